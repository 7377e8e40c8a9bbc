"""Adapters in every family of backbones, against the library's own forward with explicit weights W + s B A."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import (
    CLASSES,
    FAMILIES,
    RANK,
    SCALING,
    D,
    adapters_of,
    assert_close,
    images_for,
    make_nonzero,
    places,
    plain,
    small,
)
from plain_models import model_config, timm_trunk
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import VisionTransformer

from lora_vit import remove_adapter, replace_linear_with_lora
from lora_vit.config import TARGETS
from lora_vit.lora.adapter import Adapter, base_of, merged_state_dict, put_on
from lora_vit.lora.backbones import head_name, places_of, sizes_of
from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.inject import inject_adapters
from lora_vit.lora.layers import AdapterSpec, PackedHead, adapters_in
from lora_vit.models.vit import PackedViT, cast, trunk_of, use_first_token_alone


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def explicit(
    model: nn.Module, tensors: dict[str, Tensor], where: list[tuple[str, str, slice]], scaling: float
) -> dict[str, Tensor]:
    """The weights that the adapters stand for: W + s B A in their rows, of DoRA with its magnitude."""
    weights: dict[str, Tensor] = {}
    for weight, name, rows in where:
        w = weights.get(weight, model.get_parameter(weight).detach()).clone()
        new = w[rows] + scaling * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
        if (magnitude := tensors.get(f"{name}.lora_magnitude")) is not None:
            new = (magnitude / new.detach().norm(dim=1))[:, None] * new
        w[rows] = new
        weights[weight] = w
    return weights


@pytest.mark.parametrize(
    ("targets", "blocks", "method"),
    [
        (list(TARGETS), None, "lora"),
        (["q", "v"], [1], "lora"),
        (["k", "fc2"], [0], "lora"),
        (["o", "fc1"], None, "lora"),
        (list(TARGETS), None, "dora"),
        (["q", "v", "fc2"], [1], "dora"),
    ],
)
def test_output_and_gradient_are_those_of_explicit_weights(family, targets, blocks, method):
    model = plain(family)
    x, names = images_for(model), list(model.state_dict())
    frozen = copy.deepcopy(model).requires_grad_(False)
    given: Any = {"targets": targets, "blocks": blocks, "method": method}
    adapted = replace_linear_with_lora(frozen, RANK, SCALING * RANK, **given).double()
    assert [n for n in adapted.state_dict() if ".lora." not in n] == names
    # sums in another order where timm adds the bias of q, k and v with its product; fp64
    torch.testing.assert_close(adapted(x), model(x), rtol=1e-10, atol=1e-10)
    make_nonzero(adapted)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in adapters_of(adapted).items()}
    expected = functional_call(model, explicit(model, leaves, places(family, targets, blocks), SCALING), (x,))
    assert float((expected - model(x)).detach().abs().max()) > 1e-3
    torch.testing.assert_close(adapted(x), expected, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(expected.square().sum(), list(leaves.values()))
    assert_gradients(gradients(adapted, adapted(x).square().sum()), dict(zip(leaves, wanted, strict=True)), 1e-8)


def assert_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """In fp64, sums over 5 to 20 tokens."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, tolerance)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of a lone trial's adapters, by their names in files."""
    model.zero_grad()
    loss.backward()
    found = {}
    for m in adapters_in(model).values():
        found |= m.trial_tensors(0, {name: p.grad[0] for name, p in m.named_parameters()})
    return found


