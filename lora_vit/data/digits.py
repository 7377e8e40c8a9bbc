"""Data that needs no files: scikit-learn's handwritten digits, and made-up images for tests."""

from __future__ import annotations

import hashlib

import numpy as np

from lora_vit import randomness
from lora_vit.data.dataset import Decoded, Found, Wanted, content_of


def find(wanted: Wanted) -> Found:
    """Digits (1,797 scans of 8x8 pixels, 10 classes; Alpaydin & Kaynak, 1998), or made-up images of the wanted size."""
    images, labels, names = _digits() if wanted.name == "digits" else _fake(wanted.cache_size or 32)
    parts = {"train": np.arange(len(labels))}
    content = content_of(names, labels, parts, np.frombuffer(hashlib.sha256(images.tobytes()).digest(), np.uint8))
    return Found(labels, names, parts, content, lambda _: Decoded(images))


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
