"""Data that needs no files: scikit-learn's handwritten digits, and made-up images for tests."""

from __future__ import annotations

import hashlib

import numpy as np

from lora_vit import randomness
from lora_vit.config import DataConfig
from lora_vit.data.dataset import ImageData
from lora_vit.data.splits import finish, split_per_class


def load(config: DataConfig, quiet: bool) -> ImageData:
    """Digits (1,797 scans of 8x8 pixels, 10 classes; Alpaydin & Kaynak, 1998) or fake images."""
    images, labels, names = _digits() if config.name == "digits" else _fake(config.cache_size or 32)
    fractions = {"val": config.val_fraction or 0.4, "test": config.test_fraction or 0.4}
    splits = split_per_class(labels, np.arange(len(labels)), fractions, config.split_seed, names)
    content = hashlib.sha256(images.tobytes()).hexdigest()
    return finish(images, labels, names, [content], splits, config)


def _digits() -> tuple[np.ndarray, np.ndarray, list[str]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 17 grey levels, 0 .. 16
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.ascontiguousarray(np.repeat(grey[:, None], 3, axis=1))
    return images, bunch.target.astype(np.int64), [str(d) for d in range(10)]


def _fake(size: int, classes: int = 4, per_class: int = 25) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Noise around one mean colour for each class."""
    labels = np.repeat(np.arange(classes), per_class)
    pixels = 3 * size * size
    noise = randomness.uniforms(np.arange(len(labels)), pixels, "fake").reshape(-1, 3, size, size)
    centre = randomness.uniforms(labels, 3, "fake colour")[:, :, None, None]
    images = np.clip(255 * (0.6 * centre + 0.4 * noise), 0, 255).astype(np.uint8)
    return images, labels.astype(np.int64), [f"class {c}" for c in range(classes)]
