"""A data set by its configuration: found by its loader, divided and decoded."""

from dataclasses import replace
from importlib import import_module
from typing import Any

from lora_vit.config import DATASETS, DataConfig
from lora_vit.data.dataset import Found, ImageData, Wanted
from lora_vit.data.preprocessing import Decoding
from lora_vit.errors import ConfigError
from lora_vit.files import shown, user_path

_FOUND: dict[Wanted, Found] = {}


def load_data(config: DataConfig, quiet: bool = False) -> ImageData:
    """The decoded and divided data set. Raises ConfigError, also where its content is not ``data.content``."""
    from lora_vit.data.splits import divide  # imports torch, which a command that only composes does not need

    found = _find(config, quiet)
    assert found is not None
    if config.content not in (None, found.content):
        there = f"data.root={config.root} holds other images, labels or class names than asked for"
        raise ConfigError(f"{there}: {found.content}, not {config.content}")
    splits, fingerprint = divide(found, config)
    given: Any = config.value_range and tuple(config.value_range)
    decoding = Decoding(config.cache_size, given, tuple(config.background))
    images, value_range, told = found.decode(decoding)
    if given and not value_range:
        raise ConfigError(f"data.value_range={config.value_range} has no effect on 8-bit images: leave it null")
    shade = int(images[0, 0, 0, 0])
    if all(abs(image.astype("i2") - shade).max() < 3 for image in images):  # seldom looks at more than the first
        same = f"every pixel of the images of data.root={config.root} becomes about {shade} of 0 .. 255"
        raise ConfigError(f"{same}: look at one, and at data.background={config.background}")
    height, width = images.shape[-2:]
    decoding = replace(decoding, size=height if height == width else None, value_range=value_range)
    return ImageData(**vars(found), images=images, decoding=decoding, told=told, splits=splits, fingerprint=fingerprint)


def known_content(config: DataConfig, fetch: bool = True) -> str | None:
    """What ``data.content`` is: None where a package brings the images, or a ``fetch`` is needed. Or ConfigError."""
    found = None if DATASETS[config.name].in_package else _find(config, False, fetch)
    return None if found is None else found.content


def forget() -> None:
    """List the files again, which a process does once: what a session of hours does before each new command."""
    _FOUND.clear()


def _find(config: DataConfig, quiet: bool, fetch: bool = True) -> Found | None:
    known = DATASETS[config.name]
    if not config.root and not known.in_package:
        raise ConfigError(f"data.root has no value: give the folder of data={config.name}")
    root, cache_dir = user_path(config.root or ""), user_path(config.cache_dir)
    if not known.in_package and cache_dir.parts[0] == "~":
        raise ConfigError(f"data.cache_dir={cache_dir}: no home folder is known here, give another folder or set HOME")
    size = config.cache_size if known.in_package else None
    if (wanted := Wanted(config.name, root, cache_dir, config.official_val, size, quiet, fetch)) not in _FOUND:
        try:  # imported when chosen: each needs another heavy package
            if (found := import_module(f"lora_vit.data.{known.loader}").find(wanted)) is not None:
                _FOUND[wanted] = found
        except OSError as error:
            place = shown(error.filename or root)
            raise ConfigError(f"{place} cannot be read ({error.strerror}): repair or remove it") from None
    return _FOUND.get(wanted)
