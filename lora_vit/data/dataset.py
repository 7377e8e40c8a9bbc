"""A data set by its configuration: found by its loader, divided and decoded to uint8 images, in memory or mapped."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from lora_vit.config import DATASETS, DataConfig
from lora_vit.data.decode import Streamed
from lora_vit.data.files import Listing
from lora_vit.data.preprocessing import Decoding, Range
from lora_vit.errors import ConfigError
from lora_vit.files import shown, user_path
from lora_vit.records import NO_TEST

# Images uint8 [N, 3, h, w], what became 0 and 255, notes on files, and why some cannot be read, by sample id.
Decoded = tuple[np.ndarray | Streamed, Range | None, tuple[str, ...], dict[int, str]]


@dataclass(frozen=True)
class Wanted:
    """A data set that is asked for: which (the fields of the same names in DataConfig), and what a loader may do."""

    name: str
    root: Path
    cache_dir: Path
    official_val: bool = False
    cache_size: int | None = None
    group: int | str | None = None
    on_broken: str = "refuse"
    labels: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    dataset: str | None = None
    target: str | None = None
    cache: str = "auto"
    fetch: bool = field(default=True, compare=False)  # download and read what is not known yet, or else return None


@dataclass(frozen=True)
class Found:
    """What a data set consists of, before it is decoded and divided."""

    labels: np.ndarray  # int64 [N], indices into class_names; -1 of what is left out
    class_names: list[str]
    parts: dict[str, np.ndarray]  # sample ids, int64, of train and of what is given apart: val, test, official_val
    content: str  # which images with which classes, as content_of says it
    decode: Callable[[Decoding], Decoded]  # the images, as they are to be decoded
    passed_over: tuple[str, ...] = ()  # what lies among them and is not used, a line for each kind
    digests: np.ndarray | None = None  # sha256 of each image's file, uint8 [N, 32], where there are files
    root: Path | None = None  # that of these files
    names: Sequence[str] = ()  # their paths below it, in the order of the sample ids
    groups: np.ndarray | None = None  # equal values [N] for images that stay in one part, of a table's column
    source: str | None = None  # where they came from, with its revision, if not from the user's own files
    left_out: dict[str, list[str]] = field(default_factory=dict)  # files and classes by why they are in no part

    @property
    def keys(self) -> np.ndarray | None:
        """By which equal files are found: the first 8 bytes of each digest, uint64 [N]."""
        return None if self.digests is None else self.digests[:, :8].copy().view(np.uint64)[:, 0]


@dataclass(frozen=True, kw_only=True)
class ImageData(Found):
    """A decoded and divided data set."""

    images: np.ndarray | Streamed  # uint8 [N, 3, h, w], perhaps a read-only memory map
    decoding: Decoding  # how they became so, and how another file becomes like them
    told: tuple[str, ...] = ()  # as in Decoded
    splits: dict[str, np.ndarray]  # train, val, test and perhaps official_val; sorted sample ids, int64
    fingerprint: str  # hex digest of content and splits

    def card(self) -> dict[str, Any]:
        """What a trial's record says of the data."""
        sizes: dict[str, Any] = {"test": 0, **{name: len(ids) for name, ids in self.splits.items()}}
        beside = {key: own for key in ("source", "left_out") if (own := getattr(self, key))}
        return {"fingerprint": self.fingerprint, "classes": len(self.class_names), **sizes, **beside}

    def line(self, image_size: int, metric: str = "") -> str:
        """The images that are used and those that are not, in one line; ``image_size``: pixels that the model wants."""
        sizes = ", ".join(f"{name} {len(ids):,}" for name, ids in self.splits.items())
        used = sum(map(len, self.splits.values()))
        classes = f"{', '.join(self.class_names[:3])}{', ...' if len(self.class_names) > 3 else ''}"
        text = f"data: {used:,} images of {len(self.class_names):,} classes ({classes}): {sizes}"
        text += "" if {"test", "official_val"} & {*self.splits} else f"; {NO_TEST}"
        if (images := len(self.splits["val"])) < 400:
            text += f"; one of {images} val images is {100 / images:.2g} points"
        there = np.flatnonzero(self.labels >= 0)
        if unused := len(there) - used:
            text += f"; {unused:,} training images left out by data.train_per_class or data.train_examples"
        height, width = self.images.shape[-2:]
        if min(height, width) < image_size:
            text += f"; {width}x{height} px, enlarged to {image_size} px"
        if self.decoding.value_range is not None:
            text += "; values {:g} .. {:g} scaled to 0 .. 255".format(*self.decoding.value_range)
        first = self.keys
        for name, ids in self.splits.items():
            for where, keys in (("", first), ("of groups ", self.groups)):
                count = 0 if keys is None or name == "train" else np.isin(keys[ids], keys[self.splits["train"]]).sum()
                text += f"; {count:,} images of {name} are {where}in train too" if count else ""
            if len(lacking := np.setdiff1d(np.arange(len(self.class_names)), self.labels[ids])):
                text += f"; classes without {name} images: {len(lacking):,} (as {self.class_names[lacking[0]]})"
        if first is not None:
            order = there[np.lexsort((self.labels[there], first[there]))]
            if len(at := np.flatnonzero((np.diff(first[order]) == 0) & (np.diff(self.labels[order]) != 0))):
                pair = " and ".join(self.class_names[label] for label in self.labels[order[at[0] : at[0] + 2]])
                text += f"; {len(np.unique(first[order[at]])):,} images lie in two classes ({pair})"
        counts = np.bincount(self.labels[there], minlength=len(self.class_names))
        if metric == "accuracy" and counts.max() > 3 * counts.min():
            text += f"; {counts.min():,} to {counts.max():,} images in a class: try trainer.metric=balanced_accuracy"
        text = "; ".join([text, *self.told])
        text += f"; left out: {', '.join(Listing(Path(), self.left_out).lines())}" if self.left_out else ""
        return text + (f"; passed over: {', '.join(self.passed_over)}" if self.passed_over else "")


