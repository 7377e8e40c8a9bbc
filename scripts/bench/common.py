"""Side-by-side timing: contenders take turns in one process, so that a noisy machine treats all alike."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_vit.build import device_name


def interleaved(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call, round by round; every round runs each contender once."""
    for _ in range(warmup):
        for call in contenders.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return seconds


def paired_ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the contender's time over the base's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def peak_memory(call: Callable[[], object]) -> float:
    """Bytes that ``call`` needs at its peak beyond what is held before it (call it twice: the first warms up)."""
    call()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    # The allocator's own events: exact, where the resident size depends on what malloc gives back.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return float(peak)


def machine() -> dict[str, Any]:
    """Device, versions and threads, for the head of a table."""
    gpu = torch.cuda.is_available()
    device = device_name(torch.device("cuda" if gpu else "cpu"))
    return {
        "device": device if gpu else f"{os.cpu_count()} x {device}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report(rows: list[dict[str, Any]], facts: dict[str, Any], out: Path | None) -> None:
    """Print a Markdown table, and write everything as JSON if asked to."""
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    if out is not None:
        out.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1))
