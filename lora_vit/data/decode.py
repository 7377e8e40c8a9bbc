"""Decoding many files: into one array, or those that are asked for (``Streamed``)."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_vit.data.preprocessing import Decoding, reason
from lora_vit.errors import ConfigError
from lora_vit.files import shown

Note = tuple[str, str, Any]
"""What there is to say of a decoded file: its name, one of these, and what belongs to it.

``broken``: why it cannot be used. ``size``: ``WIDTHxHEIGHT``, which is not the array's. ``values``: some, where it has
more than 8 bits and there is no range to scale them by. Anything else is a note on the file, with None.
"""


def decode(root: Path, names: list[str], digests: np.ndarray, decoding: Decoding, out: Any, start: int) -> list[Note]:
    """Decode files of ``root`` into rows from ``start`` on of ``out``, an array or a mapped one. Raises OSError.

    Returns what there is to say of some of them.
    """
    is_mapped, notes = isinstance(out, np.memmap), list[Note]()
    rows = np.zeros((len(names), *out.shape[1:]), np.uint8) if is_mapped else out[start : start + len(names)]
    for row, name, digest in zip(rows, names, digests, strict=True):
        try:
            if hashlib.sha256(content := Path(root, name).read_bytes()).digest() != digest.tobytes():
                raise ValueError("it changed after it was first read: run the command again")
            pixels, told = decoding.read(content, find=True)
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
    if is_mapped:  # written rather than stored there: a full disk is an error then, but would kill the process now
        with open(out.filename, mode="r+b") as file:
            file.seek(out.offset + start * rows[0].nbytes)
            file.write(rows.data)
    return notes


class Streamed:
    """Stands where an array of all images would, uint8 [N, 3, h, w], and decodes those whose ids are asked for.

    Raises ConfigError for a file that cannot be decoded so.
    """

    def __init__(self, root: Path, names: Sequence[str], digests: np.ndarray, decoding: Decoding,
                 shape: tuple[int, ...]):  # fmt: skip
        from joblib import cpu_count  # of the cores that this process may use

        self.root, self.names, self.digests, self.decoding = root, names, digests, decoding
        self.shape, self._threads = shape, cpu_count()
        self._pool = ThreadPoolExecutor(self._threads)
        Image.core.set_blocks_max(16)  # that Pillow keeps: else the system clears new memory for each picture

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        rows, length = np.empty((len(ids), *self.shape[1:]), np.uint8), -(-len(ids) // self._threads)

        def part(start: int) -> list[Note]:
            own = ids[start : start + length]
            return decode(self.root, [self.names[i] for i in own], self.digests[own], self.decoding, rows, start)

        for notes in self._pool.map(part, range(0, len(ids), length)):
            for name, kind, why in notes:
                if why is not None:
                    what = f"{shown(self.root / name)} cannot be decoded ({why if kind == 'broken' else f'its {kind}'})"
                    raise ConfigError(f"{what}: repair or remove it; data.cache=disk finds all such files beforehand")
        return rows
