"""Packs in fp16: loss scales like torch's GradScaler, overflows that are a trial's own, models that do not fit."""

from __future__ import annotations

import pytest
import torch
from helpers import largest_difference, train_together
from packs import THREE, new_pack, new_trials, take_steps, three
from plain_trials import BASELINE, plain_trial
from torch import Tensor, nn

from lora_vit import api, build, distributed
from lora_vit.build import build_setup, choose_precision
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError
from lora_vit.training import optim
from lora_vit.training import pack as pack_module
from lora_vit.training.optim import LossScale
from lora_vit.training.pack import Pack, sample_losses
from lora_vit.training.trial import TrialState

FP16 = {"trainer.precision": "fp16"}
CHANGES = [*THREE, {"seed": 4, "lora.rank": 3}]
FOUR = [plain_trial({**own, **FP16}) for own in CHANGES]
OVERFLOWING = 2.0**40
"""A loss scale with which gradients of the small trial are infinite in fp16, and for the next twenty steps."""


@pytest.fixture(scope="module")
def setup():
    return build_setup(FOUR[0], Process())


def pack_of(setup, scales: dict[int, float] | None = None) -> Pack:
    """The four, some with another loss scale than a new trial has."""
    trials = new_trials(FOUR)
    for k, scale in (scales or {}).items():
        trials[k].state.loss_scale = scale
    return Pack(trials, setup)


def state_of(pack: Pack) -> list[Tensor]:
    o, scaling = pack.optimizer, pack.loss_scale
    assert scaling is not None
    return [t.clone() for t in (pack.flat.values_KP, o.exp_avg_KP, o.exp_avg_sq_KP, o.updates_K1, scaling.scale_K)]


def test_scales_are_those_of_torchs_grad_scaler(monkeypatch):
    """Each trial's own, whatever the others meet."""
    monkeypatch.setattr(optim, "GROW_AFTER", 3)
    fits = torch.rand(40, 5, generator=torch.Generator().manual_seed(0)) > torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0])
    scaling, found = LossScale([TrialState() for _ in range(5)], torch.device("cpu")), []
    for fits_K in fits:
        scaling.update(fits_K)
        found.append(scaling.scale_K.clone())
    for k in range(5):
        scaler = torch.amp.GradScaler("cpu", growth_interval=3)
        p = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([p], 0.0)
        for step in range(40):
            scaler.scale(p.sum())
            p.grad = torch.tensor([1.0 if fits[step, k] else torch.inf])
            scaler.step(optimizer)
            scaler.update()
            assert found[step][k] == scaler.get_scale()
    assert {0.0, 1.0} <= {float(s) < 1 for s in found[-1]}


def test_a_pack_in_fp16_is_each_trial_alone(setup):
    losses = torch.tensor(take_steps(pack_of(setup), 7))
    for k, config in enumerate(FOUR):
        alone = torch.tensor(take_steps(new_pack([config], setup), 7))[:, 0]
        # 11 bits, and another order of sums where a product is batched: 2e-4 were seen
        torch.testing.assert_close(losses[:, k], alone, rtol=2e-3, atol=0)


def test_gradients_are_those_of_fp32_but_for_rounding(setup):
    """Also of a trunk that is trained."""
    for changes in (CHANGES, [{**BASELINE, "lora.method": "full"}]):
        packs = []
        for precision in ("fp16", "fp32"):
            trials = new_trials([plain_trial({**own, "trainer.precision": precision}) for own in changes])
            for trial in trials:
                trial.state.loss_scale = 2.0**10  # at 2^16 some overflow in their first step
            packs.append(Pack(trials, build_setup(trials[0].config, Process())))
        low, high = (torch.tensor(take_steps(pack, 1)[0]) for pack in packs)
        torch.testing.assert_close(low, high, rtol=1e-3, atol=0)
        assert not torch.equal(low, high)
        low, high = (pack.flat.grads_KP for pack in packs)
        wrong_K = (low - high).norm(dim=1) / high.norm(dim=1)
        assert float(wrong_K.min()) > 0
        assert float(wrong_K.max()) < 5e-3  # 2.4e-3 were seen