def tokens_in_last_block(model: Any) -> list[int]:
    """Of its output projection and MLP, and of what it gives; filled by each pass."""
    seen: list[int] = []
    if isinstance(model, VisionTransformer):
        last = model.encoder.layers[-1]
        modules = last.self_attention.out_proj, last.mlp[3], model.encoder.ln
    else:
        modules = model.blocks[-1].attn.proj, model.blocks[-1].mlp.fc2, model.norm
    for module in modules:
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-2]))
    return seen


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("torchvision", {}),
        ("vit_tiny_patch16_224", {"act_layer": "gelu"}),  # timm's own class
        ("vit_tiny_patch16_224", {"qk_norm": True, "norm_layer": "layernorm", "scale_attn_norm": True}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28}),
        ("vit_giant_patch14_dinov2", {"img_size": 28}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_base_patch16_rope_224", {}),  # Eva with AttentionRope
        ("vit_base_patch16_rope_mixed_224", {}),
        ("vit_base_patch16_sapiens2", {"num_kv_heads": (1, 3)}),
        ("vit_small_patch16_lingbot", {}),  # Eva with its own attention, registers, rotation of halves
        ("eva_giant_patch14_clip_224", {"img_size": 28}),
        ("eva02_base_patch16_clip_224", {}),
        ("vit_small_patch16_dinov3_qkvb", {"global_pool": "token"}),
        ("vit_base_patch16_sapiens2", {"num_kv_heads": (3, 1)}),
        ("beit_base_patch16_224", {"global_pool": "token"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_last_block_of_the_class_token_alone_is_exact(name, changes, dropout):
    """Against the library's own block, which computes all tokens: frozen, and with the gradients of adapters."""
    model = small(name, changes)
    x, whole, alone = images_for(model), model, copy.deepcopy(model)
    use_first_token_alone(alone)
    assert_close(alone(x), whole(x), 1e-12)
    for adapted in (whole, alone):
        replace_linear_with_lora(adapted, RANK, SCALING * RANK, dropout).double().train()
        make_nonzero(adapted)
    seen, everything = tokens_in_last_block(alone), tokens_in_last_block(whole)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # Sapiens2 rotates by drawn frequencies in training
        logits = alone(x)
        torch.manual_seed(0)
        expected = whole(x)
    assert_close(logits, expected, 1e-12)
    assert seen == [1, 1, 1]
    assert len(everything) == 3
    assert min(everything) > 4
    found, wanted = gradients(alone, logits.square().sum()), gradients(whole, expected.square().sum())
    assert_gradients(found, wanted, 1e-10)  # sums with the zeros of the other tokens, and without


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("torchvision", 32, 1),
        ("eva02_base_patch16_clip_224", 32, 1),
        ("vit_base_patch16_siglip_224", 32, 4),  # attention pooling
        ("vit_base_patch16_siglip_gap_224", 32, 4),  # average
        ("vit_small_patch16_dinov3_qkvb", 32, 9),
        ("beit_base_patch16_224", 32, 5),
        ("deit_tiny_distilled_patch16_224", 32, 6),  # a head on the second token
    ],
)
def test_a_trunk_computes_in_its_last_block_what_its_pooling_takes(name, size, tokens):
    pytest.importorskip("timm")
    with torch.device("meta"):
        trunk = trunk_of(model_config(image_size=size)) if name == "torchvision" else timm_trunk(name, size)
        seen = tokens_in_last_block(trunk)
        width = trunk.hidden_dim if name == "torchvision" else trunk.num_features
        assert trunk(torch.empty(2, 3, size, size)).shape == (2, width)
    assert seen == [tokens] * 3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_base_resnet26d_224", {"img_size": 64, "depth": 1}),  # batch norms in front
        ("vit_base_patch16_sapiens2", {"num_kv_heads": (1, 3)}),  # frequencies that are drawn in training
    ],
)
def test_training_neither_draws_nor_notes_anything_in_a_trunk(name, changes):
    trunk = small(name, {**changes, "num_classes": 0}).requires_grad_(False)
    x, before = images_for(trunk, 3), copy.deepcopy(trunk.state_dict())
    replace_linear_with_lora(trunk, RANK)
    pack = PackedViT(trunk.double(), PackedHead([0], [0.0], D, CLASSES, DropoutState([0]), "head").double(), 1).train()
    assert all(m.training for m in adapters_in(pack).values())
    assert torch.equal(pack(x, [0]), pack(x, [0]))
    assert all(torch.equal(t, before[n]) for n, t in trunk.state_dict().items() if n in before)
    assert not any(m.training for m in adapters_in(pack.eval()).values())


