"""Weights under others' names: their own models, saved as they save them, give the same features in ours."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import load, model_config, randomised
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT
from torchvision.models.vision_transformer import interpolate_embeddings

from lora_vit.errors import ConfigError
from lora_vit.models.names import translate
from lora_vit.models.vit import trunk_of
from lora_vit.models.weights import fetch_weights

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
timm_layers = pytest.importorskip("timm.layers")

SIZES: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTH, MLP = 32, 64
GATED_MLP = 88  # two thirds of 128, rounded up to a multiple of 8, as HF does


DECODER = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
HF: dict[str, tuple[str, str, dict[str, Any]]] = {  # configuration, model and what is special
    "ViT": ("ViT", "ForImageClassification", {}),
    "ViT masked": ("ViT", "ForMaskedImageModeling", {"encoder_stride": 8}),
    "DeiT": ("DeiT", "ForImageClassificationWithTeacher", {}),
    "Dinov2": ("Dinov2", "ForImageClassification", {"mlp_ratio": 2}),
    "Dinov2 gated": ("Dinov2", "Model", {"mlp_ratio": 4, "use_swiglu_ffn": True}),
    "Dinov2 with registers": ("Dinov2WithRegisters", "Model", {"mlp_ratio": 2}),
    "ViTMAE": ("ViTMAE", "ForPreTraining", {"mask_ratio": 0.0, "decoder_intermediate_size": 32, **DECODER}),
    "DINOv3": ("DINOv3ViT", "Model", {}),
    "CLIP": ("CLIPVision", "Model", {"hidden_act": "gelu"}),
    "Siglip": ("SiglipVision", "Model", {"hidden_act": "gelu"}),
}


def hf(kind: str, **changes: Any) -> nn.Module:
    name, model, special = HF[kind]
    sizes = {**SIZES, "hidden_size": WIDTH, "intermediate_size": MLP, "layer_norm_eps": 1e-6, **special, **changes}
    return randomised(getattr(transformers, f"{name}{model}")(getattr(transformers, f"{name}Config")(**sizes)), 0.3)


def timm_vit(kind: Any = timm.models.VisionTransformer, **changes: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    return randomised(kind(**{**sizes, "num_classes": 0, **changes}), 0.3, seed=2)


GATED: dict[str, Any] = {"init_values": 1.0, "mlp_layer": timm_layers.SwiGLUPacked, "act_layer": nn.SiLU}
TIMM: dict[str, dict[str, Any]] = {
    "DeiT": {"kind": timm.models.deit.VisionTransformerDistilled},
    "Dinov2": {"init_values": 1e-5},
    "Dinov2 gated": {**GATED, "mlp_ratio": 2 * GATED_MLP / WIDTH},
    "Dinov2 with registers": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
    "CLIP": {"pre_norm": True},
    "Siglip": {"class_token": False, "global_pool": "map"},
}


def timm_for(kind: str, **changes: Any) -> nn.Module:
    """What timm builds for such weights."""
    return timm_vit(**{**TIMM.get(kind, {}), **changes})


def images(size: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(5)).to(dtype)


def hf_features(model: nn.Module, x: Tensor, kind: str) -> Tensor:
    """Normed tokens; of CLIP, whose last norm is for the class token alone, that; of Siglip what is pooled."""
    inner = getattr(model, getattr(model, "base_model_prefix", ""), model)
    with torch.no_grad():
        if kind == "ViTMAE":  # which shuffles the patches
            noise = torch.arange(16.0).expand(len(x), -1)
            return inner(x, noise=noise).last_hidden_state
        out = inner(x)
    return out.pooler_output if kind in ("CLIP", "Siglip") else out.last_hidden_state


def timm_features(model: Any, x: Tensor, kind: str) -> Tensor:
    with torch.no_grad():
        tokens = model.forward_features(x)
        if kind == "Siglip":
            return model.pool(tokens)
    return tokens[:, 0] if kind == "CLIP" else tokens


SEEN = "2 blocks of width 32, patch 8"
KINDS = {
    "ViT": f"{SEEN}, left out: classifier",
    "ViT masked": f"{SEEN}, left out: decoder, mask_token",
    "DeiT": f"{SEEN}, left out: cls_classifier, distillation_classifier",
    "Dinov2": f"{SEEN}, layer scale, left out: classifier, mask_token",
    "Dinov2 gated": f"{SEEN}, layer scale, left out: mask_token",
    "Dinov2 with registers": f"{SEEN}, 4 registers, layer scale, left out: mask_token",
    "ViTMAE": f"{SEEN}, left out: decoder",
    "CLIP": f"{SEEN}, a norm in front (CLIP: OpenAI's needs *_quickgelu_*)",
    "Siglip": SEEN,
}


def save_and_load(held: Any, model: nn.Module, path: Path) -> str:
    """Load what is saved; the line without the path."""
    torch.save(held, path / "w.pth")
    return load(model, path / "w.pth").removeprefix(f"model.weights={path}/w.pth: ")


def assert_has(model: nn.Module, other: nn.Module) -> None:
    wanted = {name: t for name, t in other.state_dict().items() if not name.startswith("head.")}
    torch.testing.assert_close(dict(model.state_dict()), wanted, rtol=0, atol=0)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Up to a share of the largest feature; which is not zero."""
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_hf_models_give_the_same_features_in_timm(kind, tmp_path):
    theirs, ours, x = hf(kind), timm_for(kind), images(dtype=torch.float64)
    theirs.save_pretrained(tmp_path)
    assert load(ours, tmp_path) == f"model.weights={tmp_path}: {KINDS[kind]}"
    # with registers the class token's position is added to the token in fp32, which rounds it
    tolerance = 1e-7 if kind == "Dinov2 with registers" else 1e-12
    assert_same(timm_features(ours.double(), x, kind), hf_features(theirs.double(), x, kind), tolerance)


