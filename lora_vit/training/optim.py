"""AdamW or SGD for K trials at once, on one flat matrix, their loss scales and learning-rate schedules.

Shape legend: K trial, P number of trained values of a trial (padded to the widest).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_vit.config import OptimizerConfig
from lora_vit.training.trial import TrialState

GROW_AFTER = 2000  # good steps in a row after which a loss scale doubles, as GradScaler's
LARGEST = 2.0**64  # where gradients are all zero, a scale would double without end
LEAST = 1.0  # a trial with a smaller scale has failed: its gradients do not fit


class FlatParameters:
    """Trained parameters of K trials as views into one matrix [K, P], gradients likewise.

    The optimizer, the gradient norm, the all-reduce and the test for finite values are then one operation each.
    Parameters with a leading trial axis share it; others (a trunk's) are allowed for K = 1 only.
    """

    def __init__(self, named: dict[str, nn.Parameter], per_trial: set[str], K: int):
        if K > 1 and set(named) - per_trial:
            raise ValueError("trained trunk parameters need a pack of one")
        self.parameters = list(named.values())
        self.values_KP = torch.cat([p.data.reshape(K, -1) for p in self.parameters], 1)
        # The losses and the request to stop ride on the gradients' all-reduce.
        self.buffer = self.values_KP.new_zeros(self.values_KP.numel() + K + 1)
        self.grads_KP = self.buffer[: -K - 1].view(K, -1)
        self.losses_K, self.stop = self.buffer[-K - 1 : -1], self.buffer[-1:]
        self._earlier_stop: Any = None
        self.slices: dict[str, tuple[slice, torch.Size]] = {}  # of a row, and the shape without a trial axis
        self.gradients: list[Tensor] = []  # views into grads_KP
        offset = 0
        for name, p in named.items():
            where = slice(offset, offset + p.numel() // K)
            self.slices[name] = where, p.shape[1:] if name in per_trial else p.shape
            p.data = self.values_KP[:, where].view(p.shape)
            self.gradients.append(self.grads_KP[:, where].view(p.shape))
            offset = where.stop

    def differentiate(self, loss: Tensor, add: bool = False) -> None:
        """Fill the gradients of all parameters from the loss, or add to them."""
        # Not backward(): its accumulation asks for another memory layout than rows of one matrix.
        found = list(torch.autograd.grad(loss, self.parameters))
        (torch._foreach_add_ if add else torch._foreach_copy_)(self.gradients, found)

    def earlier_stop(self) -> Tensor:
        """``stop`` at the call before, on the host, which waits for that step alone: the GPU is at the present one."""
        now = self.stop.to("cpu", non_blocking=True, copy=True), torch.cuda.current_stream().record_event()
        (stop, copied), self._earlier_stop = self._earlier_stop or now, now
        copied.synchronize()
        return stop


class PackedOptimizer:
    """AdamW (Loshchilov & Hutter, 2019, algorithm 2), or for all trials SGD, with other hyperparameters per trial.

    ``torch.optim`` takes one learning rate for a tensor. A row's result equals torch's on that row alone.
    """

    def __init__(self, flat: FlatParameters, configs: list[OptimizerConfig]):
        self.flat = flat
        self.exp_avg_KP, self.exp_avg_sq_KP = torch.zeros_like(flat.values_KP), torch.zeros_like(flat.values_KP)
        self.updates_K1 = flat.values_KP.new_zeros(len(configs), 1)
        clip = [math.inf if c.clip_norm is None else c.clip_norm for c in configs]
        self.clips = min(clip) < math.inf
        self.is_sgd = configs[0].name == "sgd"
        betas = [(c.momentum, 0.0) if self.is_sgd else c.betas for c in configs]
        rows = [(*b, c.eps, most, c.weight_decay) for b, c, most in zip(betas, configs, clip, strict=True)]
        columns = flat.values_KP.new_tensor(rows).T[..., None]
        self.beta1_K1, self.beta2_K1, self.eps_K1, self.clip_K1, self.decay_K1 = columns
        # of lr: the head's own rate, and lora_B's as a multiple of lora_A's (LoRA+, Hayou et al., 2024)
        factors = [((c.head_lr or c.lr) / c.lr, c.lora_b_lr_ratio) for c in configs]
        self.factors_KP: Tensor | None = None  # all are 1
        if {*factors} != {(1.0, 1.0)}:
            self.factors_KP = torch.ones_like(flat.values_KP)
            head_K1, lora_B_K1 = flat.values_KP.new_tensor(factors).T[..., None]
            for name, (where, _) in flat.slices.items():
                if name.startswith("head.") or name.endswith(".lora_B"):
                    self.factors_KP[:, where] = head_K1 if name.startswith("head.") else lora_B_K1

    @torch.no_grad()
    def step(self, lr_K1: Tensor, ok_K1: Tensor, norm_K1: Tensor) -> None:
        """One update of the rows where ``ok_K1``; others keep all bits. ``norm_K1``: norms of the gradients."""
        grads = self.flat.grads_KP
        if self.clips:  # as ``clip_grad_norm_`` does
            grads.mul_((self.clip_K1 / (norm_K1 + 1e-6)).clamp_(max=1.0))
        grads.masked_fill_(~ok_K1, 0.0)
        beta1, beta2 = torch.where(ok_K1, self.beta1_K1, 1.0), torch.where(ok_K1, self.beta2_K1, 1.0)
        lr = torch.where(ok_K1, lr_K1, 0.0)
        lr = lr if self.factors_KP is None else lr * self.factors_KP
        self.updates_K1 += ok_K1
        if self.is_sgd:  # its decay is a part of the gradient, its momentum a sum, not an average
            self.exp_avg_KP.mul_(beta1).add_(grads + torch.where(ok_K1, self.decay_K1, 0.0) * self.flat.values_KP)
            self.flat.values_KP.sub_(lr * self.exp_avg_KP)
            return
        count = self.updates_K1.clamp(min=1)
        self.flat.values_KP.mul_(1 - lr * self.decay_K1)
        self.exp_avg_KP.lerp_(grads, 1 - beta1)
        self.exp_avg_sq_KP.mul_(beta2).addcmul_(grads * (1 - beta2), grads)
        denominator = self.exp_avg_sq_KP.sqrt().div_((1 - self.beta2_K1**count).sqrt()).add_(self.eps_K1)
        self.flat.values_KP.sub_(lr / (1 - self.beta1_K1**count) * self.exp_avg_KP / denominator)


class LossScale:
    """Loss scales of fp16, powers of two, one for each trial on the device, and its good steps since the last change.

    In fp16 gradients below 6e-8 vanish. So the loss is multiplied by a large factor and the gradients are divided by it
    (Micikevicius et al., 2018, section 3.2). What is then beyond 65,504 is infinite: the step does not count, and the
    factor is halved. ``torch.amp.GradScaler`` does so for one trial, and has the host look at each step.
    """

    def __init__(self, states: Sequence[TrialState], device: torch.device):
        self.scale_K = torch.tensor([s.loss_scale for s in states], dtype=torch.float32, device=device)
        self.good_K = torch.tensor([s.good_steps for s in states], dtype=torch.int64, device=device)

    def update(self, fits_K: Tensor) -> None:
        """Halve the scales of trials whose step overflowed, double those that had enough good steps in a row."""
        self.good_K.add_(1).mul_(fits_K)
        grows_K = self.good_K >= GROW_AFTER
        self.good_K.masked_fill_(grows_K, 0)
        self.scale_K.mul_(torch.where(fits_K, 1.0 + grows_K, 0.5)).clamp_(max=LARGEST)


def scheduled_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate at step 0, 1, ...: linear warm-up, then linear or cosine decay to 0, or constant."""
    warmup = round(config.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1) * config.lr
    done = (step - warmup) / max(1, total_steps - warmup)
    factors = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return factors[config.schedule] * config.lr
