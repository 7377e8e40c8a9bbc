"""Evaluate a trained trial: ``lora-vit evaluate FOLDER --split test``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_vit.cli import add_trial, completed_trial, main
from lora_vit.config import TrialConfig
from lora_vit.errors import ConfigError

if TYPE_CHECKING:
    from lora_vit.records import TrialRecord
    from lora_vit.training.pack import Pack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_trial(parser)
    parser.add_argument("--data-root", help="where the data set is, if not where it was trained from")
    parser.add_argument("--split", default="test", help="val, test, train or official_val")


def run(args: argparse.Namespace) -> int:
    """Print the trial's accuracy on a split and what its record says; exit code 1 where they differ."""
    record, config = completed_trial(args, args.data_root)
    pack = trained_pack(args.folder, record, config)
    if args.split not in pack.setup.data.splits:
        raise ConfigError(f"--split {args.split} does not exist here (one of: {', '.join(pack.setup.data.splits)})")
    predictions = pack.predict(args.split)[0]
    print(f"{args.split.capitalize()} Accuracy: {predictions.accuracy:.2%}  ({len(predictions.labels):,} images)")
    recorded = record.metrics.get(f"{args.split}_accuracy", predictions.accuracy)
    if recorded != predictions.accuracy:
        print(f"the record says {recorded:.4%}: other hardware or versions")
    return int(recorded != predictions.accuracy)


def trained_pack(folder: Path, record: TrialRecord, config: TrialConfig) -> Pack:
    """The trial as the trainer had it when it recorded its figures: a pack of one. Raises ConfigError as ``bind``."""
    from lora_vit.build import build_setup
    from lora_vit.distributed import Process
    from lora_vit.lora.adapter import bind, read_adapter
    from lora_vit.training.checkpoint import TrialState
    from lora_vit.training.pack import Pack
    from lora_vit.training.trial import TrialRun

    adapter = read_adapter(folder)
    setup = build_setup(config, Process())
    bind(adapter, setup.base, setup.data.class_names, setup.data.card())
    return Pack([TrialRun(config, record, TrialState(values=adapter.tensors))], setup)


if __name__ == "__main__":
    main("evaluate")
