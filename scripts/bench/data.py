"""Images per second of the cached, batched path against torchvision's ImageFolder and DataLoader.

    python scripts/bench/data.py DIR    # DIR holds tiny-imagenet-200/ or its zip
    python scripts/bench/data.py DIR --stream    # DIR holds a folder per class, of JPEGs larger than 256 px

Two tasks: uint8 batches at 64 px, and normalised float batches at 224 px (flip on). Contenders take turns.
``--stream``: images that are decoded when they are needed (``data.cache=none``), also against webdataset, which reads
the same files from one tar. Three tasks: what a GPU is sent, which is uint8 at 256 px of ours, for it crops, flips and
normalises itself, and 224 px of theirs, cropped, flipped and normalised; that from all, on the CPU; 256 px from all.
``--cpu-seconds``: images for each second of a core, of all processes together, which other work on the machine changes
less.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from common import machine, report
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lora_vit.api import compose
from lora_vit.config import DataConfig
from lora_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, Transform
from lora_vit.data.cache import decoded
from lora_vit.data.dataset import forget, load_data
from lora_vit.data.files import digests_of
from lora_vit.data.preprocessing import Decoding
from lora_vit.data.stream import Samples, TrainStream
from lora_vit.distributed import Process

BATCH = 64
_QUEUED = 5
"""Batches that workers have ready from before their turn; not timed."""


def config(root: Path, cache_dir: str, name: str = "tiny_imagenet", kept: str = "disk") -> DataConfig:
    own = {"augment": "flip", "cache_size": None} if kept == "disk" else {"augment": "crop_flip", "cache_size": 256}
    places = {"name": name, "root": str(root), "cache": kept, "cache_dir": cache_dir}
    data = compose(["data=fake"]).data
    return replace(data, **places, **own, batch_size=BATCH, val_fraction=0.1, test_fraction=0.1)


def steps(normalised: bool, streamed: bool) -> v2.Compose:
    """What the others do to a picture."""
    scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    to_224 = v2.RandomResizedCrop(224, antialias=True) if streamed else v2.Resize((224, 224), antialias=True)
    if normalised:
        return v2.Compose([to_224, v2.RandomHorizontalFlip(), v2.PILToTensor(), *scale])
    return v2.Compose([*([v2.Resize(256, antialias=True), v2.CenterCrop(256)] if streamed else []), v2.PILToTensor()])


def loader(folder: Path, normalised: bool, workers: int, streamed: bool = False) -> Iterator[object]:
    data = ImageFolder(str(folder), steps(normalised, streamed))
    while True:
        yield from DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def of_tar(tar: Path, normalised: bool, workers: int) -> Iterator[object]:
    """webdataset's batches, shuffled among 1,000."""
    import webdataset

    how = {"shardshuffle": False, "nodesplitter": None, "workersplitter": None, "empty_check": False}
    data = webdataset.WebDataset(str(tar), **how).shuffle(1000).decode("pil").to_tuple("jpg")
    data = data.map_tuple(steps(normalised, streamed=True))
    while True:
        yield from DataLoader(data, BATCH, num_workers=workers, drop_last=True)


def ours(samples: Samples, normalised: bool, augment: str = "flip") -> Iterator[object]:
    data = config(Path(), "")
    data.augment = augment
    transform = Transform(data, 224, torch.device("cpu"), torch.float32)
    stream = TrainStream(samples, transform, BATCH, 0, Process())
    if not normalised:
        transform.train = lambda images, *_: images  # type: ignore[method-assign]
    epoch = 0
    while True:
        for step in range(stream.steps_per_epoch):
            yield stream.batch(epoch, step)
        epoch += 1


def stream(root: Path, rounds: int, batches: int, clock: Callable[[], float], out: Path | None) -> None:
    """The table of ``--stream``."""
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        data = load_data(config(root, cache, "imagefolder", "none"))
        first = time.perf_counter() - start
        forget()
        start = time.perf_counter()
        data = load_data(config(root, cache, "imagefolder", "none"))
        later = time.perf_counter() - start
        samples, rows, workers = Samples(data, torch.device("cpu")), [], torch.get_num_threads()
        next(ours(samples, True, "crop_flip"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        tar = Path(cache, "all.tar")
        with tarfile.open(tar, "w") as archive:
            for i, name in enumerate(np.random.default_rng(0).permutation(np.array(data.names))[:5000]):
                archive.add(root / name, f"{i:06d}.jpg")
        mine = {normalised: ours(samples, normalised, "crop_flip") for normalised in (False, True)}
        theirs = {
            normalised: {
                f"ImageFolder, {workers} workers": loader(root, normalised, workers, streamed=True),
                f"webdataset, {workers} workers": of_tar(tar, normalised, workers),
            }
            for normalised in (False, True)
        }
        for task, own, other in (("for a GPU", 0, 1), ("224 px, on the CPU", 1, 1), ("256 px, uint8", 0, 0)):
            found = rates({"ours": mine[bool(own)], **theirs[bool(other)]}, batches, rounds, clock)
            rows += compared(task, found)
    facts = {"images": len(data.labels), "first identity s": round(first, 1), "later s": round(later, 1)}
    report(rows, {**machine(), **facts, "peak MiB with the first batch": round(peak)}, out)


def compared(task: str, found: dict[str, list[float]]) -> list[dict[str, object]]:
    """A row for each contender."""
    return [
        {
            "task": task,
            "contender": name,
            "max images/s": max(values),
            "median images/s": statistics.median(values),
            "ours is faster by": float(statistics.median(np.array(found["ours"]) / np.array(values))),
        }
        for name, values in found.items()
    ]


def cpu_seconds() -> float:
    """Those that this process and its workers have used."""
    own = psutil.Process()
    return sum(used.user + used.system for used in (p.cpu_times() for p in (own, *own.children(recursive=True))))


def rates(
    contenders: dict[str, Iterator[object]],
    batches: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Images per second of each round; contenders take turns."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for batch in contenders.values():
        next(batch)
    for _ in range(rounds):
        for name, batch in contenders.items():
            for _ in range(_QUEUED):
                next(batch)
            start = clock()
            for _ in range(batches):
                next(batch)
            found[name].append(batches * BATCH / (clock() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=15)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--cpu-seconds", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.stream:
        clock = cpu_seconds if args.cpu_seconds else time.perf_counter
        return stream(args.root, args.rounds, args.batches, clock, args.json)
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
            rows += compared(task, found)
    facts = {**machine(), "images": len(names), "building the cache s": round(build, 2)}
    report(rows, {**facts, "one ImageFolder epoch, all cores s": round(epoch, 2)}, args.json)


if __name__ == "__main__":
    main()
