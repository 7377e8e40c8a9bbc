"""The packed adapters and heads against torch's own layers, with weights given."""

import pytest
import torch

from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.layers import AdapterSpec, LoRAAdapters

I, O = 24, 16


def adapters_of(*specs: AdapterSpec) -> LoRAAdapters:
    state = DropoutState([s.seed for s in specs])
    adapters = LoRAAdapters(list(specs), ["block.fc1"], [0], "block.fc1", I, O, state)
    torch.nn.init.normal_(adapters.lora_B, generator=torch.Generator().manual_seed(0))
    for k, spec in enumerate(specs):
        adapters.lora_B.data[k, :, :, spec.rank :] = 0
    return adapters


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_scaling_acts_in_full_precision_under_bf16(dropout):
    """Roundings of activations to bf16 average out over many tokens; a rounded factor, 0.2 % off, would not."""
    adapters = adapters_of(AdapterSpec(3, 32 / 3, dropout, "kaiming_uniform", 0)).train()
    adapters.lora_A.data, adapters.lora_B.data = (p.data.bfloat16().float() for p in adapters.parameters())
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1, 20000, I, generator=generator).bfloat16()
    upstream = torch.randn(1, 20000, O, generator=generator).bfloat16()
    adapters.state.set(torch.tensor([0]), torch.arange(1))
    zero = torch.zeros(O, I)

    def run(dtype):
        y = adapters.linear(z.to(dtype), zero.to(dtype), None)
        return [y.detach(), *torch.autograd.grad(y, list(adapters.parameters()), upstream.to(dtype))]

    for low, full in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        ratio = float((low.double() * full.double()).sum() / full.double().square().sum())
        assert ratio == pytest.approx(1, abs=5e-4)
