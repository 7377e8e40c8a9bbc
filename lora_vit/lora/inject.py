"""Put adapters into a torchvision Vision Transformer, and choose what is trained.

The public pair for a plain model is :func:`replace_linear_with_lora` and :func:`mark_lora_and_head_as_trainable`;
:func:`inject_adapters` does the same for a pack of K trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_vit import randomness
from lora_vit.config import TARGETS
from lora_vit.lora.attention import EncoderBlock
from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.layers import AdapterSpec, LoRAAdapters

_PROJECTIONS = {
    "q": "self_attention.q",
    "k": "self_attention.k",
    "v": "self_attention.v",
    "o": "self_attention.out_proj",
    "fc1": "mlp.0",
    "fc2": "mlp.3",
}


def projection_name(block: str, target: str) -> str:
    """Name of a target in the block called ``block``, e.g. ``encoder.layers.encoder_layer_0.self_attention.q``."""
    return f"{block}.{_PROJECTIONS[target]}"


def use_adaptable_blocks(model: nn.Module) -> None:
    """Replace each torchvision encoder block by ours (same parameters). Raises as :func:`_adaptable_blocks`."""
    _use(model, _adaptable_blocks(model))


def _use(model: nn.Module, blocks: dict[str, EncoderBlock]) -> None:
    for name, block in blocks.items():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = block


def _adaptable_blocks(model: nn.Module) -> dict[str, EncoderBlock]:
    """The encoder blocks by name, in order; torchvision's as ours over the same parameters.

    Raises:
        ValueError: there is none (the message lists the linear layers), or one that cannot take adapters.
    """
    from torchvision.models.vision_transformer import EncoderBlock as TorchvisionBlock

    blocks = {}
    for name, module in model.named_modules():
        if isinstance(module, TorchvisionBlock):
            blocks[name] = EncoderBlock(module).train(module.training)
        elif isinstance(module, EncoderBlock):
            blocks[name] = module
    if not blocks:
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        shown = ", ".join(linears[:20]) or "none"
        raise ValueError(
            f"no target matches: the model has no torchvision ViT encoder block to adapt (its linear layers: {shown})"
        )
    return blocks


def inject_adapters(
    model: nn.Module,
    specs: Sequence[AdapterSpec],
    targets: Sequence[str],
    blocks: Sequence[int] | None,
    state: DropoutState,
) -> list[LoRAAdapters]:
    """Give the targeted projections adapters of K trials.

    Args:
        model: a torchvision VisionTransformer, changed in place.
        specs: one per trial.
        targets: some of q, k, v, o, fc1, fc2.
        blocks: indices of the encoder blocks, or None for all.
        state: shared key of the dropout masks.

    Raises:
        ValueError: there are adapters already, a target or block does not exist (the message lists those that do), or
            a rank is above a layer's width; the model is left as it was.
    """
    if any(isinstance(module, LoRAAdapters) for module in model.modules()):
        raise ValueError("the model has adapters already: take them out with lora_vit.lora.inject.remove_adapters")
    found = _adaptable_blocks(model)
    wanted = [t for t in TARGETS if t in targets]
    chosen = range(len(found)) if blocks is None else sorted(set(blocks))
    if not wanted or not chosen or set(targets) - set(TARGETS) or set(chosen) - set(range(len(found))):
        raise ValueError(
            f"no target matches targets={list(targets)}, blocks={None if blocks is None else list(blocks)}: there "
            f"are the targets {', '.join(TARGETS)} in the blocks 0 to {len(found) - 1}"
        )
    made = []
    for name, block in (list(found.items())[index] for index in chosen):
        attention, fc1, fc2 = block.self_attention, block.fc1, block.fc2
        D = attention.out_proj.in_features
        qkv = [t for t in wanted if t in "qkv"]
        places: list[tuple[nn.Module, str, list[str], list[int], str, int, int]] = [
            (attention, "in_proj_lora", qkv, ["qkv".index(t) for t in qkv], "self_attention.in_proj", D, D),
            (attention, "out_proj_lora", ["o"], [0], "self_attention.out_proj", D, D),
            (block, "fc1_lora", ["fc1"], [0], "mlp.0", fc1.in_features, fc1.out_features),
            (block, "fc2_lora", ["fc2"], [0], "mlp.3", fc2.in_features, fc2.out_features),
        ]
        for owner, attribute, group, slots, input_name, width_in, width_out in places:
            if group and group[0] in wanted:
                names = [projection_name(name, t) for t in group]
                adapters = LoRAAdapters(list(specs), names, slots, f"{name}.{input_name}", width_in, width_out, state)
                made.append((owner, attribute, adapters.to(fc1.weight.device).train(model.training)))
    _use(model, found)
    for owner, attribute, adapters in made:
        setattr(owner, attribute, adapters)
    return [adapters for _, _, adapters in made]


def remove_adapters(model: nn.Module) -> None:
    """Take all adapters out again; the base model is unchanged."""
    for module in list(model.modules()):
        for attribute, child in list(module.named_children()):
            if isinstance(child, LoRAAdapters):
                setattr(module, attribute, None)


def replace_linear_with_lora(
    model: nn.Module,
    rank: int = 4,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    blocks: Sequence[int] | None = None,
    scaling: str = "standard",
    init: str = "kaiming_uniform",
    seed: int = 0,
) -> nn.Module:
    """Give the linear layers of a plain torchvision ViT's encoder LoRA adapters (Hu et al., 2021), in place.

    Args:
        model: a ``torchvision.models.VisionTransformer``.
        rank: of the update, from 1 to the layers' width.
        alpha: see ``scaling``.
        dropout: probability in [0, 1) on the adapters' input, in train mode.
        targets: some of q, k, v, o, fc1, fc2.
        blocks: indices of encoder blocks, None for all.
        scaling: the update is scaled by alpha/rank ("standard") or alpha/sqrt(rank) ("rslora").
        init: of lora_A; lora_B starts at zero, so that the model's output does not change.
        seed: of the initialisation and the dropout masks.

    Returns:
        The model.

    Raises:
        ValueError: an impossible value, nothing to adapt, or adapters that are there already; the model is left as it
            was.
    """
    if not (rank >= 1 and rank == int(rank)):
        raise ValueError(f"rank={rank} is impossible: give a whole number from 1 up")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha} is impossible: give a number above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is impossible: give a probability in [0, 1)")
    if scaling not in ("standard", "rslora"):
        raise ValueError(f"scaling '{scaling}' is unknown (standard, rslora)")
    factor = alpha / (math.sqrt(rank) if scaling == "rslora" else rank)
    adapt(model, AdapterSpec(rank, factor, dropout, init, seed), targets, blocks)
    return model


def adapt(
    model: nn.Module, spec: AdapterSpec, targets: Sequence[str], blocks: Sequence[int] | None
) -> list[LoRAAdapters]:
    """:func:`inject_adapters` of one trial into a model without a trainer: its dropout keys itself in each pass."""
    state = DropoutState([randomness.key("dropout", spec.seed)])
    injected = inject_adapters(model, [spec], targets, blocks, state)
    if spec.dropout > 0:
        model.register_forward_pre_hook(_KeyEachPass(state), with_kwargs=True)
    return injected


class _KeyEachPass:
    """Forward pre-hook: a model without a trainer draws other dropout masks in each pass in train mode.

    An object, not a function: a copied or pickled model then takes its own key along.
    """

    def __init__(self, state: DropoutState):
        self.state = state

    def __call__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if module.training:
            images = (*args, *kwargs.values())[0]
            self.state.advance(len(images), images.device)


def mark_lora_and_head_as_trainable(
    model: nn.Module, head_substring: str = "heads.head", bias: str = "none"
) -> list[str]:
    """Freeze everything but the adapters and the head; return the names of what is trained.

    Args:
        model: after :func:`replace_linear_with_lora`.
        head_substring: parameters with this in their name are the head's.
        bias: also train no bias ("none"), those of adapted layers ("lora_only"), or all ("all").

    Raises:
        ValueError: no adapter or no head parameter is found, or ``bias`` is unknown.
    """
    if bias not in ("none", "lora_only", "all"):
        raise ValueError(f"bias '{bias}' is unknown (none, lora_only, all)")
    names = [name for name, _ in model.named_parameters()]
    if not any(".lora_" in name for name in names):
        raise ValueError("the model has no LoRA adapter: call replace_linear_with_lora first")
    if not any(head_substring in name for name in names):
        top = ", ".join(sorted({name.split(".")[0] for name in names}))
        raise ValueError(f"no parameter's name contains head_substring='{head_substring}' (top level: {top})")
    adapted = adapted_bias_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = (
            ".lora_" in name
            or head_substring in name
            or (name.endswith("bias") and (bias == "all" or (bias == "lora_only" and name in adapted)))
        )
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def adapted_bias_names(model: nn.Module) -> set[str]:
    """Names of the biases of the layers that have adapters."""
    biases = {
        "in_proj_lora": "in_proj_bias",
        "out_proj_lora": "out_proj.bias",
        "fc1_lora": "mlp.0.bias",
        "fc2_lora": "mlp.3.bias",
    }
    adapted = [name.rpartition(".") for name, module in model.named_modules() if isinstance(module, LoRAAdapters)]
    return {f"{owner}.{biases[attribute]}" for owner, _, attribute in adapted}
