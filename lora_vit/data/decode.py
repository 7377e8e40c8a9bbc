"""Decoding many files into one array. Light: the processes that decode import it, and little else."""

import hashlib
import io
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from lora_vit.data.preprocessing import Decoding, reason

Note = tuple[str, str, Any]
"""What there is to say of a decoded file: its name, one of these, and what belongs to it.

``broken``: why it cannot be used. ``size``: ``WIDTHxHEIGHT``, which is not the array's. ``values``: some, where it has
more than 8 bits and there is no range to scale them by. Anything else is a note on the file, with None.
"""


def decode(root: str, names: list[str], digests: np.ndarray, decoding: Decoding, out: str, start: int) -> list[Note]:
    """Decode files of ``root`` into the rows from ``start`` on of the array in the file ``out``. Raises OSError.

    Returns what there is to say of some of them.
    """
    array, notes = np.load(out, mmap_mode="r"), list[Note]()
    rows = np.zeros((len(names), *array.shape[1:]), np.uint8)
    for row, name, digest in zip(rows, names, digests, strict=True):
        try:
            if hashlib.sha256(content := Path(root, name).read_bytes()).digest() != digest.tobytes():
                raise ValueError("it changed while it was read: run the command again")
            pixels, told = decoding.read(io.BytesIO(content), find=True)
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
    # Written rather than mapped: a full disk is an error here, but would kill a process that maps the file.
    with open(out, mode="r+b") as file:
        file.seek(array.offset + start * rows[0].nbytes)
        file.write(rows.data)
    return notes


def end_with(parent: int) -> None:
    """Let this process end when the process ``parent`` does, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