SPECS = [AdapterSpec(2, 1.0, 0.0, 5), AdapterSpec(4, 0.5, 0.3, 6), AdapterSpec(3, 2.0, 0.1, 7)]


def packed(family: str, specs: list[AdapterSpec], blocks: list[int] | None) -> PackedViT:
    """A pack whose lora_B are, for each trial, as they would be alone."""
    model = plain(family)
    if family == "torchvision":
        model.heads = nn.Sequential()
    else:
        model.reset_classifier(0)
    state, seeds = DropoutState([s.seed for s in specs]), [s.seed for s in specs]
    model.requires_grad_(False)
    for adapters in inject_adapters(model, specs, TARGETS, blocks, state):
        adapters.double()
        for k, spec in enumerate(specs):
            own = adapters.lora_B.data[k, :, :, : spec.rank]
            own.copy_(torch.randn(own.shape, generator=torch.Generator().manual_seed(spec.seed), dtype=torch.float64))
    head = PackedHead(seeds, [0.0] * len(specs), D, CLASSES, state).double()
    return PackedViT(model, head, len(specs)).train()


def first_block(trunk: nn.Module) -> nn.Module:
    return trunk.get_submodule(next(iter(places_of(trunk))))


@pytest.mark.parametrize(
    ("blocks", "streams", "method"),
    [(None, [0, 0, 0], "lora"), ([1], [0, 0, 1], "lora"), ([1], [0, 1, 2], "lora"), (None, [0, 1, 0], "dora")],
)
def test_a_trial_in_a_pack_is_the_trial_alone(family, blocks, streams, method):
    specs = [spec._replace(method=method) for spec in SPECS]
    pack = packed(family, specs, blocks)
    x = images_for(pack.trunk, 2 * (max(streams) + 1))
    pack.head.state.set(torch.tensor([0, 1, 2]), torch.arange(2))
    seen: list[int] = []
    first_block(pack.trunk).register_forward_hook(lambda m, args, out: seen.append(len(out)))
    together = pack(x, streams)
    together.square().sum().backward()
    assert seen == [len(x) if blocks else 2 * len(SPECS)]  # the stem, and the blocks before the first adapters, once
    for k, (spec, stream) in enumerate(zip(specs, streams, strict=True)):
        alone = packed(family, [spec], blocks)
        alone.head.state.set(torch.tensor([k]), torch.arange(2))
        logits = alone(x[2 * stream : 2 * stream + 2], [0])
        torch.testing.assert_close(together[k], logits[0], rtol=1e-9, atol=1e-9)
        logits.square().sum().backward()
        for mine, its in zip(adapters_in(pack).values(), adapters_in(alone).values(), strict=True):
            assert_close(mine.lora_A.grad[k, :, : spec.rank], its.lora_A.grad[0], 1e-9)
            assert_close(mine.lora_B.grad[k, ..., : spec.rank], its.lora_B.grad[0], 1e-9)
            if method == "dora":
                assert_close(mine.lora_magnitude.grad[k], its.lora_magnitude.grad[0], 1e-9)


@pytest.mark.parametrize("trained", [False, True])
def test_blocks_that_are_computed_again_give_the_same_bits_and_keep_less(family, trained):
    """Those of a pack with dropout behind a block that its trials share; and of a trained trunk in bf16."""
    results = []
    for recompute in (False, True):
        pack = packed(family, SPECS[:1] if trained else SPECS, None if trained else [1])
        if trained:
            cast(pack.trunk, torch.float32).requires_grad_()
        pack = PackedViT(pack.trunk, pack.head, pack.K, recompute).train()
        pack.head.state.set(torch.arange(pack.K), torch.arange(2))
        x, kept = images_for(pack.trunk, 2), [0]
        count = lambda t, kept=kept: kept.append(t.nbytes) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            out = pack(x.bfloat16() if trained else x, [0] * pack.K)
        of = [p for p in pack.parameters() if p.requires_grad]
        results.append([out, *torch.autograd.grad(out.square().sum(), of, materialize_grads=True)])
        results[-1].append(sum(kept))
    *plain_ones, kept_by_all = results[0]
    *again, kept_by_again = results[1]
    assert all(torch.equal(a, b) for a, b in zip(plain_ones, again, strict=True))
    assert kept_by_again < 0.6 * kept_by_all  # what pools tokens is not computed again


