"""Tiny-ImageNet (Stanford CS231n): 200 classes, 500 training images of 64x64 pixels each.

Our train, val and test come out of its train folder, whose labels are sure; its own val folder is an optional
further test set.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_vit.data.cache import decoded
from lora_vit.data.dataset import DataError, Decoded, Found, NotFetchedError, content_of
from lora_vit.data.files import PassedOver, digests_of, folders_in, images_below, locked_in
from lora_vit.terminal import Progress

FOLDER = "tiny-imagenet-200"
_BLOCK = 1 << 20
_TIMEOUT = 30.0
"""Seconds without an answer after which the network counts as absent."""
_BROKEN_OFF = (TimeoutError, ConnectionError, http.client.HTTPException)
_NETWORK = (urllib.error.URLError, *_BROKEN_OFF)
_DAMAGED = (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError)
"""What ``zipfile`` raises for archives that are cut off, altered, encrypted or compressed in another way."""


@dataclass(frozen=True)
class Source:
    """Where the archive is published, and what it is."""

    url: str
    size: int
    md5: str


PUBLISHED = Source("http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248_100_043, "90528d7ca1a48142e341f4ef8d21d0de")


def find(name: str, root: str, cache_dir: str, quiet: bool, official_val: bool, fetch: bool) -> Found:
    """The data set at ``root`` (folder or zip), downloaded first if it is not there.

    Raises:
        DataError: no network, a damaged archive, a class without images.
    """
    cache, passed = Path(cache_dir), PassedOver()
    folder = find_folder(Path(root), cache, quiet, PUBLISHED if fetch else None)
    wnids = _lines(folder / "wnids.txt")
    if len(set(wnids)) != len(wnids) or len(wnids) < 2:
        raise DataError(f"{folder / 'wnids.txt'} must name two or more different classes: extract the archive anew")
    names, labels = _train_index(folder, wnids, cache, passed)
    parts = {"train": np.arange(len(names))}
    if official_val:
        more, classes = _official_val(folder, wnids, cache, passed)
        parts["official_val"] = np.arange(len(names), len(names) + len(more))
        names, labels = names + more, labels + classes
    label_array, class_names = np.array(labels, dtype=np.int64), _class_names(folder, wnids)
    digests = digests_of(folder, names, cache, quiet, fetch)

    def decode(size: int | None) -> Decoded:
        return decoded(folder, names, digests, size, cache, quiet)

    content = content_of(class_names, label_array, parts, digests)
    return Found(label_array, class_names, parts, content, decode, passed.lines())


def find_folder(root: Path, cache_dir: Path, quiet: bool, source: Source | None) -> Path:
    """The extracted folder: at or in ``root``, from a zip there, or downloaded into it.

    Raises:
        DataError: as :func:`download` and :func:`extract`.
    """
    below = [folder for folder in sorted(root.glob("*")) if _is_whole(folder)]
    one_off = below if len(below) == 1 else []
    above = [root.parent] if root.name in ("train", "val") else []
    for folder in (root, root / FOLDER, *one_off, *above):
        if _is_whole(folder):
            return folder
    if (root / FOLDER).exists():
        raise DataError(
            f"{root / FOLDER} is not whole, it lacks wnids.txt or train/: unpack {FOLDER}.zip anew, or give another "
            "data.root"
        )
    archive = _archive(root)
    target = root / FOLDER if archive is None else _beside(archive, cache_dir)
    if _is_whole(target):
        return target
    if source is None:
        raise NotFetchedError(f"Tiny-ImageNet is not unpacked below data.root={root} yet")
    try:
        with locked_in(cache_dir, f"tiny-imagenet {target.resolve()}"):  # several processes of one run come here
            if archive is not None:
                extract(archive, target, quiet)
            elif not _is_whole(target):
                archive = download(root, source, quiet)
                extract(archive, target, quiet)
                archive.unlink()
    except OSError as error:
        raise DataError(
            f"{error.filename or root} cannot be written ({error.strerror or error}): give another data.root or "
            "data.cache_dir"
        ) from None
    return target


def _beside(archive: Path, cache_dir: Path) -> Path:
    """Where an archive is unpacked: next to it, or in the cache if that is read-only (then named by its content)."""
    if os.access(archive.parent, os.W_OK):
        return archive.parent / archive.stem
    stat = archive.stat()
    key = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    return cache_dir / f"{archive.stem}-{key}"


def _is_whole(folder: Path) -> bool:
    return (folder / "wnids.txt").is_file() and (folder / "train").is_dir()


def _archive(root: Path) -> Path | None:
    """The zip that ``root`` is or holds."""
    if root.is_file():
        return root
    if root.suffix == ".zip" and not root.exists():
        raise DataError(f"data.root={root} does not exist: give a zip, or a folder to download to")
    if (root / f"{FOLDER}.zip").is_file():
        return root / f"{FOLDER}.zip"
    found = sorted(root.glob(f"{FOLDER}*.zip"))
    if len(found) > 1:
        raise DataError(f"{root} holds {', '.join(p.name for p in found)}: give one of them as data.root")
    return found[0] if found else None


def download(root: Path, source: Source, quiet: bool) -> Path:
    """Fetch the archive into ``root``; goes on with a part that an earlier try left.

    Raises:
        DataError: no network, cut off (the part stays for the next try), or not the published file (nothing is left).
        OSError: ``root`` cannot be written.
    """
    target, part = root / f"{FOLDER}.zip", root / f"{FOLDER}.zip.part"
    remedy = (
        f"put {FOLDER}.zip or {FOLDER}/ into {root.resolve()}, or run experiment=quickstart, which needs no download"
    )
    root.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    if have < source.size:
        try:
            whole = _fetch(source, part, have, quiet)
        except _NETWORK as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            raise DataError(
                f"Tiny-ImageNet is not below data.root={root} and cannot be downloaded ({reason}): {remedy}"
            ) from None
        have = part.stat().st_size
        if not whole:
            raise DataError(
                f"the download of {source.url} broke off at {have:,} of {source.size:,} bytes: the same command goes "
                f"on from there, or {remedy}"
            )
    digest = hashlib.md5(usedforsecurity=False)
    with part.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if have != source.size or digest.hexdigest() != source.md5:
        part.unlink()
        raise DataError(
            f"the file at {source.url} has {have:,} bytes and md5 {digest.hexdigest()}, expected {source.size:,} and "
            f"{source.md5}: try again, or {remedy}"
        )
    os.replace(part, target)
    return target


def _fetch(source: Source, part: Path, have: int, quiet: bool) -> bool:
    """Append what the server sends to ``part``; False where it stopped before the end."""
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        goes_on = answer.status == 206
        length = answer.headers["Content-Length"]
        if not goes_on and length is not None and int(length) != source.size:
            # a login page, say; what an earlier try left is not replaced by it
            raise urllib.error.URLError(f"{source.url} has {int(length):,} bytes, expected {source.size:,}")
        with (
            part.open("ab" if goes_on else "wb") as file,
            Progress("downloading Tiny-ImageNet", source.size, quiet, "bytes") as bar,
        ):
            if goes_on:
                bar.advance(have)
            while True:
                try:
                    block = answer.read(_BLOCK)
                except _BROKEN_OFF:
                    break
                if not block:
                    break
                file.write(block)
                bar.advance(len(block))
    return part.stat().st_size >= source.size


def extract(archive: Path, target: Path, quiet: bool) -> Path:
    """Unpack beside ``target`` and move into place: it is whole or absent.

    Raises:
        DataError: damaged, with a path outside its folder, or without wnids.txt and train/.
    """
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            inner = _unpack(archive, Path(temporary), quiet)
            try:
                os.replace(inner, target)
            except OSError:
                if not _is_whole(target):  # another run was first
                    raise
    except _DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{archive} is damaged ({reason}): fetch it anew, or give another data.root to have it downloaded"
        ) from None
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
        if _is_whole(inner):
            if inner == into:
                inner = into / FOLDER
                inner.mkdir()
                for child in [c for c in into.iterdir() if c != inner]:
                    child.rename(inner / child.name)
            return inner
    raise DataError(f"{archive} holds no wnids.txt and train/: it is not Tiny-ImageNet")


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _train_index(folder: Path, wnids: list[str], cache: Path, passed: PassedOver) -> tuple[list[str], list[int]]:
    known = set(wnids)
    for name in folders_in(folder / "train", cache, passed):
        if name not in known:
            passed.add("folders of train/ that wnids.txt does not name", name)
    names: list[str] = []
    labels: list[int] = []
    for label, wnid in enumerate(wnids):
        images = f"train/{wnid}/images"
        found = images_below(folder, images, cache, passed) if (folder / images).is_dir() else []
        if not found:
            raise DataError(f"class {wnid} of wnids.txt has no images in {folder / images}: extract the archive anew")
        names += found
        labels += [label] * len(found)
    return names, labels


def _official_val(folder: Path, wnids: list[str], cache: Path, passed: PassedOver) -> tuple[list[str], list[int]]:
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise DataError(f"data.official_val=true, but there is no {annotations}: extract the archive anew")
    place = {wnid: label for label, wnid in enumerate(wnids)}
    rows = sorted([*line.split("\t"), ""][:2] for line in _lines(annotations))
    rows = [row for row in rows if row[1] in place]
    images = folder / "val" / "images"
    there = images_below(folder, "val/images", cache, passed) if images.is_dir() else []
    missing = sorted({f"val/images/{name}" for name, _ in rows} - set(there))
    if not rows:
        raise DataError(f"{annotations} names no image of the classes of wnids.txt: extract the archive anew")
    if missing:
        raise DataError(
            f"{annotations} names {len(missing)} images that are not in {images}, for example {missing[0]}: "
            "extract the archive anew"
        )
    return [f"val/images/{name}" for name, _ in rows], [place[wnid] for _, wnid in rows]


def _class_names(folder: Path, wnids: list[str]) -> list[str]:
    """The first word of each class in words.txt, with its wnid where two classes share one."""
    words = {}
    if (folder / "words.txt").is_file():
        for line in _lines(folder / "words.txt"):
            wnid, _, text = line.partition("\t")
            words[wnid] = text.split(",")[0].strip()
    names = [words.get(wnid) or wnid for wnid in wnids]
    return [name if names.count(name) == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]
