"""What a pack keeps, gives and lets go: states, padding, values that are not finite, memory."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from helpers import trial_config
from packs import new_pack, take_steps
from torch import Tensor

from lora_vit.build import build_setup
from lora_vit.distributed import Process
from lora_vit.lora.layers import LoRAAdapters
from lora_vit.training.pack import Pack

TRIALS = (
    ("seed=1", "lora.rank=2", "lora.dropout=0.3"),
    ("seed=2", "lora.rank=5", "optimizer.clip_norm=0.5"),
    ("seed=1", "lora.rank=1", "model.head_dropout=0.5"),
)


@pytest.fixture(scope="module")
def setup():
    return build_setup(trial_config(), Process())


@pytest.fixture
def pack(setup) -> Pack:
    return new_pack([trial_config(*t) for t in TRIALS], setup)


def matrices(pack: Pack) -> tuple[Tensor, ...]:
    return pack.flat.values_KP, pack.optimizer.exp_avg_KP, pack.optimizer.exp_avg_sq_KP


def tensors(pack: Pack) -> list[dict[str, Tensor]]:
    return [t for trial in pack.trials for t in (trial.state.values, trial.state.exp_avg, trial.state.exp_avg_sq)]


def test_saved_states_are_unpadded_and_stay_as_they_are(pack):
    take_steps(pack, 2)
    pack.pull()
    before = [{n: t.clone() for n, t in group.items()} for group in tensors(pack)]
    place = "encoder.layers.encoder_layer_1.mlp.0.lora_"
    for trial, rank in zip(pack.trials, (2, 5, 1), strict=True):
        for group in (trial.state.values, trial.state.exp_avg, trial.state.exp_avg_sq):
            assert group[place + "A"].shape == (rank, 32)
            assert group[place + "B"].shape == (48, rank)
            assert group["heads.head.weight"].shape == (4, 32)
            assert all(t.is_contiguous() and t.any() for t in group.values())
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in group.values())  # nothing else is held
    take_steps(pack, 1)
    for group, old in zip(tensors(pack), before, strict=True):
        assert all(torch.equal(group[n], old[n]) for n in old)
    pack.pull()
    for group, old in zip(tensors(pack), before, strict=True):
        assert not any(torch.equal(group[n], old[n]) for n in old)


def test_a_pack_of_saved_states_goes_on_bit_for_bit(pack):
    take_steps(pack, 3)
    pack.pull()
    again = Pack(pack.trials, build_setup(trial_config(), Process()))  # a trunk carries the adapters of one pack
    for mine, other in zip(matrices(again), matrices(pack), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(again.optimizer.updates_K1, pack.optimizer.updates_K1)
    assert again.step_in_epoch == 3
    rates = pack.learning_rates()
    assert torch.equal(again.learning_rates(), rates)
    for lr_K1 in rates[:2]:
        assert torch.equal(again.step(lr_K1, False), pack.step(lr_K1, False))
    assert torch.equal(again.step_state.loss_sum_K, pack.step_state.loss_sum_K)
    assert torch.equal(again.step_state.step_K, pack.step_state.step_K)


def test_a_state_of_another_model_is_refused(pack, setup):
    take_steps(pack, 1)
    pack.pull()
    del pack.trials[1].state.exp_avg["heads.head.bias"]
    with pytest.raises(ValueError, match=f"the checkpoint of {pack.trials[1].name} has other tensors"):
        Pack(pack.trials, setup)


def test_padding_is_zero_tells_moved_padding_from_values_that_are_not_finite(pack):
    take_steps(pack, 2)
    assert pack.padding_is_zero()
    assert pack.finite_K().tolist() == [True, True, True]
    lora_A = pack.model.trunk.encoder.layers[1].fc1_lora.lora_A
    with torch.no_grad():
        for value in (math.inf, math.nan):
            lora_A[1, 0, 4, 0] = value  # the last of rank 5, nothing padded
            assert pack.padding_is_zero()
            assert pack.finite_K().tolist() == [True, False, True]
        lora_A[1, 0, 4, 0] = 1.0
        lora_A[0, 0, 2, 31] = 1e-30  # beyond rank 2
        assert pack.finite_K().all()
        assert not pack.padding_is_zero()
        lora_A[0, 0, 2, 31] = 0.0
        pack.model.head.bias[2, 3] = -math.inf
        assert pack.padding_is_zero()
        assert pack.finite_K().tolist() == [True, True, False]


def test_what_leaves_is_freed_at_once(setup):
    pack = new_pack([trial_config(*t) for t in TRIALS], setup)
    take_steps(pack, 1)
    pack.predict("val")
    adapters = [m for m in pack.model.modules() if isinstance(m, LoRAAdapters)]
    parts = [pack, pack.model, pack.model.head, pack.flat, pack.optimizer, pack.step_state, *adapters, *matrices(pack)]
    left = [weakref.ref(part) for part in parts]
    del adapters, parts
    gc.collect()
    gc.disable()  # what waits for the collector holds a GPU's memory until then
    try:
        pack.pull()
        rest = pack.trials[1:]
        del pack
        rest_pack = Pack(rest, setup)
        alive = [type(part()).__name__ for part in left if part() is not None]
    finally:
        gc.enable()
    assert [t.config.seed for t in rest_pack.trials] == [2, 1]
    assert alive == []
