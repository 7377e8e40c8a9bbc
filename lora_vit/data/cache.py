"""Images decoded once, on all cores, into a uint8 array that every later run maps into memory."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from lora_vit.data.dataset import Decoded, Found, Range, content_of, shown
from lora_vit.data.files import PassedOver, cannot_write, cores, digests_of, locked_in
from lora_vit.errors import ConfigError
from lora_vit.files import write_json

_FORMAT = 3
_NAMED = 20
"""Broken files that one message names."""
_CHUNK = 64
"""Most images that a worker decodes before it reports."""
_BYTES_PER_WORKER = 4 << 20
"""Image files that are worth the start of another worker (a quarter of a second)."""

_DARK = 16
"""Upper 8 bits of 16 that no sound colour image stays below: it has 12 bits or fewer."""


Parts = dict[str, list[tuple[str, int]]]
"""The images of each part: their paths below the data set's folder, and their labels."""
Problem = tuple[str, Exception]
"""A file's name and why it cannot be used as it is: DeepImage, OtherSize, MorePictures or, if broken, ValueError."""


class DeepImage(Exception):  # noqa: N818  (not an error: a range is wanted)
    """An image of more than 8 bits, for which no range was given; its smallest and its largest value."""

    def __str__(self) -> str:
        return "its values are {:g} .. {:g}, not 8-bit as those trained on".format(*self.args)


class OtherSize(Exception):  # noqa: N818  (not an error where there is ``data.cache_size``)
    """An image of another size than the first."""


class MorePictures(Exception):  # noqa: N818  (not an error: it is told)
    """A file with several pages or frames, of which the first is used."""


def decode(file: Path, size: int | None, value_range: Range | None = None) -> np.ndarray:
    """An image file as RGB, uint8 [3, h, w]; with ``size`` its short side resized (antialiased) and centre-cropped.

    Turned upright where its EXIF data says so. Transparency is dropped. Pixels of 16 or 32 bits are mapped from
    ``value_range`` to 0 .. 255.

    Raises:
        ConfigError: it cannot be read as an image, or is deep and there is no range.
    """
    try:
        return _decode(file, size, value_range)
    except Exception as error:  # damaged files make Pillow's readers raise errors of many kinds
        raise ConfigError(f"{shown(file)} cannot be read as an image ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own words show a buffer's address
        return "no format that Pillow knows"
    return str(error) or type(error).__name__


def _decode(file: io.BytesIO | Path, size: int | None, value_range: Range | None) -> np.ndarray:
    # The user's own files: large ones are no attack.
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30
    with warnings.catch_warnings(), Image.open(file) as image:
        warnings.simplefilter("ignore")  # odd metadata is not the user's concern as long as the pixels can be read
        if size is not None:
            image.draft("RGB", (size, size))  # JPEG decodes straight to a size not below this
        kept_upper_bits = image.mode in ("RGB", "RGBA") and ";16" in str(image.tile)
        image.getexif()  # Pillow 10 cannot read it from a TIFF of several pages any more once these are loaded
        image.load()
        if kept_upper_bits and (brightest := int(np.asarray(image)[..., :3].max())) < _DARK:
            raise ValueError(
                f"16-bit {image.mode} with values up to {256 * brightest + 255} of 65535, of which the upper 8 bits "
                "are black: convert it to 8 bits"
            )
        ImageOps.exif_transpose(image, in_place=True)
        pixels = _rgb(image, value_range)
        if size is not None:
            pixels = ImageOps.fit(pixels, (size, size), Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))


def _has_more(content: bytes) -> bool:
    with contextlib.suppress(Exception), warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
        warnings.simplefilter("ignore")
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))  # MPO: a photo with its preview
    return False  # what follows the first picture is damaged


def _rgb(image: Image.Image, value_range: Range | None) -> Image.Image:
    if image.mode == "RGB":
        return image
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    # Pillow's own conversion clips at 255 instead of scaling
    grey = np.asarray(image).astype(np.float64)
    if not np.isfinite(grey).all():
        raise ValueError("it has values that are not finite")
    if value_range is None:
        raise DeepImage(float(grey.min()), float(grey.max()))
    low, high = value_range
    if np.mean((grey < low) | (grey > high)) > 0.5:
        raise ValueError(f"its values are {grey.min():g} .. {grey.max():g}, those trained on {low:g} .. {high:g}")
    scaled = (grey - low) * (256 / max(high - low + (image.mode != "F"), 1e-30))
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8)).convert("RGB")


