"""The user's own images: a folder for each class, with given splits or with ours."""

import os
import re
from collections import Counter
from pathlib import Path
from unicodedata import normalize

from lora_vit.data.cache import Parts, found_in
from lora_vit.data.dataset import Found, Wanted
from lora_vit.data.files import Listing, marks_among
from lora_vit.data.imagenet import flat_val
from lora_vit.errors import ConfigError
from lora_vit.files import shown

# What the folder of each part may be called, in small letters or capitals.
_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
# What is no class: a split, one of several numbered parts, and, beside another that holds the same folders, a variant.
_SPLIT = re.compile(r"(?<![a-z])(train(ing)?|val(id|idation)?|test(ing)?|dev|eval(uation)?)(set)?(?![a-z])", re.I)
_NUMBERED = re.compile(r"(?<![a-z])(part|fold|split|batch|chunk|shard|train|test|\w*set|ima?ge?s?)[ _.-]*\d+$", re.I)
_VARIANT = re.compile("colou?r|gr[ae]y|rgb|segment|original|raw|augment|process|resize|crop|normali[sz]", re.I)


def find(wanted: Wanted) -> Found | None:
    """Class folders below ``root`` or its train/, val/ and test/. Raises ConfigError where these are not clear."""
    top, files = wanted.root, Listing(wanted.cache_dir)
    if not top.is_dir():
        raise ConfigError(f"data.root={shown(top)} is not a folder: give the folder that holds your class folders")
    folders = _part_folders(top, files)
    place, classes = top / folders["train"], _classes(top / folders["train"], files)
    if len(classes) < 2:
        holds = f"{shown(place)} holds {f'one class folder ({shown(min(classes))})' if classes else 'no class folders'}"
        wants = "a classifier needs two or more, each with its images: give the folder that holds them"
        raise ConfigError(f"{', '.join([holds, *files.lines()])}: {wants}")
    _refuse_parts(place, [name for names in classes.values() for name in names])
    parts: Parts = {}
    for part, folder in folders.items():
        flat = part == "val" and not _folders(top / folder)
        if flat and (listed := flat_val(top, folder, [*classes], files)):
            parts[part] = listed
            continue
        own = classes if part == "train" else _classes(top / folder, files)
        if others := set(own) - set(classes):
            there = f"{shown(top / folder)} has the class '{shown(min(others))}'"
            raise ConfigError(f"{there}, which {folders['train']}/ lacks: take it away, or add it there")
        parts[part] = []
        for label, class_name in enumerate(classes):
            found = [name for each in own.get(class_name, []) for name in files.images(top, str(Path(folder, each)))]
            if not found and part == "train" and wanted.on_broken != "skip":
                holds = f"class folder {shown(place / class_name)} holds no image that Pillow can open"
                raise ConfigError(f"{', '.join([holds, *files.lines()])}: fill or remove it")
            parts[part] += [(name, label) for name in found]
        if not parts[part]:
            remedy = "sort them so (links will do), or put ImageNet's LOC_val_solution.csv beside it"
            raise ConfigError(f"{shown(top / folder)} holds no images in class folders: {remedy}")
    return found_in(top, [shown(c) for c in classes], parts, files, wanted)


def _classes(place: Path, files: Listing) -> dict[str, list[str]]:
    """The folders of each class, by its name: the two forms that Unicode has of one, as disks write them, are one."""
    found: dict[str, list[str]] = {}
    for name in files.folders(place):
        found.setdefault(normalize("NFC", name), []).append(name)
    return dict(sorted(found.items()))


def _folders(place: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith("."))


def _part_folders(top: Path, files: Listing) -> dict[str, str]:
    """Folder of each part that is there; ``train`` is ``.`` where the class folders are at the top."""
    found = {}
    folders = _folders(top)
    for part, called in _NAMES.items():
        if len(there := [name for name in folders if name.lower() in called]) > 1:
            raise ConfigError(f"{shown(top)} has {' and '.join(f'{n}/' for n in there)}: keep one of them")
        if there:
            found[part] = there[0]
    if not found:
        for name in _folders(top.parent) if top.name.lower() in _NAMES["train"] else ():
            if name.lower() in (*_NAMES["val"], *_NAMES["test"]):
                files.skip(f"parts beside {top.name}/, used with the folder of all as data.root", name)
        return {"train": "."}
    if "train" not in found:
        raise ConfigError(f"{shown(top)} has {min(found.values())}/ but no train/: add it, or rename the class")
    for name in files.folders(top):
        if name not in found.values():
            files.skip("folders beside train/", name)
    if "test" in found and not _folders(top / found["test"]):
        files.skip("folders beside train/ without classes", found.pop("test"))
    return found


def _refuse_parts(place: Path, classes: list[str]) -> None:
    """Raise ConfigError where class folders are named, or filled, like something else that data sets consist of."""
    inside = {name: _folders(place / name) for name in classes}
    shared = Counter(low for lows in inside.values() for low in lows)
    alike = [name for name in classes if sum(shared[low] > 1 for low in inside[name]) > 1]
    stems = Counter(_SPLIT.sub("", name) for name in classes)
    splits = [name for name in classes if _SPLIT.search(name) and (inside[name] or stems[_SPLIT.sub("", name)] > 1)]
    kinds = [("splits", splits), ("numbered parts", [name for name in classes if _NUMBERED.search(name)])]
    kinds += [("splits", [f"{name}/{low}" for low in inside[name] if _SPLIT.search(low)]) for name in classes]
    kinds += [("a copy", [f"{name}/{low}" for low in inside[name] if low in inside]) for name in classes]
    kinds.append(("variants of one set", alike if any(map(_VARIANT.search, alike)) else []))
    kinds.append(("images and their annotations", classes if marks_among(classes) else []))
    for what, like in kinds:
        if len(like) > 1:
            which = ", ".join(map(shown, sorted(like)[:3])) + (", ..." if len(like) > 3 else "")
            remedy = "give a folder for each class, or train/, val/ and test/ with these"
            raise ConfigError(f"{which} in {shown(place)} look like {what}, not like classes: {remedy} (links will do)")
