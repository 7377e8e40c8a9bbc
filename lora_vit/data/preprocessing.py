"""What is done to a picture before a model sees it: the one description of it, and the code that does it.

It needs neither torch nor the data, so a deployed model can use it too:

>>> from lora_vit import preprocessing
>>> prepare = preprocessing("exported/onnx")  # or the folder of a trial, or a file that merge or export wrote
>>> images = prepare("image.jpg")[None]  # float32 [1, 3, S, S]
"""

import contextlib
import importlib
import io
import json
import os
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

from lora_vit.errors import ConfigError
from lora_vit.files import shown

for plugin in ("pillow_heif", "pillow_avif"):  # where they are installed; of the second to import it is all
    with contextlib.suppress(ImportError):
        getattr(importlib.import_module(plugin), "register_heif_opener", bool)()
Range = tuple[float, float]  # the values that become 0 and 255 where pixels have more than 8 bits
WHOLE = (0.0, 65535.0)  # of 16 bits
ABOUT = "lora_vit.json"  # what an export says of itself: in its folder, and inside a .pt2
DEEP, SEVERAL, ALPHA = "more than 8 bits", "several pictures: the first is used", "an alpha channel"
KINDS = (DEEP, SEVERAL, ALPHA)  # of files, as their headers show them
Head = np.dtype([("width", "<u4"), ("height", "<u4"), *((kind, "?") for kind in KINDS)])  # upright; 0 if unreadable
_LOCK, _INSIDE, _FILTERS = threading.Lock(), list[Any](), contextlib.ExitStack()  # of threads for which Pillow reads


@dataclass(frozen=True)
class Decoding:
    """How a file becomes RGB, uint8 [3, h, w]: its first picture, turned upright where its EXIF data says so.

    ``size``: pixels to which the short side is resized (antialiased), around whose centre a square is cropped; None: as
    it is. ``value_range``: what becomes 0 and 255 where pixels have 16 or 32 bits; those without data become 0.
    ``background``: the colour behind transparent pixels; None, in older adapters: transparency is dropped.
    """

    size: int | None
    value_range: Range | None = None
    background: tuple[int, ...] | None = (255, 255, 255)

    def __call__(self, file: "str | os.PathLike[str] | Image.Image") -> np.ndarray:
        """The pixels. Raises ConfigError where a file cannot be read, or is deep and there is no range."""
        try:
            pixels, _ = self.read(file if isinstance(file, Image.Image) else Path(file).read_bytes())
            if pixels.ndim == 1:
                raise ValueError(f"its values are {pixels[0]:g} .. {pixels[-1]:g}, not 8-bit as those trained on")
            return pixels
        except Exception as error:  # damaged files make Pillow's readers raise errors of many kinds
            raise ConfigError(f"{shown(str(file))} cannot be read as an image ({reason(error)})") from None

    def read(self, file: Any, find: bool = False) -> tuple[np.ndarray, set[str]]:
        """The pixels of a file (its bytes or Pillow's image), and what is to be told of such files.

        Smallest value, those of some pixels and largest take the pixels' place where they have more than 8 bits and
        there is no range. For 16 bits of colour there is one, unless it is to ``find``.
        """
        told, colour, no_data = set[str](), False, None
        if getattr(file, "filename", "") and getattr(file, "tile", ()) and not file.tell():  # Pillow's, not decoded yet
            file = Path(file.filename).read_bytes()
        ours = not isinstance(file, Image.Image)  # others' images stay as they are
        if (image := _jpeg(file, self.size) if ours else None) is None:
            with _opened(file) as opened:
                if self.size is not None and ours:
                    opened.draft("RGB", (self.size, self.size))  # JPEG decodes straight to a size not below this
                colour = _is_deep_colour(opened)
                opened.getexif()  # Pillow 10 cannot read it from a TIFF of several pages any more once these are loaded
                opened.load()
                no_data = getattr(opened, "tag_v2", {}).get(42113)  # GDAL's, of a TIFF: the value of pixels without any
                image = ImageOps.exif_transpose(opened)  # a copy, which the look at further pictures leaves alone
                told |= _several(opened)
        if colour or image.mode.startswith(("I", "F")):
            told.add(DEEP)
            values = np.asarray(image.convert("RGB"), np.float64) * 256 if colour else np.asarray(image, np.float64)
            empty = np.isclose(values, float(no_data.strip(" \0")), 1e-6, equal_nan=True) if no_data else False
            known = values[~np.broadcast_to(empty, values.shape)]
            if not known.size or not np.isfinite(known).all():
                raise ValueError("it has values that are not finite" if known.size else "none of its pixels holds data")
            ends = float(known.min()), float(known.max()) + 255 * colour
            if colour and ends[1] < 4096 and not image.has_transparency_data:  # Pillow keeps the upper 8 bits alone
                black = f"16-bit {image.mode} with values up to {ends[1]:g} of 65535: its upper 8 bits are black"
                raise ValueError(f"{black}, convert it to 8 bits")
            if self.value_range is None and (find or not colour):
                some = known[np.random.default_rng(0).integers(0, known.size, 64)]
                return np.array([ends[0], *some, ends[1]]), told
            low, high = self.value_range or WHOLE
            if np.mean((known < low) | (known > high)) > 0.5:
                raise ValueError("its values are {:g} .. {:g}, value_range is {:g} .. {:g}".format(*ends, low, high))
            if ends[0] < low or ends[1] > high:
                told.add("values beyond this range, which are clipped")
            scale = 256 / max(high - low + (image.mode != "F"), 1e-30)  # of whole numbers, high is a value too
            if colour:
                table = np.clip((256 * np.arange(256) - low) * scale, 0, 255).astype(int).tolist()
                image = image.point([n for band in image.getbands() for n in (range(256) if band == "A" else table)])
            else:
                scaled = np.clip((np.where(empty, low, values) - low) * scale, 0, 255)  # Pillow would clip at 255
                image = Image.fromarray(scaled.astype(np.uint8))
        if self.background is not None and image.has_transparency_data:
            image = image.convert("RGBA")
            if np.asarray(image.getchannel("A")).min() < 255:
                told.add("transparent pixels")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*self.background, 255)), image)
        if image.mode != "RGB":
            image = image.convert("RGB")
        if self.size is not None:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), told


