"""The packed adapters and heads against torch's own layers: initial spreads, dropout, scaling, precision."""

import math
import zlib

import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn

from lora_vit import randomness
from lora_vit.lora.dropout import DropoutState, keep_mask, threshold
from lora_vit.lora.functional import Prologue
from lora_vit.lora.layers import AdapterSpec, LoRAAdapters, PackedHead, initial_lora_A

I, O, B, S = 24, 16, 2, 5
SPECS = (
    AdapterSpec(2, 32 / 3, 0.3, 3),
    AdapterSpec(4, 0.5, 0.0, 4),
    AdapterSpec(1, 8.0, 0.7, 3),
)


def adapters_of(*specs: AdapterSpec) -> LoRAAdapters:
    """Adapters with a lora_B that is not zero, in fp64."""
    state = DropoutState([s.seed for s in specs])
    adapters = LoRAAdapters(list(specs), {0: "block.q", 2: "block.v"}, "block.in", I, O, state).double()
    nn.init.normal_(adapters.lora_B, generator=torch.Generator().manual_seed(0))
    for k, spec in enumerate(specs):
        adapters.lora_B.data[k, :, :, spec.rank :] = 0
    state.set(torch.tensor([5 + k for k in range(len(specs))]), torch.arange(B))
    return adapters