def test_an_overflow_leaves_its_trial_as_it_was_and_the_others_bit_for_bit(setup):
    calm = pack_of(setup)
    expected, after = take_steps(calm, 4), state_of(calm)
    troubled = pack_of(setup, {1: OVERFLOWING})
    before = state_of(troubled)
    for step, (one, other) in enumerate(zip(expected, take_steps(troubled, 4), strict=True)):
        assert [one[k] for k in (0, 2, 3)] == [other[k] for k in (0, 2, 3)]
        assert (one[1] == other[1]) == (step == 0), "its loss is then that of what it was"
    for mine, its, first in zip(state_of(troubled), after, before, strict=True):
        assert torch.equal(mine[[0, 2, 3]], its[[0, 2, 3]])
        assert torch.equal(mine[1], first[1]) == (mine.ndim == 2)
    assert troubled.loss_scale.scale_K[1] == OVERFLOWING / 2**4
    assert troubled.first_bad_step_K.tolist() == [-1] * 4
    assert torch.isfinite(troubled.loss_sum_K).all()


def test_a_loss_that_overflowed_counts_as_the_mean_so_far(setup, monkeypatch):
    """Not as infinite: the epoch's mean stays that of the other steps."""

    def losses(*given: Tensor) -> Tensor:
        infinite = torch.tensor([0.0, torch.inf, 0.0, 0.0])[:, None]
        return sample_losses(*given) + (infinite if pack.step_in_epoch == 1 else 0.0)

    monkeypatch.setattr(pack_module, "sample_losses", losses)
    pack = pack_of(setup)
    found = torch.tensor(take_steps(pack, 3), dtype=torch.float64)
    assert torch.isinf(found).tolist() == [[step == 1 and k == 1 for k in range(4)] for step in range(3)]
    found[1, 1] = found[0, 1]
    torch.testing.assert_close(pack.loss_sum_K, found.sum(0), rtol=1e-12, atol=0)


def test_an_overflow_in_another_process_is_one_here(setup, monkeypatch):
    """The sum of gradients has it; the loss that is logged is that of the whole batch."""
    pack = pack_of(setup)
    before = state_of(pack)
    width = pack.flat.grads_KP.shape[1]

    def theirs(buffer: Tensor) -> Tensor:
        buffer[2 * width + 5] = torch.inf  # of the third trial
        return buffer

    monkeypatch.setattr(distributed, "sum_over_processes_", theirs)
    take_steps(pack, 1)
    assert [bool(u) for u in pack.optimizer.updates_K1[:3]] == [True, True, False]
    assert torch.equal(pack.flat.values_KP[2], before[0][2])
    assert pack.loss_scale.scale_K[:3].tolist() == [2.0**16, 2.0**16, 2.0**15]


def test_scales_resume_bit_for_bit(setup, monkeypatch):
    monkeypatch.setattr(optim, "GROW_AFTER", 3)
    pack = pack_of(setup, {1: OVERFLOWING, 3: 2.0})
    take_steps(pack, 2)
    pack.pull()
    again = Pack(pack.trials, build_setup(FOUR[0], Process()))
    rates = pack.learning_rates()
    for lr_K1 in rates[:3]:
        assert torch.equal(again.step(lr_K1, False), pack.step(lr_K1, False))
    for mine, its in zip(state_of(again), state_of(pack), strict=True):
        assert torch.equal(mine, its)
    assert again.loss_scale.good_K.tolist() == pack.loss_scale.good_K.tolist()
    assert again.loss_scale.scale_K[3] == 4.0, "grown after a step here and two there"