@dataclass(frozen=True)
class Preprocessing:
    """From a picture's file to the model's input: decoding, one resize (antialiased) and normalisation.

    ``image_size``: pixels of a side that the model wants, S; ``mean`` and ``std``: of each colour in [0, 1].
    """

    decoding: Decoding
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def __call__(self, file: "str | os.PathLike[str] | Image.Image") -> np.ndarray:
        """The model's input, float32 [3, S, S], of an image file or of Pillow's image; raises as :class:`Decoding`."""
        pixels, size = self.decoding(file).astype(np.float32), (self.image_size, self.image_size)
        if pixels.shape[1:] != size:
            how = Image.Resampling[self.interpolation.upper()]
            pixels = np.stack([np.asarray(Image.fromarray(one).resize(size, how)) for one in pixels])
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        return (pixels / 255 - mean) / std

    def to_dict(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key != "decoding"}
        read = self.decoding
        return {"orientation": "exif", "background": read.background, "value_range": read.value_range,
                "decoded_size": read.size, "crop": "squash" if read.size is None else "centre", **own}  # fmt: skip

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> "Preprocessing":
        """As the card of an adapter, export or merged file says it: as a whole, or that of older adapters in parts."""
        said = card["preprocessing"] if "preprocessing" in card else {"background": None, **card["base"], **card}
        own: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
        decoding = Decoding(own["decoded_size"], own["value_range"], own["background"])
        return cls(decoding, *(own[key] for key in ("image_size", "mean", "std", "interpolation")))


