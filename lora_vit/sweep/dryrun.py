"""The plan of a sweep: its packs, and what time and memory they are expected to take. Trains and writes nothing."""

from __future__ import annotations

from typing import Any

import torch

from lora_vit.distributed import Process
from lora_vit.records import State
from lora_vit.stopping import StopRequest
from lora_vit.sweep.measure import PackSizes, choose_pack_size, measure
from lora_vit.sweep.plan import Group, Job, SweepRun, make_groups
from lora_vit.sweep.processes import threads_each
from lora_vit.sweep.setups import Setups
from lora_vit.terminal import make_console, print_table


def print_plan(run: SweepRun, states: dict[str, State]) -> None:
    """Print what ``sweep.dry_run=false`` would train; a few steps of each kind of pack are timed.

    Args:
        run: of the open trials.
        states: of all trials.
    """
    torch.set_num_threads(threads_each(run.workers))  # as each worker will have
    sizes = PackSizes(run, Setups(Process()), StopRequest(), _ignore)
    rows, seconds_in_all = [], 0.0
    for group in make_groups(run.jobs):
        size, seconds, memory = _expected(sizes, group)
        share = -(-len(group.jobs) // run.workers)
        size = max(1, min(size, share))
        epochs = sum(_epochs_left(job, states[job.trial_id]) for job in group.jobs)
        seconds_in_all += seconds * epochs
        packs = -(-len(group.jobs) // size)
        held = f"{memory / 2**20:,.0f} MB" if memory else "-"
        rows.append((group.title, str(len(group.jobs)), f"{packs} of up to {size}", held, _duration(seconds * epochs)))
    console = make_console()
    console.print(f"plan of {run.folder}: {len(states)} trials, {len(states) - len(run.jobs)} of them finished")
    header = ("trials that share a backbone", "trials", "packs", "memory of a pack", "time")
    print_table(console, "", header, rows)
    processes = f" in {run.workers} processes" if run.workers > 1 else ""
    console.print(f"about {_duration(seconds_in_all / run.workers)}{processes}, measured on a few steps")


def _expected(sizes: PackSizes, group: Group) -> tuple[int, float, int]:
    """Pack size, seconds of one epoch of one trial, and bytes of a pack."""
    setup, wanted = sizes.setups.of(group.jobs[0]), sizes.run.options.pack_size
    configs = [job.config for job in group.jobs]
    if group.alone or wanted != "auto":
        size = 1 if group.alone else min(int(wanted), len(configs))
        seconds, memory = measure(configs[:size], setup, sizes.stop)
        return size, seconds, memory
    figures: dict[str, Any] | None = sizes.known(group, len(configs))
    if figures is None:
        size, measured = choose_pack_size(configs, setup, sizes.run.workers, sizes.stop)
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