@pytest.mark.parametrize(
    ("targets", "method"), [(list(TARGETS), "lora"), (["q", "v", "fc1"], "lora"), (["q", "v", "fc1", "fc2"], "dora")]
)
def test_merged_is_unmerged_and_loads_strictly(family, targets, method):
    model = plain(family).float()
    names, head = list(model.state_dict()), head_name(model)
    generator = torch.Generator().manual_seed(4)
    tensors = {f"{head}.weight": torch.randn(3, D, generator=generator)}
    tensors[f"{head}.bias"] = torch.randn(3, generator=generator)
    for weight, name, rows in places(family, targets):
        width_out, width_in = model.get_parameter(weight)[rows].shape
        tensors[f"{name}.lora_A"] = torch.randn(RANK, width_in, generator=generator) * 0.1
        tensors[f"{name}.lora_B"] = torch.randn(width_out, RANK, generator=generator)
        if method == "dora":
            tensors[f"{name}.lora_magnitude"] = 1 + torch.rand(width_out, generator=generator)
    lora = {"method": method, "rank": RANK, "targets": targets, "blocks": None, "dropout": 0.0}
    adapter = Adapter(tensors, {"lora": lora, "effective_scaling": 0.5})
    merged, base = merged_state_dict(model, adapter), model.state_dict()
    name, changes, *_ = FAMILIES[family]
    plain_again = small(name, {**changes, "num_classes": 3}).float()
    plain_again.load_state_dict(merged, strict=True)
    assert list(plain_again.state_dict()) == names
    wanted = {**base, **explicit(model, tensors, places(family, targets), 0.5)}
    for n in (n for n in merged if not n.startswith("head")):  # fp32, one rounding of the sum
        torch.testing.assert_close(merged[n], wanted[n], rtol=1e-6, atol=1e-6)
    before = base_of(model)
    put_on(model, adapter)
    x = images_for(model).float()
    assert_close(model(x), plain_again(x), 1e-3)  # fp32
    remove_adapter(model)
    assert base_of(model) == before


def test_layers_with_one_input_share_its_dropout(family):
    model = replace_linear_with_lora(plain(family), dropout=0.5)
    for i in range(2):
        keys = {n: m._module_key for m in adapters_in(model).values() for n in m.names if f"{i}." in n}
        q, fc1 = ([keys[n] for _, n, _ in places(family, targets, [i])] for targets in (["q", "k", "v"], ["fc1"]))
        assert len(set(q)) == len(set(fc1)) == 1
        assert len(set(keys.values())) == 4


@pytest.mark.parametrize(("given", "size"), [(32, 32), ((32, 48), [32, 48])])
def test_timms_models_are_known_by_name_and_size(given, size):
    model = small("vit_tiny_patch16_224", {"img_size": given})
    assert sizes_of(model) == {"architecture": "vit_tiny_patch16_224", "image_size": size}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit_base_patch16_rpn_224", {}, r"no encoder block of .*DINOv2.*BEiT"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, r"blocks\.0 has DiffAttention and Mlp: no adapters for these"),
    ],
)
def test_blocks_of_another_kind_are_refused_with_what_fits(name, changes, message):
    with pytest.raises(ValueError, match=message):
        replace_linear_with_lora(small(name, changes))