_FOUND: dict[Wanted, Found] = {}  # in this process
_NEEDED = {"root": "the folder", "labels": "the table", "dataset": "the name", "target": "the module:function"}


def load_data(config: DataConfig) -> ImageData:
    """The decoded and divided data set. Raises ConfigError, also where its content is not ``data.content``."""
    from lora_vit.data.splits import divide, groups_of  # import torch, which a command that only composes needs not

    found = find(config)
    assert found is not None
    if config.content not in (None, found.content):
        there = f"data.root={config.root} holds other images, labels or class names than asked for"
        raise ConfigError(f"{there}: {found.content}, not {config.content}")
    found = replace(found, groups=groups_of(found, config.group))
    splits, fingerprint = divide(found, config)  # what cannot be divided need not be decoded
    given: Any = config.value_range and tuple(config.value_range)
    decoding = Decoding(config.cache_size, given, tuple(config.background))
    images, value_range, told, broken = found.decode(decoding)
    if config.on_broken == "skip":
        splits, fingerprint = divide(found, config, broken)
        found = _without(found, broken, splits["train"])
    if given and not value_range:
        raise ConfigError(f"data.value_range={config.value_range} has no effect on 8-bit images: leave it null")
    one = lambda i: images[np.array([i])][0].astype("i2")  # noqa: E731
    used = np.concatenate([*splits.values()])
    shade = int(one(used[0])[0, 0, 0])
    if all(abs(one(i) - shade).max() < 3 for i in used):  # seldom looks at more than the first
        same = f"every pixel of the images of data.root={config.root} becomes about {shade} of 0 .. 255"
        raise ConfigError(f"{same}: look at one, and at data.background={config.background}")
    height, width = images.shape[-2:]
    decoding = replace(decoding, size=height if height == width else None, value_range=value_range)
    return ImageData(**vars(found), images=images, decoding=decoding, told=told, splits=splits, fingerprint=fingerprint)


