"""Our attention and encoder block against torchvision's, with dropout on, and what they refuse."""

import copy
import functools

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock as TorchvisionBlock

from lora_vit.lora.attention import Attention, EncoderBlock
from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.layers import AdapterSpec, LoRAAdapters

D, HEADS = 16, 4


def theirs(attention_dropout: float = 0.0) -> TorchvisionBlock:
    torch.manual_seed(0)
    norm = functools.partial(nn.LayerNorm, eps=1e-3)
    block = TorchvisionBlock(HEADS, D, 24, 0.0, attention_dropout, norm)
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    return block.double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class KnownDropout(nn.Dropout):
    """Drops what a fixed rule says: torch's draws in the order of memory, which differs between the two."""

    def forward(self, x):
        keep = torch.cos(torch.arange(x.numel(), dtype=x.dtype) * (self.p * 100)).view(x.shape) > 0
        return x * keep / (1 - self.p) if self.training and self.p > 0 else x


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.1, 0.2, 0.3), (0.1, 0.0, 0.3)])
def test_a_block_equals_torchvisions_with_its_dropout(dropouts, mode, x):
    reference = theirs()
    reference.dropout, reference.mlp[2], reference.mlp[4] = (KnownDropout(p) for p in dropouts)
    expected = reference.train(mode == "train")(x)
    block = EncoderBlock(reference).train(mode == "train")
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)  # fp64, sums in another order
    if dropouts == (0.0, 0.0, 0.0) or mode == "eval":
        torch.testing.assert_close(block(x, first_token_only=True), expected[:, :1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_adapted_mlp_equals_other_weights_also_under_the_blocks_own_dropout(dropout, mode, x):
    reference = theirs()
    reference.mlp[2] = KnownDropout(dropout)
    block = EncoderBlock(copy.deepcopy(reference))
    spec, state = AdapterSpec(3, 2.0, 0.0, "gaussian", 0), DropoutState([0])
    block.fc1_lora = LoRAAdapters([spec], ["fc1"], [0], "fc1", D, 24, state).double()
    block.fc2_lora = LoRAAdapters([spec], ["fc2"], [0], "fc2", 24, D, state).double()
    with torch.no_grad():
        for layer, adapters in ((reference.mlp[0], block.fc1_lora), (reference.mlp[3], block.fc2_lora)):
            nn.init.normal_(adapters.lora_B)
            layer.weight += 2.0 * adapters.lora_B[0, 0] @ adapters.lora_A[0, 0]
    expected = reference.train(mode == "train")(x)
    # fp64, sums in another order
    torch.testing.assert_close(block.train(mode == "train")(x), expected, rtol=1e-11, atol=1e-11)


def test_attention_dropout_acts_in_train_mode_alone(x):
    block = EncoderBlock(theirs(attention_dropout=0.5))
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_attention_equals_torchs(x):
    source = theirs().self_attention
    expected, _ = source(x, x, x, need_weights=False)
    attention = Attention(source)
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention(x, first_token_only=True), expected[:, :1], rtol=1e-12, atol=1e-12)
    norm = nn.LayerNorm(D, eps=1e-2).double()
    torch.testing.assert_close(attention(x, norm), attention(norm(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"bias": False}, {"kdim": 8}, {"add_bias_kv": True}])
def test_other_projections_are_refused(settings):
    with pytest.raises(ValueError, match="one biased q, k, v projection"):
        Attention(nn.MultiheadAttention(D, HEADS, batch_first=True, **settings))


def test_compute_follows_the_inputs_dtype(x):
    block = EncoderBlock(theirs())
    full, low = block(x).detach(), block(x.bfloat16()).detach()
    assert low.dtype == torch.bfloat16
    # 8 significant bits, a few roundings in a row
    assert float((low.double() - full).norm() / full.norm()) < 0.02
