"""Images decoded on all cores: once, into a uint8 array that every later run maps into memory, or when needed."""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lora_vit.data.dataset import Decoded, Found, Wanted, content_of
from lora_vit.data.decode import Note, Streamed, decode
from lora_vit.data.files import Listing, facts_of, in_threads, locked_in, writing_to
from lora_vit.data.preprocessing import DEEP, KINDS, WHOLE, Decoding, Range
from lora_vit.errors import ConfigError
from lora_vit.files import shown, write_json

_FORMAT = 4
_NAMED = 20  # broken files that one message names
_CHUNK = 32  # most images that a thread decodes before it reports
_MEMORY_SHARE, _DISK_SHARE = 0.25, 0.5  # largest parts of what is free, of memory since it keeps what is mapped
_BLOCK, _BLOCKS = 1 << 20, 256  # bytes and number of the parts of a cache that are read again when it is opened
_LEVELS = 32  # of 256: fewer for nearly all pixels of deep images show that a value stands alone

Parts = dict[str, list[tuple[str, int]]]  # images of each part: paths below the data set's folder, and labels


def found_in(root: Path, class_names: list[str], parts: Parts, passed: Listing, wanted: Wanted) -> Found | None:
    """The data set of the images in ``parts``, below ``root``; None or an error as ``facts_of`` has it."""
    names = [name for images in parts.values() for name, _ in images]
    labels = np.array([label for images in parts.values() for _, label in images], dtype=np.int64)
    ends = np.cumsum([len(images) for images in parts.values()])
    ids = dict(zip(parts, np.split(np.arange(len(names)), ends[:-1]), strict=True))
    if (facts := facts_of(root, names, wanted.cache_dir, wanted.fetch)) is None:
        return None
    digests, heads = facts["digest"].copy(), facts["head"]
    content = content_of(class_names, labels, ids, digests)
    how: Any = {"cache": wanted.cache, "heads": heads, "skip": wanted.on_broken == "skip"}
    decode_all = functools.partial(decoded, root, names, digests, wanted.cache_dir, **how)
    return Found(labels, class_names, ids, content, decode_all, passed.lines(), digests, root, names)


def decoded(root: Path, names: list[str], digests: np.ndarray, cache_dir: Path, decoding: Decoding,
            cache: str = "disk", heads: np.ndarray | None = None, skip: bool = False) -> Decoded:  # fmt: skip
    """The images, uint8 [N, 3, h, w], as ``data.cache`` says: a read-only map of a file, in memory, or ``Streamed``.

    The file is keyed by the images' content; runs that start together wait for the first. Without a size in
    ``decoding`` all images must have one. ``heads``: what the files' headers tell, which streaming needs. Raises
    ConfigError for several sizes, no space or place, and broken images unless we ``skip`` them.
    """
    how = f"{_FORMAT} {decoding.size} {decoding.background}{decoding.value_range or ''}{' skip' * skip}\n"
    path = cache_dir / f"images-{hashlib.sha256(how.encode() + digests.tobytes()).hexdigest()[:16]}.npy"
    if cache in ("auto", "disk") and (found := _open(path)):
        return found
    needed = math.prod(shape := _shape_of(root, names, decoding))
    free = psutil.virtual_memory().available, shutil.disk_usage(cache_dir).free
    gib = [n / 2**30 for n in (needed, *free)]
    sizes = "{:,.1f} GiB decoded, {:,.1f} of memory and {:,.1f} of data.cache_dir free".format(*gib)
    can_stream = heads is not None and not skip and (decoding.value_range is not None or not heads[DEEP].any())
    cache = place_of(cache, needed, *free, can_stream)
    if cache == "none" and heads is not None:
        return _streamed(root, names, digests, decoding, heads, shape, sizes)
    if needed > free[cache == "disk"]:
        raise ConfigError(f"data.cache={cache}: {sizes}: give data.cache=none, or a smaller data.cache_size")
    if cache == "memory":
        images = np.empty(shape, np.uint8)
        return images, *_fill(root, names, digests, decoding, images, skip)
    with writing_to(cache_dir), locked_in(cache_dir, path.name):
        return _open(path) or _build(root, names, digests, decoding, path, shape, skip)  # another may have


def place_of(asked: str, needed: int, memory: int, disk: int, can_stream: bool) -> str:
    """Where ``data.cache`` puts decoded images of so many bytes; ``auto``: on the disk up to shares of what is free."""
    fits = needed <= _MEMORY_SHARE * memory and needed <= _DISK_SHARE * disk
    return asked if asked != "auto" else "disk" if fits or not can_stream else "none"


def _shape_of(root: Path, names: list[str], decoding: Decoding) -> tuple[int, ...]:
    """The shape of all images, by the first that can be decoded; where none can, all are named later."""
    for name in names:
        with contextlib.suppress(ConfigError):
            return (len(names), *replace(decoding, value_range=(-1e39, 1e39))(root / name).shape)
    return (len(names), 3, 1, 1)


