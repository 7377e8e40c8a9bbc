"""Classify images with a trained trial: ``python -m lora_vit.predict FOLDER IMAGE...``."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import Any

from lora_vit.commands import completed_record, recorded_config, run_command, trial_folder
from lora_vit.records import replacing


def predict_images(folder: Path, images: list[Path], top: int, device: str) -> list[dict[str, Any]]:
    """The ``top`` classes of each image: rows with image, rank, class and probability."""
    record = completed_record(folder)
    config = recorded_config(record, None, device)
    import numpy as np
    import torch

    from lora_vit.build import DTYPES, ModelFactory, choose_device
    from lora_vit.data.augment import Transform
    from lora_vit.data.cache import decode
    from lora_vit.distributed import Process
    from lora_vit.lora.merge import load_adapter, read_adapter

    card = read_adapter(folder).card
    where = choose_device(config.trainer.accelerator, Process())
    dtype = DTYPES[config.trainer.precision]
    pixels = [decode(path, card["decoded_size"]) for path in images]
    factory = ModelFactory(config, len(card["class_names"]), where, dtype)
    model = factory.original
    model.heads = torch.nn.Sequential()
    model.heads.add_module("head", torch.nn.Linear(model.hidden_dim, len(card["class_names"])))
    load_adapter(model, folder).to(where).eval()
    transform = Transform(config.model.image_size, "none", where, torch.float32)
    rows = []
    with torch.no_grad():
        for path, image in zip(images, pixels, strict=True):
            x = transform.eval(torch.from_numpy(np.ascontiguousarray(image))[None].to(where))
            p_C = torch.softmax(model(x)[0].float(), -1)
            best = p_C.topk(min(top, len(p_C)))
            for place, (p, c) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), 1):
                rows.append({"image": str(path), "rank": place, "class": card["class_names"][c], "probability": p})
    return rows


def _show(rows: list[dict[str, Any]], out: Path | None) -> int:
    last = None
    for row in rows:
        if row["image"] != last:
            last = row["image"]
            print(last)
        print(f"  {row['probability']:7.2%}  {row['class']}")
    if out is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["image", "rank", "class", "probability"])
        writer.writeheader()
        writer.writerows(rows)
        with replacing(out) as file:
            file.write(text.getvalue().encode())
    return 0


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(prog="python -m lora_vit.predict", description=__doc__)
    parser.add_argument("folder", type=trial_folder, help="folder of a completed trial")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    parser.add_argument("--top", type=int, default=5, help="how many classes to show (default 5)")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    args = parser.parse_args()
    run_command(lambda: _show(predict_images(args.folder, args.images, args.top, args.device), args.csv))


if __name__ == "__main__":
    main()