def decoded(
    root: Path, names: list[str], digests: np.ndarray, size: int | None, cache_dir: Path, quiet: bool
) -> Decoded:
    """The images as a read-only map, uint8 [N, 3, h, w]; decoded now if no earlier run has.

    The cache is keyed by the files' content, so that a changed file makes a new one, and a folder that moved does
    not. Runs that start together wait for the first. It appears whole or not at all.

    Args:
        root: folder of the files.
        names: their paths below it; their order is the order of the array.
        digests: sha256 of each, uint8 [N, 32].
        size: pixels of each side, None for the images' own (then all must agree).
        cache_dir: where caches lie.
        quiet: no progress.

    Returns:
        The map, and the range of values that became 0 .. 255 where files have more than 8 bits.

    Raises:
        ConfigError: broken images (all named at once), images of several sizes, no space, or a folder that
            cannot be written.
    """
    key = hashlib.sha256(f"{_FORMAT} {size}\n".encode() + digests.tobytes()).hexdigest()[:16]
    path = cache_dir / f"images-{key}.npy"
    found = _open(path, len(names))
    if found is None:
        try:
            with locked_in(cache_dir, path.name):
                found = _open(path, len(names))  # perhaps another run has just made it
                if found is None:
                    beside = _build(root, names, digests, size, path, quiet)
                    found = np.load(path, mmap_mode="r"), *beside
        except OSError as error:
            raise cannot_write(cache_dir, error) from None
    return found


def found_in(
    root: Path, class_names: list[str], parts: Parts, passed: PassedOver, cache_dir: Path, quiet: bool, fetch: bool
) -> Found:
    """The data set of the images in ``parts``, which lie below ``root``.

    Raises:
        ConfigError: as :func:`~lora_vit.data.files.digests_of`.
    """
    names = [name for images in parts.values() for name, _ in images]
    labels = np.array([label for images in parts.values() for _, label in images], dtype=np.int64)
    ends = np.cumsum([len(images) for images in parts.values()])
    ids = dict(zip(parts, np.split(np.arange(len(names)), ends[:-1]), strict=True))
    digests = digests_of(root, names, cache_dir, quiet, fetch)

    def decode_all(size: int | None) -> Decoded:
        return decoded(root, names, digests, size, cache_dir, quiet)

    content = content_of(class_names, labels, ids, digests)
    return Found(labels, class_names, ids, content, decode_all, passed.lines(), digests)


def _open(path: Path, count: int) -> Decoded | None:
    """The cache, or None if it is absent or damaged (the disk's doing: we replace it whole)."""
    try:
        images: np.ndarray = np.load(path, mmap_mode="r")
        low_high, more = json.loads(path.with_suffix(".json").read_text())
        value_range = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        whole = images.dtype == np.uint8 and images.ndim == 4 and len(images) == count
        return (images, value_range, int(more)) if whole else None
    except Exception:  # damaged in one of many ways
        return None


@dataclass(frozen=True)
class _Job:
    """Decode files of ``root`` into the array of ``shape`` that starts at byte ``offset`` of the file ``out``."""

    root: str
    size: int | None
    shape: tuple[int, ...]
    out: str
    offset: int
    value_range: Range | None = None

    def run(self, start: int, names: list[str], digests: np.ndarray) -> list[Problem]:
        """Decode the files into rows ``start`` and on; what cannot be used is returned."""
        rows = np.zeros((len(names), *self.shape[1:]), np.uint8)
        problems: list[Problem] = []
        for row, name, digest in zip(rows, names, digests, strict=True):
            try:
                content = Path(self.root, name).read_bytes()
                if hashlib.sha256(content).digest() != digest.tobytes():
                    raise ValueError("it was changed in this moment: start again")
                image = _decode(io.BytesIO(content), self.size, self.value_range)
                if image.shape != row.shape:
                    raise OtherSize(f"{image.shape[2]}x{image.shape[1]}")
                row[:] = image
                if _has_more(content):
                    raise MorePictures
            except (DeepImage, OtherSize, MorePictures) as error:
                problems.append((name, error))
            except Exception as error:  # of Pillow's many kinds not all can be sent to another process
                problems.append((name, ValueError(_reason(error))))
        # Written rather than mapped: a full disk is an error here, but would kill a process that maps the file.
        with open(self.out, "r+b") as file:
            file.seek(self.offset + start * rows[0].nbytes)
            file.write(rows.data)
        return problems


class _Worker:
    """A Python process that runs a job's chunks; Pillow spends most of a small image under the interpreter's lock.

    It is a plain subprocess, because multiprocessing would run the user's main script in it once more.
    """

    def __init__(self, job: _Job):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        command = [sys.executable, "-c", "from lora_vit.data.cache import serve; serve()"]
        # In a session of its own, so that Ctrl-C reaches the parent alone, which then ends this.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._job = job

    def run(self, *chunk: Any) -> list[Problem]:
        """As the job's; errors of the process are raised here."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((self._job, chunk), self._process.stdin)
            self._process.stdin.flush()
            answer: list[Problem] | OSError = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code, (_, names, _) = self._process.wait(), chunk
            raise ConfigError(
                f"a process that decodes images ended with code {code} between {shown(names[0])} and "
                f"{shown(names[-1])} of {shown(self._job.root)}: is there enough memory, are these images sound?"
            ) from None
        if isinstance(answer, OSError):
            raise answer
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """A worker's side: read a job and a chunk of it from stdin and answer, until stdin closes."""
    with contextlib.suppress(EOFError):
        while True:
            job, chunk = pickle.load(sys.stdin.buffer)
            try:
                answer = job.run(*chunk)
            except OSError as error:
                answer = error
            pickle.dump(answer, sys.stdout.buffer)
            sys.stdout.buffer.flush()


