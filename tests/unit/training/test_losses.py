"""Class weights and mixed labels against torch, torchvision and scikit-learn, and packs against each trial alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import largest_difference, train_together
from packs import new_pack, three
from plain_trials import plain_trial
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from lora_vit.build import build_setup, prepare
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError
from lora_vit.training.pack import class_weights, sample_losses

K, B, C = 3, 10, 4
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(K, B, C, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(0, C, (K, B), generator=GENERATOR)
WEIGHTS = torch.tensor([[1.0, 1, 1, 1], [0.2, 5, 1, 3], [7, 0.1, 2, 1]], dtype=torch.float64)
SMOOTHING = [0.0, 0.1, 0.3]
SMOOTHING_K1 = torch.tensor(SMOOTHING, dtype=torch.float64)[:, None]


def test_the_weighted_mean_is_torchs():
    """In fp64, sums in another order."""
    losses_KB = sample_losses(LOGITS, LABELS, SMOOTHING_K1, WEIGHTS)
    found = losses_KB.sum(1) / WEIGHTS.gather(1, LABELS).sum(1)
    for k, smoothing in enumerate(SMOOTHING):
        expected = cross_entropy(LOGITS[k], LABELS[k], weight=WEIGHTS[k], label_smoothing=smoothing)
        torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=1e-12)


def test_two_labels_are_torchvisions_mixed_ones():
    shares, both = torch.tensor([0.3, 0.7]).double(), torch.stack([LABELS, LABELS.roll(1, 1)], 2)
    losses_KB = sample_losses(LOGITS, both, SMOOTHING_K1, WEIGHTS, shares.expand(K, 1, 2))
    for k, smoothing in enumerate(SMOOTHING):
        labels = LABELS[k]
        mixed = v2.MixUp(num_classes=C).transform(labels, {"labels": labels, "lam": 0.3}).double()
        expected = cross_entropy(LOGITS[k], mixed, weight=WEIGHTS[k], label_smoothing=smoothing, reduction="sum")
        torch.testing.assert_close(losses_KB[k].sum(), expected, rtol=1e-6, atol=1e-6)  # torchvision's labels are fp32


def weighted(weights: object) -> TrialConfig:
    return plain_trial({"optimizer.class_weights": weights, "data.train_per_class": None})


def test_balanced_is_scikit_learns():
    data = build_setup(plain_trial(), Process()).data
    data = dataclasses.replace(data, labels=data.labels.copy())  # what was read is read once for all tests
    train = data.splits["train"]
    data.labels[train] = np.arange(len(train)) % 7 % C
    expected = compute_class_weight("balanced", classes=np.arange(C), y=data.labels[train])
    found = class_weights([weighted("balanced"), weighted(None), weighted([1, 2, 3, 4])], data)
    np.testing.assert_allclose(found, [expected, [1] * C, [1, 2, 3, 4]], rtol=1e-12)
    data.labels[train] %= 2  # classes 2 and 3 have no training image
    assert np.isfinite(class_weights([weighted("balanced")], data)).all()
    assert class_weights([weighted(None)] * 2, data) is None


def test_weights_are_refused_where_there_are_other_classes():
    for check in (lambda config: prepare([plain_trial(), config]), lambda config: build_setup(config, Process())):
        with pytest.raises(ConfigError, match=r"^optimizer\.class_weights=\[1\.0, 2\.0\]: give 4 numbers"):
            check(weighted([1, 2]))


EACH = ({"class_weights": "balanced", "head_lr": 1e-2}, {"class_weights": [1, 2, 3, 4], "lora_b_lr_ratio": 8.0}, {})
"""What three trials differ in beside :data:`packs.THREE`."""


def several(optimizer: str = "adamw") -> list[TrialConfig]:
    configs = three({"data.augment": ["crop_flip", "randaugment", "color_jitter", "random_erasing", "mixup", "cutmix"]})
    momenta = [{"name": optimizer, "momentum": m if optimizer == "sgd" else 0.9} for m in (0.9, 0.5, 0.0)]
    for config, own, moment in zip(configs, EACH, momenta, strict=True):
        for key, value in {**own, **moment}.items():
            setattr(config.optimizer, key, value)
    return configs


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_pack_equals_each_alone(optimizer, tmp_path):
    together = train_together(several(optimizer), tmp_path / "pack")
    for k, (one, config) in enumerate(zip(together, several(optimizer), strict=True)):
        (alone,) = train_together([config], tmp_path / f"alone{k}")
        assert largest_difference(one, alone) < 1e-9  # a batched product may sum in another order
        assert (one.predicted == alone.predicted).all()


def test_a_step_divides_by_the_weights_of_the_whole_batch_and_mixes_each_stream_its_own_way():
    pack = new_pack(several())
    pack.step(pack.learning_rates()[0], False)
    labels = [pack.setup.data.labels[s.batch_ids(0, 0, whole=True)] for s in pack.streams]
    sums = [pack.weights_KC[k].numpy()[labels[g]].sum() for k, g in enumerate(pack.stream_of_trial)]
    np.testing.assert_allclose(pack.divisor, sums, rtol=1e-12)
    shares = [s.batch(0, 0)[2] for s in pack.streams]
    assert shares[0] != shares[1]
    expected = [[[shares[g], 1 - shares[g]]] for g in pack.stream_of_trial]
    np.testing.assert_allclose(pack.shares_K1L, expected, rtol=1e-12)
