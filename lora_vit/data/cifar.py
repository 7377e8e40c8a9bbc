"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) through torchvision."""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path

import numpy as np

from lora_vit.config import DataConfig
from lora_vit.data.cache import locked
from lora_vit.data.dataset import DataError, ImageData
from lora_vit.data.splits import finish, split_per_class


def load(config: DataConfig, quiet: bool) -> ImageData:
    """50,000 training images divided into train and val; the official 10,000 test images are ``test``.

    Raises:
        DataError: not there and not to be downloaded, or a setting that has no effect here.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if config.name == "cifar10" else CIFAR100
    assert config.root is not None
    root = Path(config.root).expanduser()
    if config.val_fraction is None:
        raise DataError(f"data.val_fraction=null, but data={config.name} has no val images of its own: give a fraction")
    for key in ("test_fraction", "cache_size"):
        value = getattr(config, key)
        if value is not None:
            raise DataError(
                f"data.{key}={value} has no effect with data={config.name}, which has its own test images, of 32 "
                "pixels: leave it null"
            )
    try:
        root.mkdir(parents=True, exist_ok=True)
        # several processes of one run come here together
        with locked(root / f".{config.name}.lock"), contextlib.redirect_stdout(io.StringIO()):
            train = kind(str(root), train=True, download=True)
            test = kind(str(root), train=False, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data={config.name} is not below data.root={root} and cannot be downloaded ({error}): put "
            f"{kind.filename} or {kind.base_folder}/ there, or run experiment=quickstart, which needs no download"
        ) from None
    images = np.ascontiguousarray(np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2))
    labels = np.array([*train.targets, *test.targets], dtype=np.int64)
    of_train = np.arange(len(train.targets))
    splits = split_per_class(labels, of_train, {"val": config.val_fraction}, config.split_seed, train.classes)
    splits["test"] = np.arange(len(train.targets), len(labels))
    content = hashlib.sha256(images.data).hexdigest()
    return finish(images, labels, list(train.classes), [content], splits, config)
