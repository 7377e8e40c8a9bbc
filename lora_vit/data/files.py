"""The files of a data set: which are images, what is passed over, and what is in them.

A data set is what its files contain, never their names and sizes alone. Each file's sha256, and what its header tells,
is kept beside the decoded images and holds while size, times and inode stay.
"""

import contextlib
import functools
import hashlib
import os
import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_vit.data.preprocessing import Head, head_of
from lora_vit.errors import ConfigError
from lora_vit.files import locked, replacing, shown
from lora_vit.records import CHECKPOINT, PLAN, RECORD
from lora_vit.terminal import Every, Progress

_NO_PIXELS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})  # Pillow only names them, or needs rare programs
_SYSTEM = frozenset({"@eaDir", "#recycle", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
"""Folders that file systems and file servers make, some with thumbnails of the images."""
_PICTURES = re.compile("(jpe?g)?_?(images?|imgs?)|jpe?gs?|photos?|pictures?", re.I)
_MARKS = re.compile("(?!with)(.*[ _-])?(mask|annot(ation)?|label|trimap|segmentation|ground_?truth|xml)s?", re.I)
_OTHERS = dict.fromkeys((".heic", ".heif", ".hif"), "of HEIC, read after pip install pillow-heif")
_OTHERS |= {".avif": "of AVIF, read after pip install pillow-avif-plugin", ".dcm": "of DICOM: save them as PNG or TIFF"}
_UNSETTLED = 2_000_000_000  # nanoseconds in which a file that changed may change again without its time showing it
_STAT = struct.Struct("=qqqQ")  # size, time of writing, time of change and inode
_FACTS = np.dtype([("digest", "u1", 32), ("head", Head)])  # of a file: sha256, what its header tells
_CHUNK = 256  # files that a thread reads before it reports
_KEEP_EVERY = 30.0  # seconds between savings of what has been read
_NAMED = 3  # files of a kind that one line names


@functools.cache
def image_endings() -> frozenset[str]:
    """Lower-case endings of all files that Pillow opens, with its plugins that are installed."""
    from lora_vit.data.preprocessing import Image  # which asks them

    extensions = Image.registered_extensions()  # fills OPEN
    return frozenset(ending for ending, kind in extensions.items() if kind in Image.OPEN.keys() - _NO_PIXELS)


def marks_among(names: Iterable[str]) -> list[str]:
    """Those of a folder's sub-folders that hold masks or annotations of the images in another one."""
    names = list(names)
    return [n for n in names if _MARKS.fullmatch(n)] if any(map(_PICTURES.fullmatch, names)) else []


def _is_image(path: str) -> bool:
    """Whether Pillow opens files of this ending, or this one if it has no ending."""
    if ending := os.path.splitext(path)[1].lower():
        return ending in image_endings()
    from PIL import Image

    with contextlib.suppress(Exception), Image.open(path) as image:
        return image.format not in _NO_PIXELS
    return False


@dataclass
class Listing:
    """Lists folders and images, sorted, and remembers what it passes over: names by the reason. Links are followed."""

    cache_dir: Path
    passed: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        """Count a file or folder that is passed over."""
        self.passed.setdefault(reason, []).append(shown(name))

    def lines(self) -> tuple[str, ...]:
        """``3 hidden (.DS_Store, ...)`` for each reason."""
        said = []
        for reason, names in self.passed.items():
            one = re.sub(r"^(folder|image|(broken )?(link|file)|class(?=es))e?s\b", r"\1", reason)
            what, more = reason if len(names) > 1 else one, ", ..." * (len(names) > _NAMED)
            said.append(f"{len(names):,} {what} ({', '.join(names[:_NAMED])}{more})")
        return tuple(said)

    def folders(self, root: Path) -> list[str]:
        """Names of the folders in ``root`` that are neither hidden nor our own."""
        found = []
        for name, is_folder in self._entries(root, ""):
            if is_folder:
                found.append(name)
            else:
                self.skip("images outside the class folders", name)
        return found

    def images(self, root: Path, folder: str) -> list[str]:
        """Paths, relative to ``root``, of the images in a folder of it and its sub-folders."""
        found: list[str] = []

        def walk(place: str, above: frozenset[str]) -> None:
            if (here := os.path.realpath(root / place)) in above:
                self.skip("links in a circle", place)
                return
            inside = list(self._entries(root, place))
            marks = marks_among(os.path.basename(name) if is_folder else "images" for name, is_folder in inside)
            stems = {os.path.splitext(name)[0] for name, is_folder in inside if not is_folder}
            for name, is_folder in inside:
                if is_folder and os.path.basename(name) in marks:
                    self.skip("folders of masks or annotations", name)
                elif is_folder:
                    walk(name, above | {here})
                elif stems & {re.sub(r"(?i)[ _-]masks?([ _-]?\d+)?$", "", stem := os.path.splitext(name)[0])} - {stem}:
                    self.skip("masks beside their images", name)
                else:
                    found.append(name)

        top = root / folder
        walk(folder, frozenset(map(os.path.realpath, {*top.absolute().parents, *top.resolve().parents})))
        return sorted(found)

    def _entries(self, root: Path, place: str) -> Iterator[tuple[str, bool]]:
        """Paths from ``root`` of the folders (true) and images in ``place``."""
        for entry in sorted(os.scandir(os.path.join(root, place)), key=lambda e: e.name):
            name = os.path.join(place, entry.name)
            if entry.name.startswith("."):
                self.skip("hidden", name)
            elif entry.name in _SYSTEM:
                self.skip("of the file system", name)
            elif entry.is_dir() and self._is_own(Path(entry.path)):
                self.skip("of lora_vit's own", name)
            elif entry.is_dir():
                yield name, True
            elif not entry.is_file():
                self.skip("broken links", name)
            elif _is_image(entry.path):
                yield name, False
            else:
                self.skip(_OTHERS.get(os.path.splitext(name)[1].lower(), "no images"), name)

    def _is_own(self, folder: Path) -> bool:
        """Whether a folder is the cache, or holds what training wrote: never a class, regardless of its content."""
        own_files = (RECORD, PLAN, ".lock", CHECKPOINT)
        if folder.resolve() == self.cache_dir.resolve() or any((folder / name).exists() for name in own_files):
            return True
        if folder.name in ("tensorboard", "summary"):  # of a run or a sweep whose folder is that of the images
            return any((folder.parent / name).exists() for name in (RECORD, PLAN))
        return folder.name == "outputs" and any((folder / name).is_dir() for name in ("runs", "sweeps"))


def digests_of(root: Path, names: Sequence[str], cache_dir: Path, fetch: bool = True) -> np.ndarray | None:
    """Sha256 of each file below ``root``, uint8 [N, 32]; the rest as of :func:`facts_of`."""
    facts = facts_of(root, names, cache_dir, fetch)
    return None if facts is None else facts["digest"].copy()


def facts_of(root: Path, names: Sequence[str], cache_dir: Path, fetch: bool = True) -> np.ndarray | None:
    """Of each file below ``root`` its sha256 (``digest``) and its ``head``; only files that changed since are read.

    None if files would have to be read and not ``fetch``. Raises OSError for a file, ConfigError for ``cache_dir``.
    """
    store = cache_dir / f"facts-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.npz"
    each = ((name, os.stat(os.path.join(root, name))) for name in names)
    stats = {name: _STAT.pack(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in each}

    def unread() -> list[str]:
        return [name for name, stat in stats.items() if known.get(name, b"")[: _STAT.size] != stat]

    known = _kept(store)
    if unread():
        if not fetch:
            return None
        with locked_in(cache_dir, store.name):
            known = _kept(store)  # perhaps another run has just read them
            settled = time.time_ns() - _UNSETTLED
            missing, keeping = unread(), Every(_KEEP_EVERY)
            for name, facts in zip(missing, _read(root, missing), strict=True):
                known[name] = stats[name] + facts
                if keeping.due() or name == missing[-1]:  # what stops this costs no second reading
                    kept = {name: row for name, row in known.items() if _STAT.unpack(row[: _STAT.size])[2] < settled}
                    with writing_to(cache_dir), replacing(store) as file:
                        rows = np.array([*kept.values()], f"V{_STAT.size + _FACTS.itemsize}")
                        np.savez(file, names=[*map(os.fsencode, kept)], rows=rows)
    return np.frombuffer(b"".join(known[name][_STAT.size :] for name in names), _FACTS)


def _kept(store: Path) -> dict[str, bytes]:
    """What earlier runs knew of the folder's files (those of several data sets, perhaps): stat and facts by name."""
    try:
        with store.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(zip(map(os.fsdecode, arrays["names"].tolist()), arrays["rows"].tolist(), strict=True))
    except Exception:  # absent, or damaged in one of many ways: the files are read again
        return {}


def _read(root: Path, names: list[str]) -> Iterator[bytes]:
    """Facts of files, read side by side."""

    def facts(name: str) -> bytes:
        content = Path(root, name).read_bytes()
        return hashlib.sha256(content).digest() + np.array(head_of(content), Head).tobytes()

    return in_threads(lambda here: map(facts, names[here]), len(names), _CHUNK, "reading images", len(names) < _CHUNK)


def in_threads(work: Callable[[slice], Iterable[Any]], count: int, most: int, what: str,
               quiet: bool = False) -> Iterator[Any]:  # fmt: skip
    """What ``work`` gives for ``count`` files, piece by piece of at ``most`` so many; ``what`` the bar says is done."""
    from joblib import cpu_count  # of the cores that this process may use

    threads = cpu_count()
    length = max(1, min(most, count // (8 * threads)))
    pieces = [slice(i, min(i + length, count)) for i in range(0, count, length)]
    with Progress(what, count, quiet) as bar, ThreadPoolExecutor(threads) as pool:
        try:
            for piece, found in zip(pieces, pool.map(lambda piece: list(work(piece)), pieces), strict=True):
                yield from found
                bar.advance(piece.stop - piece.start)
        finally:  # what stops this takes back what has not begun
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def locked_in(cache_dir: Path, what: str) -> Iterator[None]:
    """Hold the lock on ``what``, in the cache folder: the data's own folder stays clean, and may be read-only."""
    with contextlib.ExitStack() as stack:
        with writing_to(cache_dir):
            stack.enter_context(locked(cache_dir / f"{hashlib.sha256(os.fsencode(what)).hexdigest()[:16]}.lock"))
        yield


@contextlib.contextmanager
def writing_to(cache_dir: Path) -> Iterator[None]:
    """Raise ConfigError in the place of OSError: the cache's folder cannot be written."""
    try:
        yield
    except OSError as error:
        what = f"data.cache_dir={shown(cache_dir)} cannot be written ({error.strerror or error})"
        raise ConfigError(f"{what}: give another folder") from None