def preprocessing(place: "str | os.PathLike[str]") -> Preprocessing:
    """What a trained model wants done to pictures. Raises ConfigError where nothing there says it.

    ``place``: the folder of a trial or an export, or a file: a merged ``.safetensors``, an ``.onnx`` or a ``.pt2``.
    """
    path = Path(place)
    try:
        return Preprocessing.of(_about(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename or path} does not exist: give a trial's folder or an export") from None
    except (OSError, ValueError, LookupError, TypeError, SafetensorError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} says nothing of how its images are prepared ({error!r})") from None


def _about(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = next((path / name for name in ("adapter.json", ABOUT) if (path / name).exists()), path / ABOUT)
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return json.loads(file.metadata()["lora_vit"])
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            found = [name for name in archive.namelist() if name.endswith(ABOUT)]
            return json.loads(archive.read(found[-1]))
    if path.suffix == ".onnx":
        import onnxruntime

        return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["lora_vit"])
    return json.loads(path.read_text(encoding="utf-8"))


def head_of(content: bytes) -> tuple[int | bool, ...]:
    """What a file's header tells of its first picture: the fields of Head."""
    with contextlib.suppress(Exception):
        if (head := _jpeg_head(content)) and not head[2]:
            return (*head[:2], False, False, False)
        with _opened(content) as opened:
            is_deep = _is_deep_colour(opened) or opened.mode.startswith(("I", "F"))
            sides = opened.size[:: -1 if opened.getexif().get(0x0112, 1) > 4 else 1]
            return (*sides, is_deep, bool(_several(opened)), opened.has_transparency_data)
    return 0, 0, False, False, False


@contextlib.contextmanager
def _opened(file: Any) -> Iterator[Any]:
    """Pillow's image of a file's bytes, or the image itself. No thread warns while any is in here.

    Threads that leave Python's own context for this crosswise would mix its filters up.
    """
    Image.MAX_IMAGE_PIXELS = None  # the user's own files: large ones are no attack
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30
    with _LOCK:
        if not _INSIDE:
            _FILTERS.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # odd metadata is not the user's concern if the pixels can be read
        _INSIDE.append(file)
    try:
        with Image.open(io.BytesIO(file)) if isinstance(file, bytes) else contextlib.nullcontext(file) as opened:
            yield opened
    finally:
        with _LOCK:
            _INSIDE.pop()
            if not _INSIDE:
                _FILTERS.close()


def _is_deep_colour(opened: Any) -> bool:
    return opened.mode in ("RGB", "RGBA", "LA") and ";16" in str(getattr(opened, "tile", ""))  # LA is read as colour is


def _several(opened: Any) -> set[str]:
    with contextlib.suppress(Exception):  # what follows the first picture may be damaged
        if opened.format != "MPO" and getattr(opened, "is_animated", False):  # MPO: with its preview
            return {SEVERAL}
    return set()


def _jpeg_head(content: bytes) -> tuple[int, int, bool] | None:
    """Width and height of a JPEG as it lies, and whether it may say how it is to be turned; None: Pillow is asked."""
    with contextlib.suppress(ValueError):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours in ("YCbCr", "Gray"):
            end = 2  # of the segments before the pixels, each with its length
            while content[end : end + 2] not in (b"\xff\xda", b""):
                end += 2 + int.from_bytes(content[end + 2 : end + 4], "big")
            return width, height, any(content.find(said, 0, end) >= 0 for said in (b"Exif\0", b"Orientation"))
    return None


def _jpeg(content: bytes, size: int | None) -> Any:
    """A JPEG upright, the pixels Pillow's own, in less time; None: Pillow is to be asked.

    Straight at the smallest of 1/1, 1/2, 1/4, 1/8 that is not below ``size``, as Pillow's draft.
    """
    with contextlib.suppress(ValueError, AttributeError):  # of what is damaged; of another Pillow's inner parts
        if head := _jpeg_head(content):
            factor = next((f for f in (8, 4, 2) if size and min(head[:2]) // size >= f), 1)
            least = [-(-side // factor) if factor > 1 else 0 for side in head[:2]]
            pixels = simplejpeg.decode_jpeg(content, "RGBX", min_height=least[1], min_width=least[0], min_factor=factor)
            # Pillow's own layout of RGB, so nothing is copied; ``frombuffer`` would have four colours to resize
            mapped = Image.core.map_buffer(pixels, pixels.shape[1::-1], "raw", 0, ("RGB", 0, 1))
            image = Image.new("RGB", (0, 0))._new(mapped)
            if not head[2]:
                return image
            with _opened(content) as opened:
                image.info = opened.info
            return ImageOps.exif_transpose(image)
    return None


def reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own words show a buffer's address
        return "no format that Pillow knows, or more bands or bits than it reads: save RGB of 8 bits"
    return str(error) or type(error).__name__
