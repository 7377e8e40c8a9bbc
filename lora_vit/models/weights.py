"""A trunk's pretrained weights: published by torchvision, by timm's hub or in the package, or a user's own file."""

import argparse
import contextlib
import json
import re
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model_weights

from lora_vit.config import ModelConfig, is_weights_file, weights_files
from lora_vit.config.identity import file_and_prefix
from lora_vit.errors import ConfigError
from lora_vit.files import user_path
from lora_vit.lora.backbones import timm_model
from lora_vit.models.names import PATCHES, describe, translate

SHIPPED = {"vit_tiny": {"GLYPHS_V1": "vit_tiny.safetensors"}}  # in the package
WRAPPERS = ("state", "model", "teacher", "target", "net", "module", "ema", "student", "online")
"""What training scripts call the model in their files, alone or beside other words: of several, the first is taken."""


def fetch_weights(m: ModelConfig, download: bool = False) -> None:
    """Refuse an unknown name and what is no file of weights, or download published ones. Raises ConfigError."""
    if m.weights is None:
        return
    if is_weights_file(m.weights):
        for file in weights_files(m.weights):
            _is_safetensors(file)
        return
    if m.library == "torchvision":
        names = SHIPPED[m.name] if m.name in SHIPPED else [w.name for w in get_model_weights(m.name)]
        if m.weights not in names:
            known = ", ".join(names)
            raise ConfigError(f"model.weights={m.weights} is unknown for {m.name}: one of {known}, a path, or null")
    if download:
        _published(m)


def load_weights(trunk: nn.Module, m: ModelConfig) -> str:
    """Load the weights in fp32, positions brought to the trunk's grid; a line on a file of them. Raises ConfigError."""
    if m.weights is None:
        return ""
    if from_file := is_weights_file(m.weights):
        parts = [part for part in map(_read_file, weights_files(str(m.weights))) if isinstance(part, dict)]
        state, where = _unwrapped({name: held for part in parts for name, held in part.items()}, m)
    else:
        fetch_weights(m)
        state, where = _published(m), ""
        if m.library == "timm":
            trunk.load_state_dict(state)
            return ""
    own = trunk.state_dict()
    try:
        translated, recognised = translate(state, own)
    except (ValueError, RuntimeError) as error:  # torch's, of tensors without values
        raise ConfigError(f"model.weights={m.weights}: {str(error).splitlines()[0]}") from None
    theirs, ours = ({name: list(t.shape) for name, t in tensors.items()} for tensors in (translated, own))
    wrong = [f"it lacks {name}" for name in sorted(ours.keys() - theirs)]
    wrong += [f"it has the unknown {name}" for name in sorted(theirs.keys() - ours)]
    wrong += [f"{name} is {t}, expected {ours[name]}" for name, t in theirs.items() if t != ours.get(name, t)]
    if wrong:
        raise ConfigError(f"model.weights={m.weights} does not fit {m.name}: {wrong[0]} (the file has {_about(state)})")
    trunk.load_state_dict(translated)
    return f"model.weights={m.weights}: {recognised}{where}" if from_file else ""


def check_beside(m: ModelConfig, trunk: Any, images: dict[str, Any]) -> str:
    """A line on what files beside the weights say and the model, or what prepares its ``images``, has otherwise.

    A trained trial, which is read without ``weights_sha256``, stays what it is. Raises ConfigError where the features
    would be others, by the number of attention heads or the activation.
    """
    if not is_weights_file(m.weights) or m.weights_sha256 is None:
        return ""
    said: dict[str, Any] = {}
    path = user_path(file_and_prefix(m.weights)[0])
    for name in ("config.json", "preprocessor_config.json", "open_clip_config.json"):
        file = (path if path.is_dir() else path.parent) / name
        try:
            held = json.loads(file.read_bytes()) if file.is_file() else {}
            for part, values in [("", held), *held.items()]:
                said |= values if isinstance(values, dict) and not part.startswith("text") else {}
        except (OSError, ValueError, AttributeError):
            raise ConfigError(f"{file}, beside model.weights, is damaged: get it again") from None
    # open_clip, timm and HF each have a word for it; DINOv2's gated MLPs ignore HF's
    by_name = "quickgelu" if "quickgelu" in str(said.get("architecture")) else ""
    activation = said.get("hidden_act") or said.get("act_layer") or by_name
    activation = {"True": "quickgelu", "False": "gelu"}.get(str(said.get("quick_gelu")), activation)
    modules = list(trunk.named_modules())
    act = next(type(part).__name__ for name, part in modules if name.endswith(("mlp.act", "mlp.1")))
    heads, eps = (next(getattr(part, key) for _, part in modules if hasattr(part, key)) for key in ("num_heads", "eps"))
    facts: dict[str, tuple[Any, Any]] = {  # theirs, and ours
        "heads": (said.get("num_attention_heads", said.get("num_heads")), heads),
        "activation": (not said.get("use_swiglu_ffn") and re.sub("_|pytorch", "", str(activation)), act.lower()),
        "epsilon": (said.get("layer_norm_eps"), eps),
        "model.name": (m.library == "timm" and said.get("architecture"), m.name.partition(".")[0]),
    }
    for key in [key for key in ("mean", "std") if getattr(m, key) is None]:
        facts[f"model.{key}"] = said.get(f"image_{key}", said.get(key)), images[key]
    other = {word: both for word, both in facts.items() if both[0] and both[0] != both[1]}
    told = [f"{word} is {theirs} beside the weights, {own} here" for word, (theirs, own) in other.items()]
    if "heads" in other or not all(name.startswith("gelu") for name in other.get("activation", ())):
        like = "a model with these, as timm's *_quickgelu_*" if activation == "quickgelu" else "a model with these"
        raise ConfigError(f"model.weights={m.weights}: {'; '.join(told)}: give {like}")
    if facts.get("model.mean", "-")[0] is None:
        told.append(f"images get {m.name}'s mean {images['mean']}, std {images['std']}: nothing says others")
    return "; ".join(told)