SHAPE = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": WIDTH, "mlp_dim": MLP}


def torchvision_features(trunk: nn.Module, x: Tensor) -> Tensor:
    """Normed tokens of torchvision's own model with the weights of a trunk."""
    model = TorchvisionViT(**SHAPE).eval()
    model.load_state_dict(trunk.state_dict(), strict=False)
    with torch.no_grad():
        tokens = model._process_input(x)
        return model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), tokens], 1))


@pytest.mark.parametrize("kind", ["ViT", "ViT masked", "ViTMAE"])
def test_hf_models_give_the_same_features_in_torchvision(kind, tmp_path):
    theirs, trunk = hf(kind), trunk_of(model_config(**SHAPE))
    theirs.save_pretrained(tmp_path)
    assert load(trunk, tmp_path) == f"model.weights={tmp_path}: {KINDS[kind]}"
    assert_same(torchvision_features(trunk, images()), hf_features(theirs, images(), kind), 1e-5)


def test_torchvision_and_timm_both_ways(tmp_path):
    timms = timm_vit(num_classes=7)
    trunk, back = trunk_of(model_config(**SHAPE)), timm_vit()
    note = save_and_load({"model": timms.state_dict()}, trunk, tmp_path)
    assert note == f"{SEEN}, left out: head, taken from 'model'"
    assert_same(torchvision_features(trunk, images()), timm_features(timms, images(), ""), 1e-5)
    save_and_load(trunk.state_dict(), back, tmp_path)
    assert_has(back, timms)


