"""Our attention and last block against torchvision's, with dropout on, and what they refuse."""

import copy
import functools

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import EncoderBlock

from lora_vit.lora.backbones import places_of
from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.inject import inject_adapters, use_own_attention
from lora_vit.lora.layers import AdapterSpec
from lora_vit.models.vit import use_first_token_alone

D, HEADS = 16, 4
SPEC = AdapterSpec(3, 2.0, 0.0, 0)


def theirs(attention_dropout: float = 0.0) -> EncoderBlock:
    torch.manual_seed(0)
    norm = functools.partial(nn.LayerNorm, eps=1e-3)
    block = EncoderBlock(HEADS, D, 24, 0.0, attention_dropout, norm)
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
    reference = theirs()
    reference.dropout, reference.mlp[2], reference.mlp[4] = (KnownDropout(p) for p in dropouts)
    expected = reference.train(mode == "train")(x)
    torch.testing.assert_close(ours(reference)(x), expected, rtol=1e-12, atol=1e-12)  # fp64, sums in another order
    if dropouts == (0.0, 0.0, 0.0) or mode == "eval":
        torch.testing.assert_close(ours(reference, True)(x), expected[:, :1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dropout", "mode", "first_token_only"),
    # the dropout of these tests depends on the number of tokens
    [(0.0, "train", False), (0.0, "train", True), (0.2, "train", False), (0.2, "eval", False), (0.2, "eval", True)],
)
def test_an_adapted_block_equals_other_weights_also_under_its_own_dropout(dropout, mode, first_token_only, x):
    reference = theirs()
    reference.mlp[2] = KnownDropout(dropout)
    block = ours(reference, first_token_only)
    model = nn.ModuleDict({"block": block})
    for adapters in inject_adapters(model, [SPEC], ["q", "v", "o", "fc1", "fc2"], None, DropoutState([0])):
        adapters.double()
        nn.init.normal_(adapters.lora_B, std=0.2)
    attention = reference.self_attention
    layers = [attention.in_proj_weight, attention.out_proj.weight, reference.mlp[0].weight, reference.mlp[3].weight]
    adapted = [block.self_attention, block.self_attention.out_proj, block.mlp[0], block.mlp[3]]
    with torch.no_grad():
        for weight, layer in zip(layers, adapted, strict=True):
            for g, slot in enumerate(layer.lora.slots):
                update = 2.0 * layer.lora.lora_B[0, g] @ layer.lora.lora_A[0, g]
                weight[slot * len(update) : (slot + 1) * len(update)] += update
    expected = reference.train(mode == "train")(x)[:, : 1 if first_token_only else None]
    # fp64, sums in another order
    torch.testing.assert_close(block.train(mode == "train")(x), expected, rtol=1e-11, atol=1e-11)


def test_attention_dropout_acts_in_train_mode_alone(x):
    block = ours(theirs(attention_dropout=0.5))
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize("settings", [{"bias": False}, {"kdim": 8}, {"add_bias_kv": True}])
def test_other_projections_are_refused(settings):
    block = theirs()
    block.self_attention = nn.MultiheadAttention(D, HEADS, batch_first=True, **settings)
    with pytest.raises(ValueError, match="one biased q, k, v projection"):
        places_of(nn.Sequential(block))


def test_an_adapted_layer_follows_the_inputs_dtype(x):
    block = theirs()
    inject_adapters(nn.Sequential(block), [SPEC], ["fc1"], None, DropoutState([0]))
    layer = block.mlp[0]
    full, low = layer(x).detach(), layer(x.bfloat16()).detach()
    assert low.dtype == torch.bfloat16
    # 8 significant bits, a few roundings in a row
    assert float((low.double() - full).norm() / full.norm()) < 0.02
