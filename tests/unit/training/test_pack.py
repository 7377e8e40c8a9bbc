"""What a pack keeps, gives and lets go: states, padding, values that are not finite, memory."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from packs import new_pack, new_trials, take_steps
from plain_trials import BASELINE, plain_trial
from torch import Tensor

from lora_vit.build import build_setup
from lora_vit.distributed import Process
from lora_vit.training.pack import Pack

TRIALS = (
    {"seed": 1, "lora.rank": 2, "lora.dropout": 0.3},
    {"seed": 2, "lora.rank": 5, "optimizer.clip_norm": 0.5},
    {"seed": 1, "lora.rank": 1, "model.head_dropout": 0.5},
)


@functools.cache
def configs():
    return [plain_trial(t) for t in TRIALS]


@pytest.fixture(scope="module")
def setup():
    return build_setup(configs()[0], Process())


@pytest.fixture
def pack(setup) -> Pack:
    return new_pack(configs(), setup)


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


def test_a_pack_of_saved_states_continues_bit_for_bit(pack):
    take_steps(pack, 3)
    pack.pull()
    again = Pack(pack.trials, build_setup(configs()[0], Process()))  # a trunk carries the adapters of one pack
    for mine, other in zip(matrices(again), matrices(pack), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(again.optimizer.updates_K1, pack.optimizer.updates_K1)
    assert again.step_in_epoch == 3
    rates = pack.learning_rates()
    assert torch.equal(again.learning_rates(), rates)
    for lr_K1 in rates[:2]:
        assert torch.equal(again.step(lr_K1, False), pack.step(lr_K1, False))
    assert torch.equal(again.loss_sum_K, pack.loss_sum_K)
    assert torch.equal(again.step_K, pack.step_K)


def test_a_state_without_moments_brings_its_values(pack, setup):
    """As one whose training begins from another's values."""
    take_steps(pack, 1)
    pack.pull()
    values, moments = (m.clone() for m in matrices(pack)[:2])
    pack.trials[1].state.exp_avg, pack.trials[1].state.exp_avg_sq, pack.trials[1].state.updates = {}, {}, 0
    again = Pack(pack.trials, setup)
    assert torch.equal(again.flat.values_KP, values)
    assert torch.equal(again.optimizer.exp_avg_KP[[0, 2]], moments[[0, 2]])
    assert not again.optimizer.exp_avg_KP[1].any()
    assert not again.optimizer.exp_avg_sq_KP[1].any()
    assert again.optimizer.updates_K1[:, 0].tolist() == [1, 0, 1]


def test_a_state_of_another_model_is_refused(pack, setup):
    take_steps(pack, 1)
    pack.pull()
    del pack.trials[1].state.exp_avg["heads.head.bias"]
    with pytest.raises(ValueError, match=f"the checkpoint of {pack.trials[1].name} has other tensors"):
        Pack(pack.trials, setup)


def test_padding_that_has_moved_is_noticed(pack):
    take_steps(pack, 2)
    lora_A = pack.model.trunk.encoder.layers[1].mlp[0].lora.lora_A
    with torch.no_grad():
        lora_A[1, 0, 4, 0] = 1.0  # the last of rank 5
        assert pack.padding_is_zero()
        lora_A[0, 0, 2, 31] = 1e-30  # beyond rank 2
    assert not pack.padding_is_zero()


def test_trials_of_one_seed_and_epoch_share_a_stream(setup, monkeypatch):
    trials = new_trials(configs())
    trials[2].state.epoch = 1
    later = Pack(trials, setup)
    assert later.stream_of_trial == [0, 1, 2]
    assert later.step_K.tolist() == [0, 0, 7]
    asked = []
    for stream in later.streams:
        monkeypatch.setattr(stream, "batch_ids", lambda e, i, s=stream: asked.append((s.seed, e, i)) or s.ids[:8])
    later.step(later.learning_rates()[0], False)
    assert asked == [(1, 0, 0), (2, 0, 0), (1, 1, 0)]


@pytest.mark.parametrize(("of", "streams"), [([0, 2], [0, 0]), ([0, 1, 2], [0, 1, 0])])
def test_the_model_sees_each_streams_images_once(of, streams, setup):
    pack, seen = new_pack([configs()[i] for i in of], setup), []
    pack.model.register_forward_hook(lambda model, args, out: seen.append(args))
    take_steps(pack, 1)
    images, stream_of_trial = seen[0]
    assert stream_of_trial == streams
    batches = [setup.train_stream(configs()[i]).batch(0, 0).images for i in range(1 + max(streams))]
    torch.testing.assert_close(images, torch.cat(batches), rtol=0, atol=0)


def test_trials_at_different_steps_are_refused(setup):
    trials = new_trials(configs())
    trials[1].state.step_in_epoch = 2
    with pytest.raises(ValueError, match=r"stand at different steps of their epochs: \[0, 2\]"):
        Pack(trials, setup)


