"""Resize, random crop, flip and normalisation of whole batches on the device, keyed by the sample.

Cropping, flipping and resizing an axis-aligned box is separable: ``out = M_h @ image @ M_w^T`` with one
antialiased bilinear resampling matrix for each image and axis. So a batch is two batched matrix products,
whatever box each image has, on CPU and GPU alike.

Shapes: B image, h w source pixels, S target pixels.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lora_vit import randomness

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_SCALE = (0.08, 1.0)  # area of a random crop as a fraction of the image's (torchvision's RandomResizedCrop)
CROP_RATIO = (3 / 4, 4 / 3)
_CROP_TRIES = 10


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device; the host continues while a GPU copies."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory makes the host wait, whatever is asked for
    return tensor.to(device, non_blocking=True)


def resampling_matrix(start_B: Tensor, length_B: Tensor, source: int, target: int, bicubic: bool = False) -> Tensor:
    """Antialiased resampling of ``[start, start + length)`` to ``target`` pixels, [B, target, source].

    A triangle filter, or Keys's cubic one with a = -0.5 (1981), whose support grows with the scale when shrinking,
    weights normalised over the pixels inside the box, as in PIL and torchvision's ``resized_crop(antialias=True)``.
    ``source``: pixels of the whole image along this axis.
    """
    device = start_B.device
    start, length = start_B.double()[:, None, None], length_B.double()[:, None, None]
    scale = length / target
    centre = start + (torch.arange(target, device=device, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(source, device=device, dtype=torch.float64)
    x = ((pixel + 0.5 - centre) / scale.clamp(min=1.0)).abs()
    weight = (1 - x).clamp(min=0)
    if bicubic:
        weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) * (x < 2)
    weight = weight * ((pixel >= start) & (pixel < start + length))
    return weight / weight.sum(-1, keepdim=True)


def crop_boxes(ids: np.ndarray, height: int, width: int, *parts: int | str, scale: Sequence[float] = CROP_SCALE,
               ratios: Sequence[float] = CROP_RATIO) -> np.ndarray:  # fmt: skip
    """Random boxes (top, left, height, width), int64 [B, 4], as torchvision's RandomResizedCrop draws them.

    Ten tries of a random area and aspect ratio (Szegedy et al., 2015), else the largest centred box.
    """
    draws = randomness.uniforms(ids, 4 * _CROP_TRIES, "crop", *parts).reshape(-1, _CROP_TRIES, 4)
    low, high = math.log(ratios[0]), math.log(ratios[1])
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    ratio = np.exp(low + (high - low) * draws[..., 1])
    w = np.round(np.sqrt(area * ratio)).astype(np.int64)
    h = np.round(np.sqrt(area / ratio)).astype(np.int64)
    fits = np.logical_and.reduce([w > 0, w <= width, h > 0, h <= height])
    top = np.floor(draws[..., 2] * (height - h + 1)).astype(np.int64)
    left = np.floor(draws[..., 3] * (width - w + 1)).astype(np.int64)
    tries = np.stack([top, left, h, w], axis=-1)
    chosen = tries[np.arange(len(ids)), fits.argmax(axis=1)]  # the first
    whole_h, whole_w = min(height, round(width / CROP_RATIO[0])), min(width, round(height * CROP_RATIO[1]))
    whole = np.array([(height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w])
    return np.where(fits.any(axis=1, keepdims=True), chosen, whole)


class Transform:
    """Makes the model's input, of S = ``image_size`` pixels a side, of uint8 images.

    ``augment``: ``none``, ``flip`` (half of the images mirrored) or ``crop_flip``; ``dtype``: of the result, the
    arithmetic is float32 (float64 for a float64 result); ``mean``, ``std``: of each colour in [0, 1].
    """

    mixes: Mapping[str, float] = {}  # how images of a batch are mixed: ways, each with its alpha

    def __init__(self, image_size: int, augment: str, device: torch.device, dtype: torch.dtype,
                 mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
                 bicubic: bool = False):  # fmt: skip
        self.image_size, self.augment, self.bicubic = image_size, augment, bicubic
        self.device, self.dtype = device, dtype
        self.work_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        shift = -torch.tensor(mean, dtype=torch.float64) * 255 * scale
        self._scale, self._shift = (t.to(device, self.work_dtype)[:, None, None] for t in (scale, shift))
        zero = torch.zeros(1, device=device)
        self._whole = functools.cache(lambda side: resampling_matrix(zero, zero + side, side, image_size, bicubic))

    def train(self, images: Tensor, seed: int, epoch: int, ids: np.ndarray) -> Tensor:
        """Augmented and normalised, [B, 3, S, S], of uint8 [B, 3, h, w]; draws are keyed by seed, epoch and id."""
        if self.augment == "none":
            return self.eval(images)
        flip_B = to_device(randomness.uniforms(ids, 1, "flip", seed, epoch)[:, 0] < 0.5, self.device)
        if self.augment == "flip":
            return self.eval(torch.where(flip_B[:, None, None, None], images.flip(-1), images))
        h, w = images.shape[-2:]
        boxes = to_device(crop_boxes(ids, h, w, seed, epoch), self.device)
        rows = resampling_matrix(boxes[:, 0], boxes[:, 2], h, self.image_size, self.bicubic)
        columns = resampling_matrix(boxes[:, 1], boxes[:, 3], w, self.image_size, self.bicubic)
        return self._resample(images, rows, torch.where(flip_B[:, None, None], columns.flip(1), columns))

    def eval(self, images: Tensor) -> Tensor:
        """Resized and normalised, [B, 3, S, S]."""
        h, w = images.shape[-2:]
        if h == w == self.image_size:
            return self._normalise(images.to(self.work_dtype)).to(self.dtype)
        return self._resample(images, self._whole(h), self._whole(w))

    def _resample(self, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Resample with one pair of matrices for all images, or one for each: rows [1 or B, S, h], columns alike."""
        x = images.to(self.work_dtype)
        # Weights of a row sum to one, so normalising commutes with resampling: do it where there are fewer pixels.
        first = images.shape[-2] * images.shape[-1] < self.image_size**2
        if first:
            x = self._normalise(x)
        rows, columns = rows.to(self.work_dtype), columns.to(self.work_dtype)
        # Along the width first: its matrix product reads contiguous rows.
        if len(rows) == 1:
            x = (x @ columns[0].mT).flatten(0, 1)
            x = torch.bmm(rows.expand(len(x), -1, -1), x).view(-1, 3, self.image_size, self.image_size)
        else:
            x = rows[:, None] @ (x @ columns[:, None].mT)
        return (x if first else self._normalise(x)).to(self.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        return x.mul_(self._scale).add_(self._shift)