def _about(state: dict[str, Tensor]) -> str:
    """The sizes of a state dict, and a model of timm that takes it, if there is one of the known kinds."""
    line, names = describe(state)
    for name in names:
        with contextlib.suppress(ConfigError, ValueError, RuntimeError), torch.device("meta"):
            model = timm_model(name, None)
            model.load_state_dict(translate(state, model.state_dict())[0], assign=True)
            return f"{line}, as model=timm model.name={name}"
    return line


def _published(m: ModelConfig) -> dict[str, Tensor]:
    """Weights of the package, of torchvision, or of the name's tag from timm's hub; under their own names."""
    if m.name in SHIPPED:
        return load_file(Path(__file__).with_name(SHIPPED[m.name][str(m.weights)]))
    if m.library == "timm":
        with torch.device("meta"):
            about = timm_model(m.name, m.image_size).pretrained_cfg
        try:
            return timm_model(m.name, m.image_size, pretrained=True).float().state_dict()
        except ConfigError as error:
            source = about.get("hf_hub_id") or about.get("url") or "nowhere: timm has no weights of this name"
            remedy = f"connect to the network, or fetch {m.name}'s model.safetensors (published at {source}) and give"
            raise ConfigError(f"model.weights={m.weights}: {error}; {remedy} model.weights=FILE.safetensors") from None
    published = get_model_weights(m.name)[str(m.weights)]
    try:
        return dict(published.get_state_dict(progress=True, check_hash=True))
    except Exception as error:
        kept = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
        if kept.exists() and not isinstance(error, urllib.error.URLError):
            raise ConfigError(f"{kept}, which was downloaded earlier, is damaged: remove it") from None
        reason = " ".join(str(getattr(error, "reason", error)).split())
        what = f"model.weights={m.weights} of {m.name} cannot be downloaded ({reason})"
        remedy = "connect to the network, give model.weights=FILE.pth, or run experiment=quickstart, which needs none"
        raise ConfigError(f"{what}: {remedy}") from None


def _is_safetensors(path: Path) -> bool:
    """Whether a file is one of safetensors, else of torch, by its content. Raises ConfigError if it is neither."""
    if not path.is_file():
        raise ConfigError(f"model.weights={path} is not a file: check the path")
    with path.open("rb") as file:
        first = file.read(64)
    if first[8:9] == b"{":
        return True
    if not first.startswith((b"PK", b"\x80")):
        what = f"model.weights={path} is neither a PyTorch nor a safetensors file"
        raise ConfigError(f"{what}: give the weights themselves, not a web page or a pointer of Git LFS")
    return False


def _read_file(path: Path) -> Any:
    """What a file holds, without running code that it may hold."""
    is_safetensors = _is_safetensors(path)
    # beside weights, training scripts keep their arguments as a Namespace, and numbers of NumPy's (1 and 2)
    numbers = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"}
    makers: Any = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
    named = [(make, f"numpy.{core}.multiarray.{make.__name__}") for make in makers for core in ("core", "_core")]
    safe: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, *numbers, *named]
    try:
        if is_safetensors:
            return load_file(path)
        # an open file, as torch goes by a path's suffix
        with path.open("rb") as file, torch.serialization.safe_globals(safe):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = f"holds Python objects ({found[1]})" if found else "is damaged or cut off, a program or another archive"
        raise ConfigError(f"model.weights={path} {held}: get it again, or save model.state_dict()") from None


def _unwrapped(held: dict[str, Any], m: ModelConfig) -> tuple[dict[str, Tensor], str]:
    """The Vision Transformer's tensors in a saved object, and where they were if they were wrapped."""
    asked = file_and_prefix(m.weights)[1].removeprefix("::")
    found = [one for one in _state_dicts(held, ()) if not asked or f"{one[0]}.".startswith(f"{asked}.")]
    names = [str(name) for _, state in [("", held), *found] for name in state]
    if {"trial_id", "exp_avg"} <= held.keys() or any(".lora_" in name for name in names):
        raise ConfigError(f"model.weights={m.weights} is an adapter: merge it first (lora-vit merge, merge_and_unload)")
    if not found:
        whole = [f"'{where}'" for where, _ in _state_dicts(held, ())]  # where ``asked`` is none of these
        there = ", ".join(whole or [str(key) for key in list(held)[:3]]) or "no state dict at all"
        what = "it holds no Vision Transformer as torchvision, timm, HF, DINO, DINOv2 or MAE name it"
        raise ConfigError(f"model.weights={m.weights} does not fit {m.name}: {what} (but {there}): give another file")
    rank = {name: i for i, name in enumerate(WRAPPERS)}
    found.sort(key=lambda one: sorted(rank.get(word, len(rank)) for word in re.split(r"[._]", one[0]) if word))
    where, state = found[0]
    others = ", ".join(other for other, _ in found[1:])
    choice = f" (it also has {others}: model.weights=FILE::{found[-1][0]} takes that)" if others else ""
    return state, f", taken from '{where}'{choice}" if where else ""


def _state_dicts(held: Any, path: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every Vision Transformer below ``held``: where it is (keys, then a prefix; joined by dots), and its tensors."""
    if not isinstance(held, dict):
        return
    tensors = {name: t for name, t in held.items() if isinstance(t, Tensor) and isinstance(name, str)}
    for name in tensors:
        if patches := PATCHES.search(name):
            prefix = name[: patches.start()]
            inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            yield ".".join((*path, prefix)).rstrip("."), inside
    for key, value in held.items():
        yield from _state_dicts(value, (*path, str(key)))
