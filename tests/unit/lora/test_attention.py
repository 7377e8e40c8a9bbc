"""Our attention and last block against torchvision's, with dropout on, and what they refuse."""

import copy
import functools

import pytest
import torch
from plain_models import randomised
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import EncoderBlock

from lora_vit.config import TARGETS
from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.inject import Passed, inject_adapters, use_own_attention
from lora_vit.lora.layers import AdapterSpec
from lora_vit.models.vit import use_first_token_alone

D, HEADS = 16, 4
SPEC = AdapterSpec(3, 2.0, 0.0, 0)


def theirs(attention_dropout: float = 0.0) -> EncoderBlock:
    norm = functools.partial(nn.LayerNorm, eps=1e-3)
    return randomised(EncoderBlock(HEADS, D, 24, 0.0, attention_dropout, norm), 0.5).double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class KnownDropout(nn.Dropout):
    """Drops what a fixed rule says: torch's draws in the order of memory, which differs between the two."""

    def forward(self, x):
        keep = torch.cos(torch.arange(x.numel(), dtype=x.dtype) * (self.p * 100)).view(x.shape) > 0
        return x * keep / (1 - self.p) if self.training and self.p > 0 else x


def ours(block: EncoderBlock, first_token_only: bool = False) -> EncoderBlock:
    """The same block with our attention, as a model's last if the first token counts alone."""
    model = VisionTransformer(16, 8, 1, HEADS, D, 24)
    model.encoder.layers = nn.Sequential(copy.deepcopy(block))
    use_own_attention(model)
    if first_token_only:
        use_first_token_alone(model)
    return model.encoder.layers[0]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.1, 0.2, 0.3), (0.1, 0.0, 0.3)])
def test_a_block_equals_torchvisions_with_its_dropout(dropouts, mode, x):
    """Also with adapters that add nothing yet: a dropout behind the GELU stays there."""
    reference = theirs()
    reference.dropout, reference.mlp[2], reference.mlp[4] = (KnownDropout(p) for p in dropouts)
    expected = reference.train(mode == "train")(x)
    block = ours(reference)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)  # fp64, sums in another order
    for adapters in inject_adapters(nn.Sequential(block), [SPEC], TARGETS, None, DropoutState([0])):
        adapters.double()
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(block.mlp[1], Passed) == (dropouts[1] == 0)
    if dropouts == (0.0, 0.0, 0.0) or mode == "eval":
        torch.testing.assert_close(ours(reference, True)(x), expected[:, :1], rtol=1e-12, atol=1e-12)


def test_attention_dropout_acts_in_train_mode_alone(x):
    block = ours(theirs(attention_dropout=0.5))
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_an_adapted_layer_follows_the_inputs_dtype(x):
    block = theirs()
    inject_adapters(nn.Sequential(block), [SPEC], ["fc1"], None, DropoutState([0]))
    layer = block.mlp[0]
    full, low = layer(x).detach(), layer(x.bfloat16()).detach()
    assert low.dtype == torch.bfloat16
    # 8 significant bits, a few roundings in a row
    assert float((low.double() - full).norm() / full.norm()) < 0.02