def test_learning_rates_of_the_rest_of_the_epoch(setup):
    trials = new_trials([plain_trial(t) for t in RATES])
    for trial in trials:
        trial.state.step_in_epoch = 5
    trials[1].state.epoch = 1
    rates = Pack(trials, setup).learning_rates()
    assert rates.shape == (2, 3, 1)
    # 14 steps: linear from 0.1; step 12 of a warm-up of 13 (0.9 of 14, rounded); constant
    expected = [[0.1 * 9 / 14, 0.2 * 13 / 14, 0.3], [0.1 * 8 / 14, 0.2, 0.3]]
    assert rates[..., 0].tolist() == [pytest.approx(row, rel=1e-12) for row in expected]


RATES = (
    {"optimizer.lr": 0.1},
    {"optimizer.lr": 0.2, "optimizer.warmup": 0.9, "optimizer.schedule": "cosine"},
    {"optimizer.lr": 0.3, "optimizer.schedule": "constant"},
)


@pytest.mark.parametrize(("precision", "dtype"), [("fp64", torch.float64), ("fp32", torch.float32)])
def test_a_step_begins_with_each_trials_settings(precision, dtype):
    """Those of the second of two processes, which has the second half of each batch."""
    changes = {"trainer.precision": precision}
    trials = new_trials([plain_trial(changes | {"seed": s, "optimizer.label_smoothing": s / 10}) for s in (1, 2, 0)])
    for trial in trials:
        trial.state.step_in_epoch, trial.state.loss_sum = 2, 0.1 + trial.config.seed
    trials[1].state.epoch = 1
    pack = Pack(trials, build_setup(trials[0].config, Process(1, 2, 0)))
    s = pack
    assert s.position_B.tolist() == [4, 5, 6, 7]
    torch.testing.assert_close(s.smoothing_K1, torch.tensor([[0.1], [0.2], [0.0]], dtype=dtype), rtol=0, atol=0)
    loss_sum_K = torch.tensor([1.1, 2.1, 0.1], dtype=torch.float64)
    torch.testing.assert_close(s.loss_sum_K, loss_sum_K, rtol=0, atol=0)
    assert s.step_K.tolist() == [pack.step_of(t) for t in trials] == [2, 9, 2]
    assert s.first_bad_step_K.tolist() == [-1, -1, -1]
    assert {t.dtype for t in (s.step_K, s.first_bad_step_K, s.position_B)} == {torch.int64}
    assert s.global_batch == 8
    assert pack.learning_rates().dtype == dtype
    assert s.forward is pack.model
    assert s.dropout is pack.model.head.state


def test_predictions_are_each_trials_own_and_kept_until_the_next_step(pack):
    take_steps(pack, 2)
    for split in ("val", "test"):
        first = pack.predict(split)
        ids = pack.setup.data.splits[split]
        images = pack.setup.transform.eval(torch.from_numpy(pack.setup.data.images[ids]))
        with torch.no_grad():
            logits = pack.model.eval()(images, [0, 0, 0])
        pack.model.train()
        for k, p in enumerate(first):
            assert p.ids.tolist() == ids.tolist()
            assert p.predicted.tolist() == logits[k].argmax(-1).tolist()
        assert len({p.loss for p in first}) == 3
        assert pack.predict(split) is first
    assert pack.predict("val") is not pack.predict("test")
    take_steps(pack, 1)
    assert [a.loss != b.loss for a, b in zip(pack.predict("test"), first, strict=True)] == [True] * 3


@pytest.mark.parametrize(("most", "batch"), [(256, 85), (7, 2), (2, 1)])
def test_evaluation_batches_count_images_times_trials(most, batch, pack, monkeypatch):
    monkeypatch.setattr("lora_vit.training.pack.EVAL_BATCH", most)
    seen = []
    pack.model.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    pack.predict("val")
    assert max(seen) == min(batch, len(pack.setup.data.splits["val"]))


def test_parameter_counts(setup):
    pack = new_pack(configs(), setup)
    base = sum(p.numel() for p in setup.build_model.original.parameters())
    head = 4 * 32 + 4
    for k, rank in enumerate((2, 5, 1)):
        adapter = 2 * rank * (4 * (32 + 32) + 2 * (32 + 48))  # two blocks
        counts = {"trainable": adapter + head, "adapter": adapter, "head": head, "total": base + adapter + head}
        assert pack.parameter_counts(k) == counts
    full = new_pack([plain_trial(BASELINE | {"lora.method": "full"})])
    assert full.parameter_counts(0) == {"trainable": base + head, "adapter": 0, "head": head, "total": base + head}


def test_a_compiled_pack_runs_the_compiled_model(setup, monkeypatch):
    calls = []

    def compiler(model):
        return lambda *args: calls.append(len(args)) or model(*args)

    monkeypatch.setattr(torch, "compile", compiler)
    pack = new_pack(configs(), dataclasses.replace(setup, compile=True))
    losses = take_steps(pack, 1)
    assert calls == [2]
    assert losses == take_steps(new_pack(configs(), setup), 1)
    assert calls == [2]
