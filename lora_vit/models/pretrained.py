"""A trunk's pretrained weights: published by torchvision, by timm's hub or in the package, or a user's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_vit.config import ModelConfig, is_weights_file
from lora_vit.errors import ConfigError
from lora_vit.lora.backbones import timm_model
from lora_vit.models.weights import check_weights, load_trunk_weights, read_state_dict


def fetch_weights(m: ModelConfig, download: bool) -> None:
    """Check that the weights are there, or download them if they are published. Raises ConfigError."""
    if m.weights is None:
        return
    if m.library == "torchvision" or is_weights_file(m.weights):
        check = read_state_dict if download and not is_weights_file(m.weights) else check_weights
        check(m.name, m.weights)
    elif download:
        _of_timm(m)


def load_weights(trunk: nn.Module, m: ModelConfig) -> str:
    """Load the weights, in fp32; returns a line on what a file was, or ``""``. Raises ConfigError."""
    if m.weights is None:
        return ""
    if m.library == "torchvision" or is_weights_file(m.weights):
        return load_trunk_weights(trunk, m.name, m.weights)
    trunk.load_state_dict(_of_timm(m))
    return ""


def _of_timm(m: ModelConfig) -> dict[str, Tensor]:
    """The published weights of the name's tag, from timm's hub."""
    with torch.device("meta"):
        about = timm_model(m.name, m.image_size).pretrained_cfg
    try:
        return timm_model(m.name, m.image_size, pretrained=True).float().state_dict()
    except ConfigError as error:
        source = about.get("hf_hub_id") or about.get("url") or "nowhere: timm has no weights of this name"
        raise ConfigError(
            f"model.weights={m.weights}: {error}; connect to the network, or fetch {m.name}'s model.safetensors "
            f"(published at {source}) and give model.weights=FILE.safetensors"
        ) from None
