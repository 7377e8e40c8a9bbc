"""Evaluate a trained trial: ``lora-vit evaluate FOLDER --split test``."""

import argparse
from pathlib import Path
from typing import Any

from lora_vit.cli import add_trial, completed_trial, main
from lora_vit.errors import ConfigError
from lora_vit.metrics import METRICS
from lora_vit.records import TrialRecord


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trial(parser)
    parser.add_argument("--data-root", help="where the data set is, if not where it was trained from")
    parser.add_argument("--split", default="test", help="val, test, train or official_val")


def evaluate(folder: str | Path, split: str = "test", weights: str | None = None, data_root: str | None = None,
             device: str = "auto") -> tuple[Any, TrialRecord]:  # fmt: skip
    """A completed trial's Predictions (:mod:`lora_vit.metrics`) on a split of its data, and its record.

    ``folder``: a trial's, or a sweep: its best cell's first seed; ``weights``, ``data_root``: where those that it was
    trained on are now, if elsewhere. Raises ConfigError, RecordError.
    """
    folder, record, config = completed_trial(folder, weights, device, data_root)
    from lora_vit.trained import trained_pack
    from lora_vit.training.loop import computing

    pack = trained_pack([folder], config)
    if split not in pack.setup.data.splits:
        raise ConfigError(f"--split {split} does not exist here (one of: {', '.join(pack.setup.data.splits)})")
    with computing(pack.setup.device, config.trainer.deterministic):
        return pack.predict(split)[0], record


def run(args: argparse.Namespace) -> int:
    """Print the trial's metric and accuracy on a split and what its record says; exit code 1 where they differ."""
    try:
        predictions, record = evaluate(args.folder, args.split, args.weights, args.data_root, args.device)
    except ConfigError as error:  # the setting is an option here
        raise ConfigError(str(error).replace("data.root", "--data-root")) from None
    for name in dict.fromkeys((record.config["trainer"]["metric"], "accuracy")):
        value, title = METRICS[name].of(predictions), METRICS[name].title.title()
        print(f"{args.split.capitalize()} {title}: {value:.2%}  ({len(predictions.labels):,} images)")
        if (recorded := record.metrics.get(f"{args.split}_{name}", value)) != value:
            print(f"the record says {recorded:.4%}: other hardware or versions")
    return int(recorded != value)


if __name__ == "__main__":
    main("evaluate")