def test_a_trial_whose_scale_falls_below_one_fails_with_the_remedy(tmp_path):
    """What no scale helps: its adapters' output is infinite. The others never notice."""
    changes = {"trainer.epochs": 3, "trainer.log_every": 5}
    wild = plain_trial({**FP16, **changes, "lora.alpha": 1e7, "lora.rank": 1, "seed": 9})
    tame = three(FP16 | changes)[:2]
    together = train_together([tame[0], wild, tame[1]], tmp_path / "three")
    alone = train_together(tame, tmp_path / "two")
    for mine, its in zip((together[0], together[2]), alone, strict=True):
        assert mine.trial.record.status == "completed"
        assert largest_difference(mine, its) < 2e-2
    record = together[1].trial.record
    assert record.status == "failed"
    assert record.error["step"] == 17, "2^16 is halved 17 times"
    assert "trainer.precision=fp32 (bf16 where the device has it)" in record.error["message"]
    assert together[1].trial.state.updates == 0


@pytest.mark.parametrize(
    ("asked", "capability", "cpu", "found", "says"),
    [
        ("auto", (6, 1), "", "fp32", "6.1 has units for neither"), ("auto", (7, 0), "", "fp16", "fp16 and no bf16"),
        ("auto", (7, 5), "", "fp16", "CUDA 7.5"), ("auto", (8, 0), "", "bf16", "CUDA 8.0 has units for bf16"),
        ("auto", (12, 0), "", "bf16", "CUDA 12.0"), ("auto", None, "avx2", "fp32", "no units for bf16"),
        ("auto", None, "amx_bf16", "bf16", "the CPU"), ("fp16", (9, 0), "", "fp16", ""),
    ],
)  # fmt: skip
def test_auto_takes_what_the_device_computes_fast_and_says_why(asked, capability, cpu, found, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(build, "_cpuinfo", lambda: cpu)
    precision, why = choose_precision(asked, torch.device("cuda" if capability else "cpu"))
    assert precision == found
    assert says in why
    assert bool(says) == bool(why)


@pytest.mark.parametrize("asked", ["fp16", "auto"])
def test_a_model_whose_activations_do_not_fit_is_told_before_it_trains(asked, monkeypatch, capsys):
    """``auto`` takes fp32 for it, and says so."""
    whole = build.load_weights

    def enlarged(trunk, m):
        trunk.encoder.layers[1].mlp[3].weight.data *= 1e8
        return whole(trunk, m)

    monkeypatch.setattr(build, "load_weights", enlarged)
    monkeypatch.setattr(build, "choose_precision", lambda *_: ("fp16", "of its units" if asked == "auto" else ""))
    config = plain_trial({"trainer.precision": asked})
    says = "vit_tiny has activations beyond fp16's 65,504 in encoder.layers.encoder_layer_1"
    if asked == "fp16":
        with pytest.raises(ConfigError, match=f"trainer.precision=fp16: {says}: give fp32"):
            build_setup(config, Process())
        return
    setup = build_setup(config, Process())
    assert f"trainer.precision=auto: fp32, as {says}\n" in capsys.readouterr().out
    assert (setup.environment["precision"], setup.transform.dtype) == ("fp32", torch.float32)
    assert new_pack([config], setup).loss_scale is None
    assert all(p.dtype == torch.float32 for p in setup.build_model([config]).parameters())


@pytest.mark.slow
def test_fp16_trains_as_well_as_fp32(tmp_path):
    """The quickstart with fewer tokens, blocks and epochs: a CPU takes fifty times as long for fp16."""
    small = ["experiment=quickstart", "model.image_size=16", "lora.blocks=[5]", "trainer.epochs=4", "optimizer.lr=1e-2",
             "data.val_fraction=0.15", "data.test_fraction=0.05"]  # fmt: skip
    accuracy = {}
    for precision in ("fp32", "fp16"):
        config = api.compose([*small, f"trainer.precision={precision}", "trainer.accelerator=cpu"])
        (done,) = train_together([config], tmp_path / precision)
        accuracy[precision] = done.trial.record.metrics["val_accuracy"]
    assert accuracy["fp32"] > 0.8, accuracy
    assert abs(accuracy["fp32"] - accuracy["fp16"]) < 0.02  # 5 of 270 images; seeds differ by more
