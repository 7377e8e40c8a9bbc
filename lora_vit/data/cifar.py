"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) through torchvision."""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path

import numpy as np

from lora_vit.config import DataConfig
from lora_vit.data.cache import locked_in
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
                f"data.{key}={value} has no effect with data={config.name}, which has test images and one size: "
                "leave it null"
            )
    try:
        try:
            train, test = (kind(str(root), train=part) for part in (True, False))
        except RuntimeError:  # not there yet; several processes of one run come here together
            cache_dir = Path(config.cache_dir).expanduser()
            with locked_in(cache_dir, f"{config.name} {root.resolve()}"), contextlib.redirect_stdout(io.StringIO()):
                train, test = (kind(str(root), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data={config.name} is not below data.root={root} and cannot be downloaded ({reason}): put "
            f"{kind.filename} or {kind.base_folder}/ there, or run experiment=quickstart, which needs no download"
        ) from None
    images = np.ascontiguousarray(np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2))
    labels = np.array([*train.targets, *test.targets], dtype=np.int64)
    of_train = np.arange(len(train.targets))
    splits = split_per_class(labels, of_train, {"val": config.val_fraction}, config.split_seed, train.classes)
    splits["test"] = np.arange(len(train.targets), len(labels))
    content = hashlib.sha256(images.data).hexdigest()
    return finish(images, labels, list(train.classes), [content], splits, config)
