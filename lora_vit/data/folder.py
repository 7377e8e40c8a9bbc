"""The user's own images: a folder for each class, with given splits or with ours."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lora_vit.config import DataConfig
from lora_vit.data.cache import decoded
from lora_vit.data.dataset import DataError, ImageData
from lora_vit.data.splits import finish, split_per_class

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")


def load(config: DataConfig, quiet: bool) -> ImageData:
    """Class folders below ``data.root``, or below its train/ and val/ and test/ where it has them.

    Raises:
        DataError: no classes, an empty class, a class of val/ or test/ that train/ lacks, broken images.
    """
    assert config.root is not None
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root={root} is not a folder: give the folder that holds your class folders")
    parts = [p for p in ("train", "val", "test") if (root / p).is_dir()] if (root / "train").is_dir() else [""]
    class_names = class_folders(root / parts[0])
    names: list[str] = []
    labels: list[int] = []
    part_ids: dict[str, np.ndarray] = {}
    for part in parts:
        extra = sorted(set(_folders(root / part)) - set(class_names))
        if extra:
            raise DataError(
                f"{root / part} has the class '{extra[0]}', which {root / parts[0]} has not: remove or add it"
            )
        first = len(names)
        for label, class_name in enumerate(class_names):
            found = image_files(root / part / class_name) if (root / part / class_name).is_dir() else []
            if not found and part == parts[0]:
                raise DataError(f"class folder {root / part / class_name} holds no images: add some, or remove it")
            names += [os.path.join(part, class_name, f) for f in found]
            labels += [label] * len(found)
        if len(names) == first:
            raise DataError(f"{root / part} holds no images in class folders: sort its images by class, or rename it")
        part_ids[part] = np.arange(first, len(names))
    label_array = np.array(labels, dtype=np.int64)
    fractions = {"val": config.val_fraction, "test": config.test_fraction}
    wanted = {name: f for name, f in fractions.items() if name not in part_ids and f is not None}
    splits = split_per_class(label_array, part_ids[parts[0]], wanted, config.split_seed, class_names)
    splits |= {part: part_ids[part] for part in parts[1:]}
    for name in ("val", "test"):
        if name not in splits:
            raise DataError(f"data.root={root} has no {name}/ and data.{name}_fraction is null: give one of them")
    images = decoded(root, names, config.cache_size, config.cache_dir, quiet)
    return finish(images, label_array, class_names, names, splits, config)


def class_folders(root: Path) -> list[str]:
    """Sorted names of the folders below ``root``. Raises DataError for fewer than two."""
    found = _folders(root)
    if len(found) < 2:
        count = "no class folders" if not found else f"one class folder ({found[0]})"
        raise DataError(f"{root} holds {count}: a classifier needs two or more, each with its images")
    return found


def _folders(root: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def image_files(folder: Path) -> list[str]:
    """Sorted names of the images in a folder; other and hidden files are left aside."""
    return sorted(
        e.name for e in os.scandir(folder) if not e.name.startswith(".") and e.name.lower().endswith(EXTENSIONS)
    )
