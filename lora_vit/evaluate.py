"""Evaluate a trained trial: ``python -m lora_vit.evaluate FOLDER --split test``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_vit.commands import completed_record, recorded_config, trial_parser
from lora_vit.config import TrialConfig
from lora_vit.errors import ConfigError, run_command


def evaluate_folder(folder: Path, split: str, root: str | None, weights: str | None, device: str) -> int:
    """Print the trial's accuracy on a split and what its record says; exit code 1 where they differ."""
    record = completed_record(folder)
    pack = trained_pack(folder, recorded_config(record, device, weights, root))
    if split not in pack.setup.data.splits:
        raise ConfigError(f"--split {split} does not exist here (one of: {', '.join(pack.setup.data.splits)})")
    predictions = pack.predict(split)[0]
    print(f"{split.capitalize()} Accuracy: {predictions.accuracy:.2%}  ({len(predictions.labels):,} images)")
    recorded = record.metrics.get(f"{split}_accuracy")
    if recorded is not None and recorded != predictions.accuracy:
        print(f"the record says {recorded:.4%}: other hardware or versions")
        return 1
    return 0


def trained_pack(folder: Path, config: TrialConfig) -> Any:
    """A :class:`~lora_vit.training.pack.Pack` of one with the folder's adapter, on the trial's own base and data.

    Raises:
        ConfigError: base or data are others.
    """
    from lora_vit.build import build_setup
    from lora_vit.distributed import Process
    from lora_vit.lora.adapter import bind, read_adapter
    from lora_vit.records import TrialRecord
    from lora_vit.training.checkpoint import TrialState
    from lora_vit.training.pack import Pack
    from lora_vit.training.trial import TrialRun

    adapter = read_adapter(folder)
    setup = build_setup(config, Process())
    bind(adapter, setup.base, setup.data.class_names, setup.data.card())
    state = TrialState(values=adapter.tensors)
    record = TrialRecord(adapter.card["trial_id"], "", "completed", {})
    return Pack([TrialRun(config, record, state)], setup)


def main() -> None:
    """Command-line entry."""
    parser = trial_parser("evaluate", __doc__)
    parser.add_argument("--data-root", help="where the data set is, if not where it was trained from")
    parser.add_argument("--split", default="test", help="val, test, train or official_val")
    args = parser.parse_args()
    run_command(lambda: evaluate_folder(args.folder, args.split, args.data_root, args.weights, args.device))


if __name__ == "__main__":
    main()
