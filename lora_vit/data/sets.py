"""Data sets as torch has them, an item a pair of picture and label: torchvision's, and the user's own."""

import contextlib
import http.client
import inspect
import io
import os
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np

from lora_vit.config.rules import one_of, refuse
from lora_vit.data.dataset import Found, Wanted, in_memory
from lora_vit.data.files import locked_in
from lora_vit.data.items import found_from
from lora_vit.errors import ConfigError, one_line

SETS = ("CIFAR10", "CIFAR100", "CLEVRClassification", "Caltech101", "Caltech256", "Country211", "DTD", "EuroSAT",
        "FER2013", "FGVCAircraft", "FashionMNIST", "Flowers102", "Food101", "GTSRB", "Imagenette", "KMNIST", "MNIST",
        "OxfordIIITPet", "PCAM", "Places365", "RenderedSST2", "SEMEION", "STL10", "SUN397", "SVHN", "StanfordCars",
        "USPS")  # fmt: skip
# What torchvision calls the parts, in ``split``; ``trainval`` where there is no val apart.
_SPLITS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid"), "test": ("test",)}


def find(wanted: Wanted) -> Found | None:
    """What ``target`` makes, or torchvision's set in ``root``, downloaded there if absent. Raises ConfigError."""
    sets = _own(wanted) if wanted.target else _of_torchvision(wanted)
    if sets is None:
        return None
    each = [*sets.values()]
    classes = next((own for key in ("classes", "categories") if (own := getattr(each[0], key, None))), None)
    names = classes and [str(name[0] if isinstance(name, tuple) else name) for name in classes]
    if wanted.target or not all(hasattr(part, "data") and np.asarray(part.data).dtype == np.uint8 for part in each):
        said = [str(own) for part in each if (own := getattr(part, "identity", None))]
        identity = repr(("identity", *sets, *said)) if len(said) == len(each) else None
        return found_from(lambda: ({part: _items(sets[part]) for part in sets}, names, None), wanted, identity)
    images = np.concatenate([np.asarray(part.data) for part in each])
    images = np.repeat(images[:, None], 3, 1) if images.ndim == 3 else images
    images = images.transpose(0, 3, 1, 2) if images.shape[3] == 3 else images
    labels = [np.asarray(part.targets if hasattr(part, "targets") else part.labels, np.int64) for part in each]
    ids = np.split(np.arange(len(images)), np.cumsum([*map(len, labels)])[:-1])
    names = names or [str(number) for number in range(max(map(max, labels)) + 1)]
    return in_memory(images, np.concatenate(labels), names, dict(zip(sets, ids, strict=True)))


def _own(wanted: Wanted) -> Mapping[str, Any]:
    """What the user's function returns, called with ``root`` if that is given: a Dataset, or one for each part."""
    try:
        build: Any = resolve_name(str(wanted.target))
        made = build(wanted.root) if wanted.root != Path() else build()
    except Exception as error:  # anything, of code of one's own
        wants = "give module:function, of a module that Python finds"
        refuse("data.target", wanted.target, f"cannot be used ({one_line(error)}): {wants}")
    return made if isinstance(made, Mapping) else {"train": made}


def _of_torchvision(wanted: Wanted) -> Mapping[str, Any] | None:
    from torchvision import datasets

    name = wanted.dataset or wanted.name.upper()
    one_of("data.dataset", name, SETS)
    kind: Any = getattr(datasets, name)
    with contextlib.suppress(OSError, RuntimeError):  # so says torchvision that files are absent or damaged
        return _parts(kind, wanted.root, download=False)
    if not wanted.fetch:
        return None
    try:
        # several processes of one run come here together
        with locked_in(wanted.cache_dir, f"{name} {wanted.root}"), contextlib.redirect_stdout(io.StringIO()):
            return _parts(kind, wanted.root, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        own = f"{kind.filename} (md5 {kind.tgz_md5}) or {kind.base_folder}/" if hasattr(kind, "tgz_md5") else ""
        lacks = f"{name} is absent from data.root={wanted.root} or damaged, and cannot be had ({one_line(error)})"
        put = f"put {own or f'what torchvision.datasets.{name} reads'} there"
        raise ConfigError(f"{lacks}: {put}, or run experiment=quickstart, which needs no download") from None


def _parts(kind: Any, root: Path, download: bool) -> dict[str, Any]:
    """The data set's own parts. Raises OSError or RuntimeError where files are absent or damaged."""
    takes = inspect.signature(kind).parameters
    more = {"download": download} if "download" in takes else {}

    def make(**how: Any) -> Any:
        return kind(root.resolve(), **how, **more)

    if "train" in takes:
        return {part: make(train=part == "train") for part in ("train", "test")}
    if "split" not in takes:
        return {"train": make()}
    sets: dict[str, Any] = {}
    for part, names in _SPLITS.items():
        for name in names:
            with contextlib.suppress(ValueError):  # it knows none of that name
                sets[part] = sets.get(part) or make(split=name)
    if "train" not in sets:
        raise RuntimeError("it has to be fetched by hand")
    return sets


def _items(data: Any) -> Any:
    """Pairs of path and label where torchvision keeps such lists, so that no picture is decoded; else itself."""
    for key in ("_image_files", "_images", "_samples", "samples", "imgs"):
        if (files := getattr(data, key, None)) and type(data).__module__.startswith("torchvision."):
            pairs = files if isinstance(files[0], tuple) else [*zip(files, data._labels, strict=True)]
            return pairs if isinstance(pairs[0][0], str | os.PathLike) else data
    return data
