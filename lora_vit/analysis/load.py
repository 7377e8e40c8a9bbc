"""Folders to a table: one row per trial, and a list of what could not be read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_vit.analysis.race import Rules
from lora_vit.config import IDENTITY, TARGETS, WITHOUT_IDENTITY, LoraConfig
from lora_vit.errors import RecordError
from lora_vit.records import PLAN, PREDICTIONS, RECORD, TrialRecord, read_predictions, read_record

OUTPUT = "summary"
"""Name of the folder that a summary is written into; never searched."""

FIGURES = ("val_accuracy", "val_loss", "train_loss", "test_accuracy", "test_loss")
COSTS = ("seconds", "images_per_second", "peak_memory_bytes", "adapter_bytes", "pack_size")
_TARGET_NAMES = {
    tuple(TARGETS): "all",
    ("q", "k", "v", "o"): "attention",
    ("fc1", "fc2"): "mlp",
}




@dataclass
class Loaded:
    """``trials``: one row per trial id (columns: see :func:`row`); ``problems``: lines for the user.

    ``races``: what the folders' ``sweep.json`` say of their race, with the sweep's ``command``.
    """

    trials: pd.DataFrame
    problems: list[str] = field(default_factory=list)
    races: list[dict[str, Any]] = field(default_factory=list)
    sweeps: int = 0


def find_records(folder: Path) -> list[Path]:
    """Folders with a record at or below ``folder``, at most two levels down, sorted."""
    found = []

    def look(path: Path, depth: int) -> None:
        if (path / RECORD).is_file():
            found.append(path)
            return
        if depth == 2:
            return
        with os.scandir(path) as entries:
            below = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".") and e.name != OUTPUT)
        for name in below:
            look(path / name, depth + 1)

    look(folder, 0)
    return found


def load_trials(folders: Iterable[str | os.PathLike[str]]) -> Loaded:
    """Read every record of the folders; of records with one trial id the newest counts.

    Raises:
        RecordError: a folder does not exist, or there is no readable record at all.
    """
    problems: list[str] = []
    rows: dict[str, dict[str, Any]] = {}
    paths: dict[Path, None] = {}
    folders = list(folders)
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            raise RecordError(f"{folder} is not a folder: give the folder of a sweep or of a run")
        try:
            paths.update((p, None) for p in find_records(folder))
        except OSError as error:
            raise RecordError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not paths:
        raise RecordError(f"no trial in {', '.join(map(str, folders))}: no {RECORD} there or up to two folders below")
    for path in paths:
        try:
            new = row(read_record(path), path, problems)
        except FileNotFoundError:
            continue  # removed since it was found
        except RecordError as error:
            problems.append(f"{error}; left out")
            continue
        old = rows.get(new["trial"])
        if old is not None:
            new, old = (new, old) if _age(new) >= _age(old) else (old, new)
            problems.append(
                f"trial {new['trial']} is there twice: {new['folder']} ({new['status']}) is newer and counts, "
                f"{old['folder']} ({old['status']}) is left out"
            )
        rows[new["trial"]] = new
    if not rows:
        raise RecordError(f"none of the {len(paths)} records can be read; the first: {problems[0]}")
    frame = pd.DataFrame(list(rows.values())).sort_values(["cell", "seed", "trial"], ignore_index=True)
    loaded = Loaded(frame, problems)
    for name in folders:
        _read_plans(Path(name), {*rows, *(p.name for p in paths)}, loaded)
    return loaded


def _read_plans(folder: Path, found: set[str], loaded: Loaded) -> None:
    """Note the races of the sweeps at or below the folder, and which trials asked for have left no record."""
    lines = loaded.problems
    inside = (folder / RECORD).is_file()  # one trial of a sweep, whose others need not be here
    for path in [folder.parent / PLAN] if inside else [folder / PLAN, *sorted(folder.glob(f"*/{PLAN}"))]:
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            planned, command = list(plan["trials"]), plan.get("command")
            loaded.sweeps += not inside
            if race := plan.get("race"):
                Rules.of(race)  # refuses what was edited
                race = {**race, "seed": int(race["seed"]), "cells": list(race["cells"])}
                loaded.races.append({"command": command, **race})
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError) as error:
            lines.append(f"{path} cannot be read ({error}): whether all trials asked for have a record is not known, "
                         "nor whether they raced")  # fmt: skip
            continue
        missing = [trial for trial in planned if trial not in found and not inside]
        if missing:
            shown = ", ".join(missing[:6]) + (" ..." if len(missing) > 6 else "")
            again = f": {command}" if command else ""
            lines.append(f"{len(missing)} of {len(planned)} trials asked for have no record ({shown}); the sweep's "
                         f"command trains what is missing{again}")  # fmt: skip


def _age(values: dict[str, Any]) -> tuple[float, str]:
    """The last sign of life; the folder's name settles ties, so that reading order never does."""
    return (max(values["started"], values["heartbeat"]), values["folder"])


