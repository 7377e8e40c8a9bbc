"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) through torchvision."""

import contextlib
import io
from typing import Any

import numpy as np

from lora_vit.data.dataset import Found, Wanted, in_memory
from lora_vit.data.files import locked_in
from lora_vit.errors import ConfigError, one_line


def find(wanted: Wanted) -> Found | None:
    """50,000 images for train and val, the official 10,000 for test; downloaded if absent. Raises ConfigError."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind: Any = CIFAR10 if wanted.name == "cifar10" else CIFAR100
    root = wanted.root.resolve()

    def halves(download: bool) -> list[Any]:
        return [kind(root, train=part, download=download) for part in (True, False)]

    try:
        train, test = halves(download=False)
    except RuntimeError:  # so says torchvision that files are absent or damaged
        if not wanted.fetch:
            return None
        try:
            # several processes of one run come here together
            with locked_in(wanted.cache_dir, f"{wanted.name} {root}"), contextlib.redirect_stdout(io.StringIO()):
                train, test = halves(download=True)
        except (OSError, RuntimeError) as error:
            lacks = f"data={wanted.name} is absent from data.root={root} or damaged"
            put = f"put {kind.filename} (md5 {kind.tgz_md5}) or {kind.base_folder}/ there"
            raise ConfigError(f"{lacks}, and cannot be downloaded ({one_line(error)}): {put}, or run "
                              "experiment=quickstart, which needs no download") from None  # fmt: skip
    labels = np.array([*train.targets, *test.targets], dtype=np.int64)
    parts = {"train": np.arange(len(train.targets)), "test": np.arange(len(train.targets), len(labels))}
    return in_memory(np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2), labels, list(train.classes), parts)
