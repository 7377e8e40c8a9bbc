"""Decoding many files into one array. Light: the processes that decode import it, and little else."""

import hashlib
import io
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_vit.data.preprocessing import Decoding, reason

Note = tuple[str, str, Any]
"""What there is to say of a decoded file: its name, one of these, and what belongs to it.

``broken``: why it cannot be used. ``size``: ``WIDTHxHEIGHT``, which is not the array's. ``values``: some, where it has
more than 8 bits and there is no range to scale them by. Anything else is a note on the file, with None.
"""


@dataclass(frozen=True)
class Job:
    """Decode files of ``root`` into the array of ``shape`` that starts at byte ``offset`` of the file ``out``."""

    root: str
    decoding: Decoding
    shape: tuple[int, ...]
    out: str
    offset: int

    def run(self, start: int, names: Sequence[str], digests: np.ndarray) -> list[Note]:
        """Decode the files into rows ``start`` and on; returns what there is to say of some. Raises OSError."""
        rows = np.zeros((len(names), *self.shape[1:]), np.uint8)
        notes = [note for each in zip(rows, names, digests, strict=True) for note in self._fill(*each)]
        # Written rather than mapped: a full disk is an error here, but would kill a process that maps the file.
        with open(self.out, "r+b") as file:
            file.seek(self.offset + start * rows[0].nbytes)
            file.write(rows.data)
        return notes

    def _fill(self, row: np.ndarray, name: str, digest: np.ndarray) -> list[Note]:
        try:
            if hashlib.sha256(content := Path(self.root, name).read_bytes()).digest() != digest.tobytes():
                return [(name, "broken", "it changed while it was read: run the command again")]
            pixels, told = self.decoding.read(io.BytesIO(content), find=True)
        except Exception as error:
            return [(name, "broken", reason(error))]
        if pixels.ndim == 1:
            return [(name, "values", pixels)]
        if pixels.shape != row.shape:
            return [(name, "size", f"{pixels.shape[2]}x{pixels.shape[1]}")]
        row[:] = pixels
        return [(name, what, None) for what in told]


def end_with(parent: int) -> None:
    """Let this process end when the process ``parent`` does, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