def _streamed(root: Path, names: list[str], digests: np.ndarray, decoding: Decoding, heads: np.ndarray,
              shape: tuple[int, ...], sizes: str) -> Decoded:  # fmt: skip
    """Raises ConfigError for what headers show to be broken or of another size, and for deep files without a range."""
    bad, sides = np.flatnonzero(heads["width"] == 0), shape[:1:-1]
    notes = decode(root, [names[i] for i in bad], digests[bad], decoding, np.empty((len(bad), *shape[1:]), "u1"), 0)
    if decoding.size is None:
        others = np.flatnonzero((heads["width"] != sides[0]) | (heads["height"] != sides[1]))
        notes += [(names[i], "size", "{}x{}".format(*heads[i].item())) for i in others if heads["width"][i]]
    _broken(root, names, notes, sides, skip=False)
    counts = {kind: int(heads[kind].sum()) for kind in KINDS}
    if counts[DEEP] and decoding.value_range is None:
        what = f"data.cache=none: {counts[DEEP]:,} of {len(names):,} images below {shown(root)} have {DEEP}"
        raise ConfigError(f"{what}: give data.value_range=[low,high], or data.cache=disk, which finds it")
    lines = (f"decoded when needed ({sizes})", *_lines(counts))
    value_range = decoding.value_range if counts[DEEP] else None
    return Streamed(root, names, digests, decoding, shape), value_range, lines, {}


def _lines(counts: Mapping[str, int]) -> tuple[str, ...]:
    """``3 files with ...`` for each kind of files that are there."""
    return tuple(f"{n:,} file{'s' * (n > 1)} with {what}" for what, n in sorted(counts.items()) if n)


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


def _build(root: Path, names: list[str], digests: np.ndarray, decoding: Decoding, path: Path,
           shape: tuple[int, ...], skip: bool) -> Decoded:  # fmt: skip
    partial = path.with_name(f"{path.name}.partial")  # one name: what a killed run left is written over
    try:
        out = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        value_range, lines, broken = _fill(root, names, digests, decoding, out, skip)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        write_json(path.with_suffix(".json"), [value_range, lines, _digest(partial), [*broken.items()]])
        os.replace(partial, path)
        return np.load(path, mmap_mode="r"), value_range, lines, broken
    finally:
        partial.unlink(missing_ok=True)


def _fill(root: Path, names: list[str], digests: np.ndarray, decoding: Decoding, out: np.ndarray, skip: bool
          ) -> tuple[Range | None, tuple[str, ...], dict[int, str]]:  # fmt: skip
    """Decode all images into an array; the rest of Decoded."""
    notes = _run(root, names, digests, decoding, out)
    deep = {name: values for name, kind, values in notes if kind == "values"}
    lost = sum(kind == "broken" for _, kind, _ in notes)
    if deep and (skip or not lost):
        # one range for all, so that equal values stay equal
        decoding = replace(decoding, value_range=_range_of(root, deep, len(names) - lost))
        notes = _run(root, names, digests, decoding, out)
    broken = _broken(root, names, notes, out.shape[:1:-1], skip)
    told = Counter(what for _, what, nothing in notes if nothing is None)
    return decoding.value_range if DEEP in told else None, _lines(told), broken


def _broken(root: Path, names: list[str], notes: list[Note], sides: tuple[int, ...], skip: bool) -> dict[int, str]:
    """Why images cannot be read, by sample id, if we ``skip`` them.

    Else raises ConfigError for them, and for images that are not as wide and high as the others.
    """
    broken = {name: why for name, kind, why in notes if kind == "broken"}
    if broken and not skip:
        named = sorted(f"{shown(name)} ({why})" for name, why in broken.items())
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        count = f"{len(named)} broken image{'s' if len(named) > 1 else ''} below {shown(root)}"
        remedy = "repair or remove them, or leave them out by data.on_broken=skip"
        raise ConfigError(f"{count}: {', '.join(named[:_NAMED])}{more}; {remedy}")
    for name, other in sorted((name, other) for name, kind, other in notes if kind == "size"):
        differs = f"{shown(root / name)} is {other}, other images are {sides[0]}x{sides[1]}"
        raise ConfigError(f"{differs}: give data.cache_size to bring all to one size")
    return {row: broken[name] for row, name in enumerate(names) if name in broken}


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


def _run(root: Path, names: list[str], digests: np.ndarray, decoding: Decoding, out: np.ndarray) -> list[Note]:
    """Decode all files, in threads: what decodes lets go of the interpreter's lock."""

    def work(here: slice) -> list[Note]:
        return decode(root, names[here], digests[here], decoding, out, here.start)

    return list(in_threads(work, len(names), _CHUNK, "decoding images"))
