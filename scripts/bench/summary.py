"""How long and how much memory a summary takes, from 100 to 10,000 records.

    python scripts/bench/summary.py [--records 100 1000 10000]

Writes made-up sweeps (five varying settings, three seeds, learning curves) into a temporary folder and summarizes
each with ``python -m lora_vit.summarize`` in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lora_vit.files import JsonLines, write_json
from lora_vit.records import METRICS, RECORD, TrialRecord

LEVELS = {
    "rank": [1, 2, 4, 8, 16, 32, 64],
    "alpha": [8.0, 16.0, 32.0, 64.0],
    "dropout": [0.0, 0.05, 0.1, 0.2, 0.3],
    "lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "weight_decay": [0.0, 0.01, 0.03, 0.1, 0.3],
}
SEEDS = 3


def config(values: tuple[float, ...], seed: int) -> dict[str, object]:
    """A whole config, as a record holds it."""
    rank, alpha, dropout, lr, decay = values
    return {
        "model": {"name": "vit_tiny", "weights": "GLYPHS_V1", "image_size": 32, "patch_size": 8, "num_layers": 6,
                  "num_heads": 4, "hidden_dim": 128, "mlp_dim": 512, "head_dropout": 0.1, "weights_sha256": None,
                  "library": "torchvision", "mean": None, "std": None, "interpolation": None},
        "data": {"name": "digits", "root": None, "batch_size": 20, "augment": "none", "split_seed": 0, "val_fraction": 0.4,
                 "test_fraction": 0.4, "train_per_class": 10, "official_val": False, "cache_size": None,
                 "cache_dir": "", "content": None},
        "optimizer": {"lr": lr, "weight_decay": decay, "betas": [0.9, 0.999], "eps": 1e-8, "decay_bias_and_norm": True,
                      "schedule": "linear", "warmup": 0.0, "clip_norm": None, "label_smoothing": 0.0},
        "lora": {"method": "lora", "rank": rank, "alpha": alpha, "dropout": dropout, "targets": ["q", "v"], "blocks": None,
                 "scaling": "standard", "init": "kaiming_uniform", "bias": "none"},
        "trainer": {"epochs": 20, "precision": "auto", "accelerator": "auto", "devices": "auto", "compile": False,
                    "resume": "auto", "checkpoint_every": 300.0, "log_every": 20, "validate_every": 1},
        "seed": seed,
    }  # fmt: skip


def make(folder: Path, records: int) -> None:
    """Write ``records`` completed trials below ``folder``."""
    rng = np.random.default_rng(0)
    cells = itertools.islice(itertools.product(*LEVELS.values()), -(-records // SEEDS))
    for k, (values, seed) in enumerate(itertools.islice(itertools.product(cells, range(SEEDS)), records)):
        rank, _, dropout, lr, _ = values
        mean = 0.9 + 0.005 * np.log2(rank) - 0.01 * np.log10(lr / 1e-3) ** 2 - 0.02 * dropout
        accuracy = float(np.round(np.clip(mean + rng.normal(0, 0.004), 0, 1) * 720) / 720)
        place = folder / f"{k:010x}"
        place.mkdir()
        record = TrialRecord(
            trial_id=place.name, cell_id=f"{k // SEEDS:010x}", status="completed", config=config(values, seed),
            metrics={"epoch": 20, "step": 100, "train_loss": 0.1, "val_loss": 1 - accuracy, "val_accuracy": accuracy,
                     "test_loss": 0.3, "test_accuracy": accuracy},
            parameters={"trainable": int(rank * 27_648), "adapter": int(rank * 27_648), "head": 1290, "total": 1_200_000},
            cost={"seconds": 4 + rank / 16, "images_per_second": 900.0, "peak_memory_bytes": 2e8, "pack_size": 8,
                  "adapter_bytes": rank * 110_592},
            environment={"versions": {"torch": "2.11.0"}, "commit": "0123abc", "dirty": False, "host": "box",
                         "device": "cpu", "precision": "fp32", "world_size": 1},
            data={"fingerprint": "f00d", "classes": 10, "train": 100, "val": 720, "test": 720},
        )  # fmt: skip
        values_json = {name: getattr(record, name) for name in record.__dataclass_fields__}
        write_json(place / RECORD, values_json)
        rows = JsonLines(place / METRICS)
        for epoch in range(1, 21):
            rows.write({"kind": "epoch", "epoch": epoch, "step": 5 * epoch, "train_loss": 0.1, "val_loss": 0.2,
                        "val_accuracy": accuracy - 0.2 / epoch})  # fmt: skip
        rows.close()


def measure(folder: Path) -> tuple[float, float]:
    """Seconds and peak resident MiB of one summary."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_vit.summarize", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"the summary failed: {process.stderr.read().decode() if process.stderr else ''}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, nargs="+", default=[100, 1000, 3000, 10_000])
    args = parser.parse_args()
    print("| records | cells | seconds | peak MiB |\n|---:|---:|---:|---:|")
    for records in args.records:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), records)
            seconds, memory = measure(Path(folder))
        print(f"| {records:,} | {-(-records // SEEDS):,} | {seconds:.1f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
