"""What is done to whole batches on the device, keyed by the sample; augmentations as torchvision's transforms v2.

Cropping, flipping and resizing an axis-aligned box is separable: ``out = M_h @ image @ M_w^T`` with one
antialiased bilinear resampling matrix for each image and axis. So a batch is two batched matrix products,
whatever box each image has, on CPU and GPU alike.

Shapes: B image, h w source pixels, S target pixels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from lora_vit import randomness
from lora_vit.config import DataConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_SCALE = (0.08, 1.0)  # area of a random crop as a fraction of the image's (torchvision's RandomResizedCrop)
CROP_RATIO = (3 / 4, 4 / 3)
ERASE_SCALE, ERASE_RATIO = (0.02, 0.33), (1 / 3.3, 1 / 0.3)  # RandomErasing's: area, width by height
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


def operations(magnitude: int, size: int, device: torch.device) -> list[Callable[[Tensor], Tensor]]:
    """RandAugment's, on uint8 [B, 3, size, size], in torchvision's order: at negative levels, then at positive ones.

    They are torchvision's own. Those that move pixels have moved the pixels' numbers instead, and sharpness and
    autocontrast stand below, since the host would wait for each of them on a GPU.
    """
    from torchvision.transforms.v2 import functional as tv

    def level(first: float, last: float) -> float:
        step = (np.float32(last) - np.float32(first)) / np.float32(30)  # as torch.linspace adds it, from the nearer end
        return float(first + step * magnitude if magnitude <= 15 else last - step * (30 - magnitude))

    numbers = torch.arange(1.0, size**2 + 1).view(1, size, size)
    found: list[Callable[[Tensor], Tensor]] = []
    for sign in (-1, 1):
        shear, shift = math.degrees(math.atan(sign * level(0, 0.3))), sign * int(level(0, 150 / 331 * size))
        moved = [tv.affine(numbers, 0, [0, 0], 1, how, center=[0, 0]) for how in ([shear, 0.0], [0.0, shear])]
        moved += [tv.affine(numbers, 0, how, 1, [0, 0]) for how in ([shift, 0], [0, shift])]
        moved += [tv.rotate(numbers, sign * level(0, 30))]
        factor = 1 + sign * level(0, 0.9)
        found += [
            lambda x: x,
            *(partial(taken, source=number.long().flatten().to(device)) for number in moved),
            partial(tv.adjust_brightness, brightness_factor=factor),
            partial(tv.adjust_saturation, saturation_factor=factor),
            partial(tv.adjust_contrast, contrast_factor=factor),
            partial(sharpened, factor=factor),
            partial(tv.posterize, bits=round(8 - magnitude / 7.5)),
            partial(tv.solarize, threshold=255 * level(1, 0)),
            stretched,
            tv.equalize,
        ]
    return found


def taken(x: Tensor, source: Tensor) -> Tensor:
    """Each pixel from the one with this number, counted from 1; black where that is 0."""
    return pad(x.flatten(2), (1, 0)).index_select(2, source).view_as(x)


def sharpened(x: Tensor, factor: float) -> Tensor:
    """Away from the mean with the eight neighbours, in which a pixel weighs five times as much; not at the border."""
    soft, inside = x.float(), (..., slice(1, -1), slice(1, -1))
    mean = (9 * avg_pool2d(soft, 3, 1, 1) + 4 * soft)[inside].div_(13).round_()
    soft[inside] += (1 - factor) * (mean - soft[inside])
    return soft.clamp_(0, 255).to(x.dtype)


def stretched(x: Tensor) -> Tensor:
    """Each colour of an image from 0 to 255."""
    low, high = (end[..., None, None].float() for end in x.flatten(2).aminmax(dim=2))
    wide = ((x - low) / ((high - low) * (1 / 255)).clamp(min=1e-9)).clamp_(0, 255)
    return torch.where(high > low, wide, x.float()).to(x.dtype)


def jittered(x: Tensor, order_B4: Tensor, factors_B4: Tensor) -> Tensor:
    """ColorJitter: each image's brightness, contrast, saturation and hue by its factors, in its own order, least first.

    That of the hue is a part of the circle of colours, by which they turn.
    """
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    for which_B1 in order_B4.argsort(1).split(1, 1):
        which, factor = which_B1[..., None, None], factors_B4.gather(1, which_B1)[..., None, None]
        grey = rgb_to_grayscale(x)
        mean = grey.sum((1, 2, 3), keepdim=True) / grey[0].numel()  # of whole numbers: exact in any order
        other = torch.where(which == 1, mean, grey) * (which > 0)
        blended = (factor * x + (1 - factor) * other).clamp_(0, 255).to(x.dtype)
        x = torch.where(which == 3, turned(x, factor), blended)
    return x


def turned(x: Tensor, part: Tensor) -> Tensor:
    """Colours of another hue, and of the same largest and smallest value (of HSV's hexagon, Smith, 1978)."""
    red, green, blue = x.float().split(1, 1)
    low, high = x.float().aminmax(dim=1, keepdim=True)
    width = high - low
    sixth = torch.where(high == red, green - blue, torch.where(high == green, blue - red, red - green))
    first = torch.where(high == red, 0.0, torch.where(high == green, 2.0, 4.0))
    away = (first + sixth / width.clamp(min=1) + 6 * part + torch.arange(5, 0, -2, device=x.device)[:, None, None]) % 6
    found = high - width * torch.minimum(away, 4 - away).clamp_(0, 1)
    return found.mul_(255.999 / 255).to(x.dtype)  # rounded as torchvision does


class Transform:
    """Makes the model's input, of S = ``image_size`` pixels a side, of uint8 images, as ``data.augment`` says.

    Crop, flip, RandAugment and ColorJitter in steps of 0 to 255, normalisation, erasing: torchvision's own order.
    ``dtype``: of the result, the arithmetic is float32 (float64 for a float64 result). ``mean``, ``std``: of each
    colour in [0, 1].
    """

    def __init__(self, data: DataConfig, image_size: int, device: torch.device, dtype: torch.dtype,
                 mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
                 bicubic: bool = False):  # fmt: skip
        self.data, self.image_size, self.bicubic = data, image_size, bicubic
        self.device, self.dtype = device, dtype
        self.work_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        shift = -torch.tensor(mean, dtype=torch.float64) * 255 * scale
        self._scale, self._shift = (t.to(device, self.work_dtype)[:, None, None] for t in (scale, shift))
        zero = torch.zeros(1, device=device)
        self._whole = cache(lambda side: resampling_matrix(zero, zero + side, side, image_size, bicubic))
        self._names = names = data.augmentations()
        what = (data.randaugment_magnitude, image_size, device)
        self._operations = operations(*what) if "randaugment" in names else []
        jitter = [getattr(data, f"color_jitter_{kind}") for kind in ("brightness", "contrast", "saturation", "hue")]
        self._jitter = np.array(jitter) if "color_jitter" in names else None
        alphas = {"mixup": data.mixup_alpha, "cutmix": data.cutmix_alpha}
        self.mixes = {name: alpha for name, alpha in alphas.items() if name in names}  # ways, each with its alpha

    def train(self, images: Tensor, seed: int, epoch: int, ids: np.ndarray) -> Tensor:
        """Augmented and normalised, [B, 3, S, S], of uint8 [B, 3, h, w]; draws are keyed by seed, epoch and id."""
        raw = bool(self._operations) or self._jitter is not None
        x = self._cropped(images, (seed, epoch), ids, raw)
        if raw:
            x = x.round_().clamp_(0, 255).to(torch.uint8)
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
        if "random_erasing" in self._names:  # a box of some images becomes the mean colour (Zhong et al., 2020)
            key, place = ("erase", seed, epoch), torch.arange(self.image_size, device=self.device)
            boxes = crop_boxes(ids, len(place), len(place), *key, scale=ERASE_SCALE, ratios=ERASE_RATIO)
            boxes *= randomness.uniforms(ids, 1, *key) < self.data.random_erasing_p
            start, length = to_device(boxes, self.device)[..., None].split(2, 1)
            rows, columns = ((place >= start) & (place < start + length)).unbind(1)
            x.masked_fill_((rows[..., None] & columns[:, None])[:, None], 0)
        return x

    def eval(self, images: Tensor, raw: bool = False) -> Tensor:
        """Resized and normalised (or ``raw``: from 0 to 255, in the arithmetic's dtype), [B, 3, S, S], or [B, W]."""
        if images.is_floating_point():  # features, of the picture and of its mirror image
            return images[:, 0, :, 0].to(self.dtype)
        h, w = images.shape[-2:]
        if h == w == self.image_size:
            x = images.to(self.work_dtype)
            return x if raw else self._normalise(x).to(self.dtype)
        return self._resample(images, self._whole(h), self._whole(w), raw)

    def _cropped(self, images: Tensor, key: tuple[int, int], ids: np.ndarray, raw: bool) -> Tensor:
        """Cropped or resized, half of the images mirrored, as :meth:`eval`'s."""
        if not {"flip", "crop_flip"} & {*self._names}:
            return self.eval(images, raw)
        flip_B = to_device(randomness.uniforms(ids, 1, "flip", *key)[:, 0] < 0.5, self.device)
        if "flip" in self._names:
            return self.eval(torch.where(flip_B[:, None, None, None], images.flip(-1), images), raw)
        h, w = images.shape[-2:]
        boxes = to_device(crop_boxes(ids, h, w, *key), self.device)
        rows = resampling_matrix(boxes[:, 0], boxes[:, 2], h, self.image_size, self.bicubic)
        columns = resampling_matrix(boxes[:, 1], boxes[:, 3], w, self.image_size, self.bicubic)
        return self._resample(images, rows, torch.where(flip_B[:, None, None], columns.flip(1), columns), raw)

    def _resample(self, images: Tensor, rows: Tensor, columns: Tensor, raw: bool) -> Tensor:
        """Resample with one pair of matrices for all images, or one for each: rows [1 or B, S, h], columns alike."""
        x = images.to(self.work_dtype)
        # Weights of a row sum to one, so normalising commutes with resampling: do it where there are fewer pixels.
        first = not raw and images.shape[-2] * images.shape[-1] < self.image_size**2
        if first:
            x = self._normalise(x)
        rows, columns = rows.to(self.work_dtype), columns.to(self.work_dtype)
        # Along the width first: its matrix product reads contiguous rows.
        if len(rows) == 1:
            x = (x @ columns[0].mT).flatten(0, 1)
            x = torch.bmm(rows.expand(len(x), -1, -1), x).view(-1, 3, self.image_size, self.image_size)
        else:
            x = rows[:, None] @ (x @ columns[:, None].mT)
        return x if raw else (x if first else self._normalise(x)).to(self.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        return x.mul_(self._scale).add_(self._shift)


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
