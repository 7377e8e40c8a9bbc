"""The user's own images: a folder for each class, with given splits or with ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lora_vit.data.cache import decoded
from lora_vit.data.dataset import DataError, Decoded, Found, content_of, shown
from lora_vit.data.files import PassedOver, digests_of, folders_in, images_below

_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""What the folder of each part may be called."""


def find(name: str, root: str, cache_dir: str, quiet: bool, official_val: bool, fetch: bool) -> Found:
    """Class folders below ``root``, or below its train/ and val/ and test/ where it has them.

    Raises:
        DataError: no classes, an empty class, a class of val/ or test/ that train/ lacks, two folders of one part.
    """
    top, cache = Path(root), Path(cache_dir)
    if not top.is_dir():
        raise DataError(f"data.root={shown(root)} is not a folder: give the folder that holds your class folders")
    passed = PassedOver()
    folders = _part_folders(top, cache, passed)
    classes = _class_folders(top / folders["train"], cache, passed)
    names: list[str] = []
    labels: list[int] = []
    parts: dict[str, np.ndarray] = {}
    for part, folder in folders.items():
        first = len(names)
        _refuse_other_classes(top, folders["train"], folder, classes, cache, passed)
        for label, class_name in enumerate(classes):
            place = Path(folder) / class_name
            found = images_below(top, str(place), cache, passed) if (top / place).is_dir() else []
            if not found and part == "train":
                raise DataError(f"class folder {shown(str(top / place))} holds no images: add some, or take it away")
            names += found
            labels += [label] * len(found)
        if len(names) == first:
            raise DataError(
                f"{shown(str(top / folder))} holds no images in class folders: sort its images by class, or rename it"
            )
        parts[part] = np.arange(first, len(names))
    label_array, class_names = np.array(labels, dtype=np.int64), [shown(c) for c in classes]
    digests = digests_of(top, names, cache, quiet, fetch)

    def decode(size: int | None) -> Decoded:
        return decoded(top, names, digests, size, cache, quiet)

    content = content_of(class_names, label_array, parts, digests)
    return Found(label_array, class_names, parts, content, decode, passed.lines())


def _part_folders(top: Path, cache: Path, passed: PassedOver) -> dict[str, str]:
    """Folder of each part that is there; ``train`` is ``.`` where the class folders are at the top."""
    found = {}
    for part, called in _NAMES.items():
        there = [name for name in called if (top / name).is_dir()]
        if len(there) > 1:
            raise DataError(f"{shown(str(top))} has {' and '.join(f'{n}/' for n in there)}: keep one of them")
        if there:
            found[part] = there[0]
    if "train" not in found:
        return {"train": "."}
    for name in folders_in(top, cache, passed):
        if name not in found.values():
            passed.add("folders beside train/", name)
    return found


def _class_folders(folder: Path, cache: Path, passed: PassedOver) -> list[str]:
    """Sorted names of the class folders. Raises DataError for fewer than two."""
    found = folders_in(folder, cache, passed)
    if len(found) < 2:
        count = "no class folders" if not found else f"one class folder ({shown(found[0])})"
        lower = [name for name in found if len(folders_in(folder / name, cache, PassedOver())) > 1]
        hint = f"; did you mean data.root={shown(str(folder / lower[0]))}?" if lower else ""
        raise DataError(
            f"{shown(str(folder))} holds {count}: a classifier needs two or more, each with its images{hint}"
        )
    return found


def _refuse_other_classes(
    top: Path, train: str, folder: str, classes: list[str], cache: Path, passed: PassedOver
) -> None:
    """Raise DataError where a part has a class that train/ lacks."""
    if folder == train:
        return
    extra = sorted(set(folders_in(top / folder, cache, passed)) - set(classes))
    if extra:
        raise DataError(
            f"{shown(str(top / folder))} has the class '{shown(extra[0])}', which {shown(str(top / train))} has not: "
            "take it away, or add it there"
        )
