"""Augmentation against torchvision's transforms v2, and its keys."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plain_trials import plain_trial
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from lora_vit import randomness
from lora_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, Transform, crop_boxes, resampling_matrix

CPU = torch.device("cpu")


def pictures(n=6, h=64, w=48) -> torch.Tensor:
    """Smooth shapes and noise, uint8 [n, 3, h, w]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 8, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic").clamp(0, 1)
    return (255 * (0.8 * smooth + 0.2 * torch.rand(n, 3, h, w, generator=generator))).to(torch.uint8)


def test_images_are_normalised_as_the_pretrained_backbones_were():
    preset = ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    assert (list(IMAGENET_MEAN), list(IMAGENET_STD)) == (preset.mean, preset.std)


@pytest.mark.parametrize("augment", ["flip", "crop_flip"])
def test_draws_depend_on_seed_epoch_and_sample_alone(augment):
    images, ids = pictures(16), np.arange(16) + 100
    transform = Transform(plain_trial({"data.augment": augment}).data, 32, CPU, torch.float64)
    whole = transform.train(images, 1, 2, ids)
    part = transform.train(images[5:9], 1, 2, ids[5:9])
    torch.testing.assert_close(part, whole[5:9], rtol=0, atol=1e-12)  # a smaller batched product may sum otherwise
    for seed, epoch, other in ((2, 2, ids), (1, 3, ids), (1, 2, ids + 1)):
        assert not torch.allclose(transform.train(images, seed, epoch, other), whole)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (30, 90), (90, 30), (12, 100), (2, 1000), (1000, 2), (1, 1)])
def test_boxes_equal_torchvisions_rule_on_the_same_draws(height, width):
    boxes, theirs = crop_boxes(np.arange(60), height, width, 7, 3), v2.RandomResizedCrop(8)
    (smallest, largest), (narrow, wide) = theirs.scale, map(math.log, theirs.ratio)
    fell_back = 0
    for i, box in enumerate(boxes.tolist()):
        draws = randomness.uniforms(np.array([i]), 40, "crop", 7, 3)[0].tolist()
        for j in range(0, 40, 4):
            area = height * width * (smallest + (largest - smallest) * draws[j])
            ratio = math.exp(narrow + (wide - narrow) * draws[j + 1])
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                assert box == [int(draws[j + 2] * (height - h + 1)), int(draws[j + 3] * (width - w + 1)), h, w]
                break
        else:
            fell_back += 1
            fallback = v2.RandomResizedCrop(8, scale=(9.0, 9.0)).make_params([torch.zeros(3, height, width)])
            assert box == [fallback[name] for name in ("top", "left", "height", "width")]
    assert (fell_back > 0) == (max(height, width) > 2.9 * min(height, width))
    assert (fell_back == 60) == (min(height, width) == 2)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [5, 17, 40])
def test_resampling_equals_torchvisions_in_float(size, mode):
    image = torch.rand(3, 21, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    boxes = torch.tensor([[0, 0, 21, 33], [3, 4, 9, 20], [20, 32, 1, 1], [2, 0, 17, 5]])
    rows = resampling_matrix(boxes[:, 0], boxes[:, 2], 21, size, mode == "bicubic")
    columns = resampling_matrix(boxes[:, 1], boxes[:, 3], 33, size, mode == "bicubic")
    for m_h, m_w, box in zip(rows, columns, boxes.tolist(), strict=True):
        expected = tv.resized_crop(image, *box, [size, size], v2.InterpolationMode(mode), antialias=True)
        torch.testing.assert_close(m_h @ image @ m_w.T, expected, rtol=1e-9, atol=1e-9)  # fp64, weights alike


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("augment", ["none", "flip", "crop_flip"])
@pytest.mark.parametrize(("size", "width"), [(24, 40), (40, 40), (48, 40), (48, 48), (80, 40)])
def test_every_path_gives_the_asked_dtype_and_the_same_values(size, width, augment, dtype):
    """Also after images of other sizes."""
    images, ids = pictures(6, 48, width), np.arange(6)
    given = images.clone()
    transform = Transform(plain_trial({"data.augment": augment}).data, size, CPU, dtype)
    for height, other in ((48, 64), (64, width)):
        transform.eval(pictures(1, height, other))
    out = transform.train(images, 1, 2, ids)
    assert torch.equal(images, given)
    assert (out.dtype, out.shape) == (dtype, (6, 3, size, size))
    assert torch.equal(transform.train(images, 1, 2, ids), out)
    exact = torch.stack([expected_image(image, augment, i, size) for i, image in enumerate(images)])
    rounding = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=rounding, atol=rounding)


def expected_image(image: torch.Tensor, augment: str, i: int, size: int) -> torch.Tensor:
    """By torchvision in fp64, on the draws of seed 1 and epoch 2."""
    image, ids = image.double() / 255, np.array([i])
    if augment == "crop_flip":
        box = crop_boxes(ids, *image.shape[1:], 1, 2)[0].tolist()
        image = tv.resized_crop(image, *box, [size, size], antialias=True)
    else:
        image = tv.resize(image, [size, size], antialias=True)
    if augment != "none" and randomness.uniforms(ids, 1, "flip", 1, 2)[0, 0] < 0.5:
        image = image.flip(-1)
    return tv.normalize(image, IMAGENET_MEAN, IMAGENET_STD)
