"""Images decoded once, on all cores, into a uint8 array that every later run maps into memory."""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np

from lora_vit.data.dataset import Decoded, Found, Wanted, content_of
from lora_vit.data.decode import Note, decode, end_with
from lora_vit.data.files import Listing, digests_of, locked_in, writing_to
from lora_vit.data.preprocessing import WHOLE, Decoding, Range
from lora_vit.errors import ConfigError
from lora_vit.files import shown, write_json
from lora_vit.terminal import Progress

_FORMAT = 4
_NAMED = 20  # broken files that one message names
_CHUNK = 64  # most images that a process decodes before it reports
_BYTES_PER_WORKER = 4 << 20  # image files that are worth the start of another process (a quarter of a second)
_BLOCK, _BLOCKS = 1 << 20, 256  # bytes and number of the parts of a cache that are read again when it is opened
_LEVELS = 32  # of 256: fewer for nearly all pixels of deep images show that a value stands alone

Parts = dict[str, list[tuple[str, int]]]  # images of each part: paths below the data set's folder, and labels


def found_in(root: Path, class_names: list[str], parts: Parts, passed: Listing, wanted: Wanted) -> Found | None:
    """The data set of the images in ``parts``, below ``root``; None or an error as ``digests_of`` has it."""
    names = [name for images in parts.values() for name, _ in images]
    labels = np.array([label for images in parts.values() for _, label in images], dtype=np.int64)
    ends = np.cumsum([len(images) for images in parts.values()])
    ids = dict(zip(parts, np.split(np.arange(len(names)), ends[:-1]), strict=True))
    if (digests := digests_of(root, names, wanted.cache_dir, wanted.fetch)) is None:
        return None
    content = content_of(class_names, labels, ids, digests)
    decode_all = functools.partial(decoded, root, names, digests, wanted.cache_dir, skip=wanted.on_broken == "skip")
    return Found(labels, class_names, ids, content, decode_all, passed.lines(), digests, root, names)


def decoded(root: Path, names: list[str], digests: np.ndarray, cache_dir: Path, decoding: Decoding,
            skip: bool = False) -> Decoded:  # fmt: skip
    """The images as a read-only map, uint8 [N, 3, h, w]; decoded now if no earlier run has.

    The cache is keyed by the files' content; runs that start together wait for the first. Without a size in
    ``decoding`` all images must have one. Raises ConfigError for several sizes, no space or place, and broken images
    unless we ``skip`` them.
    """
    how = f"{_FORMAT} {decoding.size} {decoding.background}{decoding.value_range or ''}{' skip' * skip}\n"
    path = cache_dir / f"images-{hashlib.sha256(how.encode() + digests.tobytes()).hexdigest()[:16]}.npy"
    if found := _open(path):
        return found
    with writing_to(cache_dir), locked_in(cache_dir, path.name):
        return _open(path) or _build(root, names, digests, decoding, path, skip)  # another run may have made it


def _open(path: Path) -> Decoded | None:
    """The cache, or None if it is absent or damaged (the disk's doing: we replace it whole)."""
    try:
        low_high, told, digest, *more = json.loads(path.with_suffix(".json").read_text())
        low_high = low_high and (float(low_high[0]), float(low_high[1]))
        found = np.load(path, mmap_mode="r"), low_high, tuple(told), dict(*more)
        return found if digest == _digest(path) else None
    except Exception:  # damaged in one of many ways
        return None


