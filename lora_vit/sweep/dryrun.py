"""The plan of a sweep: its packs, and what time and memory they are expected to take. Trains and writes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_vit.config import SweepConfig
from lora_vit.sweep.ledger import State
from lora_vit.sweep.measure import choose_pack_size, measure
from lora_vit.sweep.packed import Worker
from lora_vit.sweep.plan import Group, Job
from lora_vit.sweep.progress import make_console, print_table
from lora_vit.sweep.workers import threads_each
from lora_vit.training.loop import StopRequest


def print_plan(jobs: Sequence[Job], states: dict[str, State], folder: Path, options: SweepConfig, workers: int) -> None:
    """Print what ``sweep.dry_run=false`` would train; a few steps of each kind of pack are timed.

    Args:
        jobs: the open trials.
        states: of all trials.
        folder: of the sweep.
        options: how it runs.
        workers: processes side by side.
    """
    torch.set_num_threads(threads_each(workers))  # as each worker will have
    worker = Worker(jobs, folder, options, time.time(), _ignore, StopRequest(), workers=workers)
    rows, seconds_in_all = [], 0.0
    for group in worker.groups:
        size, seconds, memory = _expected(worker, group)
        share = -(-len(group.jobs) // workers)
        size = max(1, min(size, share))
        epochs = sum(_epochs_left(job, states[job.trial_id]) for job in group.jobs)
        seconds_in_all += seconds * epochs
        packs = -(-len(group.jobs) // size)
        held = f"{memory / 2**20:,.0f} MB" if memory else "-"
        rows.append((group.title, str(len(group.jobs)), f"{packs} of up to {size}", held, _duration(seconds * epochs)))
    console = make_console()
    console.print(f"plan of {folder}: {len(states)} trials, {len(states) - len(jobs)} of them finished")
    header = ("trials that share a backbone", "trials", "packs", "memory of a pack", "time")
    print_table(console, "", header, rows)
    processes = f" in {workers} processes" if workers > 1 else ""
    console.print(f"about {_duration(seconds_in_all / workers)}{processes}, measured on a few steps")


def _expected(worker: Worker, group: Group) -> tuple[int, float, int]:
    """Pack size, seconds of one epoch of one trial, and bytes of a pack."""
    setup = worker.setup_for(group.jobs[0])
    configs = [job.config for job in group.jobs]
    if group.alone or worker.options.pack_size != "auto":
        size = 1 if group.alone else min(int(worker.options.pack_size), len(configs))
        seconds, memory = measure(configs[:size], setup, worker.stop)
        return size, seconds, memory
    figures: dict[str, Any] | None = worker.ledger.pack_size(worker.size_key(group), len(configs))
    if figures is None:
        size, measured = choose_pack_size(configs, setup, worker.workers, worker.stop)
        figures = {"size": size, **measured}
    size = int(figures["size"])
    return size, figures["seconds_per_trial_epoch"][str(size)], figures["memory_bytes"][str(size)]


def _epochs_left(job: Job, state: State) -> int:
    done = 0 if state.record is None or state.status == "failed" else int(state.record.metrics.get("epoch", 0))
    return max(0, job.config.trainer.epochs - done)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _ignore(kind: str, **fields: object) -> None:
    """Takes events that nobody shows."""
