"""Weights under others' names: their own models, saved as they save them, give the same features in ours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from lora_vit.config import ConfigError
from lora_vit.models.names import describe, translate
from lora_vit.models.vit import build_trunk
from lora_vit.models.weights import check_weights, load_trunk_weights

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
timm_layers = pytest.importorskip("timm.layers")

SIZES: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTH, MLP = 32, 64
NORM_EPS = 1e-6
GATED_MLP = 88  # two thirds of 128, rounded up to a multiple of 8, as HF does


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter drawn anew, so that none stays at a one or zero that would hide its loss."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return model.eval()


def hf(kind: str, **changes: Any) -> nn.Module:
    name, model = {
        "ViT": ("ViT", "ViTForImageClassification"),
        "ViT masked": ("ViT", "ViTForMaskedImageModeling"),
        "DeiT": ("DeiT", "DeiTForImageClassificationWithTeacher"),
        "Dinov2": ("Dinov2", "Dinov2ForImageClassification"),
        "Dinov2 gated": ("Dinov2", "Dinov2Model"),
        "Dinov2 with registers": ("Dinov2WithRegisters", "Dinov2WithRegistersModel"),
        "ViTMAE": ("ViTMAE", "ViTMAEForPreTraining"),
        "CLIP": ("CLIPVision", "CLIPVisionModel"),
        "Siglip": ("SiglipVision", "SiglipVisionModel"),
    }[kind]
    sizes = {**SIZES, "hidden_size": WIDTH, "intermediate_size": MLP, "layer_norm_eps": NORM_EPS, **changes}
    if "inov2" in name:
        sizes |= {"mlp_ratio": 4 if kind == "Dinov2 gated" else 2, "use_swiglu_ffn": kind == "Dinov2 gated"}
    if name == "ViT" and "masked" in kind:
        sizes |= {"encoder_stride": 8}
    if name == "ViTMAE":
        sizes |= {"mask_ratio": 0.0, "decoder_hidden_size": 16, "decoder_num_attention_heads": 2}
        sizes |= {"decoder_num_hidden_layers": 1, "decoder_intermediate_size": 32}
    if name in ("CLIPVision", "SiglipVision"):
        sizes |= {"hidden_act": "gelu"}
    return randomised(getattr(transformers, model)(getattr(transformers, f"{name}Config")(**sizes)))


def timm_vit(**changes: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    return randomised(timm.models.VisionTransformer(**{**sizes, "num_classes": 0, **changes}), seed=2)


def timm_for(kind: str, **changes: Any) -> nn.Module:
    """What timm builds for such weights."""
    special: dict[str, Any] = {
        "DeiT": {"reg_tokens": 1},
        "Dinov2": {"init_values": 1e-5},
        "Dinov2 gated": {"init_values": 1e-5, "mlp_layer": timm_layers.SwiGLUPacked, "mlp_ratio": 2 * GATED_MLP / WIDTH},
        "Dinov2 with registers": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
        "CLIP": {"pre_norm": True},
        "Siglip": {"class_token": False, "global_pool": "map"},
    }.get(kind, {})
    if kind == "DeiT":
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
        return randomised(timm.models.deit.VisionTransformerDistilled(**{**sizes, "num_classes": 0, **changes}), seed=2)
    return timm_vit(**{**special, **changes})


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


KINDS = {
    "ViT": ("HF's ViT, 2 blocks of width 32, patch 8, left out: classifier", 1e-6),
    "ViT masked": ("HF's ViT, 2 blocks of width 32, patch 8, left out: decoder, mask_token", 1e-6),
    "DeiT": ("HF's DeiT, 2 blocks of width 32, patch 8, left out: cls_classifier, distillation_classifier", 1e-6),
    "Dinov2": ("HF's Dinov2, 2 blocks of width 32, patch 8, layer scale, left out: classifier, mask_token", 1e-6),
    "Dinov2 gated": ("HF's Dinov2, 2 blocks of width 32, patch 8, layer scale, left out: mask_token", 1e-6),
    "Dinov2 with registers": (
        "HF's Dinov2WithRegisters, 2 blocks of width 32, patch 8, 4 registers, layer scale, left out: mask_token",
        1e-6,
    ),
    "ViTMAE": ("HF's ViTMAE, 2 blocks of width 32, patch 8, left out: decoder", 1e-6),
    "CLIP": ("HF's CLIP, 2 blocks of width 32, patch 8", 1e-6),
    "Siglip": ("HF's Siglip, 2 blocks of width 32, patch 8", 1e-6),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_hf_models_give_the_same_features_in_timm(kind, dtype, tmp_path):
    theirs, ours = hf(kind), timm_for(kind)
    theirs.save_pretrained(tmp_path)
    note = load_trunk_weights(ours, "it", str(tmp_path))
    x = images(dtype=dtype)
    expected = hf_features(theirs.to(dtype), x, kind)
    assert expected.std() > 0.1
    # both round each of some twenty products, in another order
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        timm_features(ours.to(dtype), x, kind), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
    assert note == f"model.weights={tmp_path}: {KINDS[kind][0]}"
