"""What the commands on a trained trial (evaluate, predict, merge) share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from lora_vit.config import ConfigError, TrialConfig, from_dict
from lora_vit.records import RecordError, TrialRecord, read_record


def trial_folder(text: str) -> Path:
    """Argument type: an existing folder."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return path


def completed_record(folder: Path) -> TrialRecord:
    """The record of a completed trial. Raises RecordError otherwise."""
    try:
        record = read_record(folder)
    except FileNotFoundError:
        raise RecordError(f"{folder} has no record.json: give the folder of a trial") from None
    if record.status != "completed":
        raise RecordError(f"{folder}: the trial is {record.shown_status()}, not completed")
    return record


def recorded_config(record: TrialRecord, root: str | None, device: str) -> TrialConfig:
    """The trial's config, at the precision that it ran in and with another data folder where given."""
    config = from_dict(record.config)
    config.trainer.precision = str(record.environment["precision"])
    config.trainer.accelerator = device
    config.trainer.compile = False
    if root is not None:
        config.data.root = root
    return config


def add_common(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command on a trial."""
    parser.add_argument("folder", type=trial_folder, help="folder of a completed trial")
    parser.add_argument("--data-root", help="where the data set is, if not where it was trained from")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")


def run_command(action: Callable[[], int]) -> None:
    """Run; errors that a user can cause end in one line and exit code 1."""
    try:
        code = action()
    except (ConfigError, RecordError) as error:
        code = _fail(error)
    except BrokenPipeError:
        os._exit(0)
    except OSError as error:
        code = _fail(error)
    except ValueError as error:
        # DataError and AdapterError live in modules that import torch, which a bad argument must not cost
        if type(error).__name__ not in ("DataError", "AdapterError"):
            raise
        code = _fail(error)
    sys.exit(code)


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1