def row(record: TrialRecord, folder: Path, problems: list[str]) -> dict[str, Any]:
    """One trial as a flat row.

    ``trial cell status seed``, settings by dotted name (``lora.rank``), metrics (fractions), costs, counts
    (``trainable`` ...), ``data.*`` and ``environment.*``, ``error``, ``folder``. A metric that is missing or
    impossible is NaN and named in ``problems``.

    Raises:
        RecordError: a time is none.
    """
    if math.isnan(as_float(record.started)) or math.isnan(as_float(record.heartbeat)):
        raise RecordError(f"{folder / RECORD}: 'started' or 'heartbeat' is no time")
    lora = LoraConfig(**record.config["lora"])
    values: dict[str, Any] = {
        "trial": record.trial_id,
        "cell": record.cell_id,
        "status": record.shown_status(),
        "seed": record.config["seed"],
        **_settings(record.config),
        "lora.effective_scaling": lora.effective_scaling() if lora.rank else math.nan,
        "epoch": as_float(record.metrics.get("epoch")),
    }
    for name in FIGURES:
        values[name] = _metric(name, record, folder, problems)
    values.update({name: as_float(record.cost.get(name)) for name in COSTS})
    for name in ("trainable", "adapter", "head", "total"):
        values[f"{name}_parameters"] = as_float(record.parameters.get(name))
    values["data.fingerprint"] = _fact(record.data.get("fingerprint"))
    values.update({f"data.{k}": _count(record.data.get(k)) for k in ("classes", "train", "val", "test")})
    environment = record.environment
    for k in ("commit", "dirty", "host", "device", "precision", "world_size"):
        values[f"environment.{k}"] = _fact(environment.get(k))
    versions = environment.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    values["environment.versions"] = ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))
    error = record.error or {}
    values["error"] = str(error.get("message", "")).strip().split("\n")[0]
    values["error_step"] = as_float(error.get("step"))
    values.update(started=record.started, heartbeat=record.heartbeat, folder=str(folder))
    return values


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The config by dotted names, without what does not decide the numbers; lists as readable text."""
    values: dict[str, Any] = dict.fromkeys(IDENTITY)
    for section, content in config.items():
        if not isinstance(content, dict):
            continue
        for key, value in content.items():
            name = f"{section}.{key}"
            if name in WITHOUT_IDENTITY:
                continue
            values[name] = _plain(key, value)
    if values["lora.method"] == "lora" and values["lora.blocks"] is None:
        values["lora.blocks"] = "all"
    return values


def _plain(key: str, value: Any) -> Any:
    if key == "targets" and isinstance(value, list):
        ordered = tuple(t for t in TARGETS if t in value)
        return _TARGET_NAMES.get(ordered, " ".join(ordered))
    if isinstance(value, list):
        return " ".join(f"{v}" for v in value)
    if isinstance(value, dict):
        return str(value)
    return value


def as_float(value: Any) -> float:
    """The value as a float; NaN for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        return math.nan
    return float(value)


def _count(value: Any) -> int | None:
    """The value where it is a whole number from 0 up."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _fact(value: Any) -> Any:
    """A value to be told and counted; anything but text, a flag or a number as text."""
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def _metric(name: str, record: TrialRecord, folder: Path, problems: list[str]) -> float:
    value = as_float(record.metrics.get(name))
    if name.endswith("accuracy") and not (math.isnan(value) or 0 <= value <= 1):
        problems.append(f"{folder / RECORD}: {name} = {value} is not a fraction in [0, 1]; taken as missing")
        return math.nan
    if record.status == "completed" and math.isnan(value) and name == "val_accuracy":
        problems.append(f"{folder / RECORD}: completed without {name}; taken as missing")
    return value


def correct(folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids and whether each was classified correctly, sorted by id, from ``predictions.npz``.

    Raises:
        RecordError: the file or the split is missing or broken.
    """
    try:
        splits = read_predictions(Path(folder))
    except RecordError as error:
        raise RecordError(str(error)) from None
    if split not in splits:
        raise RecordError(f"{Path(folder) / PREDICTIONS} has no split '{split}'")
    fields = splits[split]
    order = np.argsort(fields["ids"], kind="stable")
    return fields["ids"][order], (fields["labels"] == fields["predicted"])[order]
