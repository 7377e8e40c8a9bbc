"""Put adapters into a Vision Transformer of torchvision or timm, and choose what is trained.

A layer's class is exchanged in place, so that its name, its parameters and all that refers to it stay. A norm or GELU
in front is computed in the adapted layer, which recomputes it in backward instead of keeping its output; the module
itself, whose parameters stay where they are, then passes on what it gets.
Shape legend: B image (K*B in a pack), S token, D width, H head, E head width.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

from lora_vit import randomness
from lora_vit.config import ADAPTED, TARGETS, LoraConfig
from lora_vit.config.rules import check_fields, one_of
from lora_vit.errors import ConfigError
from lora_vit.lora.backbones import OF_HEADS, Place, head_name, last_layer, places_of, plain_models, refuse_adapted
from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.functional import NOTHING, Prologue
from lora_vit.lora.layers import AdapterSpec, LoRAAdapters, adapters_in


class Passed(nn.Module):
    """A norm or GELU that the layers behind it compute."""

    original_class: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        return x


class AdaptedLinear(nn.Linear):
    """A linear layer with its adapters if it has any, after the norm or GELU in ``front`` (one or none)."""

    lora: LoRAAdapters | None
    front: tuple[Passed, ...]  # not registered: it has its own name in the model

    def forward(self, x: Tensor) -> Tensor:
        """[K*B, S, I] to [K*B, S, O]."""
        return project(self, x, self.weight, self.bias)


class Attention(nn.MultiheadAttention):
    """torchvision's self-attention: one product for q, k and v, then ``scaled_dot_product_attention``.

    ``nn.MultiheadAttention`` reads its weights directly, so that other linear layers in it change nothing.
    """

    lora: LoRAAdapters | None
    front: tuple[Passed, ...]
    first_token_only = False

    def forward(self, x_BSD: Tensor, *_: Tensor, **__: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """[B, S, D] to [B, S, D], or [B, 1, D] for the first token alone; and no weights."""
        B, S, D = x_BSD.shape
        qkv = project(self, x_BSD, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, S, E]
        if self.first_token_only:
            q = q[:, :, :1]
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(mixed.transpose(1, 2).reshape(B, -1, D)), None


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__dict__["original_class"], module.__class__ = type(module), cls


def project(layer: AdaptedLinear | Attention, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """LayerNorm or GELU where there is one in front, then a linear layer with its adapters if it has any."""
    norm: Any = layer.front[0] if layer.front else None
    prologue = NOTHING if norm is None else Prologue("gelu")
    if norm is not None and issubclass(norm.original_class, nn.LayerNorm):
        prologue = Prologue("layer_norm", norm.eps, norm.weight.to(x.dtype), norm.bias.to(x.dtype))
    if layer.lora is None or layer.lora.disabled:
        return F.linear(prologue(x), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return layer.lora.linear(x, weight, bias, prologue)


def use_own_attention(model: nn.Module) -> None:
    """Have every projection of the encoder called as a layer, with equal results: torchvision's attention becomes ours.

    timm's attention adds its bias of q, k and v after the layer, where it would else read the layer's weight.
    """
    module: Any
    for module in model.modules():
        if isinstance(module, EncoderBlock) and not isinstance(module.self_attention, Attention):
            become(module.self_attention, Attention)
            module.self_attention.lora, module.self_attention.front = None, ()
        elif hasattr(module, "qkv_bias_separate"):
            vars(module).setdefault("bias_was_separate", module.qkv_bias_separate)
            module.qkv_bias_separate = True


def inject_adapters(model: nn.Module, specs: Sequence[AdapterSpec], targets: Sequence[str],
                    blocks: Sequence[int] | None, state: DropoutState) -> list[LoRAAdapters]:  # fmt: skip
    """Give the targeted projections adapters of K trials, in place: one spec each, one state for all dropout masks.

    Raises ValueError where there are adapters already, or as :func:`chosen_places`; the model is left as it was.
    """
    refuse_adapted(model)
    chosen = chosen_places(model, targets, blocks, max(spec.rank for spec in specs))
    adapted = [place for place in chosen if set(targets) & set(place.names)]
    passed = {place.front for place in adapted if place.front is not None}
    use_own_attention(model)
    for place in (place for place in chosen if place in adapted or place.front in passed):
        layer: Any = model.get_submodule(place.layer)
        if not isinstance(layer, Attention):
            become(layer, AdaptedLinear)
        layer.lora, layer.front = None, (model.get_submodule(place.front),) if place.front in passed else ()
        if place in adapted:
            out_features, in_features = place.sizes(model)
            slots = {slot: name for slot, (target, name) in enumerate(place.names.items()) if target in targets}
            layer.lora = LoRAAdapters(specs, slots, place.reads, in_features, out_features, state)
            weight = model.get_parameter(place.weight)
            layer.lora.to(weight.device).train(model.training)
            if specs[0].method == "dora":
                # Nothing else keeps the output of attention's projection, and it is cheap to compute again; timm adds
                # a bias apart in place.
                square = weight.shape[0] == weight.shape[1]
                layer.lora.decompose(weight, keeps_output=not (square or place.bias_apart))
    for name in passed:
        become(model.get_submodule(name), Passed)
    return list(adapters_in(model).values())


def chosen_places(model: nn.Module, targets: Sequence[str], blocks: Sequence[int] | None, rank: int = 1) -> list[Place]:
    """All places of the blocks. Raises ValueError where a target or block is missing, or a target below the rank."""
    found = list(places_of(model).values())
    chosen = range(len(found)) if blocks is None else sorted(set(blocks))
    if not targets or not chosen or set(targets) - set(TARGETS) or set(chosen) - set(range(len(found))):
        given = f"blocks={None if blocks is None else list(blocks)}, targets={list(targets)}"
        there = f"the targets {', '.join(TARGETS)} in the blocks 0 to {len(found) - 1}"
        raise ValueError(f"{given} match nothing: there are {there}")
    places = [place for index in chosen for place in found[index]]
    for place in places:
        if set(targets) & set(place.names) and rank > (width := min(place.sizes(model))):
            raise ValueError(f"rank={rank} is impossible: {place.layer} is {width} wide")
    return places


def remove_adapter(model: nn.Module) -> nn.Module:
    """Take all adapters out, in place; returns the model: in its library's classes, its trunk bit for bit the base.

    Parameters of the trunk that were trained beside the adapters get their values of before. The head stays. So does a
    model without adapters, which is what is asked for. Raises ConfigError within :func:`disable_adapter`.
    """
    adapters_in(model)
    for module in list(model.modules()):
        own, hooks = vars(module), module._forward_pre_hooks
        if isinstance(module, (AdaptedLinear, Attention)):
            del module.lora, module.front
        if isinstance(module, (AdaptedLinear, Attention, Passed)):
            module.__class__ = own.pop("original_class")
        if "bias_was_separate" in own:
            module.qkv_bias_separate = own.pop("bias_was_separate")
        own.pop("adapter_card", None)
        for name, value in own.pop("base_values", {}).items():
            module.get_parameter(name).data.copy_(value)
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), DropoutState)]:
            del hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """A context in which a model's trunk computes what the base does; the head stays.

    In it adapters can be neither saved, merged, taken out nor put on. Raises ConfigError where the model has none.
    """
    adapter_card(model)
    changes: Any = [(m, "disabled", m.disabled, True) for m in model.modules() if isinstance(m, LoRAAdapters)]
    for name, value in base_values(model).items():  # exchanged, not written: autograd may have kept what is there
        changes.append((p := model.get_parameter(name), "data", p.data, value.to(p)))
    try:
        for owner, key, _, value in changes:
            setattr(owner, key, value)
        yield
    finally:
        for owner, key, before, _ in changes:
            setattr(owner, key, before)


def adapter_card(model: nn.Module, kinds: Any = nn.Module) -> dict[str, Any]:
    """The settings of a model's adapters. Raises ConfigError where it has none itself, or is of none of the kinds."""
    if "adapter_card" not in vars(model) or not isinstance(model, kinds):
        remedy = "give torchvision's or timm's model itself, here and to replace_linear_with_lora"
        raise ConfigError(f"the {type(model).__name__} has no adapter: {remedy}")
    return vars(model)["adapter_card"]


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """What the trunk's parameters that are trained beside adapters were before, where there is no trainer."""
    return vars(model).setdefault("base_values", {})


