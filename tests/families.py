"""Every family of backbones, small and in fp64: where its adapters sit, by a table of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_models import randomised
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lora_vit.lora.layers import adapters_in

D, CLASSES, RANK, SCALING = 48, 5, 3, 2.0
SMALL = {"depth": 2, "embed_dim": D, "num_heads": 3, "img_size": 32, "num_classes": CLASSES}
THIRDS = {t: slice(i * D, (i + 1) * D) for i, t in enumerate("qkv")}
TORCHVISION = {t: ("self_attention.in_proj_weight", f"self_attention.{t}", rows) for t, rows in THIRDS.items()}
TORCHVISION_MLP = {"o": ["self_attention.out_proj"], "fc1": ["mlp.0"], "fc2": ["mlp.3"]}
FUSED = {t: ("attn.qkv.weight", f"attn.{t}", rows) for t, rows in THIRDS.items()}
SPLIT = {t: (f"attn.{t}_proj.weight", f"attn.{t}_proj", slice(None)) for t in "qkv"}
PLAIN_MLP = {"o": ["attn.proj"], "fc1": ["mlp.fc1"], "fc2": ["mlp.fc2"]}
GATED_MLP = {**PLAIN_MLP, "fc1": ["mlp.fc1_g", "mlp.fc1_x"]}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, list[str]]]] = {
    # family: timm's name, arguments for a small one, where q, k and v are, where the others are
    "torchvision": ("torchvision", {}, TORCHVISION, TORCHVISION_MLP),
    "AugReg": ("vit_tiny_patch16_224", {}, FUSED, PLAIN_MLP),
    "DeiT": ("deit_tiny_patch16_224", {}, FUSED, PLAIN_MLP),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224", {}, FUSED, PLAIN_MLP),
    "DeiT-III": ("deit3_small_patch16_224", {}, FUSED, PLAIN_MLP),
    "DINO": ("vit_small_patch16_224.dino", {}, FUSED, PLAIN_MLP),
    "DINOv2": ("vit_small_patch14_dinov2", {"img_size": 28}, FUSED, PLAIN_MLP),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28}, FUSED, PLAIN_MLP),
    "DINOv2 giant": ("vit_giant_patch14_dinov2", {"img_size": 28}, FUSED, PLAIN_MLP),
    "MAE": ("vit_base_patch16_224.mae", {}, FUSED, PLAIN_MLP),
    "CLIP": ("vit_base_patch16_clip_224", {}, FUSED, PLAIN_MLP),
    "CLIP with quick GELU": ("vit_base_patch16_clip_quickgelu_224", {}, FUSED, PLAIN_MLP),
    "SigLIP": ("vit_base_patch16_siglip_224", {}, FUSED, PLAIN_MLP),
    "SigLIP, averaged": ("vit_base_patch16_siglip_gap_224", {}, FUSED, PLAIN_MLP),
    "EVA": ("eva_giant_patch14_224", {"img_size": 28}, FUSED, PLAIN_MLP),
    "EVA-02": ("eva02_base_patch14_224", {"img_size": 28}, SPLIT, GATED_MLP),
    "EVA-02 tiny": ("eva02_tiny_patch14_224", {"img_size": 28}, FUSED, PLAIN_MLP),
    "DINOv3": ("vit_small_patch16_dinov3", {}, FUSED, PLAIN_MLP),
    "DINOv3 with qkv bias": ("vit_small_patch16_dinov3_qkvb", {}, FUSED, PLAIN_MLP),
    "DINOv3 7B": ("vit_7b_patch16_dinov3", {}, FUSED, GATED_MLP),
    "PE": ("vit_pe_core_tiny_patch16_384", {}, FUSED, PLAIN_MLP),
    "BEiT": ("beit_base_patch16_224", {}, FUSED, PLAIN_MLP),
    "BEiTv2": ("beitv2_base_patch16_224", {}, FUSED, PLAIN_MLP),
}


def plain(family: str) -> Any:
    return small(*FAMILIES[family][:2])


def small(name: str, changes: dict[str, Any]) -> Any:
    """A small fp64 model with weights that are all away from zero and one."""
    torch.manual_seed(0)
    if name == "torchvision":
        model: Any = VisionTransformer(32, 16, 2, 3, D, 4 * D, num_classes=changes.get("num_classes", CLASSES))
    else:
        model = pytest.importorskip("timm").create_model(name, **{**SMALL, **changes})
    return randomised(model, 0.2, mean=0.1).double()


def images_for(model: Any, count: int = 4) -> Tensor:
    side = model.image_size if isinstance(model, VisionTransformer) else model.patch_embed.img_size[0]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def make_nonzero(model: nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.2, generator=generator)
        if name.endswith("lora_magnitude"):
            p.data *= 0.8 + 0.4 * torch.rand(p.shape, generator=generator, dtype=p.dtype)


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for m in adapters_in(model).values() for n, t in m.trial_tensors(0).items()}


def places(family: str, targets: list[str], blocks: list[int] | None = None) -> list[tuple[str, str, slice]]:
    """The weight, the adapter's name and the weight's rows, as the table above has them."""
    _, _, qkv, others = FAMILIES[family]
    found = [qkv[t] for t in targets if t in "qkv"]
    found += [(f"{name}.weight", name, slice(None)) for t in targets if t not in "qkv" for name in others[t]]
    block = "encoder.layers.encoder_layer_" if family == "torchvision" else "blocks."
    return [(f"{block}{i}.{w}", f"{block}{i}.{n}", rows) for i in blocks or range(2) for w, n, rows in found]


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Relative to the largest, which is not zero."""
    largest = float(wanted.detach().abs().max())
    assert largest > 0
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * largest)
