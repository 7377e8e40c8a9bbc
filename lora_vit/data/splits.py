"""Which samples are for training, validation and test: stratified per class, keyed by the split's seed."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lora_vit import randomness
from lora_vit.config import DataConfig
from lora_vit.data.dataset import Found
from lora_vit.data.files import Listing
from lora_vit.errors import ConfigError
from lora_vit.files import shown


def divide(found: Found, config: DataConfig, without: Iterable[int] = ()) -> tuple[dict[str, np.ndarray], str]:
    """The splits of a data set, by the parts that it has and the config's fractions, and its fingerprint.

    Each class is divided, in the order of its own key, by the same fractions, rounded to the nearest whole, at least 1;
    the rest is ``train``. Groups stay whole. ``without``: samples that are in no part; with ``on_broken=skip``, neither
    are those of a class with too few. Raises ConfigError where ``val`` neither is there nor has a fraction, and where
    there are too few images.
    """
    given = {"val": config.val_fraction, "test": config.test_fraction}
    fractions = {part: f for part, f in given.items() if f and part not in found.parts}
    if not {"val"} & {*fractions, *found.parts}:
        raise ConfigError(f"data.root={config.root} has no val/ and data.val_fraction is null: give one of them")
    labels, without = found.labels, np.fromiter(without, int)
    splits = {part: ids[~np.isin(ids, without)] for part, ids in found.parts.items()}
    sizes = np.bincount(labels[splits["train"]], minlength=len(found.class_names))
    counts = {part: np.maximum(1, np.rint(sizes * f)).astype(int) for part, f in fractions.items()}
    there = np.unique(labels[np.concatenate([*splits.values()])])
    few = there[(sizes <= sum(counts.values()))[there]]
    if config.on_broken == "skip" and 0 < len(few) < len(there) - 1:
        return divide(found, config, np.union1d(without, np.flatnonzero(np.isin(labels, few))))
    if len(few):
        called = f"class '{found.class_names[few[0]]}' has {sizes[few[0]]} images"
        remedy = "add images, or drop the class (data.on_broken=skip does)"
        raise ConfigError(f"{called}, too few to be in {', '.join(['train', *fractions])}: {remedy}")
    names, seed, train = ("train", *fractions), config.split_seed, np.sort(splits["train"])
    wanted, of = np.array([sizes - sum(counts.values()), *counts.values()]), np.zeros(len(labels), int)
    if found.groups is None:
        last = [*range(1, len(names)), 0]  # train gets what the others leave
        for label, ids in _by_class(train, labels, "split", seed).items():
            of[ids] = np.repeat(last, wanted[last, label])
    else:
        of[train] = _whole(found.groups[train], labels[train], wanted, seed)
    splits |= {part: train[of[train] == number] for number, part in enumerate(names)}
    if empty := [part for part in names if not len(splits[part])]:
        raise ConfigError(f"data.group={config.group} leaves {' and '.join(empty)} empty: give larger fractions")
    splits["train"] = _fewer(splits["train"], found, config)
    if (count := len(splits["train"])) < config.batch_size:
        many = f"data.batch_size={config.batch_size} is more than the {count} training images"
        raise ConfigError(f"{many}: give at most that")
    digest = hashlib.sha256(found.content.encode())
    for name in sorted(splits):
        digest.update(name.encode() + b"\0" + splits[name].astype("<i8").tobytes())
    return splits, digest.hexdigest()[:16]


def _by_class(ids: np.ndarray, labels: np.ndarray, what: str, seed: int) -> dict[int, np.ndarray]:
    """The sample ids of each class that has any, in the order of the key (``what``, seed, class)."""
    ids = np.sort(ids)
    ids = ids[np.argsort(labels[ids], kind="stable")]  # one pass for all classes
    each = {int(labels[own[0]]): own for own in np.split(ids, np.flatnonzero(np.diff(labels[ids])) + 1) if len(own)}
    return {label: own[randomness.permutation(len(own), what, seed, label)] for label, own in each.items()}


def _whole(groups: np.ndarray, labels: np.ndarray, wanted: np.ndarray, seed: int) -> np.ndarray:
    """The part, int64 [N], of images of these groups and classes: a group's is one; about as many as ``wanted`` [P, C].

    In the order of a key, each group goes where one of its classes is missing, if it fits, to ``train`` (0) always;
    else where it lowers the sum of (missing images)^2 / wanted most.
    """
    groups = np.unique(groups, return_inverse=True)[1]
    (owner, label), images = np.unique([groups, labels], axis=1, return_counts=True)
    starts, missing = np.flatnonzero(np.diff(owner, prepend=-1)), wanted.astype(float)
    part = np.zeros(len(starts), int)
    for g in randomness.permutation(len(starts), "groups", seed):
        own = slice(starts[g], starts[g + 1] if g + 1 < len(starts) else None)
        c, n = label[own], images[own]
        grows = np.sum(n * (n - 2 * missing[:, c]) / wanted[:, c], axis=1)
        lacks = (missing[:, c] == wanted[:, c]).any(axis=1) & ((grows <= 0) | (np.arange(len(wanted)) == 0))
        part[g] = np.argmax(lacks) if lacks.any() else np.argmin(grows)
        missing[part[g], c] -= n
    return part[groups]


def _fewer(train: np.ndarray, found: Found, config: DataConfig) -> np.ndarray:
    """The training images that are kept, in a second order, so that fewer are a subset of more. Raises ConfigError."""
    if not (config.train_per_class or config.train_examples):
        return train
    of_class = _by_class(train, found.labels, "train_per_class", config.split_seed)
    if keep := config.train_per_class:
        for label in (label for label, ids in of_class.items() if len(ids) < keep):
            few = f"class '{found.class_names[label]}' has only {len(of_class[label])} training images"
            raise ConfigError(f"data.train_per_class={keep}: {few}, give at most that, or null for all")
        return np.sort(np.concatenate([ids[:keep] for ids in of_class.values()]))
    if not len(of_class) <= (keep := config.train_examples or 0) <= len(train):
        there = f"there are {len(train)} training images of {len(of_class)} classes"
        raise ConfigError(f"data.train_examples={keep}: {there}, give no more, and at least one for each class")
    # One of each class, then in proportion to their sizes (Sainte-Laguë): fewer in all are no more of any class.
    turns = [np.arange(1, 2 * n, 2) * (np.arange(n) > 0) / n for n in map(len, of_class.values())]
    order = np.argsort(np.concatenate(turns), kind="stable")
    return np.sort(np.concatenate([*of_class.values()])[order[:keep]])


def groups_of(found: Found, group: int | str | None) -> np.ndarray | None:
    """The group of each image as a number, int64 [N], or None where each is its own. Raises ConfigError.

    ``group``: a level of folders below the class's, a pattern with a pair of parentheses, or a column of the table.
    """
    if group is None:
        return None
    above = 1 + (len(found.parts) > 1 or bool(os.path.commonpath(found.names or [""])))  # folders: train/, class
    pattern = f"^(?:[^/]+/){{{above}}}((?:[^/]+/){{{group}}})" if isinstance(group, int) else group
    try:
        if found.groups is None and (re.compile(pattern).groups != 1 or not found.names):
            raise re.error("not one pair of parentheses" if found.names else "they are no files")
        keys = [*map(str, [] if found.groups is None else found.groups)]
        keys = keys or [(match and match[1]) or "" for match in (re.search(pattern, name) for name in found.names)]
    except re.error as error:
        remedy = r"give a level of folders from 1 up, or a pattern for their paths, as '/(patient\d+)_'"
        raise ConfigError(f"data.group={group} groups no images ({error}): {remedy}") from None
    if lost := [shown(name) for name, key in zip(found.names, keys, strict=True) if not key]:
        without = Listing(Path(), {f"of {len(keys):,} files are without it": lost}).lines()[0]
        raise ConfigError(f"data.group={group}: {without}: give one that all have")
    return np.unique([*map(os.fsencode, keys)], return_inverse=True)[1]
