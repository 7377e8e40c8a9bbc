"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) through torchvision."""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from lora_vit.data.dataset import Found, NotFetchedError, content_of
from lora_vit.data.files import locked_in
from lora_vit.errors import ConfigError


def find(name: str, root: str, cache_dir: str, quiet: bool, official_val: bool, fetch: bool) -> Found:
    """50,000 images for train and val; the official 10,000 test images are ``test``. Downloaded if absent.

    Raises:
        ConfigError: damaged, or not there and not to be downloaded.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind: Any = CIFAR10 if name == "cifar10" else CIFAR100
    folder = _around(Path(root), kind)
    try:
        try:
            train, test = (kind(str(folder), train=part) for part in (True, False))
        except RuntimeError:
            if not fetch:
                raise NotFetchedError(f"data={name} is not below data.root={root} yet") from None
            # not there yet; several processes of one run come here together
            with locked_in(Path(cache_dir), f"{name} {folder.resolve()}"), contextlib.redirect_stdout(io.StringIO()):
                train, test = (kind(str(folder), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if (folder / kind.base_folder).exists() or (folder / kind.filename).exists():
            raise ConfigError(
                f"data={name}: {kind.base_folder}/ or {kind.filename} in {folder} is damaged or not whole, and cannot "
                f"be fetched anew ({reason}): unpack {kind.filename} (md5 {kind.tgz_md5}) there"
            ) from None
        raise ConfigError(
            f"data={name} is not below data.root={root} and cannot be downloaded ({reason}): put "
            f"{kind.filename} or {kind.base_folder}/ there, or run experiment=quickstart, which needs no download"
        ) from None
    images = np.ascontiguousarray(np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2))
    labels = np.array([*train.targets, *test.targets], dtype=np.int64)
    first = len(train.targets)
    parts = {"train": np.arange(first), "test": np.arange(first, len(labels))}
    digest = np.frombuffer(hashlib.sha256(images.data).digest(), np.uint8)
    content = content_of(list(train.classes), labels, parts, digest)
    return Found(labels, list(train.classes), parts, content, lambda _: (images, None, 0))


def _around(root: Path, kind: Any) -> Path:
    """``root``, or the folder above or below it that holds the data set, where it is one level off."""
    held = (kind.base_folder, kind.filename)
    if any((root / name).exists() for name in held):
        return root
    if root.name in held:
        return root.parent
    below = sorted(p for p in root.glob("*") if any((p / name).exists() for name in held))
    return below[0] if len(below) == 1 else root
