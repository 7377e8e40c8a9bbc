"""Batches are of the trial's data and of this process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from plain_trials import plain_trial

from lora_vit.build import build_setup
from lora_vit.distributed import Process
from lora_vit.training.setup import Setup

CONFIG = plain_trial({"seed": 5, "data.batch_size": 4, "data.augment": "crop_flip"})


@pytest.fixture(scope="module")
def whole() -> Setup:
    return build_setup(CONFIG, Process())


@pytest.mark.parametrize("rank", [0, 1])
def test_training_batches_are_of_the_trial_and_of_this_process(rank, whole):
    stream = dataclasses.replace(whole, process=Process(rank, 2)).train_stream(CONFIG)
    assert (stream.seed, stream.steps_per_epoch) == (5, len(whole.data.splits["train"]) // 4)
    assert stream.samples is whole.samples
    assert stream.transform is whole.transform
    first = whole.train_stream(CONFIG).batch(1, 2).ids
    assert stream.batch(1, 2).ids.tolist() == first[2 * rank : 2 * rank + 2].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_sees_each_sample_once(split, world_size, whole):
    """In order, with an incomplete last batch, not augmented."""
    for rank in range(world_size):
        batches = list(dataclasses.replace(whole, process=Process(rank, world_size)).eval_stream(split, 3))
        ids = whole.data.splits[split][rank::world_size]
        assert [b.ids.tolist() for b in batches] == [ids[i : i + 3].tolist() for i in range(0, len(ids), 3)]
        assert torch.cat([b.labels for b in batches]).tolist() == whole.data.labels[ids].tolist()
        expected = whole.transform.eval(torch.from_numpy(whole.data.images[ids]))
        torch.testing.assert_close(torch.cat([b.images for b in batches]), expected, rtol=0, atol=1e-12)
