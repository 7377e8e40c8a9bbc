"""What a trial leaves on disk for others to read: the interface between training and all that compares trials."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lora_vit.config import IDENTITY, SCHEMA_VERSION, TrialConfig, from_dict, ids, to_dict, trial_id
from lora_vit.errors import ConfigError, RecordError
from lora_vit.files import write_json

RECORD, METRICS, TIMING, PREDICTIONS = "record.json", "metrics.jsonl", "timing.jsonl", "predictions.npz"
LOG, CHECKPOINT = "train.log", "checkpoint.pt"
PLAN, SEARCH = "sweep.json", "search.db"  # of a sweep: what it was asked for; of a search: what Optuna knows
NO_TEST = "no test part: nothing is tested"
NO_FIGURE = "has no val_{}: remove it, then the same command trains it again"  # a completed trial's, edited or old


@dataclass
class TrialRecord:
    """One trial's ``record.json``. Times are seconds since 1970, accuracies fractions."""

    trial_id: str  # 10 hex digits
    cell_id: str  # the same without the seed; trials of one cell are repeats
    status: str  # running, completed, failed, stopped or interrupted
    config: dict[str, Any]  # the typed config as nested dictionaries (config["lora"]["rank"])
    # of the last epoch: epoch (finished ones), step, train_loss, figures of val (val_loss ...); at the end of test
    metrics: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)  # epoch and val metric of the best, for information
    parameters: dict[str, int] = field(default_factory=dict)  # counts: trainable, adapter, head, total
    # seconds, images_per_second, peak_memory_bytes, pack_size, adapter_bytes
    cost: dict[str, Any] = field(default_factory=dict)
    # versions, commit, dirty, host, device, threads, resolved precision, world size, command
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # fingerprint, classes, samples of each split, names left_out
    untracked: dict[str, str] = field(default_factory=dict)  # trackers that have failed, by name, and how
    started: float = 0.0
    heartbeat: float = 0.0  # the last sign of life (later ones are the file's time while it runs)
    finished: float | None = None
    error: dict[str, Any] | None = None  # message, traceback and, where known, step
    schema: int = SCHEMA_VERSION

    def shown_status(self) -> str:
        """The status, where a running trial without a heartbeat for five minutes counts as interrupted."""
        silent = time.time() - self.heartbeat > 300.0
        return "interrupted" if self.status == "running" and silent else self.status


# The names of the types that JSON may give for each field; a float may be written as a whole number.
_KINDS = {
    f.name: re.sub(r"\[.*?\]", "", str(f.type)).replace("None", "NoneType").replace("float", "float | int").split(" | ")
    for f in dataclasses.fields(TrialRecord)
}


def write_record(folder: Path, record: TrialRecord) -> None:
    """Replace the folder's ``record.json``; the heartbeat is set to now."""
    record.heartbeat = time.time()
    write_json(folder / RECORD, dataclasses.asdict(record))


def read_record(folder: Path) -> TrialRecord:
    """Read the folder's ``record.json``; a field with a default may be missing, as in those of earlier versions.

    Raises FileNotFoundError where there is none, and RecordError where it is cut off, of another schema version, or
    edited: its config is not that of its trial id.
    """
    path = folder / RECORD
    try:
        alive, values = path.stat().st_mtime, json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{path} is not complete JSON ({error})") from None
    if not isinstance(values, dict) or "schema" not in values:
        raise RecordError(f"{path} is not a trial record")
    if (schema := values["schema"]) != SCHEMA_VERSION:
        raise RecordError(f"{path} has schema {schema}, not {SCHEMA_VERSION}: use the matching version of lora_vit")
    for f in dataclasses.fields(TrialRecord):
        if f.name not in values and f.default is f.default_factory:  # neither is given
            raise RecordError(f"{path} lacks '{f.name}'")
        if f.name in values and (kind := type(values[f.name]).__name__) not in _KINDS[f.name]:
            raise RecordError(f"{path}: '{f.name}' is a {kind}")
    record = TrialRecord(**{name: values[name] for name in _KINDS if name in values})
    if record.status not in ("running", "completed", "failed", "stopped", "interrupted"):
        raise RecordError(f"{path}: status '{record.status}' is unknown")
    if record.status == "running":
        record.heartbeat = alive
    try:
        config = from_dict(record.config)
        own = ids(config)
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        raise RecordError(f"{path} was edited: its config is incomplete ({error})") from None
    if own != (record.trial_id, record.cell_id):
        raise RecordError(f"{path} was edited: its config is that of trial {own[0]}, not of {record.trial_id}")
    record.config = to_dict(config)  # as this version has it
    return record


class State(NamedTuple):
    """Where a trial stands, as its folder says."""

    status: str  # a record's, or new, or refused where the folder cannot be used
    record: TrialRecord | None = None  # None where there is none, or none of this trial
    problem: str = ""  # why the folder cannot be used, in one line

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train here. Every trial is either *ended* or *open*."""
        return self.status in ("completed", "failed", "refused")


def state_of(folder: Path, config: TrialConfig | None = None, expected_id: str = "") -> State:
    """Where the trial in this folder stands, whatever is in the files: any trial, or that of a config or its id."""
    try:
        record = read_record(folder)
    except FileNotFoundError:
        return State("new")
    except RecordError as error:
        return State("refused", problem=f"{error}; give another folder, or remove that file")
    if config is not None:
        expected_id = expected_id or trial_id(config)
        if record.trial_id != expected_id:
            problem = f"{folder} holds trial {record.trial_id}, this is trial {expected_id}: give another folder"
            # the first setting that differs; that of the weights last: a path does not matter, its sha256 does
            for name in sorted((*IDENTITY, "seed"), key=lambda name: name == "model.weights"):
                section, _, key = name.rpartition(".")
                there, here = ((v[section] if section else v)[key] for v in (record.config, to_dict(config)))
                if there != here:
                    break
            return State("refused", problem=f"{problem} ({name} is {there} there, {here} here)")
    return State(record.shown_status(), record)