def test_a_rotary_embedding_is_made_once_and_the_same():
    timm = pytest.importorskip("timm")
    trunk = timm_trunk("vit_small_patch16_dinov3", 32)
    assert trunk.rope.pos_embed_cached is not None, "else it is made on the host in each pass"
    theirs = timm.create_model("vit_small_patch16_dinov3", img_size=32).rope.get_embed(shape=[2, 2])
    assert torch.equal(trunk.rope.get_embed(shape=[2, 2]), theirs)


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    """Bytes, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage()) or t, lambda t: t):
        model(x)
    return sum(size for where, size in {s.data_ptr(): s.nbytes() for s in kept}.items() if where not in own)


def test_norms_and_gelus_are_not_kept_beside_what_a_frozen_layer_keeps():
    """Adapters add their h, of the rank's width, alone."""
    frozen, adapted = (plain("DINOv2").requires_grad_(False) for _ in range(2))
    x = images_for(frozen, 8)
    frozen.patch_embed.proj.bias.requires_grad_()
    adapted.patch_embed.proj.bias.requires_grad_()
    replace_linear_with_lora(adapted, 1).double()
    assert kept_for_backward(adapted, x) < 1.03 * kept_for_backward(frozen, x)  # 1.008; with one norm of two kept, 1.07


@pytest.mark.parametrize(
    ("kind", "targets"), [("torchvision", ["o"]), ("DINOv2", ["o"]), ("EVA-02", [*"qkvo"]), ("BEiT", [*"qkvo"])]
)
def test_which_layers_compute_again_what_the_gradient_of_a_magnitude_needs(kind, targets):
    """The others keep their output: most of these are kept by what comes next."""
    model = replace_linear_with_lora(plain(kind), method="dora")
    again = {name for m in adapters_in(model).values() if not m.keeps_output for name in m.names}
    assert again == {name for _, name, _ in places(kind, targets)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets", [list(TARGETS), ["v"], ["fc2"]])
def test_under_autocast_the_layers_are_what_plain_modules_are(family, targets, dtype):
    """As near to the exact output and gradients as explicit weights under autocast, but for more roundings."""
    model = plain(family)
    x, where = images_for(model), places(family, targets)
    frozen = copy.deepcopy(model).requires_grad_(False)
    adapted = replace_linear_with_lora(frozen, RANK, SCALING * RANK, targets=targets).double()
    make_nonzero(adapted)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in adapters_of(adapted).items()}

    def of_plain(dtype: torch.dtype) -> list[Tensor]:
        own = {name: t.to(dtype) for name, t in leaves.items()}
        out = functional_call(model.to(dtype), explicit(model, own, where, SCALING), (x.to(dtype),))
        return [out, *torch.autograd.grad(out.double().square().sum(), list(leaves.values()))]

    exact = of_plain(torch.float64)
    with torch.autocast("cpu", dtype):
        rounded, out = of_plain(torch.float32), adapted.float()(x.float())
    found = gradients(adapted, out.double().square().sum())
    for ours, theirs, truth in zip([out.detach(), *(found[name] for name in leaves)], rounded, exact, strict=True):
        wrong, least = (float((t - truth).detach().norm()) for t in (ours, theirs))
        assert wrong < 4 * least + 1e-3 * float(truth.detach().norm())


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.float16, 0.0125)])
@pytest.mark.parametrize("trained", [False, True])
def test_half_precision_is_the_same_but_for_its_rounding(family, trained, dtype, error):
    """Also where parameters of the trunk are trained, which are kept in fp32 and used in the images' dtype."""
    full, low = (packed(family, SPECS[:1], None).eval() for _ in range(2))
    x = images_for(full.trunk, 2)
    expected = full(x, [0])
    cast(low.trunk, torch.float32 if trained else dtype)
    low = PackedViT(low.trunk.requires_grad_(trained), low.head, 1).eval()
    seen: list[torch.dtype] = []
    first_block(low.trunk).register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    found = low(x.to(dtype), [0])
    assert seen == [dtype]
    # 8 significant bits through two blocks of large weights, or 11
    assert float(((found - expected).norm() / expected.norm()).detach()) < error
    assert not trained or all(p.dtype == torch.float32 for p in low.trunk.parameters())