def _build(
    root: Path, names: list[str], digests: np.ndarray, size: int | None, path: Path, quiet: bool
) -> tuple[Range | None, int]:
    """Make the cache; returns the range that it scaled, and how many files have further pictures."""
    first = _first_readable(root, names, size)
    shape = (len(names), *first.shape)
    needed = int(np.prod(shape))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ConfigError(
            f"the decoded images need {needed / 2**30:.1f} GiB, {path.parent} has {free / 2**30:.1f} GiB: "
            "give another data.cache_dir, or a smaller data.cache_size"
        )
    partial = path.with_name(f"{path.name}.partial")  # one name: what a killed run left is written over
    try:
        offset = np.lib.format.open_memmap(partial, "w+", np.uint8, shape).offset
        job = _Job(str(root), size, shape, str(partial), offset)
        problems = _run(job, names, digests, quiet)
        deep = [error.args for _, error in problems if isinstance(error, DeepImage)]
        if deep:  # one range for all, so that equal values stay equal
            job = replace(job, value_range=(min(low for low, _ in deep), max(high for _, high in deep)))
            problems = _run(job, names, digests, quiet)
        unused = [problem for problem in problems if not isinstance(problem[1], MorePictures)]
        _refuse(root, unused, f"{first.shape[2]}x{first.shape[1]}")
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        beside = job.value_range, len(problems) - len(unused)
        write_json(path.with_suffix(".json"), beside)
        os.replace(partial, path)
        return beside
    finally:
        partial.unlink(missing_ok=True)


def _run(job: _Job, names: list[str], digests: np.ndarray, quiet: bool) -> list[Problem]:
    """Decode all files: here if there are few, else in several workers, each with a thread that feeds it."""
    from lora_vit.terminal import Progress  # not in the workers: it doubles the time they take to start

    file_bytes = 0
    with contextlib.suppress(OSError):  # one that is gone by now is named below
        file_bytes = sum(os.path.getsize(os.path.join(job.root, name)) for name in names)
    count = min(cores(), file_bytes // _BYTES_PER_WORKER)
    length = max(1, min(_CHUNK, len(names) // (8 * max(count, 1))))
    chunks = [(i, names[i : i + length], digests[i : i + length]) for i in range(0, len(names), length)]
    problems: list[Problem] = []
    with Progress("decoding images", len(names), quiet) as bar, contextlib.ExitStack() as stack:
        answers: Iterator[list[Problem]] = (job.run(*chunk) for chunk in chunks)
        if count > 1:
            pool = stack.enter_context(ThreadPoolExecutor(count))
            idle = [_Worker(job) for _ in range(count)]
            for worker in idle:
                stack.callback(worker.stop)  # before the pool is left, so that its threads end

            def feed(chunk: tuple[int, list[str], np.ndarray]) -> list[Problem]:
                worker = idle.pop()  # there are as many workers as threads
                try:
                    return worker.run(*chunk)
                finally:
                    idle.append(worker)

            answers = pool.map(feed, chunks)
        for chunk, found in zip(chunks, answers, strict=True):
            problems += found
            bar.advance(len(chunk[1]))
    return problems


def _refuse(root: Path, problems: list[Problem], usual: str) -> None:
    """Raise the one error that tells all broken images, or an image of another size."""
    broken = sorted(f"{shown(name)} ({error})" for name, error in problems if isinstance(error, ValueError))
    if broken:
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        count = "1 broken image" if len(broken) == 1 else f"{len(broken)} broken images"
        raise ConfigError(f"{count} below {shown(root)}: {', '.join(broken[:_NAMED])}{more}; mend them or take them away")
    if problems:
        name, size = min(problems, key=lambda problem: problem[0])
        raise ConfigError(
            f"{shown(root / name)} is {size}, other images are {usual}: give data.cache_size to bring all to one size"
        )


def _first_readable(root: Path, names: list[str], size: int | None) -> np.ndarray:
    """Any image that decodes: it tells the shape. The broken ones are named together later."""
    why = ""
    for name in names:
        try:
            return decode(root / name, size, (-1e39, 1e39))
        except ConfigError as error:
            why = why or str(error)
    raise ConfigError(f"none of the {len(names)} images below {shown(root)} can be read: {why}")
