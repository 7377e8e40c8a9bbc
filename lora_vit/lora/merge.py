"""Adapters on disk, on a plain torchvision model, and merged into its weights.

Merging is a pure function on state dicts: W' = W + s B A for each adapted projection (Hu et al., 2021, section 4).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_vit import randomness
from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.inject import inject_adapters, key_each_pass
from lora_vit.lora.layers import AdapterSpec

_ADAPTER_KEY = re.compile(r"(?P<block>.*)\.(?P<place>self_attention\.(?:q|k|v|out_proj)|mlp\.[03])\.lora_A$")
_WEIGHT_OF = {  # place -> the base's weight and which third of it
    "self_attention.q": ("self_attention.in_proj_weight", 0),
    "self_attention.k": ("self_attention.in_proj_weight", 1),
    "self_attention.v": ("self_attention.in_proj_weight", 2),
    "self_attention.out_proj": ("self_attention.out_proj.weight", None),
    "mlp.0": ("mlp.0.weight", None),
    "mlp.3": ("mlp.3.weight", None),
}


class AdapterError(ValueError):
    """An adapter that cannot be read or does not fit; the message is one line."""


@dataclass(frozen=True)
class Adapter:
    """One trial's adapter: its tensors by name (fp32) and its card (``adapter.json``)."""

    tensors: dict[str, Tensor]
    card: dict[str, Any]

    @property
    def scaling(self) -> float:
        """Factor of every adapter's output; 1 where there are none."""
        return float(self.card["effective_scaling"] or 1.0)


def read_adapter(folder: str | Path) -> Adapter:
    """Read ``adapter.safetensors`` and ``adapter.json``. Raises AdapterError where they are missing or damaged."""
    folder = Path(folder)
    try:
        card = json.loads((folder / "adapter.json").read_text())
        tensors = load_file(folder / "adapter.safetensors")
    except FileNotFoundError as error:
        raise AdapterError(f"{error.filename or folder} does not exist: give the folder of a completed trial") from None
    except Exception as error:
        raise AdapterError(f"{folder}: the adapter cannot be read ({str(error).splitlines()[0]})") from None
    return Adapter(tensors, card)


def merged_state_dict(base: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The plain torchvision state dict of base and adapter together, in fp32.

    Args:
        base: state dict of the base under torchvision's names, at the adapter's image size; its head is replaced.
        adapter: every tensor of it is used.

    Raises:
        AdapterError: a tensor of the adapter has no place in the base.
    """
    state = {name: t.float().clone() for name, t in base.items() if not name.startswith("heads.")}
    for name, tensor in adapter.tensors.items():
        if name.endswith(".lora_B"):
            continue
        if not name.endswith(".lora_A"):
            if name not in state and not name.startswith("heads."):
                raise AdapterError(f"the adapter's {name} has no place in the base")
            state[name] = tensor.float().clone()
            continue
        found = _ADAPTER_KEY.match(name)
        if found is None:
            raise AdapterError(f"the adapter's {name} is not on a known projection")
        leaf, third = _WEIGHT_OF[found["place"]]
        weight_name = f"{found['block']}.{leaf}"
        lora_B = adapter.tensors[name.removesuffix("lora_A") + "lora_B"]
        update = adapter.scaling * (lora_B.double() @ tensor.double())
        if weight_name not in state:
            raise AdapterError(f"the adapter's {name} has no place in the base")
        weight = state[weight_name]
        part = weight if third is None else weight.view(3, -1, weight.shape[1])[third]
        if part.shape != update.shape:
            raise AdapterError(f"the adapter's {name} is for a layer of {list(update.shape)}, not {list(part.shape)}")
        part.copy_((part.double() + update).float())
    return state


def head_module(model: nn.Module, adapter: Adapter) -> nn.Linear:
    """The classifier's linear layer in ``model.heads.head``, made anew where its size differs.

    A ``Sequential(Dropout, Linear)`` keeps its dropout.
    """
    heads: Any = model.heads
    weight = adapter.tensors["heads.head.weight"]
    head: Any = heads.head
    last: Any = head[-1] if isinstance(head, nn.Sequential) else head
    if last.weight.shape != weight.shape:
        new = nn.Linear(weight.shape[1], weight.shape[0], device=last.weight.device, dtype=last.weight.dtype)
        if isinstance(heads.head, nn.Sequential):
            heads.head[-1] = new
        else:
            heads.head = new
        return new
    return cast(nn.Linear, last)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a trained adapter and its head on a plain torchvision model, in place, strictly.

    The model must hold the base weights that the adapter was trained on; its output then equals the trial's.

    Args:
        model: ``torchvision.models.VisionTransformer`` at the adapter's image size.
        folder: of a completed trial.

    Returns:
        The model.

    Raises:
        AdapterError: unreadable, or the model has other layers or another image size.
        ValueError: the model has no encoder block to adapt.
    """
    adapter = read_adapter(folder)
    own_size = getattr(model, "image_size", None)
    if own_size != adapter.card["model"]["image_size"]:
        raise AdapterError(
            f"the adapter is for {adapter.card['model']['image_size']} px, the model for {own_size} px: build the "
            "model with image_size=... and interpolated position embeddings"
        )
    rest = dict(adapter.tensors)
    head = head_module(model, adapter)
    with torch.no_grad():
        head.weight.copy_(rest.pop("heads.head.weight"))
        head.bias.copy_(rest.pop("heads.head.bias"))
        lora = adapter.card["lora"]
        if lora["method"] == "lora":
            spec = AdapterSpec(lora["rank"], adapter.scaling, lora["dropout"], lora["init"], 0)
            state = DropoutState([randomness.key("dropout", 0)])
            if spec.dropout > 0:
                key_each_pass(model, state)
            for injected in inject_adapters(model, [spec], lora["targets"], lora["blocks"], state):
                for name, view in injected.trial_tensors(0).items():
                    if name not in rest or rest[name].shape != view.shape:
                        raise AdapterError(f"the model's {name} {list(view.shape)} is not in the adapter")
                    view.copy_(rest.pop(name))
        parameters = dict(model.named_parameters())
        for name, tensor in rest.items():  # trained trunk parameters
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise AdapterError(f"the adapter's {name} has no place in the model")
            parameters[name].copy_(tensor)
    return model


def merge_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Merge a trained adapter and its head into a plain torchvision model's weights, in place.

    Unlike :func:`load_adapter` this leaves no extra layer: the model stays torchvision's own.
    """
    adapter = read_adapter(folder)
    base = {k: v.cpu() for k, v in model.state_dict().items()}
    state = merged_state_dict(base, adapter)
    head = head_module(model, adapter)
    with torch.no_grad():
        head.weight.copy_(state.pop("heads.head.weight"))
        head.bias.copy_(state.pop("heads.head.bias"))
    model.load_state_dict(state, strict=False)
    return model
