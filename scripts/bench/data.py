"""Images per second of the cached, batched path against torchvision's ImageFolder and DataLoader.

    python scripts/bench/data.py DIR    # DIR holds tiny-imagenet-200/ or its zip

Two tasks: uint8 batches at 64 px, and normalised float batches at 224 px (flip on). Contenders take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import machine, report
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lora_vit.config import DataConfig
from lora_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, Transform
from lora_vit.data.cache import decoded
from lora_vit.data.dataset import load_data
from lora_vit.data.files import digests_of
from lora_vit.data.preprocessing import Decoding
from lora_vit.data.stream import Samples, TrainStream
from lora_vit.distributed import Process

BATCH = 64
_QUEUED = 5
"""Batches that workers have ready from before their turn; not timed."""


def config(root: Path, cache: str) -> DataConfig:
    return DataConfig(
        name="tiny_imagenet",
        root=str(root),
        batch_size=BATCH,
        augment="flip",
        randaugment_num_ops=2,
        randaugment_magnitude=9,
        color_jitter_brightness=0.4,
        color_jitter_contrast=0.4,
        color_jitter_saturation=0.4,
        color_jitter_hue=0.0,
        random_erasing_p=0.5,
        mixup_alpha=1.0,
        cutmix_alpha=1.0,
        split_seed=0,
        val_fraction=0.1,
        test_fraction=0.1,
        train_per_class=None,
        official_val=False,
        cache_size=None,
        cache_dir=cache,
        background=[255, 255, 255],
        value_range=None,
    )


def loader(folder: Path, normalised: bool, workers: int) -> Iterator[object]:
    steps = [v2.PILToTensor()]
    if normalised:
        scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        steps = [v2.Resize((224, 224), antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor(), *scale]
    data = ImageFolder(str(folder), v2.Compose(steps))
    while True:
        yield from DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def ours(samples: Samples, normalised: bool) -> Iterator[object]:
    transform = Transform(config(Path(), ""), 224, torch.device("cpu"), torch.float32)
    stream = TrainStream(samples, transform, BATCH, 0, Process())
    epoch = 0
    while True:
        for step in range(stream.steps_per_epoch):
            yield stream.batch(epoch, step) if normalised else samples.gather(stream.batch_ids(epoch, step))
        epoch += 1


def rates(contenders: dict[str, Iterator[object]], batches: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of each round; contenders take turns."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for batch in contenders.values():
        next(batch)
    for _ in range(rounds):
        for name, batch in contenders.items():
            for _ in range(_QUEUED):
                next(batch)
            start = time.perf_counter()
            for _ in range(batches):
                next(batch)
            found[name].append(batches * BATCH / (time.perf_counter() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        data = load_data(config(args.root, cache))
        samples = Samples(data, torch.device("cpu"))
        folder = next(p.parent for p in sorted(args.root.rglob("wnids.txt"))) / "train"
        names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*.JPEG"))]
        start = time.perf_counter()
        second = Path(cache) / "second"
        decoded(folder, names, digests_of(folder, names, second), second, Decoding(None))
        build = time.perf_counter() - start
        start = time.perf_counter()
        for _ in DataLoader(ImageFolder(str(folder), v2.PILToTensor()), BATCH, num_workers=torch.get_num_threads()):
            pass
        epoch = time.perf_counter() - start
        rows = []
        for task, normalised in (("uint8, 64 px", False), ("normalised, 224 px", True)):
            contenders = {"ours": ours(samples, normalised)}
            contenders |= {f"ImageFolder, {w} workers": loader(folder, normalised, w) for w in (0, 1, 2)}
            found = rates(contenders, args.batches, args.rounds)
            for name, values in found.items():
                ratio = statistics.median(np.array(found["ours"]) / np.array(values))
                rows.append(
                    {
                        "task": task,
                        "contender": name,
                        "max images/s": max(values),
                        "median images/s": statistics.median(values),
                        "ours is faster by": float(ratio),
                    }
                )
    facts = {**machine(), "images": len(names), "building the cache s": round(build, 2)}
    report(rows, {**facts, "one ImageFolder epoch, all cores s": round(epoch, 2)}, args.json)


if __name__ == "__main__":
    main()
