"""What an image file becomes: RGB, uint8, upright. Light: the processes that decode import it, and little else."""

import contextlib
import hashlib
import io
import os
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from lora_vit.data.dataset import Range, shown
from lora_vit.errors import ConfigError

_DARK = 16  # upper 8 bits of 16 that no sound colour image stays below: it has 12 bits or fewer
_LOOK_EVERY = 0.5  # seconds after which a process that decodes looks whether its parent is still there


def decode(file: Path, size: int | None, value_range: Range | None = None) -> np.ndarray:
    """An image file as RGB, uint8 [3, h, w]; with ``size`` its short side resized (antialiased) and centre-cropped.

    Turned upright where its EXIF data says so. Transparency is dropped. Pixels of 16 or 32 bits are mapped from
    ``value_range`` to 0 .. 255. Raises ConfigError where it cannot be read, or has such pixels and there is no range.
    """
    try:
        pixels, _ = _decoded(file, size, value_range)
        if isinstance(pixels, tuple):
            raise ValueError("its values are {:g} .. {:g}, not 8-bit as those trained on".format(*pixels))
        return pixels
    except Exception as error:  # damaged files make Pillow's readers raise errors of many kinds
        raise ConfigError(f"{shown(file)} cannot be read as an image ({_reason(error)})") from None


Note = tuple[str, str, Any]
"""What there is to say of a decoded file: its name, one of these, and what belongs to it.

``broken``: why it cannot be used. ``size``: ``WIDTHxHEIGHT``, which is not the array's. ``values``: smallest and
largest, where it has more than 8 bits and there is no range to scale them by. ``more``: it holds further pictures.
"""


@dataclass(frozen=True)
class Job:
    """Decode files of ``root`` into the array of ``shape`` that starts at byte ``offset`` of the file ``out``."""

    root: str
    size: int | None
    shape: tuple[int, ...]
    out: str
    offset: int
    value_range: Range | None = None

    def run(self, start: int, names: Sequence[str], digests: np.ndarray) -> list[Note]:
        """Decode the files into rows ``start`` and on; returns what there is to say of some. Raises OSError."""
        rows = np.zeros((len(names), *self.shape[1:]), np.uint8)
        notes = [self._fill(*each) for each in zip(rows, names, digests, strict=True)]
        # Written rather than mapped: a full disk is an error here, but would kill a process that maps the file.
        with open(self.out, "r+b") as file:
            file.seek(self.offset + start * rows[0].nbytes)
            file.write(rows.data)
        return [note for note in notes if note is not None]

    def _fill(self, row: np.ndarray, name: str, digest: np.ndarray) -> Note | None:
        try:
            content = Path(self.root, name).read_bytes()
            if hashlib.sha256(content).digest() != digest.tobytes():
                return name, "broken", "it changed while it was read: run the command again"
            pixels, has_more = _decoded(io.BytesIO(content), self.size, self.value_range)
        except Exception as error:
            return name, "broken", _reason(error)
        if isinstance(pixels, tuple):
            return name, "values", pixels
        if pixels.shape != row.shape:
            return name, "size", f"{pixels.shape[2]}x{pixels.shape[1]}"
        row[:] = pixels
        return (name, "more", None) if has_more else None


def end_with(parent: int) -> None:
    """Let this process end when the process ``parent`` does, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own words show a buffer's address
        return "no format that Pillow knows"
    return str(error) or type(error).__name__


def _decoded(file: io.BytesIO | Path, size: int | None, value_range: Range | None) -> tuple[np.ndarray | Range, bool]:
    """The first picture of a file, upright, uint8 [3, h, w], and whether the file holds more.

    Smallest and largest value take the pixels' place where there are more than 8 bits and no range to scale them by.
    """
    # The user's own files: large ones are no attack.
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30
    with warnings.catch_warnings(), Image.open(file) as opened:
        warnings.simplefilter("ignore")  # odd metadata is not the user's concern as long as the pixels can be read
        if size is not None:
            opened.draft("RGB", (size, size))  # JPEG decodes straight to a size not below this
        kept_upper_bits = opened.mode in ("RGB", "RGBA") and ";16" in str(opened.tile)
        opened.getexif()  # Pillow 10 cannot read it from a TIFF of several pages any more once these are loaded
        opened.load()
        if kept_upper_bits and (brightest := int(np.asarray(opened)[..., :3].max())) < _DARK:
            raise ValueError(
                f"16-bit {opened.mode} with values up to {256 * brightest + 255} of 65535: its upper 8 bits "
                "are black, convert it to 8 bits"
            )
        image = ImageOps.exif_transpose(opened)  # a copy, which the look at further pictures leaves alone
        has_more = False
        with contextlib.suppress(Exception):  # what follows the first picture may be damaged
            has_more = opened.format != "MPO" and bool(getattr(opened, "is_animated", False))  # MPO: with its preview
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image, np.float64)
        if not np.isfinite(grey).all():
            raise ValueError("it has values that are not finite")
        values = float(grey.min()), float(grey.max())
        if value_range is None:
            return values, has_more
        low, high = value_range
        if np.mean((grey < low) | (grey > high)) > 0.5:
            raise ValueError("its values are {:g} .. {:g}, those trained on {:g} .. {:g}".format(*values, low, high))
        scale = 256 / max(high - low + (image.mode != "F"), 1e-30)  # of whole numbers, high is a value too
        image = Image.fromarray(np.clip((grey - low) * scale, 0, 255).astype(np.uint8))  # Pillow would clip at 255
    if image.mode != "RGB":
        image = image.convert("RGB")
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), has_more
