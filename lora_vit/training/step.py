"""One training step of a pack: forward, backward, one all-reduce, one optimizer update; no host sync.

Shape legend: K trial, G stream, B image of this process, C class, P trained value of a trial.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lora_vit import distributed
from lora_vit.lora.dropout import DropoutState
from lora_vit.models.vit import PackedViT
from lora_vit.training.optim import FlatParameters, PackedAdamW


@dataclass
class StepState:
    """What a pack's steps read and update on the device."""

    model: PackedViT
    flat: FlatParameters
    optimizer: PackedAdamW
    dropout: DropoutState
    step_K: Tensor  # int64: the trials' own steps
    position_B: Tensor  # int64: places of this process's images in the global batch
    smoothing_K1: Tensor  # label smoothing
    loss_sum_K: Tensor  # float64: sum of the epoch's losses so far
    first_bad_step_K: Tensor  # int64: first step with a loss or gradient that is not finite, -1: none
    global_batch: int
    updating: bool = False  # between the first change of a step and its last


def sample_losses(logits_KBC: Tensor, labels_KB: Tensor, smoothing_K1: Tensor) -> Tensor:
    """Cross entropy with per-trial label smoothing (Szegedy et al., 2016), [K, B]."""
    log_p_KBC = log_softmax(logits_KBC, dim=-1)
    true_KB = log_p_KBC.gather(-1, labels_KB[..., None]).squeeze(-1)
    return -(1 - smoothing_K1) * true_KB - smoothing_K1 * log_p_KBC.mean(-1)


def train_step(
    s: StepState, images: Tensor, labels_KB: Tensor, stream_of_trial: list[int], lr_K1: Tensor, stop: bool
) -> Tensor:
    """Take one step of every trial and return their losses over the global batch, [K].

    A trial's loss is the mean over its own images, and the losses are summed over trials, so that each trial's
    gradient is exactly its own. A trial whose loss or gradient is not finite is left unchanged from then on.

    Args:
        s: the pack's state, updated.
        images: normalised, of all streams, [G*B, 3, H, W].
        labels_KB: int64.
        stream_of_trial: which stream each trial sees.
        lr_K1: learning rates.
        stop: whether this process was asked to stop; summed over processes into ``s.flat.stop``.
    """
    s.dropout.set(s.step_K, s.position_B)
    logits_KBC = s.model(images, stream_of_trial)
    loss_K = sample_losses(logits_KBC, labels_KB, s.smoothing_K1).sum(1) / s.global_batch
    s.flat.differentiate(loss_K.sum())
    s.flat.losses_K.copy_(loss_K.detach())
    s.flat.stop.fill_(float(stop))
    distributed.sum_over_processes_(s.flat.buffer)

    norm_K1 = torch.linalg.vector_norm(s.flat.grads_KP, dim=1, keepdim=True)
    loss_K = s.flat.losses_K.clone()
    ok_K = torch.isfinite(loss_K) & torch.isfinite(norm_K1[:, 0]) & (s.first_bad_step_K < 0)
    s.updating = True
    s.first_bad_step_K = torch.where(ok_K | (s.first_bad_step_K >= 0), s.first_bad_step_K, s.step_K)
    s.optimizer.step(lr_K1, ok_K[:, None], norm_K1)
    s.loss_sum_K += loss_K
    s.step_K += 1
    return loss_K
