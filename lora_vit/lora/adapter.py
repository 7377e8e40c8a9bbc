"""Adapters on disk, bound to their base, put on a plain torchvision model, and merged into its weights.

Merging is a pure function on state dicts: W' = W + s B A for each adapted projection (Hu et al., 2021, section 4).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lora_vit import randomness
from lora_vit.config import SCHEMA_VERSION, ConfigError
from lora_vit.lora.inject import adapt, projection_name
from lora_vit.lora.layers import AdapterSpec, LoRAAdapters
from lora_vit.records import state_of

SIZES = ("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim")
"""torchvision's arguments that make the model that an adapter is for."""
POSITIONS = "encoder.pos_embedding"
POSITIONS_TOLERANCE = 1e-4
"""Of a projection of the position embedding: interpolated on another kind of CPU it differs in its last bits."""


class AdapterError(ConfigError):
    """An adapter that cannot be read or does not belong to what it is put on; the message is one line."""


@dataclass(frozen=True)
class Adapter:
    """One trial's adapter: its tensors by name (fp32) and its card (``adapter.json``)."""

    tensors: dict[str, Tensor]
    card: dict[str, Any]

    @property
    def scaling(self) -> float:
        """Factor of every adapter's output; 1 where there are none."""
        return float(self.card["effective_scaling"] or 1.0)

    def places(self) -> Iterator[tuple[str, str, int | None]]:
        """Each adapted projection: its name, the base's weight that it is (a part of), and which third of that."""
        lora = self.card["lora"]
        if lora["method"] != "lora":
            return
        for i in range(self.card["base"]["num_layers"]) if lora["blocks"] is None else sorted(lora["blocks"]):
            block = f"encoder.layers.encoder_layer_{i}"
            for target in lora["targets"]:
                name = projection_name(block, target)
                if target in "qkv":
                    yield name, f"{block}.self_attention.in_proj_weight", "qkv".index(target)
                else:
                    yield name, f"{name}.weight", None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the card promises."""
        sizes, lora = {key: self.card["base"][key] for key in SIZES}, self.card["lora"]
        with torch.device("meta"):
            model = VisionTransformer(**sizes, num_classes=len(self.card["class_names"]))
        every = {name: tuple(p.shape) for name, p in model.named_parameters()}
        adapted: dict[str, tuple[int, ...]] = {}
        biases = set()
        for name, weight, third in self.places():
            rows, columns = every[weight]
            adapted[f"{name}.lora_A"] = (lora["rank"], columns)
            adapted[f"{name}.lora_B"] = (rows if third is None else rows // 3, lora["rank"])
            biases.add(weight.removesuffix("weight") + "bias")

        def is_trained(name: str) -> bool:
            if lora["method"] == "full" or name.startswith("heads."):
                return True
            return name.endswith("bias") if lora["bias"] == "all" else lora["bias"] == "lora_only" and name in biases

        return adapted | {name: shape for name, shape in every.items() if is_trained(name)}


def read_adapter(folder: str | Path) -> Adapter:
    """Read ``adapter.safetensors`` and ``adapter.json``.

    Raises:
        AdapterError: they are missing, damaged or edited, do not belong together, hold NaN, or lie in the folder of a
            trial that is not completed.
    """
    folder = Path(folder)
    trial = state_of(folder)
    if trial.status not in ("completed", "new"):  # new: the adapter's own two files may have been copied elsewhere
        raise AdapterError(trial.problem or f"{folder}: the trial is {trial.status}, not completed")
    try:
        card = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter.safetensors", "pt") as file:
            own = json.loads((file.metadata() or {}).get("lora_vit", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
    except FileNotFoundError as error:
        name = error.filename or folder / "adapter.safetensors"
        raise AdapterError(f"{name} does not exist: give the folder of a completed trial") from None
    except Exception as error:
        raise AdapterError(f"{folder}: the adapter cannot be read ({str(error).splitlines()[0]})") from None
    if not card or card != own or (trial.record and trial.record.trial_id != card["trial_id"]):
        raise AdapterError(f"{folder}: adapter.json and adapter.safetensors are not of one trial, or were edited")
    if card["schema"] != SCHEMA_VERSION:
        raise AdapterError(f"{folder}: the adapter is of version {card['schema']}, this one reads {SCHEMA_VERSION}")
    adapter = Adapter(tensors, card)
    expected, found = adapter.shapes(), {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            there, wanted = (d.get(name, "absent") for d in (found, expected))
            raise AdapterError(f"{folder}: the adapter's {name} is {there}, expected {wanted}")
        if not torch.isfinite(tensors[name]).all():
            raise AdapterError(f"{folder}: the adapter's {name} holds NaN or infinite values")
    return adapter


def base_of(model: nn.Module) -> dict[str, Any]:
    """A model as the base of adapters: its sizes, and its weights without head by content, as ``adapter.json`` has it.

    Returns:
        :data:`SIZES`; ``sha256`` over names, shapes and fp32 values of the weights, and the norms' eps; ``positions``:
        projections of the position embedding, which is left out of the digest.

    Raises:
        AdapterError: it is no plain torchvision model with a head that can be replaced, or has adapters.
    """
    if not isinstance(model, VisionTransformer) or getattr(model, "_compiled_call_impl", None) is not None:
        kind = type(model).__name__
        raise AdapterError(f"not a plain torchvision VisionTransformer ({kind}): wrap or compile it afterwards")
    if any(isinstance(m, LoRAAdapters) for m in model.modules()):
        raise AdapterError("the model has adapters already: begin with its base")
    _last_layer(model)
    sizes = {
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_layers": len(model.encoder.layers),
        "num_heads": model.encoder.layers[0].self_attention.num_heads,
        "hidden_dim": model.hidden_dim,
        "mlp_dim": model.mlp_dim,
    }
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("heads.")}
    positions = state.pop(POSITIONS).double().flatten().cpu().numpy()
    signs = randomness.uniforms(np.arange(len(positions)), 4, "positions") < 0.5
    norms = [(name, m.eps) for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    digest = hashlib.sha256(str(sorted(norms)).encode())
    for name in sorted(state):
        digest.update(f"{name} {list(state[name].shape)}\n".encode())
        digest.update(np.ascontiguousarray(state[name].float().cpu().numpy()).data)
    projections = np.where(signs, positions[:, None], -positions[:, None]).sum(0)
    return {**sizes, "sha256": digest.hexdigest(), "positions": projections.tolist()}


def bind(
    adapter: Adapter,
    base: dict[str, Any],
    class_names: Sequence[str] | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Raise AdapterError, which says what differs, unless adapter, base and data belong together.

    Args:
        adapter: whose card says what it was trained on.
        base: from :func:`base_of`.
        class_names: of the data that figures are to be shown for.
        data: what that data's record says: fingerprint and number of images.
    """
    card, trained_on = adapter.card, adapter.card["base"]
    for key in SIZES:
        if base[key] != trained_on[key]:
            raise AdapterError(f"the adapter is for a model with {key}={trained_on[key]}, here {key}={base[key]}")
    theirs, ours = np.array(trained_on["positions"]), np.array(base["positions"])
    same_positions = np.abs(theirs - ours).max() <= POSITIONS_TOLERANCE * np.abs(theirs).max()
    if base["sha256"] != trained_on["sha256"] or not same_positions:
        what = "weights" if same_positions else "position embedding and perhaps other weights"
        raise AdapterError(
            f"the model's {what} are not those that the adapter was trained on ({trained_on['weights'] or 'random'}): "
            "give these, in fp32, with no adapter merged into them"
        )
    if class_names is not None and list(class_names) != card["class_names"]:
        gone = [f"lacks '{c}'" for c in card["class_names"] if c not in class_names]
        new = [f"has '{c}' in addition" for c in class_names if c not in card["class_names"]]
        raise AdapterError(f"the data has other classes than the adapter: it {(gone + new or ['orders them anew'])[0]}")
    if data is not None and data["fingerprint"] != card["data"]["fingerprint"]:
        then = {**card["data"], "fingerprint": data["fingerprint"]}
        changed = [f"{key} {then.get(key)} then, {now} now" for key, now in data.items() if now != then.get(key)]
        what = ", ".join(changed) or "other contents or splits of as many images"
        raise AdapterError(f"the data is not what the adapter was trained and tested on: {what}")


