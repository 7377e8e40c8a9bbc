"""Which samples are for training, validation and test: stratified per class, keyed by the split's seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from lora_vit import randomness
from lora_vit.config import DataConfig
from lora_vit.data.dataset import Found
from lora_vit.errors import ConfigError


def _shuffled(labels: np.ndarray, ids: np.ndarray, what: str, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each class with its samples in the order of its own key."""
    for label in np.unique(labels[ids]):
        of_class = np.sort(ids[labels[ids] == label])
        yield int(label), of_class[randomness.permutation(len(of_class), what, seed, int(label))]


def split_per_class(
    labels: np.ndarray, ids: np.ndarray, fractions: dict[str, float], seed: int, class_names: list[str]
) -> dict[str, np.ndarray]:
    """Divide the samples ``ids`` of each class by the same fractions, in (0, 1); the rest is ``train``. Sorted ids.

    Numbers are rounded to the nearest whole, at least 1. Raises ConfigError where a class has too few samples.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*fractions, "train")}
    for label, of_class in _shuffled(labels, ids, "split", seed):
        counts = [max(1, round(len(of_class) * f)) for f in fractions.values()]
        if sum(counts) >= len(of_class):
            few = f"class '{class_names[label]}' has {len(of_class)} images"
            raise ConfigError(f"{few}, too few to be in train, {', '.join(fractions)}: add images, or drop the class")
        for found, samples in zip(parts.values(), np.split(of_class, np.cumsum(counts)), strict=True):
            found.append(samples)
    return {name: np.sort(np.concatenate(found)) for name, found in parts.items()}


def keep_per_class(labels: np.ndarray, ids: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Keep ``count`` samples of each class; fewer are always a subset of more. Sorted ids.

    Raises ConfigError where a class has fewer.
    """
    kept = []
    for label, of_class in _shuffled(labels, ids, "train_per_class", seed):
        if len(of_class) < count:
            few = f"class {label} has only {len(of_class)} training images"
            raise ConfigError(f"data.train_per_class={count}: {few}, give at most that, or null for all")
        kept.append(of_class[:count])
    return np.sort(np.concatenate(kept))


def divide(found: Found, config: DataConfig) -> tuple[dict[str, np.ndarray], str]:
    """The splits of a data set, by the parts that it has and the config's fractions, and its fingerprint.

    Raises ConfigError for a part that neither is there nor has a fraction, and where there are too few images.
    """
    fractions = {}
    for part, fraction in (("val", config.val_fraction), ("test", config.test_fraction)):
        if part in found.parts:
            continue
        if fraction is None:
            lacks = f"data.root={config.root} has no {part}/"
            raise ConfigError(f"{lacks} and data.{part}_fraction is null: give one of them")
        fractions[part] = fraction
    splits = split_per_class(found.labels, found.parts["train"], fractions, config.split_seed, found.class_names)
    splits |= {part: ids for part, ids in found.parts.items() if part != "train"}
    if config.train_per_class is not None:
        splits["train"] = keep_per_class(found.labels, splits["train"], config.train_per_class, config.split_seed)
    if (count := len(splits["train"])) < config.batch_size:
        many = f"data.batch_size={config.batch_size} is more than the {count} training images"
        raise ConfigError(f"{many}: give at most that")
    digest = hashlib.sha256(found.content.encode())
    for name in sorted(splits):
        digest.update(name.encode() + b"\0" + splits[name].astype("<i8").tobytes())
    return splits, digest.hexdigest()[:16]
