"""One training step of a pack: forward, backward, one all-reduce, one optimizer update; no host sync.

Shape legend: K trial, G stream, B image of this process, C class, P trained value of a trial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lora_vit import distributed

if TYPE_CHECKING:
    from lora_vit.training.pack import Pack


def sample_losses(logits_KBC: Tensor, labels_KB: Tensor, smoothing_K1: Tensor) -> Tensor:
    """Cross entropy with per-trial label smoothing (Szegedy et al., 2016), [K, B]."""
    log_p_KBC = log_softmax(logits_KBC, dim=-1)
    true_KB = log_p_KBC.gather(-1, labels_KB[..., None]).squeeze(-1)
    return -(1 - smoothing_K1) * true_KB - smoothing_K1 * log_p_KBC.mean(-1)


def train_step(pack: Pack, images: Tensor, labels_KB: Tensor, lr_K1: Tensor, stop: bool) -> Tensor:
    """Take one step of every trial and return their losses over the global batch, [K].

    A trial's loss is the mean over its own images, and the losses are summed over trials, so that each trial's
    gradient is exactly its own. A trial whose loss or gradient is not finite is left unchanged from then on.

    ``images``: normalised, of all streams, [G*B, 3, H, W]; ``stop``: whether this process was asked to stop, which is
    summed over processes into ``pack.flat.stop``.
    """
    flat = pack.flat
    pack.dropout.set(pack.step_K, pack.position_B)
    logits_KBC = pack.forward(images, pack.stream_of_trial)
    loss_K = sample_losses(logits_KBC, labels_KB, pack.smoothing_K1).sum(1) / pack.global_batch
    flat.differentiate(loss_K.sum())
    flat.losses_K.copy_(loss_K.detach())
    flat.stop.fill_(float(stop))
    distributed.sum_over_processes_(flat.buffer)

    norm_K1 = torch.linalg.vector_norm(flat.grads_KP, dim=1, keepdim=True)
    loss_K = flat.losses_K.clone()
    ok_K = torch.isfinite(loss_K) & torch.isfinite(norm_K1[:, 0]) & (pack.first_bad_step_K < 0)
    pack.updating = True
    pack.first_bad_step_K = torch.where(ok_K | (pack.first_bad_step_K >= 0), pack.first_bad_step_K, pack.step_K)
    pack.optimizer.step(lr_K1, ok_K[:, None], norm_K1)
    pack.loss_sum_K += loss_K
    pack.step_K += 1
    return loss_K
