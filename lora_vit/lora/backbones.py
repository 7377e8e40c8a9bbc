"""torchvision's and timm's Vision Transformers as bases of adapters: made, described, given a classifier and adapters.

What differs between families and libraries is here. Where adapters sit is found here for every backbone.
"""

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from lora_vit.config import SIZES, nearest
from lora_vit.errors import ConfigError
from lora_vit.lora.layers import adapters_in

TORCHVISION = "torchvision's VisionTransformer"
OF_HEADS = ("heads.", "head.", "head_dist.")  # prefixes of the classifiers' parameters
FAMILIES = "torchvision's ViT, and timm's ViT (AugReg, DeiT, DINO, DINOv2, MAE, CLIP, SigLIP), EVA-02, DINOv3, PE, BEiT"


def timm_model(name: str, image_size: int | None, classes: int = 0, pretrained: bool = False) -> Any:
    """timm's model, by default with random weights and at its own size. Raises ConfigError where it cannot be made."""
    try:
        import timm
    except ImportError:
        raise ConfigError("model=timm needs the package timm: pip install 'lora_vit[timm]'") from None
    try:
        size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
        if timm.is_model(name) and timm.model_entrypoint(name).__module__ == "timm.models.eva":
            size["dynamic_img_size"] = False  # else it makes rotary embeddings on the host in each pass
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, **size)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        known = timm.is_model(name.partition(".")[0])
        hint = f" (adapters are for {FAMILIES})" if known else nearest(name, timm.list_models())
        raise ConfigError(f"model.name={name} cannot be made by timm {timm.__version__}: {reason}{hint}") from None


def new_backbone(base: Mapping[str, Any], classes: int = 0) -> Any:
    """A plain model with random weights, of the kind that an adapter's card says; without head for no classes."""
    with torch.random.fork_rng(devices=[]):  # a user's own draws stay what they are
        if base["architecture"] != TORCHVISION:
            return timm_model(base["model"], base["image_size"], classes)
        # a head draws from the same generator: torchvision's own, of 1,000 classes, decides the random weights
        model = VisionTransformer(**{key: base[key] for key in SIZES}, num_classes=classes or 1000)
    if not classes:
        model.heads = nn.Sequential()
    return model


def sizes_of(model: Any) -> dict[str, Any]:
    """What makes a model one of its kind. Raises ConfigError unless it is a plain backbone with a head like ours."""
    if getattr(model, "_compiled_call_impl", None) is not None or not isinstance(model, plain_models()):
        kind = type(model).__name__
        raise ConfigError(f"not a plain model of torchvision's or timm's ({kind}): wrap or compile it afterwards")
    refuse_adapted(model)
    last_layer(model)
    if not isinstance(model, VisionTransformer):
        height, width = model.patch_embed.img_size
        size = height if height == width else [height, width]
        return {"architecture": getattr(model, "pretrained_cfg", {}).get("architecture"), "image_size": size}
    layers = model.encoder.layers
    counts = {"num_layers": len(layers), "num_heads": layers[0].self_attention.num_heads}
    return {"architecture": TORCHVISION, **{k: counts.get(k) or getattr(model, k) for k in SIZES}}


def refuse_adapted(model: nn.Module) -> None:
    if adapters_in(model):
        raise ConfigError("the model has adapters already: take them out with lora_vit.remove_adapter")


def trunk_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without its classifiers."""
    return {name: t for name, t in model.state_dict().items() if not name.startswith(OF_HEADS)}


def head_name(model: nn.Module) -> str:
    return "heads.head" if isinstance(model, VisionTransformer) else "head"


def last_layer(model: Any) -> nn.Linear | None:
    """The classifier's linear layer; None where the model has no head. Raises ConfigError for other heads."""
    if isinstance(model, VisionTransformer):
        children = dict(model.heads.named_children())
        if type(model.heads) is nn.Sequential and not children:
            return None
        head = children.get("head") if len(children) == 1 else None
    elif isinstance(head := model.head, nn.Identity):
        return None
    *before, last = head if type(head) is nn.Sequential and len(head) else [head]
    if type(last) is nn.Linear and last.bias is not None and all(type(m) is nn.Dropout for m in before):
        return last
    what = "the model's heads are not one linear layer with bias, alone or after dropout"
    raise ConfigError(f"{what}: give it such a {head_name(model)}")


def put_head(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give the model the classifier in an adapter's tensors, if any; one of another size is replaced, dropout stays."""
    last = last_layer(model)
    if f"{head_name(model)}.weight" not in tensors:
        return
    head = {leaf: tensors[f"{head_name(model)}.{leaf}"] for leaf in ("weight", "bias")}
    if last is None or last.weight.shape != head["weight"].shape:
        (classes, width), like = head["weight"].shape, next(model.parameters())
        last = nn.utils.skip_init(nn.Linear, width, classes, device=like.device, dtype=like.dtype)  # draws nothing
        owner = model.get_submodule(head_name(model).rpartition(".")[0])
        if isinstance(getattr(owner, "head", None), nn.Sequential):
            owner.head[-1] = last
        else:
            owner.head = last
    last.load_state_dict(head)
    if hasattr(model, "head_dist"):  # DeiT's, on the second token: the heads' mean is our head of the tokens' mean
        model.head_dist = copy.deepcopy(last)


@dataclass(frozen=True)
class Place:
    """A linear layer that can take adapters; everything by its dotted name in the model."""

    layer: str  # the module: an nn.Linear, or torchvision's attention, which has q, k and v's weight itself
    weight: str  # [parts * O, I]
    biases: tuple[str, ...]  # that its output gets
    names: dict[str, str]  # of the adapters in files, by target, in the order of the output's equal parts
    reads: str  # name of the layer's input, one for all that read it: key of its dropout mask
    front: str | None = None  # the LayerNorm or GELU before it, if its output is read only by places with this front

    @property
    def bias_apart(self) -> bool:
        """Whether timm has the bias in parts, and adds it behind the layer."""
        return any(bias.endswith("q_bias") for bias in self.biases)

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
