"""torchvision's Vision Transformer for a pack of K trials over one frozen trunk.

Shape legend: K trial, G stream of images, B image, S token, D width, C class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lora_vit.lora.attention import EncoderBlock
from lora_vit.lora.inject import use_adaptable_blocks
from lora_vit.lora.layers import PackedHead


def build_trunk(
    image_size: int, patch_size: int, num_layers: int, num_heads: int, hidden_dim: int, mlp_dim: int
) -> VisionTransformer:
    """torchvision's VisionTransformer without its head, with adaptable encoder blocks; nothing is trainable.

    The random weights are the same in every process (drawn under a fixed seed; weights are usually loaded over
    them). The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = VisionTransformer(image_size, patch_size, num_layers, num_heads, hidden_dim, mlp_dim)
    trunk.heads = nn.Sequential()
    use_adaptable_blocks(trunk)
    return trunk.requires_grad_(False)


class PackedViT(nn.Module):
    """K trials' logits from the images of G streams.

    The stem and all blocks below the first adapter see each stream once; then the activations are repeated for
    the trials of a stream and stacked along the batch, ``[K*B, S, D]``. Without adapters (a linear probe) only
    the heads are per trial. The last block computes the class token alone.
    """

    def __init__(self, trunk: VisionTransformer, head: PackedHead, K: int, first_trained: int):
        """Build from a trunk and heads.

        Args:
            trunk: from :func:`build_trunk`, adapters injected where wanted.
            head: the heads of K trials.
            K: number of trials.
            first_trained: index of the first block with a trained parameter; ``-1`` if the stem has one, the
                number of blocks if none has.
        """
        super().__init__()
        self.trunk, self.head, self.K, self.first_trained = trunk, head, K, first_trained

    def forward(self, images: Tensor, stream_of_trial: Sequence[int]) -> Tensor:
        """Normalised images [G*B, 3, H, W] to logits [K, B, C] in the head's dtype.

        Args:
            images: of all streams, stream by stream.
            stream_of_trial: for each trial, which stream it sees.
        """
        G = max(stream_of_trial) + 1
        blocks: list[EncoderBlock] = list(self.trunk.encoder.layers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.first_trained < 0):
            x = self._embed(images)
            for block in blocks[: max(self.first_trained, 0)]:
                x = block(x, first_token_only=block is blocks[-1])
        if list(stream_of_trial) != list(range(G)):
            streams = x.chunk(G)
            x = torch.cat([streams[g] for g in stream_of_trial])  # an index would have to travel to the device
        for block in blocks[max(self.first_trained, 0) :]:
            x = block(x, first_token_only=block is blocks[-1])
        norm: nn.LayerNorm = self.trunk.encoder.ln
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad | norm.weight.requires_grad):
            weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
            x = nn.functional.layer_norm(x[:, 0], norm.normalized_shape, weight, bias, norm.eps)
        return self.head(x.view(self.K, -1, x.shape[-1]))

    def _embed(self, images: Tensor) -> Tensor:
        """Patches, class token and position embedding: [B, 3, H, W] to [B, S, D]."""
        trunk = self.trunk
        conv: nn.Conv2d = trunk.conv_proj
        dtype = images.dtype
        bias = None if conv.bias is None else conv.bias.to(dtype)
        x = nn.functional.conv2d(images, conv.weight.to(dtype), bias, stride=conv.stride)
        x = x.flatten(2).transpose(1, 2)
        token = trunk.class_token.to(dtype).expand(len(x), -1, -1)
        x = torch.cat([token, x], dim=1) + trunk.encoder.pos_embedding.to(dtype)
        return trunk.encoder.dropout(x)
