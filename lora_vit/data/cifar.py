"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) through torchvision."""

from __future__ import annotations

import contextlib
import hashlib
import io
from typing import Any

import numpy as np

from lora_vit.data.dataset import Decoded, Found, Wanted, content_of
from lora_vit.data.files import locked_in
from lora_vit.errors import ConfigError


def find(wanted: Wanted) -> Found | None:
    """50,000 images for train and val; the official 10,000 test images are ``test``. Downloaded if absent.

    Raises:
        ConfigError: absent or damaged, and not to be downloaded.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind: Any = CIFAR10 if wanted.name == "cifar10" else CIFAR100
    try:
        train, test = (kind(wanted.root, train=part) for part in (True, False))
    except RuntimeError:  # so says torchvision that files are absent or damaged
        if not wanted.fetch:
            return None
        train, test = _fetched(kind, wanted)
    images = np.ascontiguousarray(np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2))
    labels = np.array([*train.targets, *test.targets], dtype=np.int64)
    first = len(train.targets)
    parts = {"train": np.arange(first), "test": np.arange(first, len(labels))}
    digest = np.frombuffer(hashlib.sha256(images.data).digest(), np.uint8)
    content = content_of(list(train.classes), labels, parts, digest)
    return Found(labels, list(train.classes), parts, content, lambda _: Decoded(images))


def _fetched(kind: Any, wanted: Wanted) -> list[Any]:
    """Both halves, downloaded or unpacked where that is needed."""
    root = wanted.root.resolve()
    try:
        # several processes of one run come here together
        with locked_in(wanted.cache_dir, f"{wanted.name} {root}"), contextlib.redirect_stdout(io.StringIO()):
            return [kind(wanted.root, train=part, download=True) for part in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"data={wanted.name} is absent from data.root={root} or damaged, and cannot be downloaded ({reason}): put "
            f"{kind.filename} (md5 {kind.tgz_md5}) or {kind.base_folder}/ there, or run experiment=quickstart, which "
            "needs no download"
        ) from None