def replace_linear_with_lora(
    model: nn.Module, rank: int = 4, alpha: float = 32.0, dropout: float = 0.0, targets: Sequence[str] = TARGETS,
    blocks: Sequence[int] | None = None, scaling: str = "standard", seed: int = 0, method: str = "lora",
) -> nn.Module:  # fmt: skip
    """Give the linear layers of a plain ViT's encoder LoRA adapters (Hu et al., 2021), in place; returns the model.

    lora_B starts at zero, so that the model's output does not change. A LayerNorm or GELU whose output only adapted
    layers read is computed in these: a forward hook on its module sees what goes into it, as input and as output.
    ``dropout``: probability in [0, 1) on the adapters' input, in train mode. ``targets``: some of q, k, v, o, fc1, fc2.
    ``blocks``: indices, None for all. ``scaling``: of the update, by alpha/rank ("standard") or alpha/sqrt(rank)
    ("rslora"). ``seed``: of the initialisation and the dropout masks. ``method``: "lora", or "dora" for a trained
    magnitude of each output besides (Liu et al., 2024), at first the norm of its weights as they are now.
    Raises ValueError: an impossible value, nothing to adapt, or adapters already; the model is left as it was.
    """
    if not isinstance(rank, (int, float)) or rank < 1 or rank % 1:
        raise ValueError(f"rank={rank} is impossible: give a whole number from 1 up")
    one_of("method", method, ADAPTED)
    lora = LoraConfig(method, rank, alpha, dropout, None, None, scaling, None)
    check_fields(lora)
    where = {"targets": list(targets), "blocks": None if blocks is None else list(blocks)}
    adapt(model, {"lora": vars(lora) | where, "effective_scaling": lora.effective_scaling()}, seed)
    return model


