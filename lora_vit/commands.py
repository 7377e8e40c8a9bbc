"""What the commands on a trained trial (evaluate, predict, merge) share."""

from __future__ import annotations

import argparse
import errno
import os
import tempfile
from pathlib import Path

from lora_vit.config import TrialConfig, from_dict, is_weights_file
from lora_vit.errors import RecordError
from lora_vit.files import user_path
from lora_vit.records import TrialRecord, read_record


def completed_record(folder: Path) -> TrialRecord:
    """The record of a completed trial. Raises RecordError otherwise."""
    try:
        record = read_record(folder)
    except FileNotFoundError:
        raise RecordError(f"{folder} has no record.json: give the folder of a trial") from None
    if record.status != "completed":
        raise RecordError(f"{folder}: the trial is {record.shown_status()}, not completed")
    return record


def recorded_config(record: TrialRecord, device: str, weights: str | None, root: str | None = None) -> TrialConfig:
    """The trial's config at the precision that it ran in, with weights and data where they are now.

    Raises:
        RecordError: the weights' file is not there, or ``root`` is given for data that lie in the package.
    """
    config = from_dict(record.config)
    if (precision := record.environment.get("precision")) not in ("fp32", "bf16", "fp64"):
        raise RecordError(f"record.json was edited: its environment.precision is {precision}")
    if root is not None and config.data.root is None:
        raise RecordError(f"--data-root has no effect: data={config.data.name} comes in a package, leave it out")
    config.trainer.precision = str(precision)
    config.trainer.accelerator = device
    config.trainer.compile = False
    config.data.root = config.data.root if root is None else root
    config.model.weights = config.model.weights if weights is None else weights
    config.data.content = config.model.weights_sha256 = None  # the adapter's binding compares, and says what differs
    if is_weights_file(config.model.weights) and not user_path(str(config.model.weights)).exists():
        raise RecordError(f"{config.model.weights} is not there: say with --weights where the trial's weights are now")
    return config


def trial_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """With the arguments of every command on a trial."""
    parser = argparse.ArgumentParser(prog=f"python -m lora_vit.{command}", description=description)
    parser.add_argument("folder", type=Path, help="folder of a completed trial")
    parser.add_argument("--weights", metavar="FILE", help="where the base's weights are, if not where they were")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    return parser


def check_out(path: Path, option: str, suffix: str) -> None:
    """Raise RecordError, before any work, where a result cannot be written or would replace another kind of file."""
    if path.suffix != suffix:
        raise RecordError(f"{option} {path}: give a file name that ends in {suffix}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RecordError(f"{option} {path} cannot be written ({error.strerror}): give another file") from None
