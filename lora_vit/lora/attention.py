"""What the layers of a backbone become where they get adapters.

A layer becomes one of these in place: its class is exchanged, so that its name, its parameters and all that refers
to it stay. A norm or GELU in front is computed in the adapted layer, which recomputes it in backward instead of keeping
its output; the module itself, whose parameters stay where they are, then passes on what it gets.

Shape legend: B image (K*B in a pack), S token, D width, H head, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from lora_vit.lora.functional import Prologue
from lora_vit.lora.layers import LoRAAdapters
from lora_vit.lora.places import plain_models


class AdaptedLinear(nn.Linear):
    """A linear layer with its adapters if it has any, after the norm or GELU in ``front`` (one or none)."""

    lora: LoRAAdapters | None
    front: tuple[nn.Module, ...]  # not registered: it has its own name in the model

    def forward(self, x: Tensor) -> Tensor:
        """[K*B, S, I] to [K*B, S, O]."""
        return project(x, self.weight, self.bias, self.lora, self.front)


class Attention(nn.MultiheadAttention):
    """torchvision's self-attention: one product for q, k and v, then ``scaled_dot_product_attention``.

    ``nn.MultiheadAttention`` reads ``in_proj_weight`` and ``out_proj.weight`` directly, so that other linear layers in
    it change nothing; hence our own.
    """

    lora: LoRAAdapters | None
    front: tuple[nn.Module, ...]
    first_token_only = False

    def forward(self, x_BSD: Tensor, *_: Tensor, **__: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Attention over tokens, [B, S, D] to [B, S, D], or [B, 1, D] for the first token alone; and no weights."""
        B, S, D = x_BSD.shape
        qkv = project(x_BSD, self.in_proj_weight, self.in_proj_bias, self.lora, self.front)
        q, k, v = qkv.view(B, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, S, E]
        if self.first_token_only:
            q = q[:, :, :1]
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(mixed.transpose(1, 2).reshape(B, -1, D)), None


class FirstTokenBlock(EncoderBlock):
    """torchvision's last block, [B, S, D] to [B, 1, D]: no more than the class token is used of its output."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        """The class token alone."""
        mixed, _ = self.self_attention(self.ln_1(x_BSD))
        x_B1D = x_BSD[:, :1] + self.dropout(mixed)
        return x_B1D + self.mlp(self.ln_2(x_B1D))


class TimmFirstTokenAttention(nn.Module):
    """timm's ``Attention``, ``AttentionRope`` or ``EvaAttention``, [B, S, D] to [B, 1, D], with one query.

    Of a rotary embedding it needs the keys' part: tokens ahead of the patches are not turned.
    """

    def forward(self: Any, x_BSD: Tensor, rope: Tensor | None = None, **_: Any) -> Any:
        """Attention of the first token over all."""
        if self.qkv is None:
            parts = [self.q_proj(x_BSD[:, :1]), self.k_proj(x_BSD), self.v_proj(x_BSD)]
        else:
            qkv = self.qkv(x_BSD)
            if getattr(self, "q_bias", None) is not None:
                qkv += torch.cat((self.q_bias, self.k_bias, self.v_bias))
            parts = qkv.chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)  # each [B, H, S, E]
        q, k = self.q_norm(q[:, :, :1]), self.k_norm(k)
        if rope is not None:
            from timm.layers import apply_rot_embed_cat

            ahead, turned = k.tensor_split([self.num_prefix_tokens], dim=2)
            turned = apply_rot_embed_cat(turned, rope, half=self.rotate_half)
            q, k = q.type_as(v), torch.cat([ahead, turned], dim=2).type_as(v)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(self.norm(mixed.transpose(1, 2).flatten(2))))


class PassedNorm(nn.LayerNorm):
    """A norm that the layers behind it compute."""

    def forward(self, x: Tensor) -> Tensor:
        """What it gets."""
        return x


class PassedGELU(nn.Module):
    """A GELU that the layer behind it computes."""

    def forward(self, x: Tensor) -> Tensor:
        """What it gets."""
        return x


def use_first_token_alone(model: Any) -> None:
    """Have the last block compute no more than the class token, if the model's output needs no more of it.

    timm's models that pool otherwise, or whose attention is not one of :class:`TimmFirstTokenAttention`'s, stay.
    """
    if isinstance(model, VisionTransformer):
        become(model.encoder.layers[-1], FirstTokenBlock)
        model.encoder.layers[-1].self_attention.first_token_only = True
    elif type(model) in plain_models() and model.global_pool == "token":
        block = model.blocks[-1]
        groups, gate = getattr(block.attn, "num_kv_groups", 1), getattr(block.attn, "gate", None)
        if hasattr(block.attn, "q_norm") and groups == 1 and gate is None:
            become(block.attn, TimmFirstTokenAttention)
            block.norm2.register_forward_pre_hook(_first_token)
            block.register_forward_hook(_first_token)


def _first_token(_: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> Tensor:
    """Forward hook, before or behind a module: the first token alone."""
    return (args[0] if output is None else output)[:, :1]


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Exchange a module's class, in place."""
    module.__dict__["original_class"], module.__class__ = type(module), cls


def become_again(module: nn.Module) -> None:
    """Undo :func:`become`."""
    module.__class__ = module.__dict__.pop("original_class")


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: LoRAAdapters | None, front: tuple[nn.Module, ...]
) -> Tensor:
    """LayerNorm or GELU where there is one in front, then a linear layer with its adapters if it has any."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    norm = front[0] if front and isinstance(front[0], nn.LayerNorm) else None
    if adapters is not None:
        kind = "layer_norm" if norm is not None else "gelu" if front else "none"
        return adapters.linear(x, weight, bias, Prologue(kind, 0.0 if norm is None else norm.eps), norm)
    if norm is not None:
        x = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    elif front:
        x = F.gelu(x)
    return F.linear(x, weight, bias)
