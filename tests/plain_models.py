"""Small backbones, trials on timm's models, and the libraries' own models with the weights that an adapter is for."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from plain_trials import plain_trial
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from lora_vit import api, load_adapter
from lora_vit.config import ModelConfig, TrialConfig, from_dict
from lora_vit.models.vit import trunk_of
from lora_vit.models.weights import load_weights
from lora_vit.records import read_record

SIZES = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
"""torchvision's arguments for the small trial's backbone."""


def randomised(model: Any, std: float, seed: int = 1, mean: float = 0.0) -> Any:
    """Every parameter drawn again, so that none stays at a one or zero that would hide its loss; to evaluate."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, mean, std, generator=generator)
    return model.eval()


def model_config(**changes: Any) -> ModelConfig:
    """The small trial's backbone with changes, by default of torchvision."""
    return dataclasses.replace(plain_trial().model, **changes)


def timm_trunk(name: str, side: int | None) -> Any:
    """Trunk of timm's model."""
    return trunk_of(model_config(library="timm", name=name, image_size=side))


def load(trunk: Any, path: Path, name: str = "it") -> str:
    """Load a file or folder of weights into a trunk; the line about it."""
    return load_weights(trunk, model_config(name=name, weights=str(path)))


@functools.cache
def register_small() -> None:
    """Have timm know ``small_NAME``: models of its families that are built in a moment."""
    from timm.models import beit, eva, register_model, vision_transformer

    def register(name: str, make: Any, **special: Any) -> None:
        def entry(pretrained: bool = False, **given: Any) -> Any:
            sizes = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32}
            return make(name, pretrained=pretrained, **{**sizes, **special, **given})

        entry.__name__ = name
        register_model(entry)

    register("small_vit", vision_transformer._create_vision_transformer)
    dinov2 = {"init_values": 0.5, "reg_tokens": 4, "no_embed_class": True}
    register("small_dinov2", vision_transformer._create_vision_transformer, **dinov2)
    register("small_beit", beit._create_beit, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    register("small_eva02", eva._create_eva, swiglu_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(2, 2))


def timm_config(*overrides: str, name: str = "vit_tiny_patch16_224", side: int | None = 32) -> TrialConfig:
    """A trial of seconds on a model of timm's with random weights."""
    register_small()
    settings = ["model=timm", f"model.name={name}", "model.weights=null", "data=fake", "data.cache_size=16"]
    settings += [] if side is None else [f"model.image_size={side}"]
    settings += ["trainer.epochs=1", "trainer.precision=fp32", "trainer.accelerator=cpu", "trainer.log_every=1"]
    return api.compose([*settings, *overrides])


def plain_model(folder: Path, classes: int = 4) -> Any:
    """The own model of the trial's library with the base's weights; its head is not the trial's."""
    m = from_dict(read_record(folder).config).model
    if m.library == "torchvision":
        model: Any = VisionTransformer(**{name: getattr(m, name) for name in SIZES}, num_classes=classes)
        state = trunk_of(m).state_dict()
        if m.weights is not None:
            state = interpolate_embeddings(m.image_size, m.patch_size, OrderedDict(torch.load(m.weights)["model"]))
        model.load_state_dict({n: t for n, t in state.items() if not n.startswith("heads.")}, strict=False)
        return model.eval()
    import timm

    model = timm.create_model(m.name, img_size=m.image_size, num_classes=classes)
    model.load_state_dict(trunk_of(m).state_dict(), strict=False)
    return model.eval()


def images(side: int, count: int = 3) -> torch.Tensor:
    """Noise, [count, 3, side, side]."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def trials_logits(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """What the own model of the trial's library gives with the adapter on it."""
    return load_adapter(plain_model(folder), folder).eval()(x)
