"""The files of a data set: which are images, what is passed over, and what is in them.

A data set is what its files contain, never their names and sizes alone. Each file's sha256 is kept beside the decoded
images and holds while size, times and inode stay.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_vit.data.dataset import DataError, NotFetchedError, shown
from lora_vit.records import CHECKPOINT, PLAN, RECORD, locked, replacing

_OWN_FILES = (RECORD, PLAN, ".lock", CHECKPOINT)
"""What tells a folder of ours: a trial's or a sweep's."""
_NO_PIXELS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow knows by name only, or opens with programs that few have."""
_UNSETTLED = 2_000_000_000
"""Nanoseconds for which a file that was just changed may change again without its time showing it."""
_CHUNK = 256
_NAMED = 3
"""Files of a kind that one line names."""


@dataclass
class PassedOver:
    """What lies among the images and is not used: names by the reason."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count a file or folder."""
        self.names.setdefault(reason, []).append(shown(name))

    def lines(self) -> tuple[str, ...]:
        """``3 hidden (.DS_Store, ...)`` for each reason."""
        told = []
        for reason, names in self.names.items():
            more = ", ..." if len(names) > _NAMED else ""
            told.append(f"{len(names):,} {reason} ({', '.join(names[:_NAMED])}{more})")
        return tuple(told)


@functools.cache
def image_endings() -> frozenset[str]:
    """Endings, in small letters, of all files that Pillow opens."""
    from PIL import Image

    return frozenset(
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NO_PIXELS
    )


def is_own(folder: Path | str, cache_dir: Path) -> bool:
    """Whether a folder is the cache, or holds what training wrote: no class, whatever lies in it."""
    folder = Path(folder)
    if folder.resolve() == cache_dir.resolve() or any((folder / name).exists() for name in _OWN_FILES):
        return True
    return folder.name == "outputs" and any((folder / name).is_dir() for name in ("runs", "sweeps"))


def folders_in(root: Path, cache_dir: Path, passed: PassedOver) -> list[str]:
    """Sorted names of the folders in ``root`` (links too) that are neither hidden nor our own."""
    found = []
    for entry in sorted(os.scandir(root), key=lambda e: e.name):
        if entry.name.startswith("."):
            passed.add("hidden", entry.name)
        elif entry.is_dir():
            if is_own(entry.path, cache_dir):
                passed.add("of lora_vit's own", entry.name)
            else:
                found.append(entry.name)
        elif not entry.is_file():
            passed.add("broken links", entry.name)
        else:
            image = os.path.splitext(entry.name)[1].lower() in image_endings()
            passed.add("images outside the class folders" if image else "no images", entry.name)
    return found


def images_below(root: Path, folder: str, cache_dir: Path, passed: PassedOver) -> list[str]:
    """Sorted paths, relative to ``root``, of the images in a folder and its sub-folders; links are followed."""
    found: list[str] = []

    def walk(place: str, above: frozenset[tuple[int, int]]) -> None:
        stat = os.stat(os.path.join(root, place))
        here = (stat.st_dev, stat.st_ino)
        if here in above:
            passed.add("links that lead back", place)
            return
        for entry in os.scandir(os.path.join(root, place)):
            name = os.path.join(place, entry.name)
            if entry.name.startswith("."):
                passed.add("hidden", name)
            elif entry.is_dir():
                if is_own(entry.path, cache_dir):
                    passed.add("of lora_vit's own", name)
                else:
                    walk(name, above | {here})
            elif not entry.is_file():
                passed.add("broken links", name)
            elif os.path.splitext(entry.name)[1].lower() in image_endings():
                found.append(name)
            else:
                passed.add("no images", name)

    try:
        walk(folder, frozenset())
    except OSError as error:
        where = shown(error.filename or str(root / folder))
        raise DataError(f"{where} cannot be read ({error.strerror}): mend its permissions or links") from None
    return sorted(found)


def digests_of(root: Path, names: Sequence[str], cache_dir: Path, quiet: bool, fetch: bool = True) -> np.ndarray:
    """Sha256 of each file below ``root``, uint8 [N, 32]; only files that changed since the last time are read.

    Raises:
        DataError: a file that cannot be read, or a ``cache_dir`` that cannot be written.
        NotFetchedError: files would have to be read, and ``fetch`` is false.
    """
    store = cache_dir / f"files-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.npz"
    stats = _stats(root, names)
    found, known = _kept(store, names, stats)
    if known.all():
        return found
    if not fetch:
        raise NotFetchedError(f"the images below {shown(str(root))} have not been read yet")
    try:
        with locked_in(cache_dir, store.name):
            found, known = _kept(store, names, stats)  # perhaps another run has just read them
            now = time.time_ns()
            missing = np.flatnonzero(~known)
            found[missing] = _read(root, [names[i] for i in missing.tolist()], quiet)
            settled = stats[:, 2] < now - _UNSETTLED
            _keep(
                store, [name for name, good in zip(names, settled, strict=True) if good], stats[settled], found[settled]
            )
    except OSError as error:
        raise cannot_write(cache_dir, error) from None
    return found


