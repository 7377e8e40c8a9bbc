"""DoRA (Liu et al., 2024): y = m / |W + s B A| (W + s B A) x + b for each output, with a norm that gets no gradient."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor, nn

from lora_vit.lora import functional
from lora_vit.lora.dropout import DropoutState, keep_mask, threshold
from lora_vit.lora.functional import Prologue
from lora_vit.lora.layers import AdapterSpec, LoRAAdapters

I, O, B, S = 6, 5, 2, 4
SPECS = [AdapterSpec(1, 0.5, 0.0, 3, "dora"), AdapterSpec(3, 2.0, 0.4, 4, "dora"), AdapterSpec(2, 8.0, 0.2, 3, "dora")]
EVERY, SOME, ONE = {0: "q", 1: "k", 2: "v"}, {0: "q", 2: "v"}, {0: "fc1"}


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapters_of(specs: list[AdapterSpec], slots: dict[int, str], weight: Tensor, keeps_output: bool) -> LoRAAdapters:
    """With lora_B away from zero and magnitudes away from the norms."""
    state = DropoutState([s.seed for s in specs])
    state.set(torch.arange(len(specs)), torch.arange(B))
    adapters = LoRAAdapters(specs, slots, "in", I, O, state).double()
    adapters.decompose(weight, keeps_output)
    for k, spec in enumerate(specs):
        adapters.lora_B.data[k, :, :, : spec.rank] = drawn(len(slots), O, spec.rank, seed=k)
    adapters.lora_magnitude.data *= 0.5 + drawn(*adapters.lora_magnitude.shape).sigmoid()
    return adapters


def explicit(adapters: LoRAAdapters, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In plain operations, with dense products, trial by trial and projection by projection."""
    rows, outputs = adapters.state.rows(zlib.crc32(b"in"), S), []
    for k, spec in enumerate(adapters.specs):
        limit = torch.full((len(rows),), threshold(spec.dropout), dtype=torch.int32)
        own = x.chunk(len(rows))[k]
        kept = keep_mask(rows, adapters.feature_I, limit)[k]
        parts = list((own @ weight.T).split(O, -1))
        for g, slot in enumerate(adapters.slots):
            A, B_ = adapters.lora_A[k, g], adapters.lora_B[k, g]
            norm = (weight[slot * O : (slot + 1) * O] + spec.scaling * B_ @ A).norm(dim=1).detach()
            dropped = own * kept / (1 - spec.dropout) if adapters.training else own
            u = parts[slot] + spec.scaling * dropped @ A.T @ B_.T
            parts[slot] = adapters.lora_magnitude[k, g] / norm * u
        outputs.append(torch.cat(parts, -1))
    return torch.cat(outputs) + (0 if bias is None else bias)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("keeps_output", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "slots"), [("none", EVERY), ("layer_norm", SOME), ("gelu", ONE), ("none", ONE), ("layer_norm", EVERY)]
)
def test_output_and_gradients_are_those_of_explicit_weights(kind, slots, has_bias, keeps_output, mode, monkeypatch):
    if mode == "train":
        monkeypatch.setattr(functional, "_AT_ONCE", 100)  # two or six rows of eight at once
    width = (max(slots) + 1) * O
    z, weight = drawn(len(SPECS) * B, S, I).requires_grad_(), drawn(width, I, seed=2)
    bias = drawn(width, seed=3).requires_grad_() if has_bias else None
    adapters = adapters_of(SPECS, slots, weight, keeps_output).train(mode == "train")
    norm = nn.LayerNorm(I).double()
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(4))
    x = {"none": lambda z: z, "gelu": nn.functional.gelu, "layer_norm": norm}[kind](z)
    parameters = (norm.weight, norm.bias) if kind == "layer_norm" else ()
    y = adapters.linear(z, weight, bias, Prologue(kind, 1e-5, *parameters))
    expected = explicit(adapters, x, weight, bias)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)  # fp64, sums of a few terms of size 10
    wanted = [z, *adapters.parameters(), *parameters, *([bias] if has_bias else [])]
    upstream = drawn(S, *y.shape[::2], seed=5).permute(1, 0, 2)  # strided
    before = upstream.clone()
    found, right = (torch.autograd.grad(o, wanted, upstream) for o in (y, expected))
    for f, r in zip(found, right, strict=True):
        torch.testing.assert_close(f, r, rtol=1e-10, atol=1e-10)
    assert torch.equal(upstream, before)
    for k, spec in enumerate(SPECS):  # padding gets no gradient
        assert not found[1][k, :, spec.rank :].any()
        assert not found[2][k, ..., spec.rank :].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_is_changed_at_the_start(dtype):
    weight = drawn(3 * O, I).to(dtype)
    adapters = LoRAAdapters(SPECS, SOME, "in", I, O, DropoutState([1, 2, 3]))
    adapters.decompose(weight, True)
    assert (adapters.factors(weight) == 1).all()
    exact = weight.double().view(3, O, I)[[0, 2]].norm(dim=-1).expand(len(SPECS), -1, -1)
    torch.testing.assert_close(adapters.lora_magnitude.double(), exact, rtol=1e-6, atol=0)  # fp32 sums, also of bf16
    names = [name for name in adapters.trial_tensors(1) if name.endswith("magnitude")]
    assert names == ["q.lora_magnitude", "v.lora_magnitude"]
    assert list(adapters.state_dict()) == ["lora_A", "lora_B", "lora_magnitude"]


