"""The plan of a sweep: its packs, and what time and memory they are expected to take. Trains and writes nothing."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import torch

from lora_vit.build import DTYPES, choose_device, choose_precision
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.models.vit import shape_of
from lora_vit.records import State
from lora_vit.stopping import StopRequest
from lora_vit.sweep.measure import PackSizes, choose_pack_size, measure
from lora_vit.sweep.plan import Group, Job, SweepRun, make_groups
from lora_vit.sweep.processes import expected_bytes, threads_each
from lora_vit.sweep.setups import Setups
from lora_vit.terminal import make_console, print_table

ATTAINED = 0.7
"""Part of the rate of a large matrix product that training is assumed to attain; small models attain less."""
IMAGES = {"tiny_imagenet": (100_000, 200), "cifar10": (50_000, 10), "cifar100": (50_000, 100), "digits": (1_797, 10),
          "fake": (100, 4)}  # fmt: skip
"""Images that are divided into splits, and classes."""


def print_plan(run: SweepRun, states: dict[str, State]) -> None:
    """Print what ``sweep.dry_run=false`` would train, and how long that may take.

    What an earlier run measured is known; the rest is timed now with ``sweep.measure=true``, else estimated.

    Args:
        run: of the open trials.
        states: of all trials.
    """
    torch.set_num_threads(threads_each(run.workers))  # as each worker will have
    sizes = PackSizes(run, Setups(Process()), StopRequest(), lambda kind, **fields: None)
    rows, seconds_in_all, guesses = [], 0.0, 0
    for group in make_groups(run.jobs):
        size, seconds, memory, measured = _expected(sizes, group)
        guesses += not measured
        size = max(1, min(size, -(-len(group.jobs) // run.workers)))
        epochs = sum(_epochs_left(job, states[job.trial_id]) for job in group.jobs)
        seconds_in_all += seconds * epochs
        about = "" if measured else "~ "
        packs = f"{-(-len(group.jobs) // size)} of up to {size}"
        held, lasts = f"{memory / 2**20:,.0f} MB", _duration(seconds * epochs)
        rows.append((group.title, str(len(group.jobs)), packs, about + held, about + lasts))
    console = make_console()
    console.print(f"plan of {run.folder}: {len(states)} trials, {len(states) - len(run.jobs)} of them finished")
    header = ("trials that share a backbone", "trials", "packs", "memory of a pack", "time")
    print_table(console, "", header, rows)
    processes = f" in {run.workers} processes" if run.workers > 1 else ""
    how = f"estimated (~) from sizes and an assumed {ATTAINED:.0%} of this device's rate: sweep.measure=true measures"
    console.print(f"about {_duration(seconds_in_all / run.workers)}{processes}, "
                  + (how if guesses else "measured on a few steps"))  # fmt: skip


def _expected(sizes: PackSizes, group: Group) -> tuple[int, float, int, bool]:
    """Trials in a pack of the group, seconds of a trial's epoch in it, its bytes, and whether that was measured."""
    wanted, configs = sizes.run.options.pack_size, [job.config for job in group.jobs]
    fixed = 1 if group.alone else None if wanted == "auto" else min(int(wanted), len(configs))
    figures: dict[str, Any] | None = sizes.known(group, len(configs)) if fixed is None else None
    if figures is None and not sizes.run.options.measure:
        size = fixed or 1
        return size, _estimated_seconds(configs[0]), expected_bytes(configs[0], size), False
    if fixed is not None:
        return fixed, *measure(configs[:fixed], sizes.setups.of(group.jobs[0]), sizes.stop), True
    if figures is None:
        size, measured = choose_pack_size(configs, sizes.setups.of(group.jobs[0]), sizes.run.workers, sizes.stop)
        figures = {"size": size, **measured}
    size = int(figures["size"])
    return size, figures["seconds_per_trial_epoch"][str(size)], figures["memory_bytes"][str(size)], True


def _estimated_seconds(config: TrialConfig) -> float:
    """Seconds of one epoch of a trial: its multiplications at the rate that a matrix product has here."""
    m, d = shape_of(config.model), config.data
    forward = 2 * m.layers * m.tokens * m.width * (4 * m.width + 2 * m.mlp + 2 * m.tokens)
    passes = {"none": 1, "lora": 2, "full": 3}[config.lora.method]  # backward: of inputs, and of weights if trained
    images, classes = IMAGES.get(d.name) or _files(Path(d.root or "").expanduser())
    train = images * (1 - (d.val_fraction or 0) - (d.test_fraction or 0))
    if d.train_per_class is not None:
        train = min(train, d.train_per_class * classes)
    validated = images * (d.val_fraction or 0) / config.trainer.validate_every
    rate = ATTAINED * _rate(config.trainer.accelerator, config.trainer.precision)
    return forward * (passes * train + validated) / rate


def _files(root: Path) -> tuple[int, int]:
    """Images and classes of a folder of class folders, or of its ``train``."""
    classes = [p for p in ((root / "train") if (root / "train").is_dir() else root).iterdir() if p.is_dir()]
    return sum(len(os.listdir(p)) for p in classes), len(classes)


@functools.cache
def _rate(accelerator: str, precision: str) -> float:
    """Floating-point operations a second of a matrix product on the device, at the precision that is asked for."""
    device = choose_device(accelerator, Process())
    a = torch.ones(1024, 1024, device=device, dtype=DTYPES[choose_precision(precision, device)])
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds)


def _epochs_left(job: Job, state: State) -> int:
    done = 0 if state.record is None or state.status == "failed" else int(state.record.metrics.get("epoch", 0))
    return max(0, job.config.trainer.epochs - done)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
