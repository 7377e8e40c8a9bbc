"""Decoding many files: into one array, or those that are asked for (``Streamed``)."""

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lora_vit.data.preprocessing import Decoding, reason
from lora_vit.errors import ConfigError
from lora_vit.files import shown

Note = tuple[str, str, Any]
"""What there is to say of a decoded file: its name, one of these, and what belongs to it.

``broken``: why it cannot be used. ``size``: ``WIDTHxHEIGHT``, which is not the array's. ``values``: some, where it has
more than 8 bits and there is no range to scale them by. Anything else is a note on the file, with None.
"""


def read(root: Path, name: str, digest: np.ndarray, decoding: Decoding) -> tuple[np.ndarray, set[str]]:
    """What :meth:`Decoding.read` finds in a file. Raises ValueError where its sha256 is another."""
    if hashlib.sha256(content := Path(root, name).read_bytes()).digest() != digest.tobytes():
        raise ValueError("it changed after it was first read: run the command again")
    return decoding.read(content, find=True)


def decode(root: Path, names: list[str], digests: np.ndarray, decoding: Decoding,
           out: Path | np.ndarray, start: int) -> list[Note]:  # fmt: skip
    """Decode files of ``root`` into the rows from ``start`` on of an array, or of the one in a file. Raises OSError.

    Returns what there is to say of some of them.
    """
    array: Any = out if isinstance(out, np.ndarray) else np.load(out, mmap_mode="r")
    notes: list[Note] = []
    rows = np.zeros((len(names), *array.shape[1:]), np.uint8)
    for row, name, digest in zip(rows, names, digests, strict=True):
        try:
            pixels, told = read(root, name, digest, decoding)
        except Exception as error:
            notes.append((name, "broken", reason(error)))
            continue
        if pixels.ndim == 1:
            notes.append((name, "values", pixels))
        elif pixels.shape != row.shape:
            notes.append((name, "size", f"{pixels.shape[2]}x{pixels.shape[1]}"))
        else:
            row[:] = pixels
            notes += [(name, what, None) for what in told]
    if isinstance(out, np.ndarray):
        out[start : start + len(rows)] = rows
        return notes
    # Written rather than mapped: a full disk is an error here, but would kill a process that maps the file.
    with open(out, mode="r+b") as file:
        file.seek(array.offset + start * rows[0].nbytes)
        file.write(rows.data)
    return notes


class Streamed:
    """Stands where an array of all images would, uint8 [N, 3, h, w], and decodes those that are asked for, in threads.

    An index is an id or an array of ids. Raises ConfigError for a file that cannot be decoded so.
    """

    def __init__(self, root: Path, names: Sequence[str], digests: np.ndarray, decoding: Decoding,
                 shape: tuple[int, ...], threads: int):  # fmt: skip
        self.root, self.names, self.digests, self.decoding = root, names, digests, decoding
        self.shape, self.nbytes, self.threads = shape, math.prod(shape), threads
        self._pool = ThreadPoolExecutor(threads)  # which starts none before it is used: a process may fork until then

    def __getitem__(self, ids: Any) -> np.ndarray:
        if np.ndim(ids) == 0:
            return self._one(ids)
        rows = np.empty((len(ids), *self.shape[1:]), np.uint8)

        def fill(places: np.ndarray) -> None:
            for place in places:
                rows[place] = self._one(ids[place])

        list(self._pool.map(fill, np.array_split(np.arange(len(ids)), self.threads)))
        return rows

    def _one(self, at: int) -> np.ndarray:
        try:
            pixels, _ = read(self.root, self.names[at], self.digests[at], self.decoding)
            if pixels.shape != self.shape[1:]:
                raise ValueError(f"it becomes {pixels.shape}, not {self.shape[1:]}")
            return pixels
        except IndexError:
            raise
        except Exception as error:
            name, remedy = shown(self.root / self.names[at]), "data.cache=disk finds all such files before it trains"
            raise ConfigError(f"{name} cannot be decoded ({reason(error)}): repair or remove it; {remedy}") from None
