"""Which samples are for training, validation and test: stratified per class, keyed by the split's seed."""

import hashlib
import os
import re
from collections.abc import Iterable

import numpy as np

from lora_vit import randomness
from lora_vit.config import DataConfig
from lora_vit.data.dataset import Found
from lora_vit.errors import ConfigError
from lora_vit.files import counted, shown


def divide(found: Found, config: DataConfig, without: Iterable[int] = ()) -> tuple[dict[str, np.ndarray], str]:
    """The splits of a data set, by the parts that it has and the config's fractions, and its fingerprint.

    Each class is divided, in the order of its own key, by the same fractions, rounded to the nearest whole, at least 1;
    the rest is ``train``. Of it ``train_per_class`` are kept, in a second order, so that fewer are a subset of more.
    Groups are divided whole. ``without``: samples that are in no part; with ``on_broken=skip``, neither are those of
    a class with too few. Raises ConfigError where ``val`` neither is there nor has a fraction, and for too few images.
    """
    given = {"val": config.val_examples or config.val_fraction, "test": config.test_fraction}
    shares = {part: share for part, share in given.items() if share and part not in found.parts}
    if not {"val"} & {*shares, *found.parts}:
        raise ConfigError(f"data.root={config.root} has no val/ and data.val_fraction is null: give one of them")
    if config.val_examples and "val" in found.parts:
        raise ConfigError(f"data.val_examples={config.val_examples}: the data have val images, leave it null")
    without, labels, seed = np.fromiter(without, int), found.labels, config.split_seed
    splits = {part: ids[~np.isin(ids, without)] for part, ids in found.parts.items()}
    if config.test_fraction == 0:
        splits.pop("test", None)
    sizes = np.bincount(labels[splits["train"]], minlength=len(found.class_names))
    if (left := np.count_nonzero(sizes)) < 1 + (config.on_broken == "skip"):
        raise ConfigError(f"data.on_broken=skip leaves {left} of {len(sizes)} classes: repair some, two are needed")
    counts = {part: _of_each(share, sizes, part, seed) for part, share in shares.items()}
    if len(few := np.flatnonzero((sizes > 0) & (sizes <= sum(counts.values())))):
        if config.on_broken == "skip":
            return divide(found, config, np.union1d(without, np.flatnonzero(np.isin(labels, few))))
        class_has = f"class '{found.class_names[few[0]]}' has {sizes[few[0]]} images"
        too_few = f"{class_has}, too few to be in train, {', '.join(shares)}"
        raise ConfigError(f"{too_few}: add images, or drop the class (data.on_broken=skip leaves it out)")
    if found.groups is None:
        ordered = _by_class(splits["train"], labels, "split", seed)
        cuts = [np.cumsum([n[labels[ids[0]]] for n in counts.values()]) for ids in ordered]
        parts = zip(*(np.split(ids, cut) for ids, cut in zip(ordered, cuts, strict=True)), strict=True)
        splits |= {part: np.sort(np.concatenate(ids)) for part, ids in zip((*counts, "train"), parts, strict=True)}
    else:
        splits |= _by_groups(splits["train"], found, counts, seed)
    if config.on_broken == "skip":
        trained = np.unique(labels[splits["train"]])
        splits = {part: ids[np.isin(labels[ids], trained)] for part, ids in splits.items()}
    splits["train"] = _fewer(splits["train"], found, config)
    if (count := len(splits["train"])) < config.batch_size:
        many = f"data.batch_size={config.batch_size} is more than the {count} training images"
        raise ConfigError(f"{many}: give at most that")
    digest = hashlib.sha256(found.content.encode())
    for name in sorted(splits):
        digest.update(name.encode() + b"\0" + splits[name].astype("<i8").tobytes())
    return splits, digest.hexdigest()[:16]


def _by_class(ids: np.ndarray, labels: np.ndarray, what: str, seed: int) -> list[np.ndarray]:
    """The sample ids of each class that has any, in the order of the key (``what``, seed, class)."""
    ids = np.sort(ids)
    ids = ids[np.argsort(labels[ids], kind="stable")]  # one pass for all classes
    each = np.split(ids, np.flatnonzero(np.diff(labels[ids])) + 1) if len(ids) else []
    return [own[randomness.permutation(len(own), what, seed, int(labels[own[0]]))] for own in each]


