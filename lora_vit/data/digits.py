"""Data that needs no files: scikit-learn's handwritten digits, and made-up images for tests."""

import numpy as np

from lora_vit import randomness
from lora_vit.data.dataset import Found, Wanted, in_memory


def find(wanted: Wanted) -> Found:
    """Digits (1,797 scans of 8x8 pixels, 10 classes; Alpaydin & Kaynak, 1998), or made-up images of the wanted size."""
    if wanted.name == "fake":  # noise around one mean colour for each class
        size, labels = wanted.cache_size or 32, np.repeat(np.arange(4), 25)
        noise = randomness.uniforms(np.arange(len(labels)), 3 * size * size, "fake").reshape(-1, 3, size, size)
        centre = randomness.uniforms(labels, 3, "fake colour")[:, :, None, None]
        images = np.clip(255 * (0.6 * centre + 0.4 * noise), 0, 255).astype(np.uint8)
        return in_memory(images, labels.astype(np.int64), [f"class {c}" for c in range(4)])
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 .. 16
    return in_memory(np.repeat(grey[:, None], 3, axis=1), bunch.target.astype(np.int64), [str(d) for d in range(10)])