def _digest(path: Path) -> str:
    """By which a cache is known again: of all its bytes, or of blocks all over it where they are many."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _build(root: Path, names: list[str], digests: np.ndarray, decoding: Decoding, path: Path, skip: bool) -> Decoded:
    shape: tuple[int, ...] = (len(names), 3, 1, 1)  # where none decodes, all are named below
    for name in names:
        with contextlib.suppress(ConfigError):
            shape = (len(names), *replace(decoding, value_range=(-1e39, 1e39))(root / name).shape)
            break
    needed, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        lacking = f"the decoded images need {needed / 2**30:.1f} GiB, {path.parent} has {free / 2**30:.1f} GiB"
        raise ConfigError(f"{lacking}: give another data.cache_dir, or a smaller data.cache_size")
    partial = path.with_name(f"{path.name}.partial")  # one name: what a killed run left is written over
    try:
        np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        notes = _run(root, names, digests, decoding, partial)
        deep = {name: values for name, kind, values in notes if kind == "values"}
        if deep and (skip or all(kind != "broken" for _, kind, _ in notes)):
            # one range for all, so that equal values stay equal
            sound = len(names) - sum(kind == "broken" for _, kind, _ in notes)
            decoding = replace(decoding, value_range=_range_of(root, deep, sound))
            notes = _run(root, names, digests, decoding, partial)
        broken = {name: why for name, kind, why in notes if kind == "broken"}
        if broken and not skip:
            named = sorted(f"{shown(name)} ({why})" for name, why in broken.items())
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            count = f"{len(named)} broken image{'s' if len(named) > 1 else ''} below {shown(root)}"
            remedy = "repair or remove them, or leave them out by data.on_broken=skip"
            raise ConfigError(f"{count}: {', '.join(named[:_NAMED])}{more}; {remedy}")
        for name, other in sorted((name, other) for name, kind, other in notes if kind == "size"):
            differs = f"{shown(root / name)} is {other}, other images are {shape[3]}x{shape[2]}"
            raise ConfigError(f"{differs}: give data.cache_size to bring all to one size")
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        told = Counter(what for _, what, nothing in notes if nothing is None)
        value_range = decoding.value_range if "more than 8 bits" in told else None
        lines = [f"{count:,} file{'s' * (count > 1)} with {what}" for what, count in sorted(told.items())]
        rows = {row: broken[name] for row, name in enumerate(names) if name in broken}
        write_json(path.with_suffix(".json"), [value_range, lines, _digest(partial), [*rows.items()]])
        os.replace(partial, path)
        return np.load(path, mmap_mode="r"), value_range, tuple(lines), rows
    finally:
        partial.unlink(missing_ok=True)


def _range_of(root: Path, deep: dict[str, np.ndarray], count: int) -> Range:
    """What becomes 0 and 255 in deep images, by name, among ``count``. Raises ConfigError where that is not clear."""
    lowest, highest = min(deep, key=lambda name: deep[name][0]), max(deep, key=lambda name: deep[name][-1])
    low, high = float(deep[lowest][0]), float(deep[highest][-1])
    some, mixed = np.concatenate([values[1:-1] for values in deep.values()]), len(deep) < count
    found, (low, high) = (low, high), WHOLE if mixed else (low, high)
    _, pixels = np.unique(np.floor(((some - low) / max(high - low, 1e-30)).clip(0, 1) * 255), return_counts=True)
    levels = 1 + int(np.searchsorted(np.sort(pixels)[::-1].cumsum(), 0.99 * len(some)))
    if 4 * levels < min(len(np.unique(some)), 4 * _LEVELS):  # where there are so few values, they are kept
        name, value = (lowest, low) if 2 * np.median(some) > low + high else (highest, high)
        what = f"{shown(root / name)} has the value {value:g}"
        if mixed:
            of_all = f"{len(deep)} of {count} images below {shown(root)}"
            what = "{} have more than 8 bits ({:g} .. {:g})".format(of_all, *found)
        most = f"by {low:g} .. {high:g} 99 % of their pixels would be {levels} of 256 grey levels"
        remedy = "say with data.value_range=[low,high] what becomes 0 and 255, or repair what stands alone"
        raise ConfigError(f"{what}: {most}: {remedy}")
    return low, high


def _run(root: Path, names: list[str], digests: np.ndarray, decoding: Decoding, out: Path) -> list[Note]:
    """Decode all files: if they are many in several processes, because Pillow keeps the interpreter's lock."""
    from joblib import Parallel, cpu_count, delayed  # loky's processes import neither the user's script nor torch

    file_bytes = 0
    with contextlib.suppress(OSError):  # one that is gone by now is named below
        file_bytes = sum(os.path.getsize(root / name) for name in names)
    count = max(1, min(cpu_count(), file_bytes // _BYTES_PER_WORKER))
    length = max(1, min(_CHUNK, len(names) // (8 * count)))
    starts = range(0, len(names), length)
    parts = ((str(root), names[i : i + length], digests[i : i + length], decoding, str(out), i) for i in starts)
    how = {"return_as": "generator", "idle_worker_timeout": 10}  # seconds after which an idle process ends
    pool = Parallel(count, backend="loky", initializer=end_with, initargs=(os.getpid(),), **how)
    notes: list[Note] = []
    try:
        with Progress("decoding images", len(names)) as bar, contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # joblib's, of work that it cancels
            with _without_ctrl_c() if count > 1 else contextlib.nullcontext():
                answers = stack.enter_context(contextlib.closing(pool(delayed(decode)(*part) for part in parts)))
            for start, answer in zip(starts, answers, strict=True):
                notes += answer
                bar.advance(min(length, len(names) - start))
    except BrokenProcessPool:
        died = f"a process that decodes images below {shown(root)} died"
        raise ConfigError(f"{died}: is there enough memory, are these images sound?") from None
    return notes


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Start processes that never hear Ctrl-C, which a terminal sends to all: this one hears it, and ends them."""
    from joblib.externals.loky.backend import resource_tracker as lokys_tracker

    for tracker in (resource_tracker, lokys_tracker):
        tracker.ensure_running()  # each would let the signal through when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
