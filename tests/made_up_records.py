"""Made-up sweeps on disk, written through the same functions that training uses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from plain_trials import BASELINE, composed, with_changes

from lora_vit import records
from lora_vit.analysis import load
from lora_vit.config import from_dict, ids, trial_id
from lora_vit.config.names import BASELINES
from lora_vit.files import write_row
from lora_vit.records import TrialRecord, write_record

CONFIG = composed("experiment=quickstart", "trainer.epochs=5", "trainer.precision=auto")
IMAGES = 720


def make_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The default config with ``settings`` by dotted name; a baseline's adapter settings are null."""
    baseline = BASELINE if settings.get("lora.method") in BASELINES else {}
    return with_changes(CONFIG, {**baseline, **settings})


def make_record(accuracy: float | None = 0.9, status: str = "completed", **settings: Any) -> TrialRecord:
    """One trial's record (settings: ``lora__rank=4``)."""
    config = make_config({k.replace("__", "."): v for k, v in settings.items()})
    typed = from_dict(config)
    rank = config["lora"]["rank"] or 0
    sizes = {"lora": rank * 27_648, "dora": (rank + 1) * 27_648, "none": 0, "full": 1_200_000}
    adapter = sizes[config["lora"]["method"]]
    loss = None if accuracy is None else 2.5 * (1 - accuracy)
    return TrialRecord(
        trial_id=trial_id(typed),
        cell_id=ids(typed)[1],
        status=status,
        config=config,
        metrics={
            "epoch": 5, "step": 25, "train_loss": None if loss is None else loss / 2, "val_loss": loss,
            "val_accuracy": accuracy, "test_loss": loss, "test_accuracy": None if accuracy is None else accuracy - 0.01,
        },
        best={"epoch": 4, "val_accuracy": accuracy},
        parameters={"trainable": adapter + 1290, "adapter": adapter, "head": 1290, "total": 1_200_000 + adapter},
        cost={
            "seconds": 4.0 + rank / 16, "images_per_second": 900.0 - rank, "peak_memory_bytes": 200_000_000 + adapter,
            "pack_size": 4, "adapter_bytes": 4 * adapter + 6000,
        },
        environment={
            "versions": {"torch": "2.11.0", "lora_vit": "0.1.0"}, "commit": "0123abc", "dirty": False, "host": "box",
            "device": "cpu", "precision": "fp32", "world_size": 1,
        },
        data={"fingerprint": "f00d", "classes": 10, "train": 100, "val": IMAGES, "test": IMAGES},
        started=1000.0,
        finished=1010.0,
    )  # fmt: skip


def make_trial(
    folder: Path,
    accuracy: float | None = 0.9,
    status: str = "completed",
    curve: bool = True,
    edit: Callable[[TrialRecord], None] | None = None,
    **settings: Any,
) -> TrialRecord:
    """Write :func:`make_record` into ``folder/TRIAL_ID``; ``edit`` changes the record before."""
    record = make_record(accuracy, status, **settings)
    if edit:
        edit(record)
    place = folder / record.trial_id
    place.mkdir(parents=True, exist_ok=True)
    if curve and accuracy is not None:
        with (place / records.METRICS).open("ab") as file:
            for epoch in range(1, 6):
                write_row(file, {"kind": "step", "step": 5 * epoch, "epoch": epoch - 1, "loss": 1.0})
                figure = {"val_accuracy": accuracy - 0.3 / epoch**2 + 0.3 / 25}
                write_row(file, {"kind": "epoch", "epoch": epoch, **figure})
    write_record(place, record)
    return record


def make_frame(cells: Sequence[dict[str, Any]], accuracies: np.ndarray, **more: Any) -> pd.DataFrame:
    """The trials of :func:`make_sweep` as the loader reads them, without the disk, in the order of the cells."""
    rows = [
        load.row(make_record(float(value), seed=seed, **settings, **more), Path("there"))
        for settings, values in zip(cells, accuracies, strict=True)
        for seed, value in enumerate(values)
        if np.isfinite(value)
    ]
    return pd.DataFrame(rows)


def make_sweep(
    folder: Path,
    cells: Sequence[dict[str, Any]],
    accuracies: np.ndarray,
    seeds: Sequence[int] | None = None,
    **more: Any,
) -> Path:
    """``accuracies`` [cells, seeds]; NaN: no such trial."""
    seeds = range(accuracies.shape[1]) if seeds is None else seeds
    for settings, row in zip(cells, accuracies, strict=True):
        for seed, value in zip(seeds, row, strict=True):
            if np.isfinite(value):
                make_trial(folder, float(value), seed=seed, **settings, **more)
    return folder


FIRST = 7
"""First seed of :func:`make_race`."""


def make_race(folder: Path, values: dict[int, np.ndarray], seeds: int = 6, **plan: Any) -> Path:
    """A race of ranks, of which so many of each one's accuracies are there; its margin is a point unless changed."""
    for rank, row in values.items():
        make_sweep(folder, [{"lora__rank": rank}], row[None, :seeds], range(FIRST, FIRST + seeds), curve=False)
    cells = sorted(make_record(lora__rank=rank).cell_id for rank in values)
    rules = {"margin": 1.0, "first_seeds": 3, "most_seeds": 6, "seed": FIRST, "cells": cells, **plan}
    (folder / records.PLAN).write_text(json.dumps({"trials": {}, "command": "the command", "race": rules}))
    return folder


def grid(
    rng: np.random.Generator, ranks: Sequence[int], dropouts: Sequence[float], lrs: Sequence[float], seeds: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """A realistic sweep: settings and accuracies that rise with rank and are best at lr 1e-3, with baselines."""
    cells: list[dict[str, Any]] = []
    means = []
    for rank, dropout, lr in itertools.product(ranks, dropouts, lrs):
        cells.append({"lora__rank": rank, "lora__dropout": dropout, "optimizer__lr": lr})
        means.append(0.94 + 0.006 * np.log2(rank) - 0.012 * np.log10(lr / 1e-3) ** 2 - 0.03 * dropout)
    cells += [{"lora__method": "none"}, {"lora__method": "full"}]
    means += [0.925, 0.955]
    y = np.array(means)[:, None] + rng.normal(0, 0.004, seeds) + rng.normal(0, 0.004, (len(means), seeds))
    return cells, np.clip(np.round(y * IMAGES) / IMAGES, 0, 1)
