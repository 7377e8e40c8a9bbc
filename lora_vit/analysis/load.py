"""Folders to a table: one row per trial, and a list of what could not be read."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

from lora_vit.analysis.race import Rules
from lora_vit.config import LoraConfig
from lora_vit.config.names import flat
from lora_vit.errors import RecordError
from lora_vit.records import PLAN, RECORD, TrialRecord, read_record

OUTPUT = "summary"
"""Name of the folder that a summary is written into; never searched."""

FIGURES = ("val_accuracy", "val_loss", "train_loss", "test_accuracy", "test_loss")
COSTS = ("seconds", "images_per_second", "peak_memory_bytes", "adapter_bytes", "pack_size")


@dataclass
class Loaded:
    """``trials``: one row per trial id (columns: see :func:`row`); ``problems``: lines for the user.

    ``races``: what the folders' ``sweep.json`` say of their race, with the sweep's ``command``. ``sweeps``: how many
    sweeps were given whole.
    """

    trials: pd.DataFrame
    problems: list[str] = field(default_factory=list)
    races: list[dict[str, Any]] = field(default_factory=list)
    sweeps: int = 0


def find_records(folder: Path, depth: int = 2) -> list[Path]:
    """Folders with a record at or below ``folder``, at most ``depth`` levels down, sorted."""
    if (folder / RECORD).is_file():
        return [folder]
    if depth == 0:
        return []
    with os.scandir(folder) as entries:
        below = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".") and e.name != OUTPUT)
    return [found for name in below for found in find_records(folder / name, depth - 1)]


def load_trials(folders: Iterable[str | os.PathLike[str]]) -> Loaded:
    """Read every record of the folders; of records with one trial id the newest counts.

    Raises:
        RecordError: a folder does not exist, or there is no readable record at all.
    """
    given = [Path(folder) for folder in folders]
    paths: dict[Path, None] = {}  # each once, in order
    for folder in given:
        if not folder.is_dir():
            raise RecordError(f"{folder} is not a folder: give the folder of a sweep or of a run")
        try:
            paths.update(dict.fromkeys(find_records(folder)))
        except OSError as error:
            raise RecordError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not paths:
        raise RecordError(f"no trial in {', '.join(map(str, given))}: no {RECORD} there or up to two folders below")
    problems: list[str] = []
    rows = _newest_rows(paths, problems)
    if not rows:
        raise RecordError(f"none of the {len(paths)} records can be read; the first: {problems[0]}")
    frame = pd.DataFrame(list(rows.values())).sort_values(["cell", "seed", "trial"], ignore_index=True)
    loaded = Loaded(frame, problems)
    for folder in given:
        _read_plans(folder, {*rows, *(path.name for path in paths)}, loaded)
    return loaded


def _newest_rows(paths: Iterable[Path], problems: list[str]) -> dict[str, dict[str, Any]]:
    """A row for each trial id, of its newest record; ``problems`` name what is left out."""
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            new = row(read_record(path), path, problems)
        except FileNotFoundError:
            continue  # removed since it was found
        except RecordError as error:
            problems.append(f"{error}; left out")
            continue
        trial, old = new["trial"], rows.get(new["trial"])
        if old is not None:
            new, old = (new, old) if _age(new) >= _age(old) else (old, new)
            problems.append(
                f"trial {trial} is there twice: {new['folder']} ({new['status']}) is newer and counts, "
                f"{old['folder']} ({old['status']}) is left out"
            )
        rows[trial] = new
    return rows


def _age(values: dict[str, Any]) -> tuple[float, str]:
    """The last sign of life; the folder's name settles ties, so that reading order never does."""
    return (max(values["started"], values["heartbeat"]), values["folder"])


def _read_plans(folder: Path, found: set[str], loaded: Loaded) -> None:
    """Note the races of the sweeps at or below the folder, and which of their trials have left no record."""
    inside = (folder / RECORD).is_file()  # one trial of a sweep, whose others need not be here
    for path in [folder.parent / PLAN] if inside else [folder / PLAN, *sorted(folder.glob(f"*/{PLAN}"))]:
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            planned = list(plan["trials"])
            if race := plan.get("race"):
                Rules.of(race)  # refuses what was edited
                race = {"command": plan.get("command"), **race}
                race.update(seed=int(race["seed"]), cells=list(race["cells"]))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError) as error:
            loaded.problems.append(f"{path} cannot be read ({error}): whether trials of the sweep lack a record is not "
                                   "known, nor whether they raced")  # fmt: skip
            continue
        loaded.sweeps += not inside
        loaded.races += [race] if race else []
        missing = [trial for trial in planned if trial not in found and not inside]
        if missing:
            shown = ", ".join(missing[:6]) + (" ..." if len(missing) > 6 else "")
            loaded.problems.append(f"{len(missing)} of {len(planned)} trials of the sweep have no record ({shown}); "
                                   f"python -m lora_vit.sweep work {shlex.quote(str(path.parent))} trains "
                                   "them")  # fmt: skip


def row(record: TrialRecord, folder: Path, problems: list[str]) -> dict[str, Any]:
    """One trial as a flat row.

    ``trial cell status seed``, settings by dotted name (``lora.rank``), metrics (fractions), costs, counts
    (``trainable`` ...), ``data.*`` and ``environment.*``, ``error``, ``folder``. A metric that is missing or
    impossible is NaN and named in ``problems``.

    Raises:
        RecordError: a time is none.
    """
    if math.isnan(as_float(record.started)) or math.isnan(as_float(record.heartbeat)):
        raise RecordError(f"{folder / RECORD}: 'started' or 'heartbeat' is not a time")
    lora = LoraConfig(**{f.name: record.config["lora"].get(f.name) for f in fields(LoraConfig)})
    values: dict[str, Any] = {
        "trial": record.trial_id,
        "cell": record.cell_id,
        "status": record.shown_status(),
        "seed": record.config["seed"],
        **flat(record.config),
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
    for name in ("commit", "dirty", "host", "device", "precision", "world_size"):
        values[f"environment.{name}"] = _fact(record.environment.get(name))
    versions = record.environment.get("versions")
    named = sorted(versions.items()) if isinstance(versions, dict) else []
    values["environment.versions"] = ", ".join(f"{k} {v}" for k, v in named)
    error = record.error or {}
    values["error"] = str(error.get("message", "")).strip().split("\n")[0]
    values["error_step"] = as_float(error.get("step"))
    values.update(started=record.started, heartbeat=record.heartbeat, folder=str(folder))
    return values


def as_float(value: Any) -> float:
    """The value as a float; NaN for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        return math.nan
    return float(value)


def _count(value: Any) -> int | None:
    """The value where it is a whole number from 0 up."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _fact(value: Any) -> Any:
    """A value to be shown and counted; anything but text, a flag or a number as text."""
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def _metric(name: str, record: TrialRecord, folder: Path, problems: list[str]) -> float:
    value = as_float(record.metrics.get(name))
    if name.endswith("accuracy") and not (math.isnan(value) or 0 <= value <= 1):
        problems.append(f"{folder / RECORD}: {name} = {value} is not a fraction in [0, 1]; taken as missing")
        return math.nan
    if record.status == "completed" and math.isnan(value) and name == "val_accuracy":
        problems.append(f"{folder / RECORD}: completed without {name}; taken as missing")
    return value
