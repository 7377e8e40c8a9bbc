"""torchvision's and timm's Vision Transformers as bases of adapters: made, described, and given a classifier."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lora_vit.config import SIZES, nearest
from lora_vit.errors import ConfigError
from lora_vit.lora.layers import LoRAAdapters
from lora_vit.lora.places import FAMILIES, plain_models

TORCHVISION = "torchvision's VisionTransformer"
OF_HEADS = ("heads.", "head.", "head_dist.")
"""Prefixes of the classifiers' parameters, torchvision's and timm's."""


def timm_model(name: str, image_size: int | None, classes: int = 0, pretrained: bool = False) -> Any:
    """timm's model, by default with random weights and at its own size. Raises ConfigError where it cannot be made."""
    try:
        import timm
    except ImportError:
        raise ConfigError("model=timm needs the package timm: pip install 'lora_vit[timm]'") from None
    try:
        size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, **size)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        known = timm.is_model(name.partition(".")[0])
        hint = f" (adapters are for {FAMILIES})" if known else nearest(name, timm.list_models())
        raise ConfigError(f"model.name={name} cannot be made by timm {timm.__version__}: {reason}{hint}") from None


def new_backbone(base: Mapping[str, Any], classes: int = 0) -> Any:
    """A plain model with random weights, of the kind that an adapter's card says; without head for no classes."""
    if base["architecture"] != TORCHVISION:
        return timm_model(base["model"], base["image_size"], classes)
    # a head draws from the same generator: torchvision's own, of 1,000 classes, decides the random weights
    model = VisionTransformer(**{key: base[key] for key in SIZES}, num_classes=classes or 1000)
    if not classes:
        model.heads = nn.Sequential()
    return model


def sizes_of(model: Any) -> dict[str, Any]:
    """timm's name or torchvision's arguments. Raises ConfigError unless it is a plain backbone with such a head."""
    if getattr(model, "_compiled_call_impl", None) is not None or not isinstance(model, plain_models()):
        kind = type(model).__name__
        raise ConfigError(f"not a plain model of torchvision's or timm's ({kind}): wrap or compile it afterwards")
    if any(isinstance(m, LoRAAdapters) for m in model.modules()):
        raise ConfigError("the model has adapters already: give its base")
    last_layer(model)
    if not isinstance(model, VisionTransformer):
        height, width = model.patch_embed.img_size
        size = height if height == width else [height, width]
        return {"architecture": getattr(model, "pretrained_cfg", {}).get("architecture"), "image_size": size}
    layers = model.encoder.layers
    counts = {"num_layers": len(layers), "num_heads": layers[0].self_attention.num_heads}
    return {"architecture": TORCHVISION, **{k: counts.get(k) or getattr(model, k) for k in SIZES}}


def trunk_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without its classifiers."""
    return {name: t for name, t in model.state_dict().items() if not name.startswith(OF_HEADS)}


def head_name(model: nn.Module) -> str:
    """Name of the classifier's linear layer."""
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
    """Give the model the classifier in an adapter's tensors: another size is replaced, dropout before it stays."""
    last = last_layer(model)
    head = {leaf: tensors[f"{head_name(model)}.{leaf}"] for leaf in ("weight", "bias")}
    if last is None or last.weight.shape != head["weight"].shape:
        (classes, width), like = head["weight"].shape, next(model.parameters())
        new = nn.Linear(width, classes, device=like.device, dtype=like.dtype)
        owner = model.get_submodule(head_name(model).rpartition(".")[0])
        if isinstance(getattr(owner, "head", None), nn.Sequential):
            owner.head[-1] = new
        else:
            owner.head = new
        last = new
    last.load_state_dict(head)
    if hasattr(model, "head_dist"):  # DeiT's, on the second token: the heads' mean is our head of the tokens' mean
        model.head_dist = copy.deepcopy(last)
