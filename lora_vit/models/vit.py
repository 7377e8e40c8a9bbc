"""A Vision Transformer of torchvision or timm for a pack of K trials over one frozen trunk.

Shape legend: K trial, G stream of images, B image, S token, D width, C class.
"""

import copy
import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

from lora_vit.config import SIZES, ModelConfig
from lora_vit.errors import ConfigError
from lora_vit.lora.backbones import TORCHVISION, new_backbone, places_of, plain_models, timm_model
from lora_vit.lora.inject import use_own_attention
from lora_vit.lora.layers import LoRAAdapters, PackedHead


def trunk_of(m: ModelConfig) -> Any:
    """The library's Vision Transformer without its head, with projections that take adapters; nothing is trainable.

    Where pooling takes the class token, the last block computes that alone. The random weights are the same in every
    process, and the global generator is left as it was. Raises ConfigError where timm cannot make the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = {"architecture": TORCHVISION if m.library == "torchvision" else m.library, "model": m.name}
        trunk = new_backbone({**dataclasses.asdict(m), **kind})
    if m.library == "timm":
        try:
            places_of(trunk)
        except ValueError as error:
            raise ConfigError(f"model.name={m.name}: {error}") from None
        if not isinstance(trunk, plain_models()) or not trunk.global_pool:
            raise ConfigError(f"model.name={m.name} ({type(trunk).__name__}) does not give one vector for each image")
        (height, width), patch = trunk.patch_embed.img_size, max(trunk.patch_embed.patch_size)
        if height != width or height % patch:
            raise ConfigError(f"model.image_size={m.image_size}: give a multiple of {m.name}'s patch size {patch}")
    use_own_attention(trunk)
    use_first_token_alone(trunk)
    return trunk.requires_grad_(False)


def use_first_token_alone(model: Any) -> None:
    """Have the last block compute no more than the class token, if the model's pooling takes no more of it.

    Hooks cut the other tokens before the MLP and behind the block. torchvision's attention, which is ours, computes one
    query; timm's stays, and its output projection gets one token.
    """
    if isinstance(model, VisionTransformer):
        block = model.encoder.layers[-1]
        block.self_attention.first_token_only = True
        cut = [block.ln_2]
    elif type(model) in plain_models() and model.global_pool == "token":
        block = model.blocks[-1]
        cut = [block.attn.proj, block.norm2]
    else:
        return
    for module in cut:
        module.register_forward_pre_hook(_first_token)
    block.register_forward_hook(_first_token)


def _first_token(_: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> Tensor:
    """Forward hook, before or behind a module: the first token alone."""
    return (args[0] if output is None else output)[:, :1]


class Shape(NamedTuple):
    """The sizes that a model's cost depends on: pixels, tokens, blocks, widths of a token and within the MLP."""

    image_size: int
    tokens: int
    layers: int
    width: int
    mlp: int


def shape_of(m: ModelConfig) -> Shape:
    """The sizes of a config's model, without its weights. Raises ConfigError as :func:`trunk_of`."""
    if m.library == "timm":
        return _timm_shape(m.name, m.image_size)
    size, patch, layers, _, width, mlp = (int(getattr(m, key)) for key in SIZES)
    return Shape(size, (size // patch) ** 2 + 1, layers, width, mlp)


@functools.cache
def _timm_shape(name: str, image_size: int | None) -> Shape:
    with torch.device("meta"):
        trunk = timm_model(name, image_size)
    places = list(places_of(trunk).values())
    pixels, mlp = trunk.patch_embed.img_size[0], trunk.get_parameter(places[0][-1].weight).shape[1]
    tokens = trunk.patch_embed.num_patches + trunk.num_prefix_tokens
    return Shape(pixels, tokens, len(places), trunk.num_features, mlp)


def cast(trunk: Any, dtype: torch.dtype) -> Any:
    """Cast a trunk in place; rotary embeddings keep their precision, and what they rotate its dtype."""
    rope = copy.deepcopy(getattr(trunk, "rope", None))
    trunk.to(dtype)
    if rope is not None:
        trunk.rope = rope
    return trunk


class _Repeat:
    """Forward pre-hook: repeats each stream's activations for the trials of ``order``, stacked along the batch."""

    order: Sequence[int] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.order is None:
            return args
        streams = args[0].chunk(max(self.order) + 1)
        return torch.cat([streams[g] for g in self.order]), *args[1:]  # an index would have to travel to the device


def _recomputed(block: "weakref.ref[nn.Module]", *args: Any, **named: Any) -> Any:
    """In the place of a block's ``forward``: keep its input alone, compute it again in backward (Chen et al., 2016).

    Equal to the bit, as dropout masks are keyed. Trained parameters that this pass has cast are handed along: when
    backward comes, the module has its own again. (A block that refers to itself is not freed with its pack.)
    """
    own: Any = block()
    whole: Any = nn.Module()  # the block without the hooks around it
    whole.block, whole.forward = own, functools.partial(type(own).forward, own)
    casts = {name: p for name, p in whole.named_parameters() if not isinstance(p, nn.Parameter)}
    return checkpoint(functional_call, whole, casts, args, named, use_reentrant=False, preserve_rng_state=False)


class PackedViT(nn.Module):
    """K trials' logits from the images of G streams.

    The stem and all blocks below the first that is trained see each stream once; then the activations are repeated for
    the trials of a stream and stacked along the batch, ``[K*B, S, D]``; in a linear probe, only before the heads.
    """

    def __init__(self, trunk: nn.Module, head: PackedHead, K: int, recompute: bool = False):
        """``recompute``: blocks with a backward pass keep their input alone; ``requires_grad`` says what is trained."""
        super().__init__()
        self.trunk, self.head, self.K = trunk, head, K
        blocks = [trunk.get_submodule(name) for name in places_of(trunk)]
        for block in blocks:  # of an earlier pack on the shared trunk
            block._forward_pre_hooks.clear()
            block.__dict__.pop("forward", None)
        self._repeat = _Repeat()
        first = next((i for i, b in enumerate(blocks) if any(p.requires_grad for p in b.parameters())), len(blocks))
        [*blocks, head][first].register_forward_pre_hook(self._repeat)
        for block in blocks[first:] if recompute else ():
            block.__dict__["forward"] = functools.partial(_recomputed, weakref.ref(block))
        self._trained = [n for n, p in trunk.named_parameters() if p.requires_grad and ".lora_" not in n]

    def train(self, mode: bool = True) -> "PackedViT":
        """Switch modes; the trunk stays in evaluation mode: it draws nothing, and batch norms keep their statistics."""
        super().train(mode)
        for module in self.trunk.modules():
            module.training = mode and isinstance(module, LoRAAdapters)
        return self

    def forward(self, images: Tensor, stream_of_trial: Sequence[int]) -> Tensor:
        """Normalised images [G*B, 3, H, W], a probe's also as features [G*B, D], to logits [K, B, C]."""
        order = None if list(stream_of_trial) == list(range(self.K)) else stream_of_trial
        self._repeat.order = order
        computed = {name: self.trunk.get_parameter(name).to(images.dtype) for name in self._trained}
        if images.ndim > 2:
            images = functional_call(self.trunk, computed, (images,)) if computed else self.trunk(images)
        logits_KBC = self.head(images)
        self._repeat.order = None
        return logits_KBC
