"""Loss scales of fp16, one for each trial of a pack.

In fp16 gradients below 6e-8 vanish. So the loss is multiplied by a large factor and the gradients are divided by it
(Micikevicius et al., 2018, section 3.2). What is then beyond 65,504 is infinite: the step does not count, and the
factor is halved. ``torch.amp.GradScaler`` does so for one trial, and has the host look at each step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_vit.training.checkpoint import TrialState

GROW_AFTER = 2000  # good steps in a row after which a scale doubles, as GradScaler's
LARGEST = 2.0**64  # where gradients are all zero, a scale would double without end
LEAST = 1.0  # a trial with a smaller scale has failed: its gradients do not fit


class LossScale:
    """The scales of K trials on the device, and how many good steps each has had since it changed; powers of two."""

    def __init__(self, states: Sequence[TrialState], device: torch.device):
        self.scale_K = torch.tensor([s.loss_scale for s in states], dtype=torch.float32, device=device)
        self.good_K = torch.tensor([s.good_steps for s in states], dtype=torch.int64, device=device)

    def update(self, fits_K: Tensor) -> None:
        """Halve the scales of trials whose step overflowed, double those that had enough good steps in a row."""
        self.good_K.add_(1).mul_(fits_K)
        grows_K = self.good_K >= GROW_AFTER
        self.good_K.masked_fill_(grows_K, 0)
        self.scale_K.mul_(torch.where(fits_K, 1.0 + grows_K, 0.5)).clamp_(max=LARGEST)
