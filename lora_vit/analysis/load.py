"""Folders to a table: one row per trial, and a list of what could not be read."""

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

    @property
    def looks(self) -> list[list[int]]:
        """Of each time that cells got more seeds: how many trials had ended, and their first and last seed."""
        return [look for plan in self.plans.values() for look in plan["looks"]]

    @property
    def command(self) -> str | None:
        """What was typed for the sweeps, a line each."""
        typed = dict.fromkeys(plan["command"] for plan in self.plans.values() if plan.get("command"))
        return "\n".join(typed) or None


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
        paths.update(dict.fromkeys(find_records(folder)))
    if not paths:
        raise RecordError(f"no trial in {', '.join(map(str, given))}: no {RECORD} there or up to two folders below")
    problems: list[str] = []
    read = []
    for path in paths:
        try:
            read.append(row(read_record(path), path))
        except RecordError as error:
            problems.append(f"{error}; left out")
    if not read:
        raise RecordError(f"none of the {len(paths)} records can be read; the first: {problems[0]}")
    common = os.path.commonpath([r["sweep"] for r in read])
    read = [{**r, "sweep": os.path.relpath(r["sweep"], common)} for r in read]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    latest = sorted(read, key=lambda r: (max(r["started"], r["heartbeat"]), r["folder"]), reverse=True)
    twice = [(new, old) for old in latest if (new := rows.setdefault((old["trial"], old["cell"]), old)) is not old]
    for new, old in twice[:1]:
        others = sum(str(one["val_accuracy"]) != str(other["val_accuracy"]) for one, other in twice)  # nan is nan
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
        command = f"python -m lora_vit.sweep work {shlex.quote(str(path.parent))}"
        loaded.problems.append(f"{len(missing)} of {len(planned)} trials of the sweep have no record; {command} trains "
                               "them")  # fmt: skip


def row(record: TrialRecord, folder: Path) -> dict[str, Any]:
    """One trial as a flat row, settings by dotted name."""
    lora, facts, error = LoraConfig(**record.config["lora"]), record.environment, record.error or {}
    versions, left_out = facts.get("versions", {}), record.data.get("left_out", {})
    return {
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
        **{f"data.{name}": record.data.get(name) for name in ("fingerprint", "classes", "train", "val", "test")},
        "data.left_out": ", ".join(f"{why}: {len(n):,} ({', '.join(n[:20])})" for why, n in left_out.items()),
        **{f"environment.{name}": facts.get(name)
           for name in ("commit", "dirty", "host", "device", "precision", "world_size")},
        "environment.versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        "error": str(error.get("message", "")).strip().split("\n")[0],
        "error_step": as_float(error.get("step")),
        "started": record.started,
        "heartbeat": record.heartbeat,
        "folder": str(folder),
    }  # fmt: skip


def as_float(value: Any) -> float:
    """The value as a float; NaN for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        return math.nan
    return float(value)
