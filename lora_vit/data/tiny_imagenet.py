"""Tiny-ImageNet (Stanford CS231n): 200 classes, 500 training images of 64x64 pixels each.

Our train, val and test come out of its train folder, whose labels are sure; its own val folder is an optional
further test set.
"""

from __future__ import annotations

import contextlib
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

from lora_vit.data.cache import found_in
from lora_vit.data.dataset import Found, NotFetchedError
from lora_vit.data.files import PassedOver, digests_of, folders_in, images_below, locked_in
from lora_vit.errors import ConfigError
from lora_vit.terminal import Progress

FOLDER = "tiny-imagenet-200"
_ORIGIN = ".sha256-of-zip"
"""In a folder that we unpacked: of what. Times tell nothing of it, for unzip and copies set them."""
_BLOCK = 1 << 20
_TIMEOUT = 30.0
"""Seconds without an answer after which the network counts as absent."""
_BROKEN_OFF = (TimeoutError, ConnectionError, http.client.HTTPException)
_NETWORK = (urllib.error.URLError, *_BROKEN_OFF)
_DAMAGED = (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError)
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
        ConfigError: no network, a damaged archive, a class without images.
    """
    cache, passed = Path(cache_dir), PassedOver()
    folder = find_folder(Path(root), cache, quiet, PUBLISHED if fetch else None)
    wnids = _lines(folder / "wnids.txt")
    if len(set(wnids)) != len(wnids) or len(wnids) < 2:
        raise ConfigError(f"{folder / 'wnids.txt'} must name two or more different classes: extract the archive anew")
    parts = {"train": _train(folder, wnids, cache, passed)}
    if official_val:
        parts["official_val"] = _official_val(folder, wnids, cache, passed)
    return found_in(folder, _class_names(folder, wnids), parts, passed, cache, quiet, fetch)


def find_folder(root: Path, cache_dir: Path, quiet: bool, source: Source | None) -> Path:
    """The extracted folder: at or in ``root``, from a zip there, or downloaded into it.

    Raises:
        ConfigError: as :func:`download` and :func:`extract`.
    """
    below = [folder for folder in sorted(root.glob("*")) if _is_whole(folder)]
    one_off = below if len(below) == 1 else []
    above = [root.parent] if root.name in ("train", "val") else []
    for folder in (root, root / FOLDER, *one_off, *above):
        if _is_whole(folder):
            return folder
    if (root / FOLDER).exists():
        raise ConfigError(
            f"{root / FOLDER} is not whole, it lacks wnids.txt or train/: unpack {FOLDER}.zip anew, or give another "
            "data.root"
        )
    archive = _archive(root)
    target = root / FOLDER if archive is None else _beside(archive, cache_dir)
    if _is_whole(target):
        origin = target / _ORIGIN
        if archive is not None and origin.exists() and origin.read_text() != _sha256(archive, cache_dir, quiet):
            raise ConfigError(f"{archive} is another one than {target} was unpacked from: remove that folder")
        return target
    if source is None:
        raise NotFetchedError(f"Tiny-ImageNet is not unpacked below data.root={root} yet")
    try:
        with locked_in(cache_dir, f"tiny-imagenet {target.resolve()}"):  # several processes of one run come here
            if not _is_whole(target):
                given = archive or download(root, source, quiet)
                extract(given, target, quiet)
                if archive is None:
                    given.unlink()
                else:
                    (target / _ORIGIN).write_text(_sha256(archive, cache_dir, quiet))
    except OSError as error:
        if not _is_whole(target):  # else another run, which has its cache elsewhere, was first
            raise ConfigError(
                f"{error.filename or target} cannot be read or written ({error.strerror or error}): give another "
                "data.root or data.cache_dir"
            ) from None
    return target


def _sha256(archive: Path, cache_dir: Path, quiet: bool) -> str:
    return digests_of(archive.parent, [archive.name], cache_dir, quiet)[0].tobytes().hex()


def _beside(archive: Path, cache_dir: Path) -> Path:
    """Where an archive is unpacked: next to it, or in the cache if that is read-only."""
    if os.access(archive.parent, os.W_OK):
        return archive.parent / archive.stem
    stat = archive.stat()
    return cache_dir / f"{archive.stem}-{stat.st_size}-{stat.st_mtime_ns}"


def _is_whole(folder: Path) -> bool:
    return (folder / "wnids.txt").is_file() and (folder / "train").is_dir()


def _archive(root: Path) -> Path | None:
    """The zip that ``root`` is or holds."""
    if root.is_file():
        return root
    if root.suffix == ".zip" and not root.exists():
        raise ConfigError(f"data.root={root} does not exist: give a zip, or a folder to download to")
    if (root / f"{FOLDER}.zip").is_file():
        return root / f"{FOLDER}.zip"
    found = sorted(root.glob(f"{FOLDER}*.zip"))
    if len(found) > 1:
        raise ConfigError(f"{root} holds {', '.join(p.name for p in found)}: give one of them as data.root")
    return found[0] if found else None


def download(root: Path, source: Source, quiet: bool) -> Path:
    """Fetch the archive into ``root``; goes on with a part that an earlier try left.

    Raises:
        ConfigError: no network, cut off (the part stays for the next try), or not the published file (nothing is left).
        OSError: ``root`` cannot be written.
    """
    from torchvision.datasets.utils import calculate_md5

    target, part = root / f"{FOLDER}.zip", root / f"{FOLDER}.zip.part"
    remedy = (
        f"put {FOLDER}.zip or {FOLDER}/ into {root.resolve()}, or run experiment=quickstart, which needs no download"
    )
    root.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    if have < source.size:
        try:
            _fetch(source, part, have, quiet)
        except _NETWORK as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            raise ConfigError(
                f"Tiny-ImageNet is not below data.root={root} and cannot be downloaded ({reason}): {remedy}"
            ) from None
        have = part.stat().st_size
        if have < source.size:
            raise ConfigError(
                f"the download of {source.url} broke off at {have:,} of {source.size:,} bytes: the same command goes "
                f"on from there, or {remedy}"
            )
    md5 = calculate_md5(part)
    if have != source.size or md5 != source.md5:
        part.unlink()
        raise ConfigError(
            f"the file at {source.url} has {have:,} bytes and md5 {md5}, expected {source.size:,} and "
            f"{source.md5}: try again, or {remedy}"
        )
    os.replace(part, target)
    return target


def _fetch(source: Source, part: Path, have: int, quiet: bool) -> None:
    """Append what the server sends to ``part``, until it stops."""
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        goes_on = answer.status == 206
        length = answer.headers["Content-Length"]
        if not goes_on and length is not None and int(length) != source.size:
            # a login page, say; what an earlier try left is not replaced by it
            raise urllib.error.URLError(f"{source.url} has {int(length):,} bytes, expected {source.size:,}")
        with (
            part.open("ab" if goes_on else "wb") as file,
            Progress("downloading Tiny-ImageNet", source.size, quiet, "bytes", have if goes_on else 0) as bar,
            contextlib.suppress(*_BROKEN_OFF),
        ):
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.advance(len(block))


def extract(archive: Path, target: Path, quiet: bool) -> None:
    """Unpack beside ``target`` and move into place: it is whole or absent.

    Raises:
        ConfigError: damaged, with a path outside its folder, or without wnids.txt and train/.
        OSError: it cannot be read, or ``target`` not be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            into = Path(temporary, FOLDER)
            into.mkdir()
            _unpack(archive, into, quiet)
            whole = [folder for folder in (into, *sorted(into.iterdir())) if _is_whole(folder)]
            if not whole:
                raise ConfigError(f"{archive} holds no wnids.txt and train/: it is not Tiny-ImageNet")
            os.replace(whole[0], target)
    except _DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"{archive} is damaged ({reason}): fetch it anew, or give another data.root to have it downloaded"
        ) from None


