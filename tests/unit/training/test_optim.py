"""The packed AdamW against torch's, row by row, and the schedules."""

import math

import pytest
import torch
from plain_trials import PLAIN
from torch import nn

from lora_vit.config import OptimizerConfig
from lora_vit.training.optim import FlatParameters, PackedAdamW, scheduled_rate


def config(**changes) -> OptimizerConfig:
    return OptimizerConfig(**(PLAIN["optimizer"] | changes))


CONFIGS = [
    config(),
    config(lr=3e-2, weight_decay=0.0, betas=[0.8, 0.99], clip_norm=0.5),
    config(lr=5e-3, weight_decay=0.3, eps=1e-4),
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
    return named, alone, flat, PackedAdamW(flat, CONFIGS)


def test_fifty_steps_equal_torchs_adamw_on_each_row_alone():
    named, alone, flat, optimizer = packed()
    references = [
        torch.optim.AdamW(p.values(), lr=c.lr, weight_decay=c.weight_decay, betas=tuple(c.betas), eps=c.eps)
        for p, c in zip(alone, CONFIGS, strict=True)
    ]
    generator = torch.Generator().manual_seed(1)
    ok = torch.ones(K, 1, dtype=torch.bool)
    for step in range(50):
        rates = []
        flat.buffer.zero_()
        for k, (parameters, c) in enumerate(zip(alone, CONFIGS, strict=True)):
            for name, p in parameters.items():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                flat.views(flat.grads_KP[k])[name].copy_(p.grad)
            rates.append(scheduled_rate(c, step, 50))
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


@pytest.mark.parametrize("bad", [[1], [0, 2]])
@pytest.mark.parametrize("at", [0, 1])
def test_a_row_that_is_not_ok_is_untouched_bit_by_bit(bad, at):
    """Also at its first step."""
    _, _, flat, optimizer = packed()
    ok, rates = torch.ones(K, 1, dtype=torch.bool), torch.full((K, 1), 1e-2, dtype=torch.float64)
    for _ in range(at):
        flat.grads_KP.normal_()
        optimizer.step(rates, ok, torch.ones(K, 1, dtype=torch.float64))
    before = [t.clone() for t in (flat.values_KP, optimizer.exp_avg_KP, optimizer.exp_avg_sq_KP)]
    flat.grads_KP.normal_()
    flat.grads_KP[bad] = math.nan
    ok[bad] = False
    optimizer.step(rates, ok, torch.linalg.vector_norm(flat.grads_KP, dim=1, keepdim=True))
    for old, new in zip(before, (flat.values_KP, optimizer.exp_avg_KP, optimizer.exp_avg_sq_KP), strict=True):
        assert [bool(torch.equal(a, b)) for a, b in zip(old, new, strict=True)] == [k in bad for k in range(K)]
        assert torch.isfinite(new).all()
    assert optimizer.updates_K1[:, 0].tolist() == [at + (k not in bad) for k in range(K)]


def test_parameters_are_views_of_the_flat_matrix():
    named, _, flat, _ = packed()
    flat.values_KP[2].fill_(7.0)
    assert all(bool((p[2] == 7.0).all()) for p in named.values())
    flat.differentiate(named["weight"].sum() * 2 + named["bias"][1].sum())
    assert bool((flat.grads_KP[:, :12] == 2.0).all())
    assert flat.grads_KP[:, 12:].sum(1).tolist() == [0, 4, 0, 0]


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ("constant", 0.0, [1.0] * 4),
        ("linear", 0.45, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]),  # 3 of 7 steps
        ("constant", 1.0, [0.25, 0.5, 0.75]),
    ],
)
def test_schedules(kind, warmup, expected):
    c, total = config(lr=0.5, schedule=kind, warmup=warmup), len(expected)
    assert [scheduled_rate(c, i, total) for i in range(total)] == pytest.approx([0.5 * factor for factor in expected])


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [(0.0, 15, 0), (0.1, 15, 2), (0.1, 14, 1), (0.1, 16, 2), (0.5, 7, 4), (0.5, 5, 2), (1.0, 6, 6)],
)
def test_a_warmup_is_rounded_to_steps(warmup, total, steps):
    c = config(lr=1.0, warmup=warmup, schedule="cosine")
    rates = [scheduled_rate(c, i, total) for i in range(total)]
    assert rates[:steps] == pytest.approx([(i + 1) / (steps + 1) for i in range(steps)])
    assert rates[steps:] == pytest.approx(
        [(1 + math.cos(math.pi * i / (total - steps))) / 2 for i in range(total - steps)]
    )


def test_a_trunks_parameters_decay_like_the_head():
    """A pack of one that trains the trunk: a matrix there has no trial axis."""
    named = {"head.bias": nn.Parameter(torch.ones(1, 4)), "trunk.weight": nn.Parameter(torch.ones(2, 3))}
    flat = FlatParameters(named, {"head.bias"}, 1)
    optimizer = PackedAdamW(flat, [config(weight_decay=0.5)])
    optimizer.step(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1))
    assert flat.values_KP.tolist() == [[0.5] * 10]
    with pytest.raises(ValueError, match="pack of one"):
        FlatParameters(named, {"head.bias"}, 2)


@pytest.mark.parametrize("clip", [0.5, None])
def test_all_trials_clip_or_none_does(clip):
    _, _, flat, _ = packed()
    optimizer = PackedAdamW(flat, [config(clip_norm=clip)] * K)
    flat.grads_KP.normal_(generator=torch.Generator().manual_seed(3))
    norm = torch.linalg.vector_norm(flat.grads_KP, dim=1, keepdim=True)
    assert (norm > 1).all()
    clipped = flat.grads_KP * 0.5 / (norm + 1e-6) if clip else flat.grads_KP.clone()
    optimizer.step(torch.zeros(K, 1, dtype=torch.float64), torch.ones(K, 1, dtype=torch.bool), norm)
    torch.testing.assert_close(optimizer.exp_avg_KP, 0.1 * clipped, rtol=1e-12, atol=1e-12)


def test_everything_lies_where_the_parameters_do_in_their_precision():
    """A row on another device is an error there; none is made in the default precision."""
    where = {"device": "meta", "dtype": torch.float64}
    named = {"weight": nn.Parameter(torch.zeros(K, 4, 3, **where)), "bias": nn.Parameter(torch.zeros(K, 4, **where))}
    flat = FlatParameters(named, set(named), K)
    optimizer = PackedAdamW(flat, [config(clip_norm=1.0)] * K)
    column = torch.zeros(K, 1, **where)
    optimizer.step(column, column > 0, column)
    views = flat.views(flat.values_KP[0])
    tensors = [*flat.gradients, *views.values()]
    tensors += [t for t in (*vars(flat).values(), *vars(optimizer).values()) if isinstance(t, torch.Tensor)]
    assert len(tensors) == 4 + 5 + 8
    assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.float64)}
    assert all(p.shape[1:] == views[name].shape for name, p in named.items())


def test_one_buffer_holds_gradients_losses_and_the_stop():
    _, _, flat, _ = packed()
    assert flat.buffer.numel() == K * 16 + K + 1
    flat.grads_KP.fill_(1.0)
    flat.losses_K.fill_(2.0)
    flat.stop.fill_(3.0)
    assert flat.buffer.tolist() == [1.0] * (K * 16) + [2.0] * K + [3.0]
    assert flat.views(torch.arange(16.0))["bias"].tolist() == [12.0, 13.0, 14.0, 15.0]
    assert flat.views(torch.arange(16.0))["weight"].shape == (4, 3)
    assert all(t.dtype == torch.float64 for t in (flat.values_KP, flat.buffer))
