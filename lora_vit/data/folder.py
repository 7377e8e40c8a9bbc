"""The user's own images: a folder for each class, with given splits or with ours."""

import re
from pathlib import Path

from lora_vit.data.cache import Parts, found_in
from lora_vit.data.dataset import Found, Wanted
from lora_vit.data.files import Listing
from lora_vit.errors import ConfigError
from lora_vit.files import shown

# What the folder of each part may be called, in small letters or capitals.
_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_LIKE_A_PART = re.compile(r"(?<![a-z])(train|training|val|valid|validation|test|testing|dev)(set)?(?![a-z])", re.I)


def find(wanted: Wanted) -> Found | None:
    """Class folders below ``root`` or its train/, val/ and test/. Raises ConfigError where these are not clear."""
    top, files = wanted.root, Listing(wanted.cache_dir)
    if not top.is_dir():
        raise ConfigError(f"data.root={shown(top)} is not a folder: give the folder that holds your class folders")
    folders = _part_folders(top, files)
    place, classes = top / folders["train"], files.folders(top / folders["train"])
    if len(classes) < 2:
        count = "no class folders" if not classes else f"one class folder ({shown(classes[0])})"
        lower = [name for name in classes if len(files.folders(place / name)) > 1]
        hint = f"; did you mean data.root={shown(place / lower[0])}?" if lower else ""
        raise ConfigError(f"{shown(place)} holds {count}: a classifier needs two or more, each with its images{hint}")
    if folders["train"] == ".":
        _refuse_splits(top, classes, wanted.cache_dir)
    parts: Parts = {}
    for part, folder in folders.items():
        others = set() if part == "train" else set(files.folders(top / folder)) - set(classes)
        if others:
            there = f"{shown(top / folder)} has the class '{shown(min(others))}'"
            raise ConfigError(f"{there}, which {folders['train']}/ lacks: take it away, or add it there")
        parts[part] = []
        for label, class_name in enumerate(classes):
            place = top / folder / class_name
            found = files.images(top, str(Path(folder, class_name))) if place.is_dir() else []
            if not found and part == "train":
                raise ConfigError(f"class folder {shown(place)} has nothing that Pillow opens: fill or remove it")
            parts[part] += [(name, label) for name in found]
        if not parts[part]:
            raise ConfigError(f"{shown(top / folder)} holds no images in class folders: sort them so, or rename it")
    return found_in(top, [shown(c) for c in classes], parts, files, wanted)


def _part_folders(top: Path, files: Listing) -> dict[str, str]:
    """Folder of each part that is there; ``train`` is ``.`` where the class folders are at the top."""
    found = {}
    folders = sorted(path.name for path in top.iterdir() if path.is_dir())
    for part, called in _NAMES.items():
        there = [name for name in folders if name.lower() in called]
        if len(there) > 1:
            raise ConfigError(f"{shown(top)} has {' and '.join(f'{n}/' for n in there)}: keep one of them")
        if there:
            found[part] = there[0]
    if not found:
        return {"train": "."}
    if "train" not in found:
        raise ConfigError(f"{shown(top)} has {min(found.values())}/ but no train/: add it, or rename the class")
    for name in files.folders(top):
        if name not in found.values():
            files.skip("folders beside train/", name)
    return found


def _refuse_splits(top: Path, classes: list[str], cache_dir: Path) -> None:
    """Raise ConfigError if two class folders that hold folders, or two folders in one class, are named like parts."""
    inside = {name: Listing(cache_dir).folders(top / name) for name in classes}
    for group in ([c for c in inside if inside[c]], *([f"{c}/{low}" for low in lower] for c, lower in inside.items())):
        like = [place for place in group if _LIKE_A_PART.search(place.rpartition("/")[2])]
        if len(like) > 1:
            which = f"{' and '.join(map(shown, like))} in {shown(top)}"
            raise ConfigError(f"{which} look like splits: put train/, val/ and test/, with classes in each, at the top")
