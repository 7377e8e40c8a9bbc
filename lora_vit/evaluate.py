"""Evaluate a trained trial: ``lora-vit evaluate FOLDER --split test``."""

import argparse

from lora_vit.cli import add_trial, completed_trial, main
from lora_vit.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trial(parser)
    parser.add_argument("--data-root", help="where the data set is, if not where it was trained from")
    parser.add_argument("--split", default="test", help="val, test, train or official_val")


def run(args: argparse.Namespace) -> int:
    """Print the trial's accuracy on a split and what its record says; exit code 1 where they differ."""
    record, config = completed_trial(args, args.data_root)
    from lora_vit.trained import trained_pack
    from lora_vit.training.loop import computing

    try:
        pack = trained_pack(args.folder, record, config)
    except ConfigError as error:  # the setting is an option here
        raise ConfigError(str(error).replace("data.root", "--data-root")) from None
    if args.split not in pack.setup.data.splits:
        raise ConfigError(f"--split {args.split} does not exist here (one of: {', '.join(pack.setup.data.splits)})")
    with computing(pack.setup.device, config.trainer.deterministic):
        predictions = pack.predict(args.split)[0]
    print(f"{args.split.capitalize()} Accuracy: {predictions.accuracy:.2%}  ({len(predictions.labels):,} images)")
    recorded = record.metrics.get(f"{args.split}_accuracy", predictions.accuracy)
    if recorded != predictions.accuracy:
        print(f"the record says {recorded:.4%}: other hardware or versions")
    return int(recorded != predictions.accuracy)


if __name__ == "__main__":
    main("evaluate")