def test_rows_that_are_zero_or_cancelled_stay_finite():
    """A pruned output stays its bias; one that the update takes away, or without magnitude, breaks nothing."""
    weight = drawn(O, I)
    weight[0] = 0
    adapters = adapters_of([AdapterSpec(1, 1.0, 0.0, 0, "dora")], ONE, weight, True).float()
    adapters.lora_B.data[0, 0, 0] = 0
    adapters.lora_A.data[0, 0, 0] = -weight[1].float()
    adapters.lora_B.data[0, 0, 1] = 1
    adapters.lora_magnitude.data[0, 0, 2] = 0
    for keeps_output in (True, False):
        adapters.keeps_output = keeps_output
        z, bias = drawn(B, S, I).float().requires_grad_(), torch.ones(O)
        y = adapters.linear(z, weight.float(), bias)
        assert (y[..., 0] == 1).all()
        assert y.isfinite().all()
        for gradient in torch.autograd.grad(y.square().sum(), [z, *adapters.parameters()]):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("keeps_output", [True, False])
def test_factors_act_in_full_precision_under_bf16(keeps_output):
    """A factor that bf16 would round by 0.2 %; over many tokens the roundings of activations average out."""
    weight = (1 + drawn(O, I)).bfloat16()
    spec = AdapterSpec(2, 1.0, 0.0, 0, "dora")
    adapters = LoRAAdapters([spec], ONE, "in", I, O, DropoutState([0]))
    adapters.decompose(weight, keeps_output)
    adapters.lora_magnitude.data *= 1.0137
    z, bias = (1 + drawn(B, 10000, I)).bfloat16(), drawn(O).bfloat16()
    upstream = (1 + drawn(B, 10000, O, seed=7)).bfloat16()

    def run(dtype):
        x = z.to(dtype).requires_grad_()
        y = adapters.linear(x, weight.to(dtype), bias.to(dtype))
        u = y.detach().double() - bias.double()
        return [u, *torch.autograd.grad(y, [x, adapters.lora_magnitude], upstream.to(dtype))]

    for low, full in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        ratio = float((low.double() * full.double()).sum() / full.double().square().sum())
        assert ratio == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("keeps_output", [True, False])
def test_what_is_kept_for_backward(keeps_output):
    """The input, as a frozen layer does, and the output where that is asked for; all else is narrow."""
    weight = drawn(O, I)
    adapters, z = adapters_of(SPECS, ONE, weight, keeps_output), drawn(len(SPECS) * B, S, I).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = adapters.linear(z, weight, None, Prologue("gelu"))
    wide = [t.data_ptr() for t in kept if t.shape[:2] == z.shape[:2]]
    assert wide == [z.data_ptr(), y.data_ptr()][: 1 + keeps_output]
