"""Which samples are for training, validation and test: stratified per class, keyed by the split's seed."""

import hashlib

import numpy as np

from lora_vit import randomness
from lora_vit.config import DataConfig
from lora_vit.data.dataset import Found
from lora_vit.errors import ConfigError


def divide(found: Found, config: DataConfig) -> tuple[dict[str, np.ndarray], str]:
    """The splits of a data set, by the parts that it has and the config's fractions, and its fingerprint.

    Each class is divided, in the order of its own key, by the same fractions, rounded to the nearest whole, at least 1;
    the rest is ``train``. Of it ``train_per_class`` are kept, in a second order, so that fewer are a subset of more.
    Raises ConfigError where ``val`` neither is there nor has a fraction, and where there are too few images.
    """
    given = {"val": config.val_fraction, "test": config.test_fraction}
    fractions = {part: f for part, f in given.items() if f is not None and part not in found.parts}
    if not {"val"} & {*fractions, *found.parts}:
        raise ConfigError(f"data.root={config.root} has no val/ and data.val_fraction is null: give one of them")
    labels, train, keep = found.labels, found.parts["train"], config.train_per_class

    def shuffled(of_class: np.ndarray, what: str) -> np.ndarray:
        key = (what, config.split_seed, int(labels[of_class[0]]))
        return np.sort(of_class)[randomness.permutation(len(of_class), *key)]

    own: dict[str, list[np.ndarray]] = {name: [] for name in (*fractions, "train")}
    by_class = train[np.argsort(labels[train], kind="stable")]  # one pass for all classes
    for of_class in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        of_class, called = shuffled(of_class, "split"), found.class_names[labels[of_class[0]]]
        counts = [max(1, round(len(of_class) * fraction)) for fraction in fractions.values()]
        if sum(counts) >= len(of_class):
            few = f"class '{called}' has {len(of_class)} images"
            raise ConfigError(f"{few}, too few to be in train, {', '.join(fractions)}: add images, or drop the class")
        *parts, rest = np.split(of_class, np.cumsum(counts))
        if keep is not None:
            if len(rest) < keep:
                few = f"class '{called}' has only {len(rest)} training images"
                raise ConfigError(f"data.train_per_class={keep}: {few}, give at most that, or null for all")
            rest = shuffled(rest, "train_per_class")[:keep]
        for ids, some in zip(own.values(), (*parts, rest), strict=True):
            ids.append(some)
    splits = {name: np.sort(np.concatenate(ids)) for name, ids in own.items()}
    splits |= {part: ids for part, ids in found.parts.items() if part != "train"}
    if (count := len(splits["train"])) < config.batch_size:
        many = f"data.batch_size={config.batch_size} is more than the {count} training images"
        raise ConfigError(f"{many}: give at most that")
    digest = hashlib.sha256(found.content.encode())
    for name in sorted(splits):
        digest.update(name.encode() + b"\0" + splits[name].astype("<i8").tobytes())
    return splits, digest.hexdigest()[:16]
