"""Tiny-ImageNet (Stanford CS231n): 200 classes, 500 training images of 64x64 pixels each.

Our train, val and test come out of its train folder, whose labels are sure; its own val folder is an optional
further test set.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_vit.config import DataConfig
from lora_vit.data.cache import decoded
from lora_vit.data.dataset import DataError, ImageData
from lora_vit.data.folder import image_files
from lora_vit.data.progress import Progress
from lora_vit.data.splits import finish, split_per_class

FOLDER = "tiny-imagenet-200"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """Where the archive is published, and what it is."""

    url: str
    size: int
    md5: str


PUBLISHED = Source("http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248_100_043, "90528d7ca1a48142e341f4ef8d21d0de")


def load(config: DataConfig, quiet: bool, source: Source = PUBLISHED) -> ImageData:
    """The data set at ``data.root`` (folder or zip), downloaded first if it is not there.

    Raises:
        DataError: no network, a damaged archive, a class without images, broken images.
    """
    assert config.root is not None
    folder = find(Path(config.root).expanduser(), Path(config.cache_dir).expanduser(), quiet, source)
    wnids = _lines(folder / "wnids.txt")
    names, labels = _train_index(folder, wnids)
    of_train = np.arange(len(names))
    if config.official_val:
        more, classes = _official_val(folder, wnids)
        names, labels = names + more, labels + classes
    label_array = np.array(labels, dtype=np.int64)
    class_names = _class_names(folder, wnids)
    fractions = {"val": config.val_fraction or 0.1, "test": config.test_fraction or 0.1}
    splits = split_per_class(label_array, of_train, fractions, config.split_seed, class_names)
    if config.official_val:
        splits["official_val"] = np.arange(len(of_train), len(names))
    images = decoded(folder, names, config.cache_size, config.cache_dir, quiet)
    return finish(images, label_array, class_names, names, splits, config)


def find(root: Path, cache_dir: Path, quiet: bool, source: Source = PUBLISHED) -> Path:
    """The extracted folder: at or in ``root``, from a zip there, or downloaded into it."""
    for folder in (root, root / FOLDER):
        if (folder / "wnids.txt").is_file() and (folder / "train").is_dir():
            return folder
    archives = [root] if root.is_file() else sorted(root.glob("tiny-imagenet-200*.zip"))
    if archives:
        archive = archives[0]
        beside = archive.parent if os.access(archive.parent, os.W_OK) else cache_dir
        return extract(archive, beside / archive.stem, quiet)
    archive = download(root, source, quiet)
    folder = extract(archive, root / FOLDER, quiet)
    archive.unlink()
    return folder


def download(root: Path, source: Source, quiet: bool) -> Path:
    """Fetch the archive into ``root``; goes on with a part that an earlier try left.

    Raises:
        DataError: no network, or not the published file (nothing is left then).
    """
    target = root / f"{FOLDER}.zip"
    part = target.with_suffix(".zip.part")
    try:
        root.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        if have < source.size:
            _fetch(source, part, have, quiet)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise DataError(
            f"Tiny-ImageNet is not below data.root={root} and cannot be downloaded "
            f"({getattr(error, 'reason', error)}): put {FOLDER}.zip or {FOLDER}/ into {root.resolve()}, or run "
            "experiment=quickstart, which needs no download"
        ) from None
    except OSError as error:
        raise DataError(f"data.root={root} cannot be written ({error.strerror or error}): give another") from None
    digest = hashlib.md5(usedforsecurity=False)
    with part.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if part.stat().st_size != source.size or digest.hexdigest() != source.md5:
        size = part.stat().st_size
        part.unlink()
        raise DataError(
            f"the file at {source.url} has {size:,} bytes and md5 {digest.hexdigest()}, expected {source.size:,} and "
            f"{source.md5}: try again, or put {FOLDER}.zip into {root.resolve()} yourself"
        )
    os.replace(part, target)
    return target


def _fetch(source: Source, part: Path, have: int, quiet: bool) -> None:
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={have}-"} if have else {})
    with (
        urllib.request.urlopen(request, timeout=30) as answer,
        part.open("ab" if answer.status == 206 else "wb") as file,
        Progress("downloading Tiny-ImageNet", source.size, quiet, "bytes") as bar,
    ):
        if answer.status == 206:
            bar.advance(have)
        while block := answer.read(_BLOCK):
            file.write(block)
            bar.advance(len(block))


def extract(archive: Path, target: Path, quiet: bool) -> Path:
    """Unpack beside ``target`` and move into place: it is whole or absent.

    Raises:
        DataError: damaged, with a path outside its folder, or without wnids.txt and train/.
    """
    if (target / "wnids.txt").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            inner = _unpack(archive, Path(temporary), quiet)
            try:
                os.replace(inner, target)
            except OSError:
                if not (target / "wnids.txt").is_file():  # another run was first
                    raise
    except (zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{archive} is damaged ({error}): fetch it anew, or remove it to have it downloaded") from None
    except OSError as error:
        raise DataError(f"{archive} cannot be unpacked into {target.parent} ({error.strerror or error})") from None
    return target


def _unpack(archive: Path, into: Path, quiet: bool) -> Path:
    with zipfile.ZipFile(archive) as opened:
        members = [m for m in opened.infolist() if not m.is_dir()]
        needed = sum(m.file_size for m in members)
        if needed > shutil.disk_usage(into).free:
            raise DataError(f"{archive} needs {needed / 2**30:.1f} GiB unpacked, more than is free in {into.parent}")
        with Progress(f"unpacking {archive.name}", len(members), quiet, "files") as bar:
            for member in members:
                goal = (into / member.filename).resolve()
                link = (member.external_attr >> 16) & 0o170000 == 0o120000
                if not goal.is_relative_to(into.resolve()) or link:
                    raise DataError(f"{archive} holds the unsafe path {member.filename!r}: it is not Tiny-ImageNet")
                opened.extract(member, into)
                bar.advance(1)
    for inner in (into / FOLDER, into, *sorted(p for p in into.iterdir() if p.is_dir())):
        if (inner / "wnids.txt").is_file() and (inner / "train").is_dir():
            if inner == into:
                inner = into / FOLDER
                inner.mkdir()
                for child in [c for c in into.iterdir() if c != inner]:
                    child.rename(inner / child.name)
            return inner
    raise DataError(f"{archive} holds no wnids.txt and train/: it is not Tiny-ImageNet")


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _train_index(folder: Path, wnids: list[str]) -> tuple[list[str], list[int]]:
    known = set(wnids)
    extra = sorted(e.name for e in os.scandir(folder / "train") if e.is_dir() and e.name not in known)
    extra = [name for name in extra if not name.startswith(".")]
    if extra:
        warnings.warn(
            f"{folder / 'train'} has {len(extra)} folders that wnids.txt does not name, ignored: "
            f"{', '.join(extra[:5])}",
            stacklevel=2,
        )
    names: list[str] = []
    labels: list[int] = []
    for label, wnid in enumerate(wnids):
        images = folder / "train" / wnid / "images"
        found = image_files(images) if images.is_dir() else []
        if not found:
            raise DataError(f"class {wnid} of wnids.txt has no images in {images}: extract the archive anew")
        names += [f"train/{wnid}/images/{name}" for name in found]
        labels += [label] * len(found)
    return names, labels


def _official_val(folder: Path, wnids: list[str]) -> tuple[list[str], list[int]]:
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise DataError(f"data.official_val=true, but there is no {annotations}: extract the archive anew")
    place = {wnid: label for label, wnid in enumerate(wnids)}
    rows = sorted(line.split("\t")[:2] for line in _lines(annotations))
    there = set(image_files(folder / "val" / "images"))
    rows = [row for row in rows if row[0] in there and row[1] in place]
    if not rows:
        raise DataError(f"{annotations} names no image of {folder / 'val' / 'images'}: extract the archive anew")
    return [f"val/images/{name}" for name, _ in rows], [place[wnid] for _, wnid in rows]


def _class_names(folder: Path, wnids: list[str]) -> list[str]:
    """The first word of each class in words.txt, with its wnid where two classes share one."""
    words = {}
    if (folder / "words.txt").is_file():
        for line in _lines(folder / "words.txt"):
            wnid, _, text = line.partition("\t")
            words[wnid] = text.split(",")[0].strip()
    names = [words.get(wnid, wnid) for wnid in wnids]
    return [name if names.count(name) == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]
