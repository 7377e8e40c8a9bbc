"""Classify images with a trained trial: ``python -m lora_vit.predict FOLDER IMAGE...``."""

from __future__ import annotations

import codecs
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_vit.commands import check_out, completed_record, recorded_config, trial_parser
from lora_vit.config import TrialConfig
from lora_vit.errors import ConfigError, run_command
from lora_vit.files import replacing, user_path
from lora_vit.terminal import Progress

BATCH = 64
"""Images that are classified together; more than these get a bar."""
NAMED = 20
"""Unreadable images that are named; the rest is counted."""


def predict_folder(
    folder: Path, given: list[Path], top: int | None, out: Path | None, weights: str | None, device: str
) -> int:
    """Print (and write) the ``top`` classes of each image; exit code 1 where some could not be read."""
    if out is not None:
        check_out(out, "--csv", ".csv")
    config = recorded_config(completed_record(folder), device, weights)
    from lora_vit.lora.adapter import read_adapter

    adapter = read_adapter(folder)
    class_names = adapter.card["class_names"]
    if top is not None and not 1 <= top <= len(class_names):
        raise ConfigError(f"--top {top} is impossible: give a number from 1 to {len(class_names)}")
    images = found_images(given, user_path(config.data.cache_dir))
    rows, unreadable = [], []
    with Progress("predicting", len(images), quiet=len(images) <= BATCH) as bar:
        for path, found in classified(adapter, images, config):
            bar.advance(1)
            if isinstance(found, ValueError):
                unreadable.append(str(found))
                continue
            ranked = sorted(zip(found, class_names, strict=True), key=lambda pair: -pair[0])[: top or 5]
            for place, (p, name) in enumerate(ranked, 1):
                rows.append({"image": str(path), "rank": place, "class": name, "probability": p})
    _show(rows, out)
    for message in unreadable[:NAMED]:
        print(f"error: {_printable(message)}", file=sys.stderr)
    if unreadable:
        print(f"error: {len(unreadable)} of {len(images)} images could not be read", file=sys.stderr)
    return 1 if unreadable else 0


def found_images(given: list[Path], cache_dir: Path) -> list[Path]:
    """The given files, and all images below the given folders; what else lies there is told in a line.

    Raises ConfigError where there are none.
    """
    from lora_vit.data.files import PassedOver, images_below

    images: list[Path] = []
    passed = PassedOver()
    for path in given:
        images += [path / name for name in images_below(path, "", cache_dir, passed)] if path.is_dir() else [path]
    if passed.names:
        print(f"passed over: {', '.join(passed.lines())}", file=sys.stderr)
    if not images:
        raise ConfigError(f"no image below {', '.join(_printable(str(path)) for path in given)}: give image files")
    return images


def classified(
    adapter: Any, images: list[Path], config: TrialConfig
) -> Iterator[tuple[Path, list[float] | ValueError]]:
    """Each image with its probability of each class, a list, or with the ConfigError that reading it gave."""
    import torch

    from lora_vit.build import ModelFactory, choose_device
    from lora_vit.data.decode import decode
    from lora_vit.distributed import Process
    from lora_vit.errors import ConfigError
    from lora_vit.lora.adapter import bind, put_on

    card = adapter.card
    where = choose_device(config.trainer.accelerator, Process())
    factory = ModelFactory(config, len(card["class_names"]), where, torch.float32)
    bind(adapter, factory.base)
    if factory.note:
        print(factory.note)
    model = factory.original
    put_on(model, adapter)
    model.to(where).eval()
    for start in range(0, len(images), BATCH):
        transform = factory.transform("none")  # keeps matrices for each size
        paths, inputs = [], []
        for path in images[start : start + BATCH]:
            try:
                pixels = torch.from_numpy(decode(path, card["decoded_size"], card["value_range"]))
            except ConfigError as error:
                yield path, error
                continue
            paths.append(path)
            inputs.append(transform.eval(pixels[None].to(where)))
        if inputs:
            with torch.no_grad():
                p_BC = torch.softmax(model(torch.cat(inputs)), -1)
            yield from zip(paths, p_BC.tolist(), strict=True)


def _printable(name: str) -> str:
    """A file's or class's name on one line of valid text, whatever its bytes are."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _show(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Write the rows, then print them (the reader of a pipe may leave early)."""
    if out is not None:
        with replacing(out) as file:
            text = codecs.getwriter("utf-8")(file, "backslashreplace")
            writer = csv.DictWriter(text, ["image", "rank", "class", "probability"])
            writer.writeheader()
            writer.writerows(rows)
    for row in rows:
        if row["rank"] == 1:
            print(_printable(row["image"]))
        print(f"  {row['probability']:7.2%}  {_printable(row['class'])}")


def main() -> None:
    """Command-line entry."""
    parser = trial_parser("predict", __doc__)
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders with images at any depth")
    parser.add_argument("--top", type=int, help="how many classes to show (default: five, or all if there are fewer)")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    run_command(lambda: predict_folder(args.folder, args.images, args.top, args.csv, args.weights, args.device))


if __name__ == "__main__":
    main()