def adapt(model: nn.Module, card: Mapping[str, Any], seed: int = 0) -> list[LoRAAdapters]:
    """:func:`inject_adapters` of one trial into a model without a trainer: its dropout keys itself in each pass."""
    lora, state = card["lora"], DropoutState([randomness.key("dropout", seed)])
    spec = AdapterSpec(lora["rank"], card["effective_scaling"], lora["dropout"], seed, lora["method"])
    injected = inject_adapters(model, [spec], lora["targets"], lora["blocks"], state)
    vars(model)["adapter_card"] = {"lora": lora, "effective_scaling": spec.scaling}
    if spec.dropout > 0:  # a method, not a closure: a copied or pickled model then takes its own key along
        model.register_forward_pre_hook(state.advance, with_kwargs=True)
    return injected


def mark_lora_and_head_as_trainable(model: nn.Module, head_substring: str = "heads.head",
                                    bias: str = "none") -> list[str]:  # fmt: skip
    """Freeze everything but the adapters and the head; return the names of what is trained.

    Parameters with ``head_substring`` in their name are the head's. ``bias``: also train no bias ("none"), those of
    adapted layers ("lora_only"), or all ("all"). Raises ValueError where there is no adapter or no head parameter.
    """
    one_of("bias", bias, ("none", "lora_only", "all"))
    names = [name for name, _ in model.named_parameters()]
    if not any(".lora_" in name for name in names):
        raise ValueError("the model has no LoRA adapter: call replace_linear_with_lora first")
    if not any(head_substring in name for name in names):
        top = ", ".join(sorted({name.split(".")[0] for name in names}))
        raise ValueError(f"no parameter's name contains head_substring='{head_substring}' (top level: {top})")
    mark_trained(model, "lora", bias, head_substring)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in trained:
        of_head = name.startswith(OF_HEADS) if isinstance(model, plain_models()) else head_substring in name
        if not of_head and ".lora_" not in name:
            base_values(model).setdefault(name, model.get_parameter(name).detach().clone())
    return trained


def mark_trained(model: nn.Module, method: str, bias: str | None, head_substring: str | None = None) -> None:
    """Set ``requires_grad`` by ``lora.method`` and ``lora.bias``; of a head, only where its name has the substring."""
    adapted = {name.rpartition(".")[0] for name in adapters_in(model)}
    blocks = places_of(model).values() if adapted else ()
    biases = {bias for places in blocks for place in places if place.layer in adapted for bias in place.biases}
    for name, parameter in model.named_parameters():
        of_head = head_substring is not None and head_substring in name
        of_bias = name.endswith("bias") and (bias == "all" or (bias == "lora_only" and name in biases))
        parameter.requires_grad = of_head or ".lora_" in name or method == "full" or of_bias


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What an adapted model has beside its base, named and shaped as in a trial's file; copies in fp32 on the CPU.

    ``NAME.lora_A`` [rank, in] and ``NAME.lora_B`` [out, rank], of DoRA ``NAME.lora_magnitude`` [out], the head's weight
    and bias, if it has one, and trained parameters of the trunk. Raises ConfigError where the model has no adapter.
    """
    adapter_card(model, plain_models())
    found: dict[str, Tensor] = {}
    for adapters in adapters_in(model).values():
        found |= adapters.trial_tensors(0)
    if (last := last_layer(model)) is not None:
        found |= {f"{head_name(model)}.{leaf}": getattr(last, leaf) for leaf in ("weight", "bias")}
    found |= {name: model.get_parameter(name) for name in base_values(model)}
    return {name: t.detach().float().cpu().clone() for name, t in found.items()}


def trainable_parameters(model: nn.Module) -> str:
    """A table to print: what is trained, by name (of all blocks together), its numbers of parameters, their shares."""
    counts: Counter[str] = Counter()
    for name, p in model.named_parameters():
        counts[re.sub(r"\d+(?=\.)", "*", name, count=1) if p.requires_grad else "frozen"] += p.numel()
    total = counts.total()
    rows = [*counts.items(), ("trained", total - counts["frozen"]), ("all", total)]
    return "\n".join(f"{count:13,}  {count / total:8.3%}  {name}" for name, count in rows)
