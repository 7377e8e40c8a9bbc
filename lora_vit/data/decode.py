"""What an image file becomes: RGB, uint8, upright. Light: the processes that decode import it, and little else."""

from __future__ import annotations

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

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from lora_vit.data.dataset import Range, shown
from lora_vit.errors import ConfigError

_DARK = 16
"""Upper 8 bits of 16 that no sound colour image stays below: it has 12 bits or fewer."""

_LOOK_EVERY = 0.5
"""Seconds after which a process that decodes looks whether its parent is still there."""


def decode(file: Path, size: int | None, value_range: Range | None = None) -> np.ndarray:
    """An image file as RGB, uint8 [3, h, w]; with ``size`` its short side resized (antialiased) and centre-cropped.

    Turned upright where its EXIF data says so. Transparency is dropped. Pixels of 16 or 32 bits are mapped from
    ``value_range`` to 0 .. 255.

    Raises:
        ConfigError: it cannot be read as an image, or has more than 8 bits and there is no range.
    """
    try:
        image, _ = _opened(file, size)
        if value_range is None and (found := _values(image)) is not None:
            raise ValueError("its values are {:g} .. {:g}, not 8-bit as those trained on".format(*found))
        return _pixels(image, size, value_range)
    except Exception as error:  # damaged files make Pillow's readers raise errors of many kinds
        raise ConfigError(f"{shown(file)} cannot be read as an image ({_reason(error)})") from None


@dataclass(frozen=True)
class Note:
    """What there is to say of a file that was decoded.

    Attributes:
        name: of the file.
        broken: why it cannot be used.
        other_size: ``WIDTHxHEIGHT`` where that is not the array's.
        values: smallest and largest, where it has more than 8 bits and there is no range to scale them by.
        has_more: it holds further pictures (pages, frames).
    """

    name: str
    broken: str = ""
    other_size: str = ""
    values: Range | None = None
    has_more: bool = False


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
        """Decode the files into rows ``start`` and on; returns what there is to say of some.

        Raises:
            OSError: ``out`` cannot be written.
        """
        rows = np.zeros((len(names), *self.shape[1:]), np.uint8)
        notes = [self._decode(*each) for each in zip(rows, names, digests, strict=True)]
        # Written rather than mapped: a full disk is an error here, but would kill a process that maps the file.
        with open(self.out, "r+b") as file:
            file.seek(self.offset + start * rows[0].nbytes)
            file.write(rows.data)
        return [note for note in notes if note != Note(note.name)]

    def _decode(self, row: np.ndarray, name: str, digest: np.ndarray) -> Note:
        try:
            content = Path(self.root, name).read_bytes()
            if hashlib.sha256(content).digest() != digest.tobytes():
                return Note(name, "it changed while it was read: run the command again")
            image, has_more = _opened(io.BytesIO(content), self.size)
            values = _values(image)
            if values is not None and self.value_range is None:
                return Note(name, values=values)
            pixels = _pixels(image, self.size, self.value_range)
        except Exception as error:
            return Note(name, _reason(error))
        if pixels.shape != row.shape:
            return Note(name, other_size=f"{pixels.shape[2]}x{pixels.shape[1]}")
        row[:] = pixels
        return Note(name, has_more=has_more)


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


def _opened(file: io.BytesIO | Path, size: int | None) -> tuple[Image.Image, bool]:
    """The first picture of a file, upright, and whether the file holds more."""
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
        upright = ImageOps.exif_transpose(image)  # a copy, which the look at further pictures leaves alone
        has_more = False
        with contextlib.suppress(Exception):  # what follows the first picture may be damaged
            has_more = image.format != "MPO" and bool(getattr(image, "is_animated", False))  # MPO: with its preview
        return upright, has_more


def _values(image: Image.Image) -> Range | None:
    """Smallest and largest value of an image of more than 8 bits, None for others.

    Raises:
        ValueError: values that are not finite.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    grey = np.asarray(image)
    if not np.isfinite(grey).all():
        raise ValueError("it has values that are not finite")
    return float(grey.min()), float(grey.max())


def _pixels(image: Image.Image, size: int | None, value_range: Range | None) -> np.ndarray:
    if value_range is not None and (found := _values(image)) is not None:
        # Pillow's own conversion clips at 255 instead of scaling.
        low, high = value_range
        grey = np.asarray(image).astype(np.float64)
        if np.mean((grey < low) | (grey > high)) > 0.5:
            raise ValueError("its values are {:g} .. {:g}, those trained on {:g} .. {:g}".format(*found, low, high))
        scaled = (grey - low) * (256 / max(high - low + (image.mode != "F"), 1e-30))
        image = Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGB")
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
