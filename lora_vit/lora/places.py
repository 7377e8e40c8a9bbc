"""Where adapters sit in a Vision Transformer: found here for every backbone, read by all that handles adapters."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

FAMILIES = "torchvision's ViT, and timm's ViT (AugReg, DeiT, DINO, DINOv2, MAE, CLIP, SigLIP), EVA-02, DINOv3, PE, BEiT"


@dataclass(frozen=True)
class Place:
    """A linear layer that can take adapters; everything by its dotted name in the model.

    Attributes:
        layer: the module: an ``nn.Linear``, or torchvision's attention, which has q, k and v's weight itself.
        weight: its weight, [parts * O, I].
        biases: that its output gets.
        names: of the adapters in files, by target, in the order of the output's equal parts.
        reads: name of the layer's input, one for all that read it: key of its dropout mask.
        front: the LayerNorm or GELU before it, if its output is read only by places with this front.
    """

    layer: str
    weight: str
    biases: tuple[str, ...]
    names: dict[str, str]
    reads: str
    front: str | None = None

    def sizes(self, model: nn.Module) -> tuple[int, int]:
        """O of each part, and I."""
        rows, columns = model.get_parameter(self.weight).shape
        return rows // len(self.names), columns


def places_of(model: nn.Module) -> dict[str, list[Place]]:
    """The places of each encoder block, by its name. Raises ValueError where one is unknown, or there is none."""
    found: dict[str, list[Place]] = {}
    for name, module in model.named_modules():
        if isinstance(module, EncoderBlock):
            found[name] = _of_torchvision(name, module)
        elif type(module) in _timm_classes("blocks"):
            found[name] = _of_timm(name, module)
    if not found:
        shown = ", ".join([name for name, m in model.named_modules() if isinstance(m, nn.Linear)][:20]) or "none"
        what = f"{type(model).__name__} has no encoder block of {FAMILIES}"
        raise ValueError(f"no target matches: {what} (its linear layers: {shown})")
    return found


def plain_models() -> Any:
    """The classes of backbones; timm's once timm is imported."""
    return (VisionTransformer, *_timm_classes("models"))


def _of_torchvision(name: str, block: EncoderBlock) -> list[Place]:
    source, attention = block.self_attention, f"{name}.self_attention"
    if source.in_proj_weight is None or source.in_proj_bias is None or source.bias_k is not None:
        raise ValueError("only self-attention with one biased q, k, v projection can take adapters")
    qkv, fused = {t: f"{attention}.{t}" for t in "qkv"}, f"{attention}.in_proj"
    return [
        Place(attention, f"{fused}_weight", (f"{fused}_bias",), qkv, fused, f"{name}.ln_1"),
        _linear(block, name, "self_attention.out_proj", "o"),
        _linear(block, name, "mlp.0", "fc1", front=f"{name}.ln_2"),
        _linear(block, name, "mlp.3", "fc2", front=f"{name}.mlp.1" if _is_idle(block.mlp[2]) else None),
    ]


def _linear(block: Any, name: str, layer: str, target: str, reads: str = "", front: str | None = None) -> Place:
    """The place of one linear layer with one target."""
    full = f"{name}.{layer}"
    biases = () if block.get_submodule(layer).bias is None else (f"{full}.bias",)
    return Place(full, f"{full}.weight", biases, {target: full}, reads or full, front)


def _of_timm(name: str, block: Any) -> list[Place]:
    attention, mlp = block.attn, block.mlp
    kind = vars(attention).get("original_class", type(attention))
    if kind not in _timm_classes("attentions") or type(mlp) not in _timm_classes("mlps"):
        raise ValueError(f"{name} has {kind.__name__} and {type(mlp).__name__}: no adapters for these")
    norm1, norm2 = (
        f"{name}.{key}" if type(m) in _timm_classes("norms") and m.weight is not None and m.bias is not None else None
        for key, m in (("norm1", block.norm1), ("norm2", block.norm2))
    )
    if getattr(attention, "gate", None) is not None:  # it reads the norm as well
        norm1 = None
    if attention.qkv is not None:
        qkv, full = {t: f"{name}.attn.{t}" for t in "qkv"}, f"{name}.attn.qkv"
        own = [f"{name}.attn.{t}_bias" for t in "qv"] if getattr(attention, "q_bias", None) is not None else []
        biases = (*own, *([] if attention.qkv.bias is None else [f"{full}.bias"]))
        places = [Place(full, f"{full}.weight", biases, qkv, full, norm1)]
    else:
        places = [_linear(block, name, f"attn.{t}_proj", t, f"{name}.attn.qkv", norm1) for t in "qkv"]
    places.append(_linear(block, name, "attn.proj", "o"))
    inputs = [layer for layer in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, layer)]
    places += [_linear(block, name, f"mlp.{layer}", "fc1", f"{name}.mlp.fc1", norm2) for layer in inputs]
    gelu = type(mlp.act) in _timm_classes("gelus") and getattr(mlp.act, "approximate", "none") == "none"
    alone = inputs == ["fc1"] and type(mlp).__name__ == "Mlp" and _is_idle(mlp.drop1) and _is_idle(mlp.norm)
    return [*places, _linear(block, name, "mlp.fc2", "fc2", front=f"{name}.mlp.act" if gelu and alone else None)]


def _is_idle(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _timm_classes(kind: str) -> tuple[type, ...]:
    """timm's classes whose forward is known to call the places; none before timm is imported."""
    if "timm" not in sys.modules:
        return ()
    from timm import layers
    from timm.models import beit, eva, vision_transformer

    classes: dict[str, tuple[type, ...]] = {
        "models": (vision_transformer.VisionTransformer, eva.Eva, beit.Beit),
        "blocks": (vision_transformer.Block, eva.EvaBlock, beit.Block),
        "attentions": (layers.Attention, layers.AttentionRope, eva.EvaAttention, beit.Attention),
        "mlps": (layers.Mlp, layers.GluMlp, layers.SwiGLU),
        "norms": (nn.LayerNorm, layers.LayerNorm),
        "gelus": (nn.GELU, layers.GELU),
    }
    return classes[kind]
