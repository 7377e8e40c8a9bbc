"""Images decoded once, on all cores, into a uint8 array that every later run maps into memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lora_vit.data.dataset import DataError
from lora_vit.records import locked

_FORMAT = 1
_NAMED = 20
"""Broken files that one message names."""
_CHUNK = 64
"""Most images that a worker decodes before it reports."""
_BYTES_PER_WORKER = 4 << 20
"""Image files that are worth the start of another worker (a quarter of a second)."""

Problem = tuple[str, str]
"""An image that cannot be used: its name, and ``""`` if it is broken, else its width and height."""


def decode(path: Path | str, size: int | None) -> np.ndarray:
    """An image file as RGB, uint8 [3, h, w]; with ``size`` its short side resized (antialiased) and centre-cropped.

    Turned upright where its EXIF data says so. Transparency is dropped, 16-bit grey becomes 8-bit.

    Raises:
        DataError: the file cannot be read as an image.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # odd metadata is not the user's concern as long as the pixels can be read
            if size is not None:
                image.draft("RGB", (size, size))  # JPEG decodes straight to a size not below this
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            pixels = _rgb(image)
            if size is not None:
                pixels = ImageOps.fit(pixels, (size, size), Image.Resampling.BILINEAR)
            return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))
    except Exception as error:  # damaged files make Pillow's readers raise errors of many kinds
        raise DataError(f"{path} cannot be read as an image ({str(error) or type(error).__name__})") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits at 255 instead of scaling them
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(grey, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def decoded(root: Path, names: list[str], size: int | None, cache_dir: str, quiet: bool) -> np.ndarray:
    """The images as a read-only map, uint8 [N, 3, h, w]; decoded now if no earlier run has.

    The cache is keyed by the files' names, sizes and times, so that a changed file makes a new one, and a folder
    that moved does not. Runs that start together wait for the first. It appears whole or not at all.

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
    key, file_bytes = _key(root, names, size)
    path = folder / f"images-{key}.npy"
    images = _open(path, len(names))
    if images is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / f"{path.name}.lock"):
                images = _open(path, len(names))  # perhaps another run has just made it
                if images is None:
                    _build(root, names, size, path, file_bytes, quiet)
                    images = np.load(path, mmap_mode="r")
        except OSError as error:
            raise DataError(
                f"data.cache_dir={cache_dir} cannot be written ({error.strerror or error}): give another folder"
            ) from None
    return images


@contextlib.contextmanager
def locked_in(cache_dir: Path, what: str) -> Iterator[None]:
    """Hold the lock on ``what``, in the cache folder: the data's own folder stays clean, and may be read-only."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with locked(cache_dir / f"{hashlib.sha256(os.fsencode(what)).hexdigest()[:16]}.lock"):
        yield


def _open(path: Path, count: int) -> np.ndarray | None:
    """The cache, or None if it is absent or damaged (the disk's doing: we replace it whole)."""
    try:
        images: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return images if images.dtype == np.uint8 and images.ndim == 4 and len(images) == count else None


def _key(root: Path, names: list[str], size: int | None) -> tuple[str, int]:
    """Name of the files' decoded form, and their bytes together."""
    digest = hashlib.sha256(f"{_FORMAT} {size}\n".encode())
    total = 0
    for name in names:
        try:
            stat = os.stat(os.path.join(root, name))
        except OSError as error:
            raise DataError(f"{root / name} cannot be read ({error.strerror}): mend or remove it") from None
        digest.update(os.fsencode(name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        total += stat.st_size
    return digest.hexdigest()[:16], total


@dataclass(frozen=True)
class _Job:
    """Decode files of ``root`` into the array of ``shape`` that starts at byte ``offset`` of the file ``out``."""

    root: str
    size: int | None
    shape: tuple[int, ...]
    out: str
    offset: int

    def run(self, start: int, names: list[str]) -> list[Problem]:
        """Decode the files into rows ``start`` and on; what cannot be used is returned."""
        rows = np.zeros((len(names), *self.shape[1:]), np.uint8)
        problems = []
        for row, name in zip(rows, names, strict=True):
            try:
                image = decode(os.path.join(self.root, name), self.size)
            except DataError:
                problems.append((name, ""))
                continue
            if image.shape == row.shape:
                row[:] = image
            else:
                problems.append((name, f"{image.shape[2]}x{image.shape[1]}"))
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
        self._told = False

    def run(self, start: int, names: list[str]) -> list[Problem]:
        """As the job's; errors of the process are raised here."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if not self._told:
                pickle.dump(self._job, self._process.stdin)
                self._told = True
            pickle.dump((start, names), self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            raise DataError(
                f"a process that decodes images ended with code {code} between {names[0]} and {names[-1]} of "
                f"{self._job.root}: is there enough memory, are these images sound?"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        problems: list[Problem] = answer
        return problems

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """A worker's side: read the job, then chunks, from stdin until it closes, and answer each."""
    job: _Job = pickle.load(sys.stdin.buffer)
    while True:
        try:
            start, names = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: list[Problem] | OSError
        try:
            answer = job.run(start, names)
        except OSError as error:
            answer = error
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _build(root: Path, names: list[str], size: int | None, path: Path, file_bytes: int, quiet: bool) -> None:
    first = _first_readable(root, names, size)
    shape = (len(names), *first.shape)
    needed = int(np.prod(shape))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            f"the decoded images need {needed / 2**30:.1f} GiB, {path.parent} has {free / 2**30:.1f} GiB: "
            "give another data.cache_dir, or a smaller data.cache_size"
        )
    partial = path.with_name(f"{path.name}.partial")  # one name: what a killed run left is written over
    try:
        with partial.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            offset = file.tell()
            file.truncate(offset + needed)
        job = _Job(str(root), size, shape, str(partial), offset)
        problems = _run(job, names, min(_cores(), file_bytes // _BYTES_PER_WORKER), quiet)
        _refuse(root, problems, f"{first.shape[2]}x{first.shape[1]}")
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _cores() -> int:
    """Cores this process may use (a container or a batch system may grant fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(job: _Job, names: list[str], count: int, quiet: bool) -> list[Problem]:
    """Decode all files: here if there are few, else in ``count`` workers, each with a thread that feeds it."""
    from lora_vit.terminal import Progress  # not in the workers: it doubles the time they take to start

    length = max(1, min(_CHUNK, len(names) // (8 * max(count, 1))))
    chunks = [(start, names[start : start + length]) for start in range(0, len(names), length)]
    problems: list[Problem] = []
    with Progress("decoding images", len(names), quiet) as bar, contextlib.ExitStack() as stack:

        def collect(found: list[Problem], done: int) -> None:
            problems.extend(found)
            bar.advance(done)

        if count < 2:
            for start, part in chunks:
                collect(job.run(start, part), len(part))
            return problems
        pool = stack.enter_context(ThreadPoolExecutor(count))
        workers = [_Worker(job) for _ in range(count)]
        for worker in workers:
            stack.callback(worker.stop)  # before the pool is left, so that its threads end
        idle = list(workers)

        def feed(chunk: tuple[int, list[str]]) -> list[Problem]:
            worker = idle.pop()  # there are as many workers as threads
            try:
                return worker.run(*chunk)
            finally:
                idle.append(worker)

        for chunk, found in zip(chunks, pool.map(feed, chunks), strict=True):
            collect(found, len(chunk[1]))
    return problems


def _refuse(root: Path, problems: list[Problem], usual: str) -> None:
    """Raise the one error that tells all broken images, or an image of another size."""
    broken = sorted(name for name, other in problems if not other)
    if broken:
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        count = "1 broken image" if len(broken) == 1 else f"{len(broken)} broken images"
        raise DataError(f"{count} below {root}: {', '.join(broken[:_NAMED])}{more}; mend or remove them")
    for name, other in sorted(problems):
        raise DataError(
            f"{root / name} is {other}, other images are {usual}: give data.cache_size to bring all to one size"
        )


def _first_readable(root: Path, names: list[str], size: int | None) -> np.ndarray:
    """Any image that decodes: it tells the shape. The broken ones are named together later."""
    for name in names:
        try:
            return decode(root / name, size)
        except DataError:
            continue
    raise DataError(f"none of the {len(names)} images below {root} can be read, for example {names[0]}")
