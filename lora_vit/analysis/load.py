"""Folders to a table: one row per trial, and a list of what could not be read."""

import itertools
import json
import math
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lora_vit.analysis.race import Rules
from lora_vit.config import LoraConfig
from lora_vit.config.names import flat
from lora_vit.errors import RecordError
from lora_vit.metrics import LOSSES, METRICS
from lora_vit.records import PLAN, RECORD, TrialRecord, read_record

OUTPUT = "summary"  # name of the folder that a summary is written into; never searched
FIGURES = ("train_loss", *(f"{split}_{name}" for split in ("val", "test") for name in LOSSES | METRICS))
COSTS = ("seconds", "images_per_second", "peak_memory_bytes", "adapter_bytes", "pack_size")


@dataclass
class Loaded:
    trials: pd.DataFrame  # one row per trial id (columns: see row())
    problems: list[str]  # lines for the user
    plans: dict[Path, dict[str, Any]] = field(default_factory=dict)  # each sweep.json
    sweeps: int = 0  # how many were given whole


def find_records(folder: Path, depth: int = 2) -> list[Path]:
    """Folders with a record at or below ``folder``, at most ``depth`` levels down, sorted."""
    if (folder / RECORD).is_file():
        return [folder]
    inside = sorted(folder.iterdir()) if depth else []
    below = [path for path in inside if path.is_dir() and not path.name.startswith(".") and path.name != OUTPUT]
    return [found for path in below for found in find_records(path, depth - 1)]


def load_trials(folders: Iterable[str | os.PathLike[str]]) -> Loaded:
    """Read every record; of those of one trial the one that was alive last counts. Raises RecordError."""
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
    read = []
    for path in paths:
        try:
            read.append(row(read_record(path), path, problems))
        except FileNotFoundError:
            continue  # removed since it was found
        except RecordError as error:
            problems.append(f"{error}; left out")
    if not read:
        raise RecordError(f"none of the {len(paths)} records can be read; the first: {problems[0]}")
    _name_sweeps(read, problems)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    latest = sorted(read, key=lambda r: (max(r["started"], r["heartbeat"]), r["folder"]), reverse=True)
    twice = [(new, old) for old in latest if (new := rows.setdefault((old["trial"], old["cell"]), old)) is not old]
    for new, old in twice[:1]:
        others = sum(one["val_accuracy"] != other["val_accuracy"] for one, other in twice)
        problems.append(
            f"records left out for newer ones of their trials: {len(twice)} ({others} with another val accuracy), the "
            f"first is {old['folder']} ({old['status']}), for {new['folder']} ({new['status']})"
        )
    frame = pd.DataFrame(list(rows.values())).sort_values(["cell", "seed", "trial"], ignore_index=True)
    loaded = Loaded(frame, problems)
    for folder in given:
        inside = (folder / RECORD).is_file()  # one trial of a sweep, whose others need not be here
        for path in [folder.parent / PLAN] if inside else [folder / PLAN, *sorted(folder.glob(f"*/{PLAN}"))]:
            _read_plan(path, loaded, None if inside else {*frame["trial"], *(path.name for path in paths)})
    return loaded


def _name_sweeps(read: list[dict[str, Any]], problems: list[str]) -> None:
    """Name sweeps, and keep cells apart (``CELL@SWEEP``) if one has all of another's trials, with other figures."""
    common = os.path.commonpath([r["sweep"] for r in read])
    for r in read:
        r["sweep"] = os.path.relpath(r["sweep"], common)
    done = pd.DataFrame(read).query("status == 'completed'")
    figures = done.pivot_table(index="trial", columns="sweep", values="val_accuracy")
    for a, b in itertools.permutations(figures, 2):
        own = figures[figures[a].notna()]
        if own[b].notna().all() and (own[a] != own[b]).any():
            problems.append(f"all trials of {a} are in {b} too, with other figures: cells are kept apart by sweep")
            for r in read:
                r["cell"] += f"@{r['sweep']}"
            return