def test_whole_numbers_beside_the_weights_are_no_hindrance(tmp_path):
    """OpenAI's CLIP on the hub has the numbers of its positions, and batch norms count."""
    theirs, ours = hf("CLIP"), timm_for("CLIP")
    prefixed = {f"vision_model.{n.removeprefix('vision_model.')}": t for n, t in theirs.state_dict().items()}
    numbers = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    assert save_and_load(prefixed | numbers, ours, tmp_path) == KINDS["CLIP"]
    assert_same(timm_features(ours, images(), "CLIP"), hf_features(theirs, images(), "CLIP"), 1e-5)
    sizes: dict[str, Any] = {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
    timms, other = (timm.create_model("vit_base_resnet26d_224", **sizes) for _ in range(2))
    timms.train()(images(64))
    save_and_load(timms.state_dict(), other, tmp_path)
    assert_has(other, timms)


def test_parts_of_two_models_are_refused(tmp_path):
    two = timm_vit().state_dict() | {"encoder.layer.1.layernorm_after.bias": torch.zeros(WIDTH)}
    one = r"blocks\.1\.norm2\.bias and encoder\.layer\.1\.layernorm_after\.bias are one tensor"
    with pytest.raises(ConfigError, match=f"{one}: the file holds parts of two models, save one alone"):
        save_and_load(two, timm_vit(), tmp_path)


@pytest.mark.parametrize("as_bin", [False, True])
def test_folders_with_an_index(as_bin, tmp_path):
    theirs, ours = hf("ViT"), timm_vit()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    assert len(parts) > 1
    if as_bin:
        for part in parts:
            torch.save(load_file(tmp_path / part), tmp_path / part.replace("safetensors", "bin"))
        text = index.read_text().replace(".safetensors", ".bin")
        index.unlink()
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(text)
    load(ours, tmp_path)
    assert_same(timm_features(ours, images(), ""), hf_features(theirs, images(), "ViT"), 1e-5)
    missing = tmp_path / (parts[-1].replace("safetensors", "bin") if as_bin else parts[-1])
    missing.unlink()
    with pytest.raises(ConfigError, match=f"^model.weights={missing} is not a file: check the path$"):
        fetch_weights(model_config(weights=str(tmp_path)))
    index.write_text("{")
    with pytest.raises(ConfigError, match=f"^model.weights={index} is damaged: get it again$"):
        fetch_weights(model_config(weights=str(tmp_path)))


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "here").mkdir()
    torch.save(timm_vit().state_dict(), tmp_path / "w.bin")
    (tmp_path / "here" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../w.bin"}}))
    with pytest.raises(ConfigError, match=r"here/w\.bin is not a file"):
        fetch_weights(model_config(weights=str(tmp_path / "here")))


def as_dino(state: dict[str, Tensor]) -> dict[str, Any]:
    teacher = {f"backbone.{name}": t for name, t in state.items()} | {"head.mlp.0.weight": torch.ones(2)}
    return {"student": {f"module.{name}": t + 1 for name, t in teacher.items()}, "teacher": teacher, "epoch": 3}


def as_mae(state: dict[str, Tensor]) -> dict[str, Any]:
    decoder = {f"decoder_blocks.0.{name}": torch.ones(2) for name in ("norm1.weight", "attn.qkv.weight")}
    return {"model": state | decoder | {"decoder_pos_embed": torch.ones(1, 17, 16), "mask_token": torch.ones(1, 1, 16)}}


def renamed(state: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    for theirs, ours in pairs:
        state = {name.replace(ours, theirs): t for name, t in state.items()}
    return state


S = "student.module.backbone"
CHUNKS = (("blocks.1.1.", "blocks.1."), ("blocks.0.0.", "blocks.0."))
ORIGINAL = {  # made from timm's model, whose names their authors took over, as their scripts write them
    "DINO": ({}, as_dino, f", taken from 'teacher.backbone' (it also has {S}: model.weights=FILE::{S} takes that)"),
    "DINOv2": ({"init_values": 1.0}, lambda s: s | {"mask_token": torch.zeros(1, WIDTH)}, ", left out: mask_token"),
    "DINOv2 in chunks": ({"init_values": 1.0}, lambda s: renamed(s, *CHUNKS), ", layer scale"),
    "DINOv2 gated": (GATED, lambda s: renamed(s, ("mlp.w12", "mlp.fc1"), ("mlp.w3", "mlp.fc2")), ", layer scale"),
    "MAE": ({}, as_mae, ", left out: decoder_blocks, decoder_pos_embed, mask_token, taken from 'model'"),
    "DeiT-III": (
        {"init_values": 1.0, "no_embed_class": True},
        lambda s: renamed(s, ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")),
        ", layer scale",
    ),
}


@pytest.mark.parametrize("kind", ORIGINAL)
def test_original_files(kind, tmp_path):
    changes, write, note = ORIGINAL[kind]
    timms, ours = timm_vit(**changes), timm_vit(**changes)
    line = save_and_load(write(dict(randomised(timms, 0.3, seed=3).state_dict())), ours, tmp_path)
    assert (line[: len(SEEN)], line.endswith(note)) == (SEEN, True)
    assert_has(ours, timms)


def test_registers_of_the_original_dinov2(tmp_path):
    """It keeps a position for the class token also with registers, which timm adds to the token."""
    plain = timm_vit(init_values=1.0, reg_tokens=4)  # which has positions for the registers as well
    state = dict(plain.state_dict())
    state["register_tokens"] = state.pop("reg_token") + state["pos_embed"][:, 1:5]
    state["pos_embed"] = state["pos_embed"][:, [0, *range(5, 21)]]
    ours = timm_vit(init_values=1.0, reg_tokens=4, no_embed_class=True)
    assert save_and_load(renamed(state, *CHUNKS), ours, tmp_path) == f"{SEEN}, 4 registers, layer scale"
    assert_same(timm_features(ours, images(), ""), timm_features(plain, images(), ""), 1e-5)


@pytest.mark.parametrize("family", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_timms_other_families_keep_their_names(family):
    model = timm.create_model(family, depth=1, embed_dim=48, num_heads=3, img_size=64, num_classes=0)
    state = randomised(model, 0.3).state_dict()
    translated, _ = translate(dict(state), state)
    assert translated.keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in translated.items())


@pytest.mark.parametrize("size", [24, 48])
@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2 with registers", "Siglip"])
def test_positions_of_another_grid_are_resampled_as_timm_does(kind, size):
    """Under the names in memory, where transformers 5 has others than in the files that it writes."""
    theirs, ours = hf(kind), timm_for(kind, img_size=size)
    state = theirs.state_dict()
    translated, note = translate(state, ours.state_dict())
    assert note.endswith(f", positions 4x4 resampled to {size // 8}x{size // 8}")
    name = next(name for name in state if "position_embedding" in name)
    positions = state[name].reshape(1, -1, WIDTH)
    ahead = positions.shape[1] - 16
    expected = timm_layers.resample_abs_pos_embed(positions, [size // 8] * 2, num_prefix_tokens=ahead)
    if kind == "Dinov2 with registers":
        torch.testing.assert_close(
            translated["cls_token"], state[name.replace("position_embeddings", "cls_token")] + expected[:, :1]
        )
        expected = expected[:, 1:]
    assert torch.equal(translated["pos_embed"], expected)


def test_positions_of_another_grid_are_resampled_as_torchvision_does():
    state, name = hf("ViT").state_dict(), "encoder.pos_embedding"
    trunks = (trunk_of(model_config(**SHAPE | {"image_size": size})) for size in (32, 48))
    of_32, of_48 = (translate(state, trunk.state_dict())[0] for trunk in trunks)
    assert torch.equal(of_48[name], interpolate_embeddings(48, 8, OrderedDict(of_32))[name])


def test_a_model_with_positions_for_tokens_takes_weights_without():
    """timm's with no_embed_class into one that has positions for its class token: zeros there."""
    theirs, ours = timm_vit(no_embed_class=True), timm_vit()
    translated, _ = translate(theirs.state_dict(), ours.state_dict())
    ours.load_state_dict(translated)
    assert_same(timm_features(ours, images(), ""), timm_features(theirs, images(), ""), 1e-6)


HAS = "(the file has 2 blocks of width 32, patch 8"
UNFIT = {
    "registers": (lambda: hf("Dinov2 with registers"), lambda: timm_for("Dinov2"),
                  f"it has the unknown embeddings.register_tokens {HAS}, 4 registers"),
    "no registers": (lambda: hf("Dinov2"), lambda: timm_for("Dinov2 with registers"), f"it lacks reg_token {HAS}"),
    "layer scale": (lambda: hf("Dinov2"), lambda: trunk_of(model_config(**SHAPE)),
                    f"it has the unknown dinov2.encoder.layer.0.layer_scale1.lambda1 {HAS}, layer scale"),
    "more blocks": (lambda: hf("ViT", num_hidden_layers=3), timm_vit, "it has the unknown vit.encoder.layer.2.att"),
    "fewer blocks": (lambda: hf("ViT", num_hidden_layers=1), timm_vit, "it lacks blocks.1.attn.proj.bias (the file"),
    "wider": (lambda: hf("ViT", hidden_size=64), timm_vit, "cls_token is [1, 1, 64], expected [1, 1, 32] (the file"),
    "DINOv3": (lambda: hf("DINOv3"), lambda: timm_for("Dinov2 with registers"), "it lacks blocks.0.attn.qkv"),
    "patches": (lambda: hf("ViT", patch_size=4), timm_vit, "patch_embed.proj.weight is [32, 3, 4, 4], expected [32, 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNFIT)
def test_what_cannot_be_mapped_says_what_the_file_is(what, tmp_path):
    theirs, ours, message = UNFIT[what]
    theirs().save_pretrained(tmp_path)
    trunk = ours()
    before = {name: t.clone() for name, t in trunk.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        load(trunk, tmp_path)
    assert str(error.value).startswith(f"model.weights={tmp_path} does not fit it: {message}")
    assert all(torch.equal(t, before[name]) for name, t in trunk.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224", "vit_base_patch32_224", "vit_large_patch16_224", "deit_small_distilled_patch16_224",
        "deit3_base_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch14_dinov2",
        "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224", "vit_small_patch16_dinov3_qkvb",
    ],
)  # fmt: skip
def test_the_model_that_is_named_is_one_that_fits(name, tmp_path):
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in timm.create_model(name).state_dict().items()}
    state = {name: torch.ones(()).expand(shape) for name, shape in shapes.items()}  # takes no room
    with pytest.raises(ConfigError, match=rf", as model=timm model\.name={name}\)$"):
        save_and_load(state, timm_vit(), tmp_path)


def other_eva(kind: str) -> Any:
    """timm's DINOv3, small, with biases unless it says not."""
    sizes = {"depth": 2, "embed_dim": WIDTH, "num_heads": 4, "img_size": 32, "patch_size": 8, "num_classes": 0}
    return randomised(timm.create_model(kind, **sizes, mlp_ratio=2), 0.3, seed=2)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_hf(gated, tmp_path):
    sizes = {"num_register_tokens": 4, "layer_norm_eps": 1e-5, "use_gated_mlp": gated, "rope_theta": 100.0}
    theirs = hf("DINOv3", **sizes, hidden_act="silu" if gated else "gelu")
    theirs.save_pretrained(tmp_path)
    ours = other_eva(f"vit_small{'_plus' if gated else ''}_patch16_dinov3_qkvb")
    assert load(ours, tmp_path).endswith(f"{SEEN}, 4 registers, layer scale, left out: mask_token")
    assert_same(timm_features(ours, images(), ""), theirs(images()).last_hidden_state.detach(), 1e-5)


def test_dinov3_of_meta(tmp_path):
    """It computes without the bias of its keys, which a mask says; biases of zeros are none."""
    for kind in ("vit_small_patch16_dinov3_qkvb", "vit_small_patch16_dinov3"):
        timms, ours = other_eva(kind), other_eva(kind)
        state = renamed(dict(randomised(timms, 0.3, seed=3).state_dict()), ("storage_tokens", "reg_token"))
        state = renamed(state, ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"))
        state |= {"rope_embed.periods": torch.ones(4), "mask_token": torch.zeros(1, WIDTH)}
        for i in range(2):
            q, v = (state.pop(f"blocks.{i}.attn.{name}_bias", torch.zeros(WIDTH)) for name in "qv")
            state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.ones(WIDTH), v])
            state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(WIDTH)
        save_and_load(state, ours, tmp_path)
        assert_has(ours, timms)


def test_clip_under_its_own_names(tmp_path):
    timms, ours = timm_for("CLIP"), timm_for("CLIP")
    state = dict(randomised(timms, 0.3, seed=3).state_dict())
    state["cls_token"], state["pos_embed"] = state["cls_token"][0, 0], state["pos_embed"][0]
    pairs = [("class_embedding", "cls_token"), ("positional_embedding", "pos_embed"), ("conv1", "patch_embed.proj"),
             ("transformer.resblocks.", "blocks."), ("ln_pre", "norm_pre"), ("ln_1", "norm1"), ("ln_2", "norm2"),
             ("attn.in_proj_", "attn.qkv."), ("attn.out_proj", "attn.proj"), ("mlp.c_fc", "mlp.fc1"),
             ("mlp.c_proj", "mlp.fc2"), ("ln_post.", "norm.")]  # fmt: skip
    state = {f"visual.{name}": t for name, t in renamed(state, *pairs).items()}
    text = {"positional_embedding": torch.ones(7, 16), "transformer.resblocks.0.ln_1.weight": torch.ones(16)}
    line = save_and_load(text | state | {"visual.proj": torch.ones(WIDTH, 16)}, ours, tmp_path)
    assert line == f"{KINDS['CLIP']}, left out: proj, taken from 'visual'"
    assert_has(ours, timms)


def test_a_model_is_recommended_only_if_it_takes_the_weights(tmp_path):
    """MAE with average pooling is of no model's name; a file of another size is."""
    state = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t
             for name, t in timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict().items()}  # fmt: skip
    with pytest.raises(ConfigError, match=r"lacks .*patch 16, average pooling\)$"):
        save_and_load(state, timm_vit(), tmp_path)
    with pytest.raises(ConfigError, match=r"patch 16, as model=timm model\.name=vit_tiny_patch16_224\)$"):
        save_and_load(renamed(state, ("norm.", "fc_norm.")), timm_vit(), tmp_path)


@pytest.mark.parametrize("kind", ["Beit", "Swin"])
def test_other_transformers_of_hf_are_not_taken_for_vits(kind, tmp_path):
    beit = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 48}
    swin = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    config = getattr(transformers, f"{kind}Config")(image_size=32, patch_size=4, **(beit if kind == "Beit" else swin))
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not fit it: it lacks") as error:
        load(timm_vit(), tmp_path)
    assert "model=timm" not in str(error.value)