def same_distribution(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Two-sample Kolmogorov-Smirnov on fixed draws: passes or fails for good; 20,000 draws tell 3 % of scale apart."""
    return ks_2samp(ours.flatten().numpy(), theirs.flatten().numpy()).pvalue > 1e-3


@pytest.mark.parametrize("width", [100, 400])
def test_kaiming_start_is_loralibs(width):
    a = torch.cat([initial_lora_A(AdapterSpec(50, 1, 0, s), "n", width) for s in range(8)])
    torch.manual_seed(0)
    theirs = nn.init.kaiming_uniform_(torch.empty(400, width), a=math.sqrt(5))  # loralib's reset_parameters
    assert same_distribution(a, theirs)
    assert float(a.abs().max()) <= 1 / math.sqrt(width)


def test_starts_are_these_draws():
    """Another order or key of draws, and a trial of an older version is another trial."""
    draw = torch.Generator().manual_seed(randomness.key("lora_A", 7, "fc1"))
    expected = torch.empty(3, 16).uniform_(-0.25, 0.25, generator=draw)
    assert torch.equal(initial_lora_A(AdapterSpec(3, 1, 0, 7), "fc1", 16), expected)
    head = PackedHead([7], [0.0], 16, 5, DropoutState([7]))
    draw = torch.Generator().manual_seed(randomness.key("heads.head", 7))
    for parameter in (head.weight, head.bias):
        assert torch.equal(parameter[0], torch.empty(parameter.shape[1:]).uniform_(-0.25, 0.25, generator=draw))


def test_adapters_start_as_each_trial_alone():
    adapters = LoRAAdapters(list(SPECS), {0: "q", 2: "v"}, "in", I, O, DropoutState([1, 2, 3]))
    assert adapters.lora_A.shape == (3, 2, 4, I)
    assert adapters.lora_B.shape == (3, 2, O, 4)
    assert not adapters.lora_B.any()
    assert set(adapters.state_dict()) == {"lora_A", "lora_B"}
    for k, spec in enumerate(SPECS):
        for g, name in enumerate(("q", "v")):
            assert torch.equal(adapters.lora_A[k, g, : spec.rank], initial_lora_A(spec, name, I))
            assert not adapters.lora_A[k, g, spec.rank :].any()
        views = adapters.trial_tensors(k)
        assert {n: tuple(v.shape) for n, v in views.items()} == {
            f"{n}.lora_{m}": (spec.rank, I) if m == "A" else (O, spec.rank) for n in "qv" for m in "AB"
        }
        assert torch.equal(views["v.lora_A"], adapters.lora_A[k, 1, : spec.rank])
        views["v.lora_B"].data.fill_(k + 1)  # they are views
        assert (adapters.lora_B[k, 1, :, : spec.rank] == k + 1).all()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["none", "gelu", "layer_norm"])
def test_each_trial_gets_its_scaling_and_dropout(mode, kind):
    adapters = adapters_of(*SPECS).train(mode == "train")
    generator = torch.Generator().manual_seed(1)
    shapes = ((3 * B, S, I), (3 * O, I), (3 * O,))
    z, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    norm = nn.LayerNorm(I, eps=1e-2).double()
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    x = {"none": lambda x: x, "gelu": nn.functional.gelu, "layer_norm": norm}[kind](z)
    parameters = (norm.weight, norm.bias) if kind == "layer_norm" else ()
    y = adapters.linear(z, weight, bias, Prologue(kind, 1e-2, *parameters))
    rows = adapters.state.rows(zlib.crc32(b"block.in"), S)
    for k, spec in enumerate(SPECS):
        here = slice(k * B, (k + 1) * B)
        xk = x[here]
        expected = list(nn.functional.linear(xk, weight, bias).chunk(3, -1))
        if mode == "train":
            kept = keep_mask(rows, adapters.feature_I, torch.full((3,), threshold(spec.dropout), dtype=torch.int32))[k]
            xk = xk * kept / (1 - spec.dropout)
        for g, slot in enumerate((0, 2)):
            A, B_ = adapters.lora_A[k, g], adapters.lora_B[k, g]
            expected[slot] = expected[slot] + spec.scaling * xk @ A.T @ B_.T
        torch.testing.assert_close(y[here], torch.cat(expected, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_scaling_acts_in_full_precision_under_bf16(dropout):
    """Roundings of activations to bf16 average out over many tokens; a rounded factor, 0.2 % off, would not.

    Activations and gradients have a mean, or the adapters' gradients would be sums of noise as the roundings are.
    """
    adapters = adapters_of(AdapterSpec(3, 32 / 3, dropout, 0)).train()
    adapters.lora_A.data, adapters.lora_B.data = (p.data.bfloat16().float() for p in adapters.parameters())
    generator = torch.Generator().manual_seed(1)
    z = (1 + torch.randn(B, 10000, I, generator=generator)).bfloat16()
    upstream = (1 + torch.randn(B, 10000, 3 * O, generator=generator)).bfloat16()
    zero = torch.zeros(3 * O, I)

    def run(dtype):
        x = z.to(dtype).requires_grad_()
        y = adapters.linear(x, zero.to(dtype), None)
        return [y.detach(), *torch.autograd.grad(y, [x, *adapters.parameters()], upstream.to(dtype))]

    for low, full in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        ratio = float((low.double() * full.double()).sum() / full.double().square().sum())
        assert ratio == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("change", ["half", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_cast_of_the_model_leaves_the_scaling_as_it_is(change, dropout):
    adapters = getattr(adapters_of(AdapterSpec(3, 32 / 12, dropout, 0)), change)()
    for factors, exact in ((adapters.scale_K, 32 / 12), (adapters.train_scale_K, 32 / 12 / (1 - dropout))):
        assert factors(torch.float64).tolist() == [exact]
        assert factors(torch.bfloat16).tolist() == torch.tensor([exact]).tolist()
    assert not any(b.is_floating_point() for b in adapters.buffers())  # an Apple GPU has no fp64


def head_of(dropouts, width=I, classes=7, seeds=None) -> PackedHead:
    seeds = list(range(len(dropouts))) if seeds is None else seeds
    state = DropoutState([10 + s for s in seeds])
    state.set(torch.tensor([3 + k for k in range(len(seeds))]), torch.arange(B))
    return PackedHead(seeds, list(dropouts), width, classes, state, "head").double()  # timm's name; the key stays


def test_heads_start_as_linear_layers_do():
    head = head_of([0.0] * 4, 400, 50)
    wide = head_of([0.0] * 100, 400, 50)
    torch.manual_seed(0)
    theirs = [nn.Linear(400, 50) for _ in range(100)]
    assert same_distribution(head.weight.detach(), torch.stack([t.weight.detach() for t in theirs[:4]]))
    assert same_distribution(wide.bias.detach(), torch.stack([t.bias.detach() for t in theirs]))
    assert float(wide.weight.detach().abs().max()) <= 1 / math.sqrt(400)
    again = head_of([0.0] * 2, 400, 50, [3, 1])
    for mine, other in ((again.weight, head.weight), (again.bias, head.bias)):
        assert torch.equal(mine, other[[3, 1]])
        assert not torch.equal(mine[0], mine[1])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dropouts", [(0.0, 0.5, 0.2), (0.4, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_each_head_drops_at_its_own_rate_and_rescales(dropouts, mode):
    head = head_of(dropouts).train(mode == "train")
    x = torch.randn(3, B, I, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = head(x)
    assert y.shape == (3, B, 7)
    rows = head.state.rows(zlib.crc32(b"heads.head"), 1)
    for k, p in enumerate(dropouts):
        xk = x[k]
        if mode == "train":
            limit = torch.full((3,), threshold(p), dtype=torch.int32)
            kept = keep_mask(rows, head.feature_I, limit)[k, :, 0]
            assert bool(kept.all()) == (p == 0)
            xk = xk * kept / (1 - p)
        expected = nn.functional.linear(xk, head.weight[k], head.bias[k])
        torch.testing.assert_close(y[k], expected, rtol=1e-12, atol=1e-12)


def test_a_head_computes_in_its_weights_dtype_and_saves_nothing_else():
    head = head_of((0.0, 0.5)).train()
    assert set(head.state_dict()) == {"weight", "bias"}
    x = torch.ones(2, B, I, dtype=torch.bfloat16)
    full, single = head(x), PackedHead([0, 1], [0.0, 0.5], I, 7, head.state).train()(x)
    assert (full.dtype, single.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(single.double(), full, rtol=1e-4, atol=1e-5)  # fp32, sums of 24 terms
