"""Augmentation against torchvision's transforms v2, and its keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from lora_vit import randomness
from lora_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, Transform, crop_boxes, resampling_matrix

LEVEL = 2 / 255
"""torchvision resizes uint8 in fixed point and rounds after each axis; ours is float throughout."""
CPU = torch.device("cpu")


def pictures(n=6, h=64, w=48) -> torch.Tensor:
    """Smooth shapes and noise, uint8 [n, 3, h, w]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 8, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic").clamp(0, 1)
    return (255 * (0.8 * smooth + 0.2 * torch.rand(n, 3, h, w, generator=generator))).to(torch.uint8)


def unnormalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


@pytest.mark.parametrize("size", [24, 32, 64, 96, 224])
def test_resize_and_normalise(size):
    images = pictures(h=64, w=64)
    ours = Transform(size, "none", CPU, torch.float32).eval(images)
    reference = v2.Compose([v2.Resize((size, size), antialias=True), v2.ToDtype(torch.float32, scale=True)])(images)
    torch.testing.assert_close(unnormalised(ours), reference, rtol=0, atol=LEVEL)
    normalised = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)(reference)
    torch.testing.assert_close(ours, normalised, rtol=0, atol=LEVEL / min(IMAGENET_STD))


def test_crop_and_flip_on_the_same_parameters():
    images, ids = pictures(12), np.arange(12) * 7
    ours = unnormalised(Transform(40, "crop_flip", CPU, torch.float32).train(images, 3, 5, ids))
    boxes = crop_boxes(ids, 64, 48, 3, 5)
    flips = randomness.uniforms(ids, 1, "flip", 3, 5)[:, 0] < 0.5
    assert 0 < flips.sum() < 12
    for image, box, flip, out in zip(images, boxes, flips, ours, strict=True):
        top, left, height, width = (int(v) for v in box)
        expected = tv.resized_crop(image, top, left, height, width, [40, 40], antialias=True)
        expected = tv.horizontal_flip(expected) if flip else expected
        torch.testing.assert_close(out, expected / 255, rtol=0, atol=LEVEL)


def test_flip_alone_only_mirrors():
    images, ids = pictures(40, 16, 16), np.arange(40)
    out = Transform(16, "flip", CPU, torch.float32).train(images, 0, 0, ids)
    plain = Transform(16, "none", CPU, torch.float32).eval(images)
    mirrored = [bool(torch.equal(o, p.flip(-1))) for o, p in zip(out, plain, strict=True)]
    same = [bool(torch.equal(o, p)) for o, p in zip(out, plain, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 10 <= sum(mirrored) <= 30


@pytest.mark.parametrize("augment", ["flip", "crop_flip"])
def test_draws_depend_on_seed_epoch_and_sample_alone(augment):
    images, ids = pictures(16), np.arange(16) + 100
    transform = Transform(32, augment, CPU, torch.float64)
    whole = transform.train(images, 1, 2, ids)
    part = transform.train(images[5:9], 1, 2, ids[5:9])
    torch.testing.assert_close(part, whole[5:9], rtol=0, atol=1e-12)  # a smaller batched product may sum otherwise
    for seed, epoch, other in ((2, 2, ids), (1, 3, ids), (1, 2, ids + 1)):
        assert not torch.allclose(transform.train(images, seed, epoch, other), whole)


def test_boxes_are_drawn_as_torchvision_draws_them():
    boxes = crop_boxes(np.arange(4000), 64, 64, 0, 0)
    torch.manual_seed(0)
    theirs = np.array(
        [v2.RandomResizedCrop(8).make_params([torch.zeros(3, 64, 64)]) for _ in range(4000)], dtype=object
    )
    reference = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    from scipy.stats import ks_2samp

    for ours_column, reference_column in (
        (boxes[:, 2] * boxes[:, 3], reference[:, 2] * reference[:, 3]),
        (boxes[:, 2] / boxes[:, 3], reference[:, 2] / reference[:, 3]),
        (boxes[:, 0], reference[:, 0]),
        (boxes[:, 1], reference[:, 1]),
    ):
        assert ks_2samp(ours_column, reference_column).pvalue > 1e-3  # fixed draws: passes or fails for good
    assert (boxes[:, 0] + boxes[:, 2] <= 64).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 64).all()


def test_a_box_that_never_fits_becomes_the_largest_centred_one():
    boxes = crop_boxes(np.arange(200), 4, 400, 0, 0)
    narrow = boxes[boxes[:, 2] == 4]
    assert len(narrow) > 0
    assert (boxes[:, 3] <= 400).all()


def test_weights_of_a_row_sum_to_one():
    start, length = torch.tensor([0.0, 5.0]), torch.tensor([20.0, 3.0])
    matrix = resampling_matrix(start, length, torch.tensor([False, True]), 20, 7)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert float(matrix[1, :, :5].abs().max()) == 0  # nothing from outside the box
