"""The packed AdamW against torch's, row by row, and the schedules."""

import math

import pytest
import torch
from torch import nn

from lora_vit.config import OptimizerConfig
from lora_vit.training.optim import FlatParameters, PackedAdamW, Schedule, schedule


def config(**changes) -> OptimizerConfig:
    values = {
        "lr": 1e-3,
        "weight_decay": 0.03,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "decay_bias_and_norm": True,
        "schedule": "linear",
        "warmup": 0.0,
        "clip_norm": None,
        "label_smoothing": 0.0,
    }
    return OptimizerConfig(**(values | changes))


CONFIGS = [
    config(),
    config(lr=3e-2, weight_decay=0.0, betas=[0.8, 0.99], clip_norm=0.5),
    config(lr=5e-3, weight_decay=0.3, eps=1e-4, decay_bias_and_norm=False),
    config(clip_norm=3.0, schedule="cosine"),
]
K = len(CONFIGS)


def packed():
    torch.manual_seed(0)
    named = {
        "weight": nn.Parameter(torch.randn(K, 4, 3, dtype=torch.float64)),
        "bias": nn.Parameter(torch.randn(K, 4, dtype=torch.float64)),
    }
    per_trial = set(named)
    alone = [{n: nn.Parameter(p[k].detach().clone()) for n, p in named.items()} for k in range(K)]
    flat = FlatParameters(named, per_trial, K)
    return named, alone, flat, PackedAdamW(flat, CONFIGS, flat.decay_mask(named, per_trial))


def torch_optimizer(parameters: dict[str, nn.Parameter], c: OptimizerConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [parameters["weight"]], "weight_decay": c.weight_decay},
        {"params": [parameters["bias"]], "weight_decay": c.weight_decay if c.decay_bias_and_norm else 0.0},
    ]
    return torch.optim.AdamW(groups, lr=c.lr, betas=tuple(c.betas), eps=c.eps)


def test_fifty_steps_equal_torchs_adamw_on_each_row_alone():
    named, alone, flat, optimizer = packed()
    references = [torch_optimizer(p, c) for p, c in zip(alone, CONFIGS, strict=True)]
    schedules = [schedule(c, 50) for c in CONFIGS]
    generator = torch.Generator().manual_seed(1)
    ok = torch.ones(K, 1, dtype=torch.bool)
    for step in range(50):
        rates = []
        flat.buffer.zero_()
        for k, (parameters, c) in enumerate(zip(alone, CONFIGS, strict=True)):
            for name, p in parameters.items():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                flat.views(flat.grads_KP[k])[name].copy_(p.grad)
            rates.append(c.lr * schedules[k].factor(step))
            if c.clip_norm is not None:
                nn.utils.clip_grad_norm_(list(parameters.values()), c.clip_norm)
            for group in references[k].param_groups:
                group["lr"] = rates[k]
            references[k].step()
        norm = torch.linalg.vector_norm(flat.grads_KP, dim=1, keepdim=True)
        optimizer.step(torch.tensor(rates, dtype=torch.float64)[:, None], ok, norm)
    for k, parameters in enumerate(alone):
        for name, p in parameters.items():
            # fp64, 50 steps of the same formula in another order of operations
            torch.testing.assert_close(named[name][k].detach(), p.detach(), rtol=1e-12, atol=1e-13)


def test_a_row_that_is_not_ok_is_untouched_bit_by_bit():
    _, _, flat, optimizer = packed()
    ok = torch.ones(K, 1, dtype=torch.bool)
    rates = torch.full((K, 1), 1e-2, dtype=torch.float64)
    flat.grads_KP.normal_()
    optimizer.step(rates, ok, torch.ones(K, 1, dtype=torch.float64))
    before = [t.clone() for t in (flat.values_KP, optimizer.exp_avg_KP, optimizer.exp_avg_sq_KP)]
    flat.grads_KP.normal_()
    flat.grads_KP[1] = math.nan
    ok[1] = False
    optimizer.step(rates, ok, torch.linalg.vector_norm(flat.grads_KP, dim=1, keepdim=True))
    for old, new in zip(before, (flat.values_KP, optimizer.exp_avg_KP, optimizer.exp_avg_sq_KP), strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])
        assert torch.isfinite(new).all()
    assert optimizer.updates_K1[:, 0].tolist() == [2, 1, 2, 2]


def test_parameters_are_views_of_the_flat_matrix():
    named, _, flat, _ = packed()
    flat.values_KP[2].fill_(7.0)
    assert all(bool((p[2] == 7.0).all()) for p in named.values())
    flat.differentiate(named["weight"].sum() * 2 + named["bias"][1].sum())
    assert bool((flat.grads_KP[:, :12] == 2.0).all())
    assert flat.grads_KP[:, 12:].sum(1).tolist() == [0, 4, 0, 0]


def test_trained_trunk_parameters_need_a_pack_of_one():
    named = {"head": nn.Parameter(torch.zeros(2, 3)), "norm": nn.Parameter(torch.zeros(3))}
    with pytest.raises(ValueError, match="pack of one"):
        FlatParameters(named, {"head"}, 2)


def test_schedules():
    linear, cosine = Schedule("linear", 0, 4), Schedule("cosine", 0, 4)
    assert [linear.factor(i) for i in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [cosine.factor(i) for i in range(4)] == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    assert {Schedule("constant", 0, 4).factor(i) for i in range(4)} == {1.0}
    warm = Schedule("linear", 3, 7)
    assert [warm.factor(i) for i in range(7)] == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
