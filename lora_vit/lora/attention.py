"""What the layers of a backbone become where they get adapters.

A layer's class is exchanged in place, so that its name, its parameters and all that refers to it stay. A norm or GELU
in front is computed in the adapted layer, which recomputes it in backward instead of keeping its output; the module
itself, whose parameters stay where they are, then passes on what it gets.
Shape legend: B image (K*B in a pack), S token, D width, H head, E head width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lora_vit.lora.backbones import plain_models
from lora_vit.lora.functional import NOTHING, Prologue
from lora_vit.lora.layers import LoRAAdapters


class AdaptedLinear(nn.Linear):
    """A linear layer with its adapters if it has any, after the norm or GELU in ``front`` (one or none)."""

    lora: LoRAAdapters | None
    front: tuple[Passed, ...]  # not registered: it has its own name in the model

    def forward(self, x: Tensor) -> Tensor:
        """[K*B, S, I] to [K*B, S, O]."""
        return project(x, self.weight, self.bias, self.lora, self.front)


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
        qkv = project(x_BSD, self.in_proj_weight, self.in_proj_bias, self.lora, self.front)
        q, k, v = qkv.view(B, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, S, E]
        if self.first_token_only:
            q = q[:, :, :1]
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(mixed.transpose(1, 2).reshape(B, -1, D)), None


class Passed(nn.Module):
    """A norm or GELU that the layers behind it compute."""

    original_class: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        return x


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


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Exchange a module's class, in place."""
    module.__dict__["original_class"], module.__class__ = type(module), cls


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: LoRAAdapters | None, front: tuple[Passed, ...]
) -> Tensor:
    """LayerNorm or GELU where there is one in front, then a linear layer with its adapters if it has any."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    norm: Any = front[0] if front else None
    prologue = NOTHING
    if norm is not None and issubclass(norm.original_class, nn.LayerNorm):
        prologue = Prologue("layer_norm", norm.eps, norm.weight.to(x.dtype), norm.bias.to(x.dtype))
    elif norm is not None:
        prologue = Prologue("gelu")
    if adapters is None:
        return F.linear(prologue(x), weight, bias)
    return adapters.linear(x, weight, bias, prologue)
