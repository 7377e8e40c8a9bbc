"""Made-up image files, and the data sets that are loaded from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from plain_trials import PLAIN

from lora_vit.config import DataConfig
from lora_vit.data import cache
from lora_vit.data.dataset import ImageData, forget, load_data
from lora_vit.data.files import digests_of
from lora_vit.data.preprocessing import Decoding
from lora_vit.errors import ConfigError


def paint(path: Path, shade: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    """A plain grey picture; those of one size have as many bytes as BMP."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)
    return path


def data_config(tmp_path: Path, name: str = "imagefolder", **changes: Any) -> DataConfig:
    """Of images in ``tmp_path/pets``, to be decoded into ``tmp_path/cache``."""
    places = {"name": name, "root": str(tmp_path / "pets"), "cache_dir": str(tmp_path / "cache")}
    values = {**PLAIN["data"], **places, "batch_size": 1, "cache_size": None, **changes}
    return DataConfig(**values)


def fresh(config: DataConfig) -> ImageData:
    """The data set, as a new command loads it: its files are listed again."""
    forget()
    return load_data(config)


def refused(load: Callable[..., object], *args: Any, **changes: Any) -> str:
    """The one line with which something cannot be loaded."""
    with pytest.raises(ConfigError) as caught:
        load(*args, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def decoded(root: Path, names: list[str], size: int | None = None, place: Path | None = None, **how: Any) -> Any:
    """The decoded files, by a cache in ``place``, with their range and what is told of them."""
    place = place or root / "cache"
    digests = digests_of(root, names, place)
    assert digests is not None
    return cache.decoded(root, names, digests, place, Decoding(size, **how))[:3]


def shades(data: ImageData | tuple[Any, ...]) -> list[int]:
    """The grey level of each image's centre."""
    images = data.images if isinstance(data, ImageData) else data[0]
    height, width = images.shape[-2:]
    return images[:, 0, height // 2, width // 2].astype(np.int64).tolist()
