"""Images decoded once, in parallel, into a uint8 array that every later run maps into memory."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lora_vit.data.dataset import DataError
from lora_vit.data.progress import Progress

_FORMAT = 1
_NAMED = 20
"""Broken files that one message names."""
_CHUNK = 256
"""Images that a thread decodes before it takes the next."""


def decode(path: Path, size: int | None) -> np.ndarray:
    """An image file as RGB, uint8 [3, h, w]; with ``size`` its short side resized (antialiased) and centre-cropped.

    Raises:
        DataError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as opened:
            if size is not None:
                opened.draft("RGB", (size, size))  # JPEG decodes straight to a size not below this
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({str(error) or type(error).__name__})") from None
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decoded(root: Path, names: list[str], size: int | None, cache_dir: str, quiet: bool) -> np.ndarray:
    """The images as a read-only map, uint8 [N, 3, h, w]; decoded now if no earlier run has.

    The cache is keyed by the files' names, sizes and times, so that a changed file makes a new one. Runs that
    start together wait for the first. It appears whole or not at all.

    Args:
        root: folder of the files.
        names: their paths below it; their order is the order of the array.
        size: pixels of each side, None for the images' own (then all must agree).
        cache_dir: where caches lie.
        quiet: no progress.

    Raises:
        DataError: broken images (all named at once), images of several sizes, no space, or a folder that
            cannot be written.
    """
    folder = Path(cache_dir).expanduser()
    path = folder / f"{root.name}-{_key(root, names, size)}.npy"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    _build(root, names, size, path, quiet)
        except OSError as error:
            raise DataError(
                f"data.cache_dir={cache_dir} cannot be written ({error.strerror or error}): give another folder"
            ) from None
    return np.load(path, mmap_mode="r")


def _key(root: Path, names: list[str], size: int | None) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {size}\n".encode())
    for name in names:
        stat = os.stat(root / name)
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _build(root: Path, names: list[str], size: int | None, path: Path, quiet: bool) -> None:
    first = _first_readable(root, names, size)
    shape = (len(names), *first.shape)
    needed = int(np.prod(shape))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            f"the decoded images need {needed / 2**30:.1f} GiB, {path.parent} has {free / 2**30:.1f} GiB: "
            "give another data.cache_dir, or a smaller data.cache_size"
        )
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    broken: list[str] = []
    try:
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)

        def work(start: int) -> int:
            chunk = range(start, min(start + _CHUNK, len(names)))
            for i in chunk:
                try:
                    image = decode(root / names[i], size)
                except DataError:
                    broken.append(names[i])
                    continue
                if image.shape != first.shape:
                    raise DataError(
                        f"{root / names[i]} is {image.shape[2]}x{image.shape[1]}, other images are "
                        f"{first.shape[2]}x{first.shape[1]}: give data.cache_size to bring all to one size"
                    )
                out[i] = image
            return len(chunk)

        # Decoding and resizing release Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool, Progress("decoding images", len(names), quiet) as bar:
            for done in pool.map(work, range(0, len(names), _CHUNK)):
                bar.advance(done)
        if broken:
            more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
            shown = ", ".join(sorted(broken)[:_NAMED])
            raise DataError(f"{len(broken)} broken images below {root}: {shown}{more}; mend or remove them")
        out.flush()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _first_readable(root: Path, names: list[str], size: int | None) -> np.ndarray:
    """Any image that decodes: it tells the shape. The broken ones are named together later."""
    for name in names:
        try:
            return decode(root / name, size)
        except DataError:
            continue
    raise DataError(f"none of the {len(names)} images below {root} can be read, for example {names[0]}")