def _of_each(share: float, sizes: np.ndarray, what: str, seed: int) -> np.ndarray:
    """How many of each class a fraction is, or a number in all (Sainte-Laguë): at least 1; int64 [C], as ``sizes``.

    A larger number in all takes no fewer of any class. Raises ConfigError where it is too small, or too large.
    """
    if share < 1:
        return np.maximum(1, np.rint(sizes * share)).astype(int)
    of = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of an image in its class
    rank = np.where(place, (2 * place + 1) / sizes[of], 0.0)
    order = np.lexsort((randomness.permutation(len(sizes), f"{what}_examples", seed)[of], rank))
    least = np.count_nonzero(sizes)
    if not least <= share <= len(of):
        there = f"there are {len(of)} images of {least} classes"
        raise ConfigError(f"data.{what}_examples={share}: {there}, give at least one for each class, at most all")
    return np.bincount(of[order[: int(share)]], minlength=len(sizes))


def _fewer(train: np.ndarray, found: Found, config: DataConfig) -> np.ndarray:
    """Those of the training images that are kept."""
    if config.train_per_class is None and config.train_examples is None:
        return train
    ordered = _by_class(train, found.labels, "train_per_class", config.split_seed)
    if config.train_examples is not None:
        sizes = np.bincount(found.labels[train], minlength=len(found.class_names))
        keep = _of_each(config.train_examples, sizes, "train", config.split_seed)
    else:
        keep = np.full(len(found.class_names), config.train_per_class)
    for ids in ordered:
        if len(ids) < keep[label := found.labels[ids[0]]]:
            few = f"class '{found.class_names[label]}' has only {len(ids)} training images"
            raise ConfigError(f"data.train_per_class={keep[label]}: {few}, give at most that, or null for all")
    return np.sort(np.concatenate([ids[: keep[found.labels[ids[0]]]] for ids in ordered]))


def _by_groups(train: np.ndarray, found: Found, counts: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """``train`` and what is taken from it, in whole groups, with about so many of each class (``counts``: [C] each).

    In the order of a key, groups are taken that fit, then those that bring a part nearer, then the smallest of a class
    that it lacks: the last group of a class stays in ``train``. Raises ConfigError where a part gets none.
    """
    assert found.groups is not None
    labels = found.labels[train]
    group, of = np.unique(found.groups[train], return_inverse=True)
    (owner, label), images = np.unique([of, labels], axis=1, return_counts=True)
    ends, left = np.searchsorted(owner, np.arange(len(group) + 1)), np.bincount(label)  # left: groups of each class
    order = randomness.permutation(len(group), "groups", seed)
    smallest = order[np.argsort(np.bincount(of)[order], kind="stable")]
    taken = np.zeros(len(group), int)  # by which part; 0: train
    for number, wanted in enumerate(counts.values(), 1):
        lacking = wanted.astype(float)
        for slack in (1, 2, None):
            spare = len(counts) - number if slack else 0  # groups that parts to come want
            for g in order if slack else smallest:
                own = slice(ends[g], ends[g + 1])
                c, n = label[own], images[own]
                fits = np.sum(n * (n - slack * lacking[c]) / wanted[c]) <= 0 if slack else (lacking == wanted)[c].any()
                if fits and not taken[g] and (left[c] > 1 + spare).all():
                    taken[g] = number
                    lacking[c] -= n
                    left[c] -= 1
        if number not in taken:
            parts = ", ".join(["train", *counts])
            raise ConfigError(f"data.group makes {len(group)} groups, too few to be in {parts} whole: give another one")
    return {part: np.sort(train[taken[of] == number]) for number, part in enumerate(("train", *counts))}


def groups_of(found: Found, group: int | str | None) -> np.ndarray | None:
    """The group of each image as a number, int64 [N], or None where each is its own. Raises ConfigError.

    ``group``: a level of folders below the class's, a pattern with a pair of parentheses, or a column of the table.
    """
    if group is None or found.groups is not None:
        return found.groups
    if not found.names:
        raise ConfigError(f"data.group={group}: these images are no files with names of their own, leave it null")
    given, paths = group, list(found.names)
    if isinstance(group, int):
        above = "[^/]+/" * (1 + (len(found.parts) > 1 or bool(os.path.commonpath(paths))))  # class, perhaps train/
        group = f"^{above}((?:[^/]+/){{{group}}})"
    matches = [re.search(group, path) for path in paths]
    keys = [match[1] if match and match[1] else "" for match in matches]
    if lost := [shown(path) for path, key in zip(paths, keys, strict=True) if not key]:
        without = counted({f"of {len(paths):,} files without it": lost})[0]
        raise ConfigError(f"data.group={given}: {without}: give a level or pattern that all have")
    numbers = {key: number for number, key in enumerate(sorted({*keys}))}
    return np.array([numbers[key] for key in keys])
