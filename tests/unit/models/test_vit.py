"""Our Vision Transformer against torchvision's own."""

from __future__ import annotations

import pytest
import torch
from plain_models import model_config, randomised
from torchvision.models import VisionTransformer

from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.layers import PackedHead
from lora_vit.models.vit import PackedViT, shape_of, trunk_of

SHAPE = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}


def theirs() -> VisionTransformer:
    return randomised(VisionTransformer(**SHAPE, num_classes=5), 0.1)


def ours(reference: VisionTransformer, first_trained: int = 0) -> PackedViT:
    """A pack of one; ``first_trained``: index of the first block that is trained, -1 with the stem, 3 for none."""
    trunk = trunk_of(model_config(**SHAPE))
    state = {k: v for k, v in reference.state_dict().items() if not k.startswith("heads.")}
    trunk.load_state_dict(state, strict=True)
    dtype = reference.class_token.dtype
    head = PackedHead([0], [0.0], 32, 5, DropoutState([0])).to(dtype)
    head.weight.data[0], head.bias.data[0] = reference.heads.head.weight, reference.heads.head.bias
    return PackedViT(trained(trunk.to(dtype), first_trained), head, 1).eval()


def trained(trunk: VisionTransformer, first: int) -> VisionTransformer:
    trunk.requires_grad_(False)
    for part in [trunk.conv_proj, *trunk.encoder.layers][first + 1 :]:
        part.requires_grad_(True)
    return trunk


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("first_trained", [-1, 0, 2, 3])
def test_logits_equal_torchvisions(dtype, tolerance, first_trained):
    # rounding error of the arithmetic itself; the order of sums differs (fused projection, class token alone)
    reference = theirs().to(dtype)
    x = torch.randn(4, 3, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(x)
        torch.testing.assert_close(ours(reference, first_trained)(x, [0])[0], expected, rtol=tolerance, atol=tolerance)
    assert float(expected.abs().max()) > 0.1


@pytest.mark.parametrize("first_trained", [0, 2, 3])
@pytest.mark.parametrize("streams", [[0, 1, 2], [0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 0, 0], [2, 1, 0]])
def test_each_trial_sees_its_own_stream(streams, first_trained):
    reference = theirs().double()
    x = torch.randn(max(streams) + 1, 2, 3, 32, 32, dtype=torch.float64)
    alone = ours(reference)
    head = PackedHead([5, 6, 7], [0.0] * 3, 32, 5, DropoutState([0, 1, 2])).double()
    pack = PackedViT(trained(alone.trunk, first_trained), head, 3).eval()
    with torch.no_grad():
        together = pack(x.flatten(0, 1), streams)
        for k, g in enumerate(streams):
            alone.head.weight.data[0], alone.head.bias.data[0] = head.weight[k], head.bias[k]
            torch.testing.assert_close(together[k], alone(x[g], [0])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first_trained", [-1, 0, 1, 2, 3])
def test_nothing_is_kept_for_backward_below_what_is_trained(first_trained):
    model = ours(theirs(), first_trained).train()
    trunk = model.trunk
    parts = [trunk.conv_proj, *trunk.encoder.layers]
    ran: dict[int, bool] = {}
    for i, layer in enumerate(trunk.encoder.layers):
        layer.register_forward_hook(lambda m, args, out, i=i: ran.__setitem__(i, out.requires_grad))
    model.head.register_forward_pre_hook(lambda m, args: ran.__setitem__(3, args[0].requires_grad))
    model(torch.randn(2, 3, 32, 32), [0]).sum().backward()
    assert ran == {i: i >= first_trained for i in range(3)} | {3: first_trained < 3}
    for i, part in enumerate(parts):
        assert all((p.grad is not None) == (i > first_trained) for p in part.parameters())
    assert trunk.encoder.ln.weight.grad is None, "frozen, and a gradient passes it"


def test_a_trunk_is_frozen_repeatable_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    trunk = trunk_of(model_config(**SHAPE))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.requires_grad for p in trunk.parameters())
    torch.manual_seed(0)
    reference = VisionTransformer(**SHAPE)
    reference.heads = torch.nn.Sequential()
    torch.testing.assert_close(trunk.state_dict(), reference.state_dict(), rtol=0, atol=0)
    assert trunk.encoder.layers[0].self_attention.num_heads == 4


def test_the_sizes_that_cost_depends_on():
    """Pixels, tokens (with those of class and registers), blocks and widths."""
    pytest.importorskip("timm")
    dinov2 = model_config(library="timm", name="vit_small_patch14_reg4_dinov2", image_size=28)
    assert shape_of(dinov2) == (28, 9, 12, 384, 1536)
    assert shape_of(model_config(**SHAPE)) == (32, 17, 3, 32, 64)
