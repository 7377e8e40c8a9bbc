"""Train trials of a finished sweep again, each alone, and print how far they are from the sweep's.

    python scripts/pack_equals_alone.py outputs/sweeps/NAME [--trials 3]

In fp64 (a sweep with trainer.precision=fp64) the differences are around 1e-12. In fp32 another order of additions
is amplified by training: predictions may differ for a few images whose two highest logits all but tie (the widest gap
among them is shown). The exit code is 1 where a difference is larger than that allows.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from lora_vit import run
from lora_vit.config import TrialConfig, from_dict
from lora_vit.files import read_rows
from lora_vit.records import PREDICTIONS, TrialRecord, read_record
from lora_vit.sweep.plan import trial_folders
from lora_vit.trained import trained_pack

FP64_LOSS, FP32_FIRST_LOSS, FP32_PREDICTIONS, FP32_GAP = 1e-9, 1e-6, 0.002, 1e-3
"""Largest relative differences allowed; in fp32 the largest part of predictions that may differ, and how far apart the
two highest logits of such an image may be."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of a sweep")
    parser.add_argument("--trials", type=int, default=3, help="how many of its packed trials to repeat (default 3)")
    args = parser.parse_args()
    packed = [p for p in trial_folders(args.sweep) if is_packed(read_record(p))]
    if not packed:
        print(f"error: {args.sweep} has no completed trial that trained in a pack", file=sys.stderr)
        return 1
    chosen = packed[:: max(1, len(packed) // args.trials)][: args.trials]
    header = ("trial", "pack", "first loss", "last loss", "adapter", "probabilities", "predictions", "gap", "")
    table = Table(*header, title="largest differences", box=None)
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        for folder in chosen:
            record = read_record(folder)
            config = from_dict(record.config)
            config = dataclasses.replace(
                config, trainer=dataclasses.replace(config.trainer, devices="1", resume="auto")
            )
            alone = Path(scratch) / folder.name
            alone.mkdir()
            run.train(config, alone, {})
            row, fine = compare(folder, alone, record, config)
            table.add_row(folder.name, str(record.cost["pack_size"]), *row, "within" if fine else "TOO FAR")
            good &= fine
    Console(width=120).print(table)
    return 0 if good else 1


def is_packed(record: TrialRecord) -> bool:
    """Whether the trial is completed and shared its training with others."""
    return record.status == "completed" and record.cost["pack_size"] > 1


def compare(packed: Path, alone: Path, record: TrialRecord, config: TrialConfig) -> tuple[list[str], bool]:
    """The cells of a row, and whether the differences are within what is allowed."""
    ours, theirs = ([r["loss"] for r in read_rows(p / "metrics.jsonl") if r["kind"] == "step"] for p in (packed, alone))
    losses = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    a, b = (load_file(p / "adapter.safetensors") for p in (packed, alone))
    adapter = max(float(np.linalg.norm(a[n] - b[n]) / max(np.linalg.norm(b[n]), 1e-30)) for n in b)
    p, q = np.load(packed / PREDICTIONS), np.load(alone / PREDICTIONS)
    splits = dict.fromkeys(name.partition(".")[0] for name in q.files)
    differ = {s: p[f"{s}.predicted"] != q[f"{s}.predicted"] for s in splits}
    share = float(np.mean(np.concatenate(list(differ.values()))))
    moved = [np.abs(p[f"{s}.true_probability"] - q[f"{s}.true_probability"]).max() for s in splits]
    gap = max((float(gaps(alone, config, s)[where].max()) for s, where in differ.items() if where.any()), default=0.0)
    if record.environment["precision"] == "fp64":
        fine = max(losses) <= FP64_LOSS and share == 0
    else:
        fine = losses[0] <= FP32_FIRST_LOSS and share <= FP32_PREDICTIONS and gap <= FP32_GAP
    figures = (losses[0], losses[-1], adapter, float(max(moved)))
    return [*(f"{x:.1e}" for x in figures), f"{share:.2%}", f"{gap:.1e}"], fine


def gaps(folder: Path, config: TrialConfig, split: str) -> np.ndarray:
    """How far apart a trial's two highest logits are for each image of a split, [N]."""
    pack = trained_pack([folder], config)
    samples, transform, ids = pack.setup.samples, pack.setup.transform, pack.setup.data.splits[split]
    parts = np.array_split(ids, -(-len(ids) // pack.setup.most_evaluated))
    with torch.no_grad():
        logits = [pack.model.eval()(transform.eval(samples.gather(part)[0]), [0])[0] for part in parts]
    top = torch.cat(logits).topk(2).values
    return (top[:, 0] - top[:, 1]).cpu().numpy()


if __name__ == "__main__":
    sys.exit(main())
