"""Multi-head self-attention and the encoder block around it, with places for adapters.

``nn.MultiheadAttention`` reads ``in_proj_weight`` and ``out_proj.weight`` directly, so that replacing its
linear layers changes nothing; hence our own. Parameter names and shapes are torchvision's.

Shape legend: B image (K*B in a pack), S token, D width, H head, E head width.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from lora_vit.lora.functional import Prologue
from lora_vit.lora.layers import LoRAAdapters


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: LoRAAdapters | None,
    norm: nn.LayerNorm | None = None,
    gelu: bool = False,
) -> Tensor:
    """LayerNorm or GELU where asked for, then a linear layer with its adapters if it has any."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if adapters is not None:
        kind = "layer_norm" if norm is not None else "gelu" if gelu else "none"
        prologue = Prologue(kind, 0.0 if norm is None else norm.eps)
        return adapters.linear(x, weight, bias, prologue, norm)
    if norm is not None:
        x = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    return F.linear(F.gelu(x) if gelu else x, weight, bias)


class Attention(nn.Module):
    """Batch-first self-attention: one product for q, k and v, then ``scaled_dot_product_attention``.

    Takes over the parameters of the ``nn.MultiheadAttention`` in torchvision's encoder blocks.
    """

    def __init__(self, source: nn.MultiheadAttention):
        """Raises ValueError where ``source`` has separate, rectangular or missing projections."""
        super().__init__()
        if source.in_proj_weight is None or source.in_proj_bias is None or source.bias_k is not None:
            raise ValueError("only self-attention with one biased q, k, v projection can take adapters")
        self.num_heads, self.dropout = source.num_heads, source.dropout
        self.in_proj_weight, self.in_proj_bias = source.in_proj_weight, source.in_proj_bias
        self.out_proj: nn.Linear = source.out_proj
        self.in_proj_lora: LoRAAdapters | None = None
        self.out_proj_lora: LoRAAdapters | None = None

    def forward(self, x_BSD: Tensor, norm: nn.LayerNorm | None = None, first_token_only: bool = False) -> Tensor:
        """Attention over (normed) tokens, [B, S, D] to [B, S, D], or [B, 1, D] for the first token alone."""
        B, S, D = x_BSD.shape
        qkv = project(x_BSD, self.in_proj_weight, self.in_proj_bias, self.in_proj_lora, norm)
        q, k, v = qkv.view(B, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, S, E]
        if first_token_only:
            q = q[:, :, :1]
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        mixed = mixed.transpose(1, 2).reshape(B, -1, D)
        return project(mixed, self.out_proj.weight, self.out_proj.bias, self.out_proj_lora)


class EncoderBlock(nn.Module):
    """torchvision's pre-norm encoder block over our attention, under the same parameter names.

    Norm and GELU go into the adapted projections, which recompute them in backward instead of keeping them.
    """

    def __init__(self, source: nn.Module):
        """Takes over the parameters of a ``torchvision.models.vision_transformer.EncoderBlock``."""
        super().__init__()
        self.ln_1: nn.LayerNorm = source.ln_1  # type: ignore[assignment]
        self.self_attention = Attention(source.self_attention)  # type: ignore[arg-type]
        self.dropout: nn.Dropout = source.dropout  # type: ignore[assignment]
        self.ln_2: nn.LayerNorm = source.ln_2  # type: ignore[assignment]
        self.mlp: nn.Sequential = source.mlp  # type: ignore[assignment]
        self.fc1_lora: LoRAAdapters | None = None
        self.fc2_lora: LoRAAdapters | None = None

    @property
    def fc1(self) -> nn.Linear:
        """First linear layer of the MLP."""
        return cast(nn.Linear, self.mlp[0])

    @property
    def fc2(self) -> nn.Linear:
        """Second linear layer of the MLP."""
        return cast(nn.Linear, self.mlp[3])

    def forward(self, x_BSD: Tensor, first_token_only: bool = False) -> Tensor:
        """[B, S, D] to the same, or to [B, 1, D]: the last block need compute only the class token."""
        mixed = self.self_attention(x_BSD, self.ln_1, first_token_only)
        x_BSD = (x_BSD[:, :1] if first_token_only else x_BSD) + self.dropout(mixed)
        fc1, fc2 = self.fc1, self.fc2
        drop1, drop2 = cast(nn.Dropout, self.mlp[2]), self.mlp[4]
        hidden = project(x_BSD, fc1.weight, fc1.bias, self.fc1_lora, norm=self.ln_2)
        if self.training and drop1.p > 0:  # torchvision's trunk dropout (0 by default) sits after the GELU
            return x_BSD + drop2(project(drop1(F.gelu(hidden)), fc2.weight, fc2.bias, self.fc2_lora))
        return x_BSD + drop2(project(hidden, fc2.weight, fc2.bias, self.fc2_lora, gelu=True))
