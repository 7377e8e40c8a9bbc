"""Classify images with a trained trial: ``lora-vit predict FOLDER IMAGE...``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_vit.cli import add_trial, check_out, completed_trial, main
from lora_vit.errors import ConfigError
from lora_vit.files import shown, user_path, write_csv

BATCH = 64  # images that are classified together; more than these get a bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trial(parser)
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders with images at any depth")
    parser.add_argument("--top", type=int, help="how many classes to show and write (default: show five, write one)")
    parser.add_argument("--csv", type=Path, help="also write a row for each image to this file")


def predict(folder: str | Path, images: Sequence[str | Path], top: int | None = None, weights: str | None = None,
            device: str = "auto") -> tuple[list[tuple[str, int, str, float]], list[str]]:  # fmt: skip
    """Image, rank, class and probability of the ``top`` classes (default: 5) of each image; why some cannot be read.

    ``images``: files, or folders with images at any depth. The rest as of :func:`.evaluate.evaluate`.
    """
    folder, _, config = completed_trial(folder, weights, device)
    import torch

    from lora_vit.data.files import Listing
    from lora_vit.terminal import Progress
    from lora_vit.trained import TrainedModel

    files, listing = [], Listing(user_path(config.data.cache_dir))
    for path in map(Path, images):
        files += [path / name for name in listing.images(path, "")] if path.is_dir() else [path]
    if listing.passed:
        print(f"passed over: {', '.join(listing.lines())}", file=sys.stderr)
    if not files:
        raise ConfigError(f"no image below {', '.join(map(_printable, map(str, images)))}: give image files")
    trained = TrainedModel(folder, config.model, device)
    if top is not None and not 1 <= top <= len(trained.class_names):
        raise ConfigError(f"--top {top} is impossible: give a number from 1 to {len(trained.class_names)}")
    rows: list[tuple[str, int, str, float]] = []
    unreadable = []
    with Progress("predicting", len(files), quiet=len(files) <= BATCH) as bar:
        for start in range(0, len(files), BATCH):
            paths, inputs = [], []
            for path in files[start : start + BATCH]:
                try:
                    inputs.append(torch.from_numpy(trained.preprocessing(path)))
                    paths.append(path)
                except ConfigError as error:
                    unreadable.append(str(error))
                bar.advance(1)
            if not inputs:
                continue
            with torch.no_grad():
                p_BC = torch.softmax(trained.adapted(torch.stack(inputs).to(trained.device)), -1)
            for path, found in zip(paths, p_BC.tolist(), strict=True):
                ranked = sorted(zip(found, trained.class_names, strict=True), key=lambda pair: -pair[0])
                rows += [(shown(path), rank, name, p) for rank, (p, name) in enumerate(ranked[: top or 5], 1)]
    return rows, unreadable


def run(args: argparse.Namespace) -> int:
    """Print (and write) the likeliest classes of each image; exit code 1 where some could not be read."""
    if args.csv is not None:
        check_out(args.csv, "--csv", ".csv")
    rows, unreadable = predict(args.folder, args.images, args.top, args.weights, args.device)
    if args.csv is not None:
        kept = (row for row in rows if row[1] <= (args.top or 1))
        write_csv(args.csv, [("image", "rank", "class", "probability"), *kept])
    for image, rank, name, p in rows:  # after they are written: the reader of a pipe may leave early
        if rank == 1:
            print(_printable(image))
        print(f"  {p:7.2%}  {_printable(name)}")
    for message in unreadable[:20]:  # the rest is counted
        print(f"error: {_printable(message)}", file=sys.stderr)
    if bad := len(unreadable):
        given = bad + sum(rank == 1 for _, rank, _, _ in rows)
        print(f"error: {bad} of {given} images could not be read", file=sys.stderr)
    return int(bool(unreadable))


def _printable(name: str) -> str:
    """A file's or class's name on one line of valid text, whatever its bytes are."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


if __name__ == "__main__":
    main("predict")
