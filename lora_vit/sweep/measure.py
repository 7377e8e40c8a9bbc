"""How many trials to train together: a few steps in packs of 1, 2, 4 ... and the fastest that fits."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_vit.config import TrialConfig, cell_id, to_dict, trial_id
from lora_vit.records import TrialRecord
from lora_vit.training.checkpoint import TrialState
from lora_vit.training.pack import EVAL_BATCH, Pack, Setup, Trial

LARGEST = 64
MEMORY_SHARE = 0.8
"""Part of the free memory that a pack may be expected to take."""
GAIN = 0.03
"""A larger pack must be faster by this part to be preferred."""


def choose_pack_size(configs: Sequence[TrialConfig], setup: Setup) -> tuple[int, dict[str, Any]]:
    """The fastest size that fits, and the figures behind it.

    Sizes double until one is slower than the best by a tenth, the trials or the memory run out.
    """
    seconds: dict[int, float] = {}
    memory: dict[int, int] = {}
    size = 1
    while size <= min(len(configs), LARGEST):
        needed = _extrapolated(memory, size)
        if needed is not None and needed > MEMORY_SHARE * free_memory(setup.device):
            break
        try:
            seconds[size], memory[size] = measure(configs[:size], setup)
        except (MemoryError, RuntimeError) as error:
            if size == 1 or "memory" not in str(error).lower() + type(error).__name__.lower():
                raise
            break
        if seconds[size] > 1.1 * min(seconds.values()):
            break
        size *= 2
    best = 1
    for size in sorted(seconds):
        if seconds[size] < (1 - GAIN) * seconds[best]:
            best = size
    return best, {
        "seconds_per_trial_epoch": {str(k): round(v, 5) for k, v in seconds.items()},
        "memory_bytes": {str(k): v for k, v in memory.items()},
    }


def measure(configs: Sequence[TrialConfig], setup: Setup) -> tuple[float, int]:
    """Seconds that one epoch of one trial takes in a pack of these, and the bytes that the pack takes."""
    before = _begin_memory(setup.device)
    pack = Pack([_fresh(c) for c in configs], setup)
    rates = pack.learning_rates()
    steps = min(len(rates), 12)
    times = []
    for i in range(steps):
        times.append(_timed(setup, lambda i=i: pack.step(rates[i], False)))  # type: ignore[misc]
        if i >= 1 and sum(times) > 2.0:
            break
    evaluation = _evaluation_seconds(pack)
    taken = _taken_memory(setup.device, before)
    step = sorted(times)[len(times) // 2] if len(times) > 2 else min(times)
    del pack
    gc.collect()
    return (step * len(rates) + evaluation) / len(configs), taken


def _fresh(config: TrialConfig) -> Trial:
    record = TrialRecord(trial_id(config), cell_id(config), "running", to_dict(config))
    return Trial(config, record, TrialState())


def _timed(setup: Setup, action: Any) -> float:
    began = time.perf_counter()
    action()
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)
    return time.perf_counter() - began


@torch.inference_mode()
def _evaluation_seconds(pack: Pack) -> float:
    """Seconds that one pass over the val split takes, from its first batches."""
    setup = pack.setup
    batch = max(1, EVAL_BATCH // pack.K)
    total = -(-len(setup.data.splits["val"]) // batch)
    pack.model.eval()
    times = []
    for batch_, _ in zip(setup.eval_stream("val", batch), range(3), strict=False):
        times.append(_timed(setup, lambda b=batch_: pack.model(b.images, [0] * pack.K)))  # type: ignore[misc]
    pack.model.train()
    return min(times) * total if times else 0.0


def _begin_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _taken_memory(device: torch.device, before: int) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def _extrapolated(memory: dict[int, int], size: int) -> int | None:
    """Bytes that a pack of this size will take, at most in proportion to the last one."""
    return 2 * max(memory.values()) if memory and size > 1 else None


def free_memory(device: torch.device) -> int:
    """Bytes that can be had: on the GPU, or of the host within its container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass  # no such files: no limit that we know of
    return free
