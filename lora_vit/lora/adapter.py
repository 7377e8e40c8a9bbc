"""Adapters on disk, bound to their base, put on a plain model, merged (W' = W + s B A: Hu et al., 2021, 4), or cut."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora_vit import randomness
from lora_vit.config import ADAPTED, SCHEMA_VERSION, SIZES, TARGETS
from lora_vit.errors import ConfigError, one_line
from lora_vit.files import replacing, write_json
from lora_vit.lora.backbones import OF_HEADS, new_backbone, put_head, sizes_of, trunk_state
from lora_vit.lora.inject import adapt, adapter_state_dict, base_values, chosen_places, remove_adapter
from lora_vit.lora.layers import adapters_in
from lora_vit.records import RECORD, state_of

INTERPOLATED = ("pos_embedding", "pos_embed", "relative_position_bias_table")  # ends of names; to the image size
POSITIONS_TOLERANCE = 1e-4  # of a projection of these: interpolated on another kind of CPU, their last bits differ
SAME = 1e-4  # of two models with the same weights, relative to the largest logit: kernels differ


class Adapter(NamedTuple):
    """One trial's adapter: its tensors by name (fp32) and its card (``adapter.json``)."""

    tensors: dict[str, Tensor]
    card: dict[str, Any]

    @property
    def columns(self) -> int:
        """Those of each ``lora_B``: the rank, or of what one threshold has cut, the rank that was trained."""
        return next(len(tensor) for name, tensor in self.tensors.items() if name.endswith(".lora_A"))


