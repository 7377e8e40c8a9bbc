"""Predictions of a pack's trials on a split (K trial, N sample of the split, B image, C class)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import log_softmax

from lora_vit import distributed
from lora_vit.data.augment import to_device
from lora_vit.data.stream import Batch
from lora_vit.models.vit import PackedViT


@dataclass
class Predictions:
    """One trial's predictions on a split, in the split's order."""

    ids: np.ndarray  # int64 [N]
    labels: np.ndarray  # int64 [N]
    predicted: np.ndarray  # int64 [N]
    true_probability: np.ndarray  # float32 [N]
    loss: float  # mean cross entropy, without label smoothing

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions."""
        return int((self.predicted == self.labels).sum()) / len(self.labels)


@torch.no_grad()
def evaluate(
    model: PackedViT, batches: Iterable[Batch], split_ids: np.ndarray, labels: np.ndarray, device: torch.device
) -> list[Predictions]:
    """Each trial's predictions.

    ``batches``: this process's share of the split; ``split_ids``: all its sample ids, [N], in its order; ``labels``:
    of the whole data set, indexed by sample id.
    """
    model.eval()
    K, N = model.K, len(split_ids)
    # Each process fills its own share; the sum over processes then is the whole, exactly.
    predicted_KN = torch.zeros(K, N, dtype=torch.int64, device=device)
    log_p_KN = torch.zeros(K, N, dtype=torch.float64, device=device)
    place = np.empty(int(split_ids.max()) + 1, dtype=np.int64)
    place[split_ids] = np.arange(N)
    for batch in batches:
        logits_KBC = model(batch.images, [0] * K)
        where = to_device(place[batch.ids], device)
        true_KB1 = batch.labels.expand(K, -1)[..., None]
        predicted_KN[:, where] = logits_KBC.argmax(-1)
        log_p_KN[:, where] = log_softmax(logits_KBC, -1).gather(-1, true_KB1).squeeze(-1).double()
    model.train()
    summed = (distributed.sum_over_processes_(x_KN).cpu().numpy() for x_KN in (predicted_KN, log_p_KN))
    return [
        Predictions(split_ids, labels[split_ids], predicted, np.exp(log_p).astype(np.float32), -float(log_p.mean()))
        for predicted, log_p in zip(*summed, strict=True)
    ]