def _unpack(archive: Path, into: Path, quiet: bool) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = [m for m in opened.infolist() if not m.is_dir()]
        needed = sum(m.file_size for m in members)
        if needed > shutil.disk_usage(into).free:
            raise ConfigError(f"{archive} needs {needed / 2**30:.1f} GiB unpacked, more than is free in {into.parent}")
        with Progress(f"unpacking {archive.name}", len(members), quiet, "files") as bar:
            for member in members:
                goal = (into / member.filename).resolve()
                link = (member.external_attr >> 16) & 0o170000 == 0o120000
                if not goal.is_relative_to(into.resolve()) or link:
                    raise ConfigError(f"{archive} holds the unsafe path {member.filename!r}: it is not Tiny-ImageNet")
                opened.extract(member, into)
                bar.advance(1)


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _train(folder: Path, wnids: list[str], cache: Path, passed: PassedOver) -> list[tuple[str, int]]:
    for name in folders_in(folder / "train", cache, passed):
        if name not in wnids:
            passed.add("folders of train/ that wnids.txt does not name", name)
    images = []
    for label, wnid in enumerate(wnids):
        place = f"train/{wnid}/images"
        found = images_below(folder, place, cache, passed) if (folder / place).is_dir() else []
        if not found:
            raise ConfigError(f"class {wnid} of wnids.txt has no images in {folder / place}: extract the archive anew")
        images += [(name, label) for name in found]
    return images


def _official_val(folder: Path, wnids: list[str], cache: Path, passed: PassedOver) -> list[tuple[str, int]]:
    annotations, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    if not annotations.is_file():
        raise ConfigError(f"data.official_val=true, but there is no {annotations}: extract the archive anew")
    rows = sorted([*line.split("\t"), ""][:2] for line in _lines(annotations))
    named = [(f"val/images/{name}", wnids.index(wnid)) for name, wnid in rows if wnid in wnids]
    there = images_below(folder, "val/images", cache, passed) if images.is_dir() else []
    missing = {name for name, _ in named} - set(there)
    if missing or not named:
        raise ConfigError(
            f"{annotations} names {len(named)} images of the classes of wnids.txt, of which {images} lacks "
            f"{len(missing)}: extract the archive anew"
        )
    for name in sorted(set(there) - {name for name, _ in named}):
        passed.add(f"of val/images without a class in {annotations.name}", name)
    return named


def _class_names(folder: Path, wnids: list[str]) -> list[str]:
    """The first word of each class in words.txt, with its wnid where two classes share one."""
    words = {}
    if (folder / "words.txt").is_file():
        for line in _lines(folder / "words.txt"):
            wnid, _, text = line.partition("\t")
            words[wnid] = text.split(",")[0].strip()
    names = [words.get(wnid) or wnid for wnid in wnids]
    return [name if names.count(name) == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]
