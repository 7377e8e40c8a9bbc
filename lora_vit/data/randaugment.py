"""RandAugment (Cubuk et al., 2020) and ColorJitter as torchvision's transforms v2 have them, for batches of images."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad


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