def cannot_write(cache_dir: Path, error: OSError) -> DataError:
    """The error for a cache that cannot be written."""
    return DataError(
        f"data.cache_dir={shown(str(cache_dir))} cannot be written ({error.strerror or error}): give another folder"
    )


def _cannot_read(root: Path, name: str, error: OSError) -> DataError:
    return DataError(f"{shown(str(root / name))} cannot be read ({error.strerror}): mend or remove it")


def _stats(root: Path, names: Sequence[str]) -> np.ndarray:
    """Size, time of writing, time of change and inode of each file, int64 [N, 4]."""
    rows = np.empty((len(names), 4), np.int64)
    for row, name in zip(rows, names, strict=True):
        try:
            stat = os.stat(os.path.join(root, name))
        except OSError as error:
            raise _cannot_read(root, name, error) from None
        row[:] = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino & 0x7FFF_FFFF_FFFF_FFFF)
    return rows


def _kept(store: Path, names: Sequence[str], stats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digests [N, 32] of an earlier run, and which of them still hold, bool [N]."""
    found, known = np.zeros((len(names), 32), np.uint8), np.zeros(len(names), bool)
    there = _open_store(store)
    if there is None:
        return found, known
    kept_names, kept_stats, kept_digests = there
    if kept_names != list(names):
        place = {name: i for i, name in enumerate(kept_names)}
        order = np.array([place.get(name, -1) for name in names], dtype=np.int64)
    else:
        order = np.arange(len(names))
    at = np.flatnonzero(order >= 0)
    at = at[(kept_stats[order[at]] == stats[at]).all(1)]
    found[at], known[at] = kept_digests[order[at]], True
    return found, known


def _open_store(store: Path) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    try:
        with store.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = [os.fsdecode(name) for name in arrays["names"].tobytes().split(b"\0")[:-1]]
            stats, found = arrays["stats"], arrays["digests"]
    except Exception:  # absent, or damaged in one of many ways: the files are read again
        return None
    return (names, stats, found) if stats.shape == (len(names), 4) and found.shape == (len(names), 32) else None


def _keep(store: Path, names: list[str], stats: np.ndarray, found: np.ndarray) -> None:
    """Keep digests, and those of other files of the folder (another data set may share it)."""
    there = _open_store(store)
    if there is not None:
        ours = set(names)
        others = [i for i, name in enumerate(there[0]) if name not in ours]
        names = [*names, *(there[0][i] for i in others)]
        stats = np.concatenate([stats, there[1][others]])
        found = np.concatenate([found, there[2][others]])
    joined = b"".join(os.fsencode(name) + b"\0" for name in names)
    with replacing(store) as file:
        np.savez(file, names=np.frombuffer(joined, np.uint8), stats=stats, digests=found)


def _read(root: Path, names: list[str], quiet: bool) -> np.ndarray:
    """Sha256 of files, uint8 [N, 32], read side by side."""
    from lora_vit.terminal import Progress

    chunks = [names[i : i + _CHUNK] for i in range(0, len(names), _CHUNK)]

    def read(chunk: list[str]) -> bytes:
        return b"".join(_sha256(root, name) for name in chunk)

    with (
        Progress("reading images", len(names), quiet or len(names) < _CHUNK) as bar,
        ThreadPoolExecutor(cores()) as pool,
    ):
        parts = []
        for chunk, part in zip(chunks, pool.map(read, chunks), strict=True):
            parts.append(part)
            bar.advance(len(chunk))
    return np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 32)


def _sha256(root: Path, name: str) -> bytes:
    try:
        with open(os.path.join(root, name), "rb") as file:
            return hashlib.sha256(file.read()).digest()
    except OSError as error:
        raise _cannot_read(root, name, error) from None


def cores() -> int:
    """Cores this process may use (a container or a batch system may grant fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def locked_in(cache_dir: Path, what: str) -> Iterator[None]:
    """Hold the lock on ``what``, in the cache folder: the data's own folder stays clean, and may be read-only."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with locked(cache_dir / f"{hashlib.sha256(os.fsencode(what)).hexdigest()[:16]}.lock"):
        yield
