"""What every data set becomes: uint8 images in memory (or mapped into it), labels, names and splits."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from lora_vit.config import DataConfig

_MODULES = {
    "tiny_imagenet": "tiny_imagenet",
    "imagefolder": "folder",
    "cifar10": "cifar",
    "cifar100": "cifar",
    "digits": "digits",
    "fake": "digits",
}

IN_PACKAGES = ("digits", "fake")
"""Data sets that need no download and no decoding."""


class DataError(ValueError):
    """A data set that cannot be used; the message says in one line what is wrong, where and what to do."""


@dataclass(frozen=True)
class ImageData:
    """A decoded data set.

    Attributes:
        images: uint8 [N, 3, h, w], perhaps a read-only memory map.
        labels: int64 [N], indices into ``class_names``.
        class_names: one per class.
        splits: ``train``, ``val``, ``test`` and perhaps ``official_val``; sorted sample ids, int64.
        fingerprint: hex digest of the files' names, labels and splits.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    splits: dict[str, np.ndarray]
    fingerprint: str

    def card(self) -> dict[str, Any]:
        """What a trial's record says of the data."""
        sizes = {name: len(ids) for name, ids in self.splits.items()}
        return {"fingerprint": self.fingerprint, "classes": len(self.class_names), **sizes}


def load_data(config: DataConfig, quiet: bool = False) -> ImageData:
    """The decoded data set of a config; downloads and caches what is not there.

    Raises:
        DataError: in one line, what is wrong with it.
    """
    # Imported when chosen: each needs another heavy package.
    module = import_module(f"lora_vit.data.{_MODULES[config.name]}")
    data: ImageData = module.load(config, quiet)
    return data