def _without(found: Found, broken: dict[int, str], train: np.ndarray) -> Found:
    """The data set without broken images and classes that are not trained on."""
    names, trained = found.class_names, np.isin(np.arange(len(found.class_names)), found.labels[train])
    classes = [f"{names[c]} ({np.count_nonzero(found.labels == c):,})" for c in np.flatnonzero(~trained)]
    files = [f"{shown(found.names[i])} ({why})" for i, why in sorted(broken.items())]
    labels = np.where(trained, np.cumsum(trained) - 1, -1)[found.labels]
    labels[[*broken]] = -1
    left_out = {"broken files": files, "classes with too few images": classes}
    left_out, kept = {why: n for why, n in left_out.items() if n}, [names[c] for c in np.flatnonzero(trained)]
    return replace(found, labels=labels, class_names=kept, left_out=left_out)


def known_content(config: DataConfig, fetch: bool = True) -> str | None:
    """What ``data.content`` is: None where a package brings the images, or a ``fetch`` is needed. Or ConfigError."""
    found = None if DATASETS[config.name].in_package else find(config, fetch)
    return None if found is None else found.content


def forget() -> None:
    """List the files again, which a process does once: what a session of hours does before each new command."""
    _FOUND.clear()


def find(config: DataConfig, fetch: bool = True) -> Found | None:
    """What it consists of; None where that is not known without a ``fetch``. Raises ConfigError."""
    known = DATASETS[config.name]
    for key in () if known.in_package else known.needs:
        if not getattr(config, key):
            raise ConfigError(f"data.{key} has no value: give {_NEEDED[key]} of data={config.name}")
    place = config.root or config.images or os.path.dirname(config.labels or "")
    root, cache_dir = user_path(place), user_path(config.cache_dir)
    if not known.in_package and cache_dir.parts[0] == "~":
        raise ConfigError(f"data.cache_dir={cache_dir}: no home folder is known here, give another folder or set HOME")
    size = config.cache_size if known.in_package else None
    given = {f.name: getattr(config, f.name) for f in fields(Wanted) if hasattr(config, f.name)}
    own = {"root": root, "cache_dir": cache_dir, "cache_size": size, "fetch": fetch}
    if (wanted := Wanted(**{**given, **own})) not in _FOUND:
        try:  # imported when chosen: each needs another heavy package
            if (found := import_module(f"lora_vit.data.{known.loader}").find(wanted)) is not None:
                _FOUND[wanted] = found
        except OSError as error:
            place = shown(error.filename or root)
            raise ConfigError(f"{place} cannot be read ({error.strerror}): repair or remove it") from None
    return _FOUND.get(wanted)


def in_memory(images: np.ndarray, labels: np.ndarray, class_names: list[str],
              parts: dict[str, np.ndarray] | None = None) -> Found:  # fmt: skip
    """A data set whose decoded images are at hand; without ``parts`` all are for training and what is split off."""
    images = np.ascontiguousarray(images)
    parts = parts or {"train": np.arange(len(labels))}
    content = content_of(class_names, labels, parts, np.frombuffer(hashlib.sha256(images.data).digest(), np.uint8))
    return Found(labels, class_names, parts, content, lambda _: (images, None, (), {}))


def content_of(class_names: list[str], labels: np.ndarray, parts: dict[str, np.ndarray], digests: np.ndarray) -> str:
    """``N images, C classes, sha256 ...``, whatever their names; ``digests``: sha256 of each file or of all images."""
    digest = hashlib.sha256(json.dumps([class_names, sorted(parts)]).encode())
    for values in (labels, *(parts[name] for name in sorted(parts))):
        digest.update(len(values).to_bytes(8, "little") + values.astype("<i8").tobytes())
    digest.update(np.ascontiguousarray(digests).tobytes())
    return f"{len(labels)} images, {len(class_names)} classes, sha256 {digest.hexdigest()[:16]}"