def read_adapter(folder: str | Path) -> Adapter:
    """Read ``adapter.safetensors`` and ``adapter.json``. Raises ConfigError unless they are whole and of one trial."""
    trial = state_of(folder := Path(folder))
    if trial.status not in ("completed", "new"):  # new: the adapter's own two files may have been copied elsewhere
        raise ConfigError(trial.problem or f"{folder}: the trial is {trial.status}, not completed")
    try:
        card = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter.safetensors", "pt") as file:
            own = json.loads((file.metadata() or {}).get("lora_vit", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
    except FileNotFoundError as error:
        name = error.filename or folder / "adapter.safetensors"
        raise ConfigError(f"{name} does not exist: give the folder of a completed trial, or save_adapter's") from None
    except Exception as error:
        raise ConfigError(f"{folder}: the adapter cannot be read ({one_line(error)})") from None
    if not card or card != own or (trial.record and trial.record.trial_id != card["trial_id"]):
        raise ConfigError(f"{folder}: adapter.json and adapter.safetensors are not of one trial, or were edited")
    if card["schema"] != SCHEMA_VERSION:
        raise ConfigError(f"{folder}: the adapter is of version {card['schema']}, this one reads {SCHEMA_VERSION}")
    if card.get("sha256") != sha256_of(tensors):
        raise ConfigError(f"{folder}: adapter.safetensors does not hold the values that were trained: copy it again")
    return Adapter(tensors, card)


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Replace the two files that :func:`read_adapter` reads."""
    card = {**adapter.card, "sha256": sha256_of(adapter.tensors)}
    write_tensors(folder / "adapter.safetensors", adapter.tensors, card)
    write_json(folder / "adapter.json", card)


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Replace a ``.safetensors`` file, which says in one entry of its metadata what it holds."""
    # One entry, a sorted JSON string: several are in another order in every process.
    metadata = {"lora_vit": json.dumps(about, sort_keys=True)}
    data = save({name: tensors[name].contiguous() for name in sorted(tensors)}, metadata)
    with replacing(path) as file:
        file.write(data)


def base_of(model: nn.Module) -> dict[str, Any]:
    """A model as the base of adapters, as ``adapter.json`` has it; raises as :func:`~.backbones.sizes_of`.

    That is its sizes; ``sha256`` over names, shapes and fp32 values of its weights without head, and the norms' eps;
    ``positions``: projections of the interpolated parameters, which are left out of the digest.
    """
    sizes = sizes_of(model)
    state = trunk_state(model)
    interpolated = [state.pop(name).double().flatten().cpu() for name in sorted(state) if name.endswith(INTERPOLATED)]
    positions = torch.cat([torch.empty(0), *interpolated]).numpy()
    signs = randomness.uniforms(np.arange(len(positions)), 4, "positions") < 0.5
    norms = [(name, m.eps) for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    projections = np.where(signs, positions[:, None], -positions[:, None]).sum(0)
    return {**sizes, "sha256": sha256_of(state, str(sorted(norms))), "positions": projections.tolist()}


def sha256_of(tensors: dict[str, Tensor], begin: str = "") -> str:
    """Digest of names, shapes and fp32 values."""
    digest = hashlib.sha256(begin.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensors[name].float().cpu().numpy()).data)
    return digest.hexdigest()


def bind(adapter: Adapter, base: dict[str, Any], class_names: Sequence[str] | None = None,
         data: dict[str, Any] | None = None) -> None:  # fmt: skip
    """Raise ConfigError, which says what differs, unless adapter, base and data belong together.

    ``base``: from :func:`base_of`; ``class_names`` and ``data`` (its card): of what figures are to be shown for.
    """
    card, trained_on = adapter.card, adapter.card["base"]
    for key in ("architecture", *SIZES, "mean", "std", "interpolation"):
        if key in base and key in trained_on and base[key] != trained_on[key]:
            raise ConfigError(f"the adapter is for a model with {key}={trained_on[key]}, here {key}={base[key]}")
    theirs, ours = np.array(trained_on["positions"]), np.array(base["positions"])
    same_positions = np.abs(theirs - ours).max() <= POSITIONS_TOLERANCE * np.abs(theirs).max()
    if base["sha256"] != trained_on["sha256"] or not same_positions:
        what = "weights" if same_positions else "position embedding and perhaps other weights"
        those = f"those that the adapter was trained on ({trained_on['weights'] or 'random'})"
        raise ConfigError(f"the model's {what} are not {those}: give these, in fp32, with no adapter merged into them")
    if class_names is not None and list(class_names) != card["class_names"]:
        gone = [f"lacks '{c}'" for c in card["class_names"] if c not in class_names]
        new = [f"has '{c}' in addition" for c in class_names if c not in card["class_names"]]
        what = (gone + new or ["has them in another order"])[0]
        raise ConfigError(f"the data's classes are not the adapter's: it {what}")
    if data is not None and data["fingerprint"] != card["data"]["fingerprint"]:
        then = {**card["data"], "fingerprint": data["fingerprint"]}
        changed = [f"{key} {then.get(key)} then, {now} now" for key, now in data.items() if now != then.get(key)]
        what = ", ".join(changed) or "other contents or splits of as many images"
        raise ConfigError(f"the data is not what the adapter was trained and tested on: {what}")


def merged_state_dict(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The plain state dict of a base and its adapter and head together, in fp32, on the CPU; nothing is changed."""
    state = {name: t.float().cpu().clone() for name, t in trunk_state(model).items()}
    state |= {name: t.float().clone() for name, t in adapter.tensors.items() if ".lora_" not in name}
    if hasattr(model, "head_dist"):
        state |= {f"head_dist.{leaf}": state[f"head.{leaf}"].clone() for leaf in ("weight", "bias")}
    for place in chosen_places(model, TARGETS, None):
        for name, rows in zip(place.names.values(), state[place.weight].chunk(len(place.names)), strict=True):
            if f"{name}.lora_A" not in adapter.tensors:
                continue
            lora_A, lora_B = (adapter.tensors[f"{name}.lora_{m}"].double() for m in "AB")
            new = rows.double() + adapter.card["effective_scaling"] * (lora_B @ lora_A)
            if (magnitude := adapter.tensors.get(f"{name}.lora_magnitude")) is not None:  # a row of zeros stays one
                norms = new.norm(dim=1, keepdim=True).clamp_min(torch.finfo(new.dtype).tiny)
                new *= magnitude.double()[:, None] / norms
            rows.copy_(new.float())
    return state


def decomposed(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, R], falling singular values [R] and V' [R, I] of ``lora_B @ lora_A``, in fp64.

    No product is made dense: with B = Q P and A' = S T (QR), B A = Q (P T') S', and P T' is [R, R].
    """
    (q_OR, p_RR), (s_IR, t_RR) = (torch.linalg.qr(x.double()) for x in (lora_B, lora_A.T))
    u_RR, values_R, v_RR = torch.linalg.svd(p_RR @ t_RR.T)
    return q_OR @ u_RR, values_R, v_RR @ s_IR.T


def cut(tensors: Mapping[str, Tensor], rank: int, by: str = "layer") -> dict[str, Tensor]:
    """A trial's tensors with adapters of a lower rank, fp32: the nearest update of that rank (Eckart & Young, 1936).

    ``by="layer"``: each layer has this rank. ``by="threshold"``: all together have at most as many parameters; what
    stays has the largest squared singular values for each of the I + O parameters that it costs, in whatever layer.
    There factors keep their shapes, and what goes is zero. DoRA's magnitudes stay, as head and biases do: they say how
    long each output's weights are, whatever their direction.
    """
    names = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    parts = {name: decomposed(*(tensors[f"{name}.lora_{m}"] for m in "AB")) for name in names}
    costs = {name: len(u_OR) + v_RI.shape[1] for name, (u_OR, _, v_RI) in parts.items()}
    worth = {name: values_R.square() / costs[name] for name, (_, values_R, _) in parts.items()}
    left, least = rank * sum(costs.values()), 0.0
    for value, cost in sorted(((v, costs[name]) for name in names for v in worth[name].tolist()), reverse=True):
        if by == "layer" or (left := left - cost) < 0:
            break
        least = value
    smaller = dict(tensors)
    for name, (u_OR, values_R, v_RI) in parts.items():
        root_R, r = (values_R * (worth[name] >= least)).sqrt(), rank if by == "layer" else len(values_R)
        smaller[f"{name}.lora_A"] = (root_R[:, None] * v_RI)[:r].float()
        smaller[f"{name}.lora_B"] = (u_OR * root_R)[:, :r].float()
    return smaller


def put_on(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter and its head on the base that it is bound to, in place."""
    put_head(model, adapter.tensors)
    own = {name: tensor for name, tensor in adapter.tensors.items() if not name.startswith(OF_HEADS)}
    views: dict[str, Tensor] = dict(model.named_parameters())  # of trained trunk parameters
    if adapter.card["lora"]["method"] in ADAPTED:
        base_values(model).update({name: views[name].detach().clone() for name in own if name in views})
        for adapters in adapt(model, {**adapter.card, "lora": {**adapter.card["lora"], "rank": adapter.columns}}):
            views |= adapters.trial_tensors(0)
    with torch.no_grad():
        for name, tensor in own.items():
            views[name].copy_(tensor)


def _output(model: nn.Module, base: dict[str, Any]) -> Tensor:
    """What a model in fp32 on the CPU, then in evaluation mode, gives for a made image."""
    side = base["image_size"]
    shape = side if isinstance(side, list) else [side, side]
    image = torch.rand(1, 3, *shape, generator=randomness.generator("base")) * 4 - 2
    with torch.no_grad():
        return model.eval()(image)


def _agree(theirs: Tensor, ours: Tensor) -> bool:
    return torch.allclose(theirs, ours, rtol=0, atol=SAME * float(ours.abs().max()))


def _refuse_half(model: nn.Module) -> None:
    if torch.finfo(dtype := next(model.parameters()).dtype).bits < 32:
        raise ConfigError(f"the model is of {dtype}, which would round the update away: give it in fp32")


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter and head of a completed trial's folder, or :func:`save_adapter`'s, on a plain model, in place.

    Returns the model. Its output equals the trial's, and it can be trained further: each pass drops other elements.
    ``model``: torchvision's ``VisionTransformer``, or timm's model of the adapter's name, with the weights that it was
    trained on, in fp32, at its image size; on any device. Else raises ConfigError, and leaves the model as it was.
    """
    adapter = read_adapter(folder)
    bind(adapter, base_of(model))
    _refuse_half(model)
    base, given = adapter.card["base"], copy.deepcopy(model).float().cpu()
    put_on(given, adapter)
    if "output" in adapter.card:  # of somebody's own loop, whose model need not be what a name makes
        ours = torch.tensor(adapter.card["output"])
    else:
        named = new_backbone(base, 1)
        named.load_state_dict(trunk_state(model), strict=False)
        put_on(named, adapter)
        ours = _output(named, base)
    if not _agree(_output(given, base), ours):
        what = f"the model has the weights of {base['model']}, but computes something else with them"
        raise ConfigError(f"{what}: make it by that name (heads of attention, activation, pooling as they are there)")
    put_on(model, adapter)
    return model


def merge_adapter(model: nn.Module, folder: str | Path | None = None) -> nn.Module:
    """Merge a model's own adapters into its weights, or those of a folder, with their head, into a plain model's.

    In place; returns the model, which then is the library's own again, in fp32's values. Else as :func:`load_adapter`.
    """
    if folder is not None and not adapters_in(load_adapter(model, folder)):
        return model  # a probe, or trained as a whole
    _refuse_half(model)
    adapter = adapter_of(model)
    merged = merged_state_dict(remove_adapter(model), adapter)
    model.load_state_dict({n: t for n, t in merged.items() if not n.startswith(OF_HEADS)}, strict=False)
    return model


def save_adapter(model: nn.Module, folder: str | Path, **about: Any) -> None:
    """Save what a model of torchvision or timm has beside its base, for :func:`load_adapter` to put on that base.

    That is :func:`adapter_state_dict`, bound to the base; what was saved there before is replaced. ``about``: more that
    ``adapter.json`` is to say, for example ``class_names=["ant", "bee"]``. Raises ConfigError where the model has no
    adapter, where more was trained than these tensors, and where the folder is a trial's.
    """
    folder, adapter = Path(folder), adapter_of(model)
    for name, p in model.named_parameters():
        if p.requires_grad and ".lora_" not in name and not name.startswith((*OF_HEADS, *base_values(model))):
            remedy = "choose what is trained by mark_lora_and_head_as_trainable, before training"
            raise ConfigError(f"{name} is trained, and what it was in the base is not known: {remedy}")
    if folder.is_file() or (folder / RECORD).exists():
        raise ConfigError(f"{folder} {'is a file' if folder.is_file() else 'holds a trial'}: give another folder")
    classes = next((len(t) for name, t in adapter.tensors.items() if name.startswith(OF_HEADS)), 0)
    if (names := about.get("class_names")) is not None and len({*map(str, names)}) != classes:
        raise ConfigError(f"class_names={names}: the model's head has {classes} classes, give each a name of its own")
    about |= {} if names is None else {"class_names": [*map(str, names)]}
    own = copy.deepcopy(model).float().cpu()
    plain = remove_adapter(copy.deepcopy(own))
    base = base_of(plain) | {"weights": "its own"}
    base["model"] = base["architecture"] or type(model).__name__
    put_on(plain, adapter)
    if not _agree(output := _output(plain, base), _output(own, base)):
        raise ConfigError("the model computes something else than base, adapter and one head: nothing is saved")
    kind = {"schema": SCHEMA_VERSION, "trial_id": None, "base": base, "output": output.tolist()}
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, Adapter(adapter.tensors, {**about, **adapter.card, **kind}))


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter that a model has, with a card of its settings alone. Raises as :func:`adapter_state_dict`."""
    tensors, card = adapter_state_dict(model), vars(model)["adapter_card"]
    return Adapter(tensors, {**card, "lora": {**card["lora"], "bias": "all" if base_values(model) else "none"}})
