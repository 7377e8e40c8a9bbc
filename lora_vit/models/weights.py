"""Load the trunk's pretrained weights, from torchvision, a file or the package."""

from __future__ import annotations

import argparse
import math
import re
import urllib.error
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import VisionTransformer, get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

from lora_vit.config import ConfigError, is_weights_file
from lora_vit.lora.adapter import POSITIONS

SHIPPED = {"vit_tiny": {"GLYPHS_V1": "vit_tiny.safetensors"}}
"""Weights that travel in the package."""
WRAPPERS = ("state_dict", "model", "model_ema", "teacher", "student", "net", "module", "ema")
"""What training scripts call the model in their files; where a file holds several, the first of these is taken."""
_ANCHOR = "class_token"
"""The name that tells where in a file, and behind which prefix, a Vision Transformer's tensors are."""


def available_weights(model: str) -> list[str]:
    """Names of the published weights of a model."""
    return list(SHIPPED[model]) if model in SHIPPED else [w.name for w in get_model_weights(model)]


def check_weights(model: str, weights: str) -> None:
    """Raise ConfigError for an unknown name, a file that is not there or holds something else; loads nothing."""
    if is_weights_file(weights):
        _format_of(weights)
        return
    names = available_weights(model)
    if weights not in names:
        raise ConfigError(
            f"model.weights={weights} is unknown for {model}: one of {', '.join(names)}, a path to a .pth or "
            ".safetensors file, or null for random weights"
        )


def read_state_dict(model: str, weights: str) -> tuple[dict[str, Tensor], str]:
    """The state dict behind ``model.weights``, under torchvision's names, and a note on where a file had it.

    Raises:
        ConfigError: unknown name, no network, or a file that is not a state dict of weights.
    """
    check_weights(model, weights)
    if is_weights_file(weights):
        return _unwrapped(_read_file(weights), model, weights)
    if model in SHIPPED:
        return load_file(Path(__file__).with_name(SHIPPED[model][weights])), ""
    published = get_model_weights(model)[weights]
    try:
        return dict(published.get_state_dict(progress=True, check_hash=True)), ""
    except Exception as error:
        kept = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
        if kept.exists() and not isinstance(error, urllib.error.URLError):
            raise ConfigError(f"{kept}, which was downloaded earlier, is damaged: remove it") from None
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise ConfigError(
            f"model.weights={weights} of {model} cannot be downloaded ({reason}): connect to the network, give "
            "model.weights=FILE.pth, or run experiment=quickstart, which needs no download"
        ) from None


def _format_of(weights: str) -> str:
    """``safetensors`` or ``torch``, by a file's first bytes. Raises ConfigError where they are something else."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ConfigError(f"model.weights={weights} is not a file: check the path")
    try:
        with path.open("rb") as file:
            first = file.read(64)
    except OSError as error:
        raise ConfigError(f"model.weights={weights} cannot be read ({error.strerror})") from None
    if first[8:9] == b"{":
        return "safetensors"
    if first.startswith((b"PK", b"\x80")):
        return "torch"
    if not first:
        what = "is empty"
    elif first.startswith(b"version https://git-lfs"):
        what = "is a pointer of Git LFS (git lfs pull fetches the file itself)"
    elif first.lstrip().startswith(b"<"):
        what = "is a web page"
    else:
        what = "is neither a PyTorch nor a safetensors file"
    raise ConfigError(f"model.weights={weights} {what}: give the file of the weights")


def _read_file(weights: str) -> Any:
    """What a file holds, without running code that it may hold."""
    path, kind = Path(weights).expanduser(), _format_of(weights)
    try:
        if kind == "safetensors":
            return load_file(path)
        # an open file, as torch goes by a path's suffix; training scripts keep their arguments as a Namespace
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = f"holds Python objects ({found[1]})" if found else "is damaged or cut off, or no state dict"
        remedy = "get it again, or save model.state_dict() and give that"
        raise ConfigError(f"model.weights={weights} {held}: {remedy}") from None


def _unwrapped(held: Any, model: str, weights: str) -> tuple[dict[str, Tensor], str]:
    """The Vision Transformer's tensors in what a training script saved, and a note where they were wrapped."""
    found = list(_state_dicts(held, ()))
    if not found:
        what = "no Vision Transformer under torchvision's names"
        raise ConfigError(f"model.weights={weights} does not fit {model}: it lacks a {_ANCHOR} ({what})")
    rank = {name: i for i, name in enumerate(WRAPPERS)}
    found.sort(key=lambda one: sorted(rank.get(part, len(rank)) for part in one[0].split(".") if part))
    where, state = found[0]
    others = f" (it also has {', '.join(other for other, _ in found[1:])})" if found[1:] else ""
    return state, f"model.weights={weights}: taken from '{where}'{others}" if where else ""


def _state_dicts(held: Any, path: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every Vision Transformer below ``held``: where it is (keys, then a prefix; joined by dots), and its tensors."""
    if not isinstance(held, dict):
        return
    tensors = {name: t for name, t in held.items() if isinstance(t, Tensor) and isinstance(name, str)}
    for name in tensors:
        if f".{name}".endswith(f".{_ANCHOR}"):
            prefix = name.removesuffix(_ANCHOR)
            inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            yield ".".join((*path, prefix)).rstrip("."), inside
    for key, value in held.items():
        yield from _state_dicts(value, (*path, str(key)))


def load_trunk_weights(trunk: VisionTransformer, model: str, weights: str) -> str:
    """Load weights into the trunk, in fp32, with the position embedding interpolated to its image size.

    Returns:
        A line that says where a file had them, if they were wrapped; else ``""``.

    Raises:
        ConfigError: as :func:`read_state_dict`, or names, shapes or values do not fit the model.
    """
    state, note = read_state_dict(model, weights)
    state = {_current_name(k): v for k, v in state.items() if not k.startswith("heads.")}
    own = trunk.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unexpected:
        wrong = f"lacks {missing[0]}" if missing else f"has the unknown {unexpected[0]}"
        raise ConfigError(f"model.weights={weights} does not fit {model}: it {wrong}")
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"model.weights={weights}: {name} is of {tensor.dtype}, not of floating point")
        state[name] = tensor.float()
        if not torch.isfinite(state[name]).all():
            raise ConfigError(f"model.weights={weights}: {name} holds NaN or infinite values")
    shape = state[POSITIONS].shape
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 2 or math.isqrt(shape[1] - 1) ** 2 != shape[1] - 1:
        raise ConfigError(f"model.weights={weights}: {POSITIONS} {list(shape)} is not for a square grid of patches")
    state = dict(interpolate_embeddings(trunk.image_size, trunk.patch_size, OrderedDict(state)))
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ConfigError(
                f"model.weights={weights} does not fit {model}: {name} is {list(tensor.shape)}, expected "
                f"{list(own[name].shape)}"
            )
    trunk.load_state_dict(state)
    return note


def _current_name(name: str) -> str:
    """torchvision's files from before 0.13 call the MLP's layers linear_1 and linear_2."""
    return name.replace("mlp.linear_1.", "mlp.0.").replace("mlp.linear_2.", "mlp.3.")
