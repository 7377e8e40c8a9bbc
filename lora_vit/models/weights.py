"""Load the trunk's pretrained weights, from torchvision, a file or the package."""

from __future__ import annotations

import hashlib
import urllib.error
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import VisionTransformer, get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

from lora_vit.config import ConfigError, is_weights_file

SHIPPED = {"vit_tiny": {"GLYPHS_V1": "vit_tiny.safetensors"}}
"""Weights that travel in the package."""


def available_weights(model: str) -> list[str]:
    """Names of the published weights of a model."""
    return list(SHIPPED[model]) if model in SHIPPED else [w.name for w in get_model_weights(model)]


def is_published(model: str, weights: str) -> bool:
    """Whether the weights are torchvision's, which downloads them at first use."""
    return model not in SHIPPED and not is_weights_file(weights)


def check_weights(model: str, weights: str) -> None:
    """Raise ConfigError for an unknown name or a file that is not there; loads nothing."""
    if is_weights_file(weights):
        if not Path(weights).expanduser().is_file():
            raise ConfigError(f"model.weights={weights} is not a file: check the path")
        return
    names = available_weights(model)
    if weights not in names:
        raise ConfigError(
            f"model.weights={weights} is unknown for {model}: one of {', '.join(names)}, a path to a .pth or "
            ".safetensors file, or null for random weights"
        )


def read_state_dict(model: str, weights: str) -> dict[str, Tensor]:
    """The state dict behind ``model.weights``, under torchvision's names.

    Raises:
        ConfigError: unknown name, no network, or a file that is not a state dict of weights.
    """
    check_weights(model, weights)
    if is_weights_file(weights):
        return _read_file(Path(weights).expanduser())
    if model in SHIPPED:
        return load_file(Path(__file__).with_name(SHIPPED[model][weights]))
    try:
        state = get_model_weights(model)[weights].get_state_dict(progress=True, check_hash=True)
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"model.weights={weights} of {model} cannot be downloaded ({reason}): connect to the network, give "
            "model.weights=FILE.pth, or run experiment=quickstart, which needs no download"
        ) from None
    return dict(state)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"model.weights={path} cannot be loaded as weights: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"model.weights={path} is not a state dict (names to tensors)")
    return state


def load_trunk_weights(trunk: VisionTransformer, model: str, weights: str) -> str:
    """Load weights into the trunk, with the position embedding interpolated to its image size.

    Returns:
        sha256 over names, shapes and values of the weights before interpolation, heads left out: the identity
        of the base that adapters belong to, whatever file they came from.

    Raises:
        ConfigError: as :func:`read_state_dict`, or names and shapes do not fit the model.
    """
    state = {k: v for k, v in read_state_dict(model, weights).items() if not k.startswith("heads.")}
    state = {_current_name(k): v for k, v in state.items()}
    digest = state_sha256(state)
    own = trunk.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unexpected:
        wrong = f"lacks {missing[0]}" if missing else f"has the unknown {unexpected[0]}"
        raise ConfigError(f"model.weights={weights} does not fit {model}: it {wrong}")
    state = dict(interpolate_embeddings(trunk.image_size, trunk.patch_size, OrderedDict(state)))
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ConfigError(
                f"model.weights={weights} does not fit {model}: {name} is {list(tensor.shape)}, expected "
                f"{list(own[name].shape)}"
            )
    trunk.load_state_dict(state)
    return digest


def _current_name(name: str) -> str:
    """torchvision's files from before 0.13 call the MLP's layers linear_1 and linear_2."""
    return name.replace("mlp.linear_1.", "mlp.0.").replace("mlp.linear_2.", "mlp.3.")


def state_sha256(state: dict[str, Tensor]) -> str:
    """Sha256 over sorted names, shapes, dtypes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else str(tensor.item()).encode())
    return digest.hexdigest()