def merged_state_dict(base: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The plain torchvision state dict of base and adapter together, in fp32.

    Args:
        base: state dict of the adapter's base under torchvision's names; its head is replaced.
        adapter: every tensor of it is used.
    """
    state = {name: t.float().clone() for name, t in base.items() if not name.startswith("heads.")}
    state |= {name: t.float().clone() for name, t in adapter.tensors.items() if ".lora_" not in name}
    for name, weight_name, third in adapter.places():
        lora_A, lora_B = (adapter.tensors[f"{name}.lora_{m}"].double() for m in "AB")
        weight = state[weight_name]
        part = weight if third is None else weight.view(3, -1, weight.shape[1])[third]
        part.copy_((part.double() + adapter.scaling * (lora_B @ lora_A)).float())
    return state


def _last_layer(model: VisionTransformer) -> nn.Linear | None:
    """The classifier's linear layer; None where the model has no head. Raises AdapterError for other heads."""
    names = [name for name, _ in model.heads.named_children()]
    if type(model.heads) is nn.Sequential and not names:
        return None
    if names == ["head"]:
        head = model.heads.head
        *before, last = head if type(head) is nn.Sequential and len(head) else [head]
        if type(last) is nn.Linear and last.bias is not None and all(type(m) is nn.Dropout for m in before):
            return last
    raise AdapterError(
        "the model's heads are not one linear layer with bias, alone or after dropout: give it such a heads.head"
    )


def put_head(model: VisionTransformer, adapter: Adapter) -> None:
    """Give the model the adapter's head: a layer of another size is made anew, dropout before it stays."""
    weight, bias = adapter.tensors["heads.head.weight"], adapter.tensors["heads.head.bias"]
    last = _last_layer(model)
    if last is None or last.weight.shape != weight.shape:
        like = model.class_token
        new = nn.Linear(weight.shape[1], weight.shape[0], device=like.device, dtype=like.dtype)
        if last is not None and isinstance(model.heads.head, nn.Sequential):
            model.heads.head[-1] = new
        else:
            model.heads.add_module("head", new)
        last = new
    with torch.no_grad():
        last.weight.copy_(weight)
        last.bias.copy_(bias)


def put_on(model: VisionTransformer, adapter: Adapter) -> None:
    """Put an adapter and its head on the base that it is bound to, in place."""
    put_head(model, adapter)
    rest = {name: t for name, t in adapter.tensors.items() if not name.startswith("heads.")}
    lora = adapter.card["lora"]
    with torch.no_grad():
        if lora["method"] == "lora":
            spec = AdapterSpec(lora["rank"], adapter.scaling, lora["dropout"], lora["init"], 0)
            for adapters in adapt(model, spec, lora["targets"], lora["blocks"]):
                for name, view in adapters.trial_tensors(0).items():
                    view.copy_(rest.pop(name))
        parameters = dict(model.named_parameters())
        for name, tensor in rest.items():  # trained trunk parameters
            parameters[name].copy_(tensor)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a trained adapter and its head on a plain torchvision model, in place.

    Its output then equals the trial's, and it can be trained on (dropout draws other masks in each pass).

    Args:
        model: ``torchvision.models.VisionTransformer`` with the weights that the adapter was trained on, in fp32, at
            the adapter's image size; on any device.
        folder: of a completed trial.

    Returns:
        The model.

    Raises:
        AdapterError: the adapter is unreadable or belongs to another model; the model is left as it was.
    """
    adapter = read_adapter(folder)
    bind(adapter, base_of(model))
    put_on(cast(VisionTransformer, model), adapter)
    return model


def merge_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Merge a trained adapter and its head into a plain torchvision model's weights, in place.

    Unlike :func:`load_adapter` this leaves no extra layer: the model stays torchvision's own. Raises as that does.
    """
    adapter = read_adapter(folder)
    bind(adapter, base_of(model))
    state = merged_state_dict({name: t.cpu() for name, t in model.state_dict().items()}, adapter)
    put_head(cast(VisionTransformer, model), adapter)
    model.load_state_dict({name: t for name, t in state.items() if not name.startswith("heads.")}, strict=False)
    return model
