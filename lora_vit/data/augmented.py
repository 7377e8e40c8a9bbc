"""Augmentations beyond crop and flip, of whole batches, as torchvision has them (transforms v2).

Shapes: B image, S pixels.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_vit import randomness
from lora_vit.config import DataConfig
from lora_vit.data.augment import Transform, crop_boxes, to_device
from lora_vit.data.randaugment import jittered, operations

ERASE_SCALE, ERASE_RATIO = (0.02, 0.33), (1 / 3.3, 1 / 0.3)  # RandomErasing's: area, width by height


class Augmented(Transform):
    """Crop, flip, RandAugment, ColorJitter in steps of 0 to 255, normalisation, erasing: torchvision's own order."""

    def __init__(self, data: DataConfig, image_size: int, *how: Any):
        self.data, names = data, data.augmentations()
        shape = next((name for name in ("flip", "crop_flip") if name in names), "none")
        super().__init__(image_size, shape, *how)
        self._raw = Transform(image_size, shape, self.device, self.work_dtype, [0] * 3, [1 / 255] * 3, self.bicubic)
        what = (data.randaugment_magnitude, image_size, self.device)
        self._operations = operations(*what) if "randaugment" in names else []
        jitter = [getattr(data, f"color_jitter_{kind}") for kind in ("brightness", "contrast", "saturation", "hue")]
        self._jitter = np.array(jitter) if "color_jitter" in names else None
        self._erases = "random_erasing" in names
        alphas = {"mixup": data.mixup_alpha, "cutmix": data.cutmix_alpha}
        self.mixes = {name: alpha for name, alpha in alphas.items() if name in names}

    def train(self, images: Tensor, seed: int, epoch: int, ids: np.ndarray) -> Tensor:
        if self._operations or self._jitter is not None:
            x = self._raw.train(images, seed, epoch, ids).round_().clamp_(0, 255).to(torch.uint8)
            draws = randomness.uniforms(ids, self.data.randaugment_num_ops, "randaugment", seed, epoch)
            for chosen_B in (draws * len(self._operations)).astype(int).T if self._operations else ():
                for i in np.unique(chosen_B):  # the images that have drawn the same one together
                    where = to_device(np.flatnonzero(chosen_B == i), self.device)
                    x[where] = self._operations[i](x[where])
            if self._jitter is not None:
                order, shares = np.split(randomness.uniforms(ids, 8, "color_jitter", seed, epoch), 2, axis=1)
                middle = np.array([1, 1, 1, 0])
                lowest = np.maximum(middle - self._jitter, [0, 0, 0, -1])
                factors = lowest * (1 - shares) + (middle + self._jitter) * shares
                x = jittered(x, to_device(order, self.device), to_device(factors, self.device).float())
            x = self._normalise(x.to(self.work_dtype)).to(self.dtype)
        else:
            x = super().train(images, seed, epoch, ids)
        if self._erases:  # a box of some images becomes the mean colour (Zhong et al., 2020)
            key, place = ("erase", seed, epoch), torch.arange(self.image_size, device=self.device)
            boxes = crop_boxes(ids, len(place), len(place), *key, scale=ERASE_SCALE, ratios=ERASE_RATIO)
            boxes *= randomness.uniforms(ids, 1, *key) < self.data.random_erasing_p
            start, length = to_device(boxes, self.device)[..., None].split(2, 1)
            rows, columns = ((place >= start) & (place < start + length)).unbind(1)
            x.masked_fill_((rows[..., None] & columns[:, None])[:, None], 0)
        return x


def mixed(x: Tensor, ways: Mapping[str, float], seed: int, epoch: int, step: int) -> tuple[Tensor, float]:
    """Images x[1:] mixed each with the one before it, and their own share; ``ways``: names, each with its alpha.

    mixup (Zhang et al., 2018) adds the two, cutmix (Yun et al., 2019) puts a box of the other in. As in torchvision a
    batch has one way, one share from Beta(alpha, alpha), and one box.
    """
    draw = np.random.RandomState(randomness.key("mix", seed, epoch, step) % 2**32)  # NumPy keeps what this one draws
    way = list(ways)[draw.randint(len(ways))]
    share = draw.beta(ways[way], ways[way])
    if way == "mixup":
        return x[:-1].lerp(x[1:], share), share
    size, half = x.shape[-1], int(0.5 * math.sqrt(1 - share) * x.shape[-1])
    rows, columns = (slice(max(0, middle - half), middle + half) for middle in draw.randint(size, size=2))
    own = x[1:].clone()
    own[..., rows, columns] = x[:-1, :, rows, columns]
    return own, 1 - own[0, 0, rows, columns].numel() / size**2
