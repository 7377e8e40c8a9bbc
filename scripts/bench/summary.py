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

from lora_vit import api
from lora_vit.config import ids, to_dict
from lora_vit.files import write_row
from lora_vit.records import METRICS, TrialRecord, write_record

LEVELS = {
    "rank": [1, 2, 4, 8, 16, 32, 64],
    "alpha": [8.0, 16.0, 32.0, 64.0],
    "dropout": [0.0, 0.05, 0.1, 0.2, 0.3],
    "lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "weight_decay": [0.0, 0.01, 0.03, 0.1, 0.3],
}
SEEDS = 3


def make(folder: Path, records: int) -> None:
    """Write ``records`` completed trials below ``folder``."""
    rng, config = np.random.default_rng(0), api.compose(["experiment=quickstart"])
    settings = itertools.islice(itertools.product(*LEVELS.values(), range(SEEDS)), records)
    for rank, alpha, dropout, lr, decay, seed in settings:
        config.lora.rank, config.lora.alpha, config.lora.dropout = rank, alpha, dropout
        config.optimizer.lr, config.optimizer.weight_decay, config.seed = lr, decay, seed
        mean = 0.9 + 0.005 * np.log2(rank) - 0.01 * np.log10(lr / 1e-3) ** 2 - 0.02 * dropout
        accuracy = float(np.round(np.clip(mean + rng.normal(0, 0.004), 0, 1) * 720) / 720)
        adapter = rank * 27_648
        trial_id, cell_id = ids(config)
        place = folder / trial_id
        place.mkdir()
        write_record(place, TrialRecord(
            trial_id=trial_id, cell_id=cell_id, status="completed", config=to_dict(config),
            metrics={"epoch": 20, "step": 100, "train_loss": 0.1, "val_loss": 1 - accuracy, "val_accuracy": accuracy,
                     "test_loss": 0.3, "test_accuracy": accuracy},
            parameters={"trainable": adapter + 1290, "adapter": adapter, "head": 1290, "total": 1_200_000},
            cost={"seconds": 4 + rank / 16, "images_per_second": 900.0, "peak_memory_bytes": 2e8, "pack_size": 8,
                  "adapter_bytes": 4 * adapter},
            environment={"versions": {"torch": "2.11.0"}, "commit": "0123abc", "dirty": False, "host": "box",
                         "device": "cpu", "precision": "fp32", "world_size": 1},
            data={"fingerprint": "f00d", "classes": 10, "train": 100, "val": 720, "test": 720},
        ))  # fmt: skip
        with (place / METRICS).open("ab") as file:
            for epoch in range(1, 21):
                write_row(file, {"kind": "epoch", "epoch": epoch, "step": 5 * epoch, "train_loss": 0.1, "val_loss": 0.2,
                                 "val_accuracy": accuracy - 0.2 / epoch})  # fmt: skip


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
