"""What every data set becomes: uint8 images in memory (or mapped into it), labels, names and splits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from lora_vit.config import DataConfig
from lora_vit.errors import ConfigError

_MODULES = {
    "tiny_imagenet": "tiny_imagenet",
    "imagefolder": "folder",
    "cifar10": "cifar",
    "cifar100": "cifar",
    "digits": "digits",
    "fake": "digits",
}

IN_PACKAGES = ("digits", "fake")
"""Data sets that need no download and no decoding, and are what their version makes them."""

Range = tuple[float, float]
"""The values that become 0 and 255 where pixels have more than 8 bits."""
Decoded = tuple[np.ndarray, "Range | None", int]
"""Images uint8 [N, 3, h, w], the range where files have more than 8 bits, and how many files have further pictures."""




class NotFetchedError(ConfigError):
    """What would have to be downloaded or read first."""


@dataclass(frozen=True)
class Found:
    """What a data set consists of, before it is decoded and divided.

    Attributes:
        labels: int64 [N], indices into ``class_names``.
        class_names: one per class.
        parts: sample ids, int64, of ``train`` and of what is given apart: ``val``, ``test``, ``official_val``.
        content: which images with which classes, as :func:`content_of` says it.
        decode: the images at a number of pixels (None: their own).
        passed_over: what lies among them and is not used, a line for each kind.
        digests: sha256 of each image's file, uint8 [N, 32], where there are files.
    """

    labels: np.ndarray
    class_names: list[str]
    parts: dict[str, np.ndarray]
    content: str
    decode: Callable[[int | None], Decoded]
    passed_over: tuple[str, ...] = ()
    digests: np.ndarray | None = None


@dataclass(frozen=True)
class ImageData:
    """A decoded data set.

    Attributes:
        images: uint8 [N, 3, h, w], perhaps a read-only memory map.
        labels: int64 [N], indices into ``class_names``.
        class_names: one per class.
        splits: ``train``, ``val``, ``test`` and perhaps ``official_val``; sorted sample ids, int64.
        fingerprint: hex digest of content, labels and splits.
        passed_over: what lies among the files and is not used.
        value_range: what became 0 and 255 where the files have more than 8 bits.
        also_in_train: images of each split whose file ``train`` has too.
        with_more: files of which only the first picture (page, frame) is used.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    splits: dict[str, np.ndarray]
    fingerprint: str
    passed_over: tuple[str, ...] = ()
    value_range: Range | None = None
    also_in_train: dict[str, int] = field(default_factory=dict)
    with_more: int = 0

    def card(self) -> dict[str, Any]:
        """What a trial's record says of the data."""
        sizes = {name: len(ids) for name, ids in self.splits.items()}
        return {"fingerprint": self.fingerprint, "classes": len(self.class_names), **sizes}

    def line(self, image_size: int) -> str:
        """What is trained on and what is not, in one line; ``image_size``: pixels that the model wants."""
        sizes = ", ".join(f"{name} {len(ids):,}" for name, ids in self.splits.items())
        used = sum(map(len, self.splits.values()))
        text = f"data: {used:,} images of {len(self.class_names):,} classes: {sizes}"
        if used < len(self.labels):
            text += f"; {len(self.labels) - used:,} training images left out by data.train_per_class"
        height, width = self.images.shape[-2:]
        if min(height, width) < image_size:
            text += f"; {width}x{height} px, enlarged to {image_size} px"
        if self.value_range is not None:
            text += "; values {:g} .. {:g} scaled to 0 .. 255".format(*self.value_range)
        for name, count in self.also_in_train.items():
            text += f"; {count:,} images of {name} are in train too" if count and name != "train" else ""
        text += f"; of {self.with_more:,} files with several pictures the first is used" if self.with_more else ""
        return text + (f"; passed over: {', '.join(self.passed_over)}" if self.passed_over else "")


def load_data(config: DataConfig, quiet: bool = False) -> ImageData:
    """The decoded and divided data set of a config; downloads and caches what is not there.

    Raises:
        ConfigError: in one line, what is wrong with it; also where its content is not ``data.content``.
    """
    from lora_vit.data.splits import divide

    found = _find(config, quiet)
    if config.content is not None and config.content != found.content:
        raise ConfigError(
            f"data.root={config.root} holds other images, labels or class names than asked for: {found.content}, "
            f"not {config.content}"
        )
    splits, fingerprint = divide(found, config)
    images, value_range, more = found.decode(config.cache_size)
    also = {}
    if found.digests is not None:
        first = found.digests[:, :8].copy().view(np.uint64)[:, 0]
        also = {name: int(np.isin(first[ids], first[splits["train"]]).sum()) for name, ids in splits.items()}
    names, passed = found.class_names, found.passed_over
    return ImageData(images, found.labels, names, splits, fingerprint, passed, value_range, also, more)


def known_content(config: DataConfig, fetch: bool = True) -> str | None:
    """What ``data.content`` is for this data set: None where the package itself has the images.

    Each process lists and reads the files once, until :func:`forget`. Without ``fetch`` nothing is downloaded or read,
    and the content is None where that would be needed.

    Raises:
        ConfigError: in one line, why it cannot be told.
    """
    if config.name in IN_PACKAGES:
        return None
    try:
        return _find(config, False, fetch).content
    except NotFetchedError:
        return None


_FOUND: dict[tuple[object, ...], Found] = {}


def forget() -> None:
    """List the files anew the next time: what a session of hours does before each new command."""
    _FOUND.clear()


def _find(config: DataConfig, quiet: bool, fetch: bool = True) -> Found:
    size = config.cache_size if config.name == "fake" else None
    key = (config.name, config.root, config.official_val, config.cache_dir, size)
    if key not in _FOUND:
        # Imported when chosen: each needs another heavy package.
        find: Callable[..., Found] = import_module(f"lora_vit.data.{_MODULES[config.name]}").find
        if config.name in IN_PACKAGES:
            _FOUND[key] = find(config.name, size)
        else:
            if not config.root:
                raise ConfigError(f"data.root has no value: give the folder of data={config.name}")
            root, cache_dir = os.path.expanduser(config.root), os.path.expanduser(config.cache_dir)
            try:
                _FOUND[key] = find(config.name, root, cache_dir, quiet, config.official_val, fetch)
            except OSError as e:
                raise ConfigError(
                    f"{shown(e.filename or root)} cannot be read ({e.strerror}): mend or remove it"
                ) from None
    return _FOUND[key]


def content_of(class_names: list[str], labels: np.ndarray, parts: dict[str, np.ndarray], digests: np.ndarray) -> str:
    """``N images, C classes, sha256 ...``: which images there are, in which order, class and part.

    File names and places do not count.

    Args:
        class_names: one per class.
        labels: int64 [N].
        parts: sample ids by name.
        digests: sha256 of each image's file, or of all images, uint8 [..., 32].
    """
    digest = hashlib.sha256(json.dumps([class_names, sorted(parts)]).encode())
    for values in (labels, *(parts[name] for name in sorted(parts))):
        digest.update(len(values).to_bytes(8, "little") + values.astype("<i8").tobytes())
    digest.update(np.ascontiguousarray(digests).tobytes())
    return f"{len(labels)} images, {len(class_names)} classes, sha256 {digest.hexdigest()[:16]}"


def shown(name: str | os.PathLike[str]) -> str:
    """A file's name or path as text, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
