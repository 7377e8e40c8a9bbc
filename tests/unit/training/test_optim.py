"""The packed AdamW and SGD against torch's, row by row, and the schedules."""

import math
from dataclasses import replace

import pytest
import torch
from plain_trials import PLAIN
from torch import nn

from lora_vit.config import OptimizerConfig
from lora_vit.training.optim import FlatParameters, PackedOptimizer, scheduled_rate


def config(**changes) -> OptimizerConfig:
    return OptimizerConfig(**(PLAIN["optimizer"] | changes))


CONFIGS = [
    config(),
    config(lr=3e-2, weight_decay=0.0, betas=[0.8, 0.99], clip_norm=0.5),
    config(lr=5e-3, weight_decay=0.3, eps=1e-4),
    config(clip_norm=3.0, schedule="cosine"),
    config(weight_decay=0.2, head_lr=5e-2, lora_b_lr_ratio=16.0),
]
K = len(CONFIGS)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fifty_steps_equal_torchs_on_each_row_alone(name):
    configs = [replace(c, name=name, momentum=0.2 * k) for k, c in enumerate(CONFIGS)]
    shapes = {"head.weight": (K, 4, 3), "head.bias": (K, 4), "block.lora_A": (K, 2, 3), "block.lora_B": (K, 4, 2)}
    generator = torch.Generator().manual_seed(1)
    named = {n: nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for n, s in shapes.items()}
    alone = [{n: nn.Parameter(p[k].detach().clone()) for n, p in named.items()} for k in range(K)]
    flat = FlatParameters(named, set(named), K)
    optimizer = PackedOptimizer(flat, configs)
    factors = [{"head": (c.head_lr or c.lr) / c.lr, "lora_A": 1.0, "lora_B": c.lora_b_lr_ratio} for c in CONFIGS]
    references = []
    for own, c in zip(alone, configs, strict=True):
        groups = [{"params": [p for n, p in own.items() if kind in n]} for kind in factors[0]]
        adamw = {"betas": tuple(c.betas), "eps": c.eps}
        kind, how = (torch.optim.AdamW, adamw) if name == "adamw" else (torch.optim.SGD, {"momentum": c.momentum})
        references.append(kind(groups, lr=c.lr, weight_decay=c.weight_decay, **how))
    ok = torch.ones(K, 1, dtype=torch.bool)
    for step in range(50):
        rates = []
        flat.buffer.zero_()
        for k, (parameters, c) in enumerate(zip(alone, configs, strict=True)):
            for leaf, p in parameters.items():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                flat.grads_KP[k, flat.slices[leaf][0]] = p.grad.flatten()
            rates.append(scheduled_rate(c, step, 50))
            if c.clip_norm is not None:
                nn.utils.clip_grad_norm_(list(parameters.values()), c.clip_norm)
            for group, factor in zip(references[k].param_groups, factors[k].values(), strict=True):
                group["lr"] = rates[k] * factor
            references[k].step()
        norm = torch.linalg.vector_norm(flat.grads_KP, dim=1, keepdim=True)
        optimizer.step(torch.tensor(rates, dtype=torch.float64)[:, None], ok, norm)
    before = flat.values_KP.clone(), optimizer.exp_avg_KP.clone()
    optimizer.step(torch.ones(K, 1, dtype=torch.float64), ~ok, norm)
    assert torch.equal(flat.values_KP, before[0])
    assert torch.equal(optimizer.exp_avg_KP, before[1])
    for k, parameters in enumerate(alone):
        for leaf, p in parameters.items():
            # fp64, 50 steps of the same formula in another order of operations
            torch.testing.assert_close(named[leaf][k].detach(), p.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("constant", 0.0, [1.0] * 4),
        ("linear", 0.45, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]),  # 3 of 7 steps
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
    optimizer = PackedOptimizer(flat, [config(weight_decay=0.5)])
    optimizer.step(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1))
    assert flat.values_KP.tolist() == [[0.5] * 10]
    with pytest.raises(ValueError, match="pack of one"):
        FlatParameters(named, {"head.bias"}, 2)