def _read_plan(path: Path, loaded: Loaded, found: set[str] | None) -> None:
    """Note a sweep's plan, and which of its trials have left no record (``found``: ids; None: that does not matter)."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        planned, metric = list(plan["trials"]), str(plan.get("metric", "accuracy"))
        plan.update(looks=[[int(n) for n in look] for look in plan.get("looks", [])])
        if race := plan.get("race"):
            Rules.of(race)  # refuses what was edited
            race.update(metric=metric, seed=int(race["seed"]), cells=list(race["cells"]))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError) as error:
        loaded.problems.append(f"{path} cannot be read ({error}): whether trials of the sweep lack a record is not "
                               "known, nor whether they raced")  # fmt: skip
        return
    loaded.trials.loc[loaded.trials["trial"].isin(planned), "metric"] = metric
    loaded.plans[path] = plan
    loaded.sweeps += found is not None
    if missing := [trial for trial in planned if found is not None and trial not in found]:
        shown = ", ".join(missing[:6]) + (" ..." if len(missing) > 6 else "")
        command = f"python -m lora_vit.sweep work {shlex.quote(str(path.parent))}"
        loaded.problems.append(
            f"{len(missing)} of {len(planned)} trials of the sweep have no record ({shown}); {command} trains them"
        )


def row(record: TrialRecord, folder: Path, problems: list[str]) -> dict[str, Any]:
    """One trial as a flat row, settings by dotted name; an impossible metric is NaN and in ``problems``."""
    if math.isnan(as_float(record.started)) or math.isnan(as_float(record.heartbeat)):
        raise RecordError(f"{folder / RECORD}: 'started' or 'heartbeat' is not a time")
    lora, facts, error = LoraConfig(**record.config["lora"]), record.environment, record.error or {}
    versions = facts["versions"] if isinstance(facts.get("versions"), dict) else {}
    left_out = record.data.get("left_out", {})
    counts = {name: record.data.get(name) for name in ("classes", "train", "val", "test")}
    values: dict[str, Any] = {
        "trial": record.trial_id,
        "cell": record.cell_id,
        "sweep": str(folder.absolute().parent),
        "status": record.shown_status(),
        "seed": record.config["seed"],
        "metric": record.config["trainer"]["metric"],
        **flat(record.config),
        "lora.effective_scaling": lora.effective_scaling() if lora.rank else math.nan,
        "epoch": as_float(record.metrics.get("epoch")),
        **{name: as_float(record.metrics.get(name)) for name in FIGURES},
        **{name: as_float(record.cost.get(name)) for name in COSTS},
        **{f"{name}_parameters": as_float(record.parameters.get(name))
           for name in ("trainable", "adapter", "head", "total")},
        "data.fingerprint": _fact(record.data.get("fingerprint")),
        "data.left_out": ", ".join(f"{why}: {len(n):,} ({', '.join(n[:20])})" for why, n in left_out.items()),
        **{f"data.{name}": n if type(n) is int and 0 <= n < 2**63 else None for name, n in counts.items()},
        **{f"environment.{name}": _fact(facts.get(name))
           for name in ("commit", "dirty", "host", "device", "precision", "world_size")},
        "environment.versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        "error": str(error.get("message", "")).strip().split("\n")[0],
        "error_step": as_float(error.get("step")),
        "started": record.started,
        "heartbeat": record.heartbeat,
        "folder": str(folder),
    }  # fmt: skip
    for name in (name for name in FIGURES if name.partition("_")[2] in METRICS):
        value = values[name]
        if not (math.isnan(value) or 0 <= value <= 1):
            problems.append(f"{folder / RECORD}: {name} = {value} is not a fraction in [0, 1]; taken as missing")
            values[name] = math.nan
        elif record.status == "completed" and math.isnan(value) and name == "val_accuracy":
            problems.append(f"{folder / RECORD}: completed without {name}; taken as missing")
    return values


def as_float(value: Any) -> float:
    """The value as a float; NaN for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        return math.nan
    return float(value)


def _fact(value: Any) -> Any:
    """A value to be shown and counted; anything but text, a flag or a number as text."""
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)
