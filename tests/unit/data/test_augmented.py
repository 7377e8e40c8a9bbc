"""RandAugment, erasing and mixing against torchvision's transforms v2 on the same parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_trials import plain_trial
from scipy.stats import beta, kstest
from torch import Tensor
from torchvision.transforms import v2

from lora_vit import randomness
from lora_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, Transform, mixed, operations

CPU, SIDE = torch.device("cpu"), 24
STEP = 2 / 255 / max(IMAGENET_STD)
"""Two of 255 steps of a colour, normalised."""


def pictures(n: int, side: int = SIDE) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def transform(dtype: torch.dtype = torch.float64, **settings: object) -> Transform:
    data = plain_trial({f"data.{key}": value for key, value in settings.items()}).data
    return Transform(data, SIDE, CPU, dtype)


def cropped(dtype: torch.dtype) -> Transform:
    """Cropped and flipped, from 0 to 255."""
    return Transform(plain_trial({"data.augment": "crop_flip"}).data, SIDE, CPU, dtype, [0] * 3, [1 / 255] * 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_erasing_equals_torchvisions_in_the_same_box(dtype):
    n, p = 400, 0.3
    x, ids = pictures(n), np.arange(n)
    erasing = transform(dtype, augment="random_erasing", random_erasing_p=p)
    whole, found = (t.train(x, 1, 2, ids) for t in (transform(dtype, augment="none"), erasing))
    gone = (found == 0).all(1) & (whole != 0).any(1)
    theirs, shapes = v2.RandomErasing(p=1), []
    for image, other, box in zip(whole, found, gone, strict=True):
        rows, columns = (torch.nonzero(box.any(dim)).flatten().tolist() for dim in (1, 0))
        if rows:
            shapes.append((len(rows), len(columns)))
            params = {"i": rows[0], "j": columns[0], "h": rows[-1] - rows[0] + 1, "w": columns[-1] - columns[0] + 1}
            image = theirs.transform(image, {**params, "v": torch.zeros(3, 1, 1, dtype=dtype)})
        torch.testing.assert_close(other, image, rtol=0, atol=0)
    assert abs(len(shapes) / n - p) < 4 * (p * (1 - p) / n) ** 0.5
    height, width = np.array(shapes).T
    area, ratio = height * width / SIDE**2, height / width
    assert 0.01 < area.min() < 0.06 < 0.28 < area.max() < 0.36  # 0.02 to 0.33, rounded to pixels
    assert 0.25 < ratio.min() < 0.4 < 2.5 < ratio.max() < 4  # 0.3 to 3.3, rounded


@pytest.mark.parametrize(("sign", "half"), [(-1, 0), (1, 1)])
@pytest.mark.parametrize("magnitude", [0, 2, 4, 9, 15, 22, 30])
@pytest.mark.parametrize("size", [SIDE, 31])
def test_operations_equal_torchvisions(size, magnitude, sign, half):
    """To the bit; sharpness, and on an older torch colour, to one step of 255, which another order may round off."""
    x, theirs = pictures(4, size), v2.RandAugment()
    found = operations(magnitude, size, CPU)[14 * half : 14 * (half + 1)]
    for operation, (name, (levels, signed)) in zip(found, theirs._AUGMENTATION_SPACE.items(), strict=True):
        level = levels(31, size, size)
        level = 0.0 if level is None else float(level[magnitude]) * (sign if signed else 1)
        how = v2.InterpolationMode.NEAREST
        expected = theirs._apply_image_or_video_transform(x, name, level, interpolation=how, fill=theirs._fill)
        assert (operation(x).int() - expected.int()).abs().max() <= (name in ("Color", "Sharpness")), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_randaugment_changes_whole_numbers_after_crop_and_flip_and_before_normalisation(dtype):
    x, ids = pictures(60, 48), np.arange(60)
    given = x.clone()
    t = transform(dtype, augment=["crop_flip", "randaugment"], randaugment_num_ops=3, randaugment_magnitude=15)
    found, space = t.train(x, 1, 2, ids), operations(15, SIDE, CPU)
    assert torch.equal(x, given)
    raw = cropped(t.work_dtype).train(x, 1, 2, ids)
    expected, seen = raw.round().clamp(0, 255).to(torch.uint8), set()
    for i, draws in enumerate(randomness.uniforms(ids, 3, "randaugment", 1, 2)):
        for draw in draws:
            seen.add(int(28 * draw))
            expected[i : i + 1] = space[int(28 * draw)](expected[i : i + 1])
    assert len(seen) == 28
    expected = v2.functional.normalize(expected.double() / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(found.double(), expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("by", [(0.2, 0.3, 0.3, 0.5), (0.4, 0, 0, 0), (0, 1.5, 0, 0), (0, 0, 1, 0), (0, 0, 0, 0.3)])
def test_color_jitter_equals_torchvisions_with_the_same_factors_in_the_same_order(by):
    """But where a sum is a whole number (of a colour that equals its grey), which rounds to it or just below.

    What is one step after one change can become three by later ones, in a few of a million values.
    """
    x, ids, kinds = pictures(200, 48), np.arange(200), ("brightness", "contrast", "saturation", "hue")
    x[0, :, :, :24], x[1] = 255, 7  # half of it white, and one colour
    strengths = dict(zip(kinds, map(float, by), strict=True))
    t = transform(augment=["crop_flip", "color_jitter"], **{f"color_jitter_{k}": v for k, v in strengths.items()})
    found, orders = t.train(x, 1, 2, ids), set()
    raw = cropped(t.work_dtype).train(x, 1, 2, ids)
    images = list(raw.round().clamp(0, 255).to(torch.uint8))
    for i, draws in enumerate(randomness.uniforms(ids, 8, "color_jitter", 1, 2)):
        orders.add(order := tuple(np.argsort(draws[:4])))
        for which in order:
            low, high = getattr(v2.ColorJitter(**strengths), kinds[which]) or [float(which < 3)] * 2  # None: not done
            change = getattr(v2.functional, f"adjust_{kinds[which]}")
            images[i] = change(images[i], low + (high - low) * draws[4 + which])
    assert len(orders) == 24
    expected = v2.functional.normalize(torch.stack(images).double() / 255, IMAGENET_MEAN, IMAGENET_STD)
    steps = (found - expected).abs() * 255 * torch.tensor(IMAGENET_STD)[:, None, None]
    assert steps.max() < (1.01 if by.count(0) == 3 else 3.01)
    assert (steps > 2.01).double().mean() < 1e-5
    assert (steps > 0.01).double().mean() < 5e-3


@pytest.mark.parametrize("augment", ["random_erasing", ["flip", "random_erasing"], "randaugment", "color_jitter"])
def test_draws_depend_on_seed_epoch_and_sample_alone(augment):
    x, ids, t = pictures(16), np.arange(16) + 100, transform(augment=augment)
    whole = t.train(x, 1, 2, ids)
    assert torch.equal(t.train(x[5:9], 1, 2, ids[5:9]), whole[5:9])
    for seed, epoch, other in ((2, 2, ids), (1, 3, ids), (1, 2, ids + 1)):
        assert not torch.equal(t.train(x, seed, epoch, other), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["mixup", "cutmix"])
def test_mixing_equals_torchvisions_with_the_same_share_and_box(way, dtype):
    images = transform(dtype, augment="none").eval(pictures(6))
    before_first = torch.cat([images[-1:], images])
    for step in range(20):
        found, share = mixed(before_first, {way: 1.0}, 1, 2, step)
        theirs = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[way](num_classes=4)
        params: dict[str, object] = {"lam": share, "labels": None, "batch_size": 6}
        if way == "cutmix":
            changed = (found != images).any(1).any(0)
            rows, columns = (torch.nonzero(changed.any(dim)).flatten().tolist() or [0, -1] for dim in (1, 0))
            params["box"] = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert share == pytest.approx(1 - changed.sum().item() / SIDE**2, abs=1e-12)
        assert found.dtype == dtype
        torch.testing.assert_close(found, theirs.transform(images, params), rtol=2**-7, atol=STEP / 2)


def test_shares_follow_beta_and_a_batch_has_one_way():
    x = torch.rand(3, 3, 64, 64, dtype=torch.float64)
    shares = [mixed(x, {"mixup": 0.4}, 0, 0, step)[1] for step in range(300)]
    assert kstest(shares, beta(0.4, 0.4).cdf).pvalue > 0.01
    both = [mixed(x, {"mixup": 1.0, "cutmix": 1.0}, 0, 0, step) for step in range(100)]
    boxed = [bool(((found == x[1:]) | (found == x[:-1])).all()) for found, _ in both]
    assert 30 < sum(boxed) < 70
    for seed, epoch in ((1, 0), (0, 1)):
        assert mixed(x, {"mixup": 0.4}, seed, epoch, 0)[1] != shares[0]
