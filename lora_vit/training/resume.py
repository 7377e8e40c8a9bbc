"""Whether a folder is new, goes on, is finished or belongs to another trial."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_vit import records
from lora_vit.config import ConfigError, TrialConfig, cell_id, to_dict, trial_id
from lora_vit.records import RecordError, TrialRecord
from lora_vit.training.checkpoint import CHECKPOINT, TrialState, load_checkpoint
from lora_vit.training.pack import Trial
from lora_vit.training.trackers import TrialFiles

OWN_FILES = (
    records.RECORD,
    records.METRICS,
    records.TIMING,
    records.LOG,
    records.PREDICTIONS,
    "adapter.safetensors",
    "adapter.json",
    CHECKPOINT,
    "tensorboard",
    ".hydra",
)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder's lock; the system drops it when the process ends, however it ends.

    Raises ConfigError where another process holds it (unless we wait for it) or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): choose another hydra.run.dir") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            raise ConfigError(f"{folder}: another process is training there, wait for it or stop it") from None
        yield
    finally:
        if os.listdir(folder) == [".lock"]:  # refused before anything was written
            os.unlink(folder / ".lock")
        os.close(handle)


def existing_record(folder: Path, config: TrialConfig) -> TrialRecord | None:
    """The folder's record if it is this trial's, None for a new folder. Changes nothing.

    Raises:
        ConfigError: the folder holds another trial, or a record that cannot be read.
    """
    try:
        record = records.read_record(folder)
    except FileNotFoundError:
        return None
    except RecordError as error:
        raise ConfigError(f"{error}; choose another hydra.run.dir, or remove that file") from None
    wanted = trial_id(config)
    if record.trial_id != wanted:
        raise ConfigError(
            f"{folder} holds trial {record.trial_id}, this is trial {wanted}: choose another hydra.run.dir "
            f"({first_difference(record.config, to_dict(config))})"
        )
    return record


def first_difference(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> str:
    """``key: theirs there, ours here`` of the first setting that differs."""
    for key in ours:
        a, b = theirs.get(key), ours[key]
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return first_difference(a, b, f"{prefix}{key}.")
        return f"{prefix}{key} is {a} there, {b} here"
    return "same settings, other files or version"


def open_trial(
    config: TrialConfig,
    folder: Path,
    record: TrialRecord | None,
    writes: bool,
    fingerprint: str,
    tensorboard: Path | None = None,
) -> Trial:
    """The trial with its state, ready to train; ``record`` is from :func:`existing_record`.

    Args:
        config: of the trial.
        folder: of the trial.
        record: None for a new folder.
        writes: whether this process writes (rank 0).
        fingerprint: of the data; a trial does not go on with other data.
        tensorboard: where event files go, if not below the folder.

    Raises:
        ConfigError: the data or the checkpoint do not fit.
    """
    if config.trainer.resume == "restart":
        if writes:
            remove_own_files(folder)
        record = None
    if record is None:
        record = TrialRecord(trial_id(config), cell_id(config), "running", to_dict(config), started=time.time())
        state = TrialState()
    else:
        there = record.data.get("fingerprint", fingerprint)
        if there != fingerprint:
            raise ConfigError(
                f"{folder} was begun with other data (fingerprint {there}, now {fingerprint}): give the same "
                "data, or train anew with trainer.resume=restart"
            )
        try:
            state = load_checkpoint(folder, record.trial_id)
        except RecordError as error:
            raise ConfigError(str(error)) from None
        record.config, record.error, record.finished = to_dict(config), None, None
        record.metrics, record.best = dict(state.last), dict(state.best)
    record.status = "running"
    files = TrialFiles(folder, record, state, tensorboard) if writes else None
    return Trial(config, record, state, files)


def remove_own_files(folder: Path) -> None:
    """Remove what a trial writes, and nothing else."""
    for name in OWN_FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
