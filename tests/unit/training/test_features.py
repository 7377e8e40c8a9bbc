"""Probes that read features train as those whose images go through the trunk in every epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import largest_difference, train_together, trial_config

from lora_vit.build import build_setup
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.errors import Interrupted
from lora_vit.records import read_record
from lora_vit.stopping import StopRequest
from lora_vit.training.features import with_features
from lora_vit.training.loop import Reporter, train_trials
from lora_vit.training.trial import Setup, TrialRun

CPU = torch.device("cpu")


def probe(folder, *overrides: str) -> TrialConfig:
    return trial_config("lora=none", "optimizer.lr=0.1", "data.augment=flip", f"data.cache_dir={folder}/c", *overrides)


def images_of(config: TrialConfig) -> tuple[Setup, list[int]]:
    """What reads images, and how many of them its trunk has seen since, pass by pass."""
    setup, seen = build_setup(config, Process()), []
    setup.build_model.frozen_trunk.register_forward_hook(lambda *call: seen.append(len(call[1][0])))
    return setup, seen


def go_on() -> None:
    """Nobody asks to stop."""


@pytest.mark.parametrize(
    ("each", "tolerance"),
    [
        ((("model.head_dropout=0.3", "optimizer.label_smoothing=0.1"),), 1e-10),
        ((("seed=1", "optimizer.class_weights=[1,2,3,4]"), ("seed=2", "model.head_dropout=0.5"), ("seed=1",)), 1e-10),
        ((("data.augment=none", "optimizer=sgd", "trainer.micro_batch=3"),), 1e-10),
        ((("trainer.precision=fp32", "optimizer.lr=1e-3"),), 1e-5),
        ((("trainer.precision=bf16", "optimizer.lr=1e-3"),), 1e-2),
        ((("trainer.precision=fp16", "optimizer.lr=1e-3"),), 1e-3),
    ],
    ids=["one", "pack", "plain", "fp32", "bf16", "fp16"],
)
def test_a_probe_trains_as_through_its_trunk(each, tolerance, tmp_path):
    """The sums of a batch are rounded in another order where it has another size: a few units of the precision."""
    configs = [probe(tmp_path, *overrides) for overrides in each]
    setup, seen = images_of(configs[0])
    through = train_together(configs, tmp_path / "through", setup)
    seen.clear()
    own = with_features(setup, configs[0], go_on)
    assert sum(seen) == sum(len(ids) * (1 + (name == "train" and "none" not in configs[0].data.augmentations()))
                            for name, ids in setup.data.splits.items())  # fmt: skip
    seen.clear()
    found = train_together(configs, tmp_path / "found", own)
    assert not seen
    for ours, theirs in zip(found, through, strict=True):
        assert largest_difference(ours, theirs) < tolerance
        assert "fp64" not in ours.trial.config.trainer.precision or (ours.predicted == theirs.predicted).all()
        assert ours.trial.record.parameters == theirs.trial.record.parameters
        assert ours.trial.record.cost["features_seconds"] > 0 and "features_seconds" not in theirs.trial.record.cost
