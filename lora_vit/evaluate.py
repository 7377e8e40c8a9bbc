"""Evaluate a trained trial: ``python -m lora_vit.evaluate FOLDER --split test``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_vit.commands import add_common, completed_record, recorded_config, run_command
from lora_vit.config import ConfigError, TrialConfig

if TYPE_CHECKING:
    from lora_vit.training.evaluate import Predictions
    from lora_vit.training.pack import Pack


def evaluate_folder(folder: Path, split: str, root: str | None, device: str) -> int:
    """Print the trial's accuracy on a split and what its record says; exit code 1 where they differ."""
    record = completed_record(folder)
    config = recorded_config(record, root, device)
    predictions = predict_split(folder, config, split)
    print(f"{split.capitalize()} Accuracy: {predictions.accuracy:.2%}  ({len(predictions.labels):,} images)")
    recorded = record.metrics.get(f"{split}_accuracy")
    if recorded is not None and recorded != predictions.accuracy:
        print(f"the record says {recorded:.4%}: other hardware, versions or data")
        return 1
    return 0


def predict_split(folder: Path, config: TrialConfig, split: str) -> Predictions:
    """The trial's predictions on a split, computed anew from its adapter."""
    pack = trained_pack(folder, config)
    if split not in pack.setup.data.splits:
        raise ConfigError(f"--split {split} does not exist here (one of: {', '.join(pack.setup.data.splits)})")
    return pack.predict(split)[0]


def trained_pack(folder: Path, config: TrialConfig) -> Pack:
    """A pack of one with the folder's adapter. Raises ConfigError where the base weights are others."""
    from lora_vit.build import build_setup
    from lora_vit.distributed import Process
    from lora_vit.lora.merge import read_adapter
    from lora_vit.records import TrialRecord
    from lora_vit.training.checkpoint import TrialState
    from lora_vit.training.pack import Pack
    from lora_vit.training.trial import Trial

    adapter = read_adapter(folder)
    setup = build_setup(config, Process())
    if setup.base_weights["sha256"] != adapter.card["base"]["sha256"]:
        raise ConfigError(f"model.weights={config.model.weights} are not the weights this adapter was trained on")
    state = TrialState(values=adapter.tensors)
    record = TrialRecord(adapter.card["trial_id"], "", "completed", {})
    return Pack([Trial(config, record, state)], setup)


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(prog="python -m lora_vit.evaluate", description=__doc__)
    add_common(parser)
    parser.add_argument("--split", default="test", help="val, test, train or official_val")
    args = parser.parse_args()
    run_command(lambda: evaluate_folder(args.folder, args.split, args.data_root, args.device))


if __name__ == "__main__":
    main()
