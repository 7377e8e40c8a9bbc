"""Predictions against sample-by-sample arithmetic, for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_vit import distributed
from lora_vit.data.stream import Batch
from lora_vit.training.evaluate import Predictions, evaluate

K, CLASSES = 3, 4
IDS = np.array([2, 3, 7, 8, 11, 19, 20])  # of the split; the data set has others
LABELS = np.arange(25) * 7 % CLASSES
LOGITS = 2 * torch.randn(K, 25, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CPU = torch.device("cpu")


class Table:
    """A pack that looks its logits up; an image holds its sample id."""

    K = K

    def __init__(self) -> None:
        self.training = True
        self.modes: list[bool] = []

    def __call__(self, images, stream_of_trial):
        assert stream_of_trial == [0] * K
        assert not torch.is_grad_enabled()
        self.modes.append(self.training)
        return LOGITS[:, images[:, 0, 0, 0].long()]

    def train(self, mode: bool = True):
        self.training = mode
        return self

    def eval(self):
        return self.train(False)


def batches(*groups):
    for ids in map(np.array, groups):
        yield Batch(torch.from_numpy(ids).view(-1, 1, 1, 1).double(), torch.from_numpy(LABELS[ids]), ids)


def check(found: list[Predictions]) -> None:
    assert len(found) == K
    for k, p in enumerate(found):
        probability = torch.softmax(LOGITS[k], -1).numpy()
        assert p.ids.tolist() == IDS.tolist()
        assert p.labels.tolist() == LABELS[IDS].tolist()
        assert p.predicted.tolist() == [int(probability[i].argmax()) for i in IDS]
        true = np.array([probability[i, LABELS[i]] for i in IDS])
        dtypes = [a.dtype for a in (p.ids, p.labels, p.predicted, p.true_probability)]
        assert dtypes == [np.int64, np.int64, np.int64, np.float32]
        np.testing.assert_allclose(p.true_probability, true, rtol=1e-6)  # rounded to fp32
        assert p.loss == pytest.approx(-np.log(true).mean(), rel=1e-12)
        assert p.accuracy == sum(probability[i].argmax() == LABELS[i] for i in IDS) / 7
    assert len({p.loss for p in found}) == K


def test_each_trials_predictions_in_the_splits_order():
    model = Table()
    check(evaluate(model, batches([2, 3, 7], [8, 11, 19], [20]), IDS, LABELS, CPU))
    assert model.modes == [False] * 3
    assert model.training


def test_the_splits_order_need_not_be_the_ids():
    ids = IDS[[4, 0, 6, 1, 5, 3, 2]]
    for k, p in enumerate(evaluate(Table(), batches([20], [2, 3, 7, 8, 11, 19]), ids, LABELS, CPU)):
        assert p.ids.tolist() == ids.tolist()
        assert p.labels.tolist() == LABELS[ids].tolist()
        assert p.predicted.tolist() == LOGITS[k, ids].argmax(-1).tolist()


def test_shares_of_two_processes_add_up(monkeypatch):
    theirs: list[torch.Tensor] = []
    monkeypatch.setattr(distributed, "sum_over_processes_", lambda t: theirs.append(t.clone()) or t)
    evaluate(Table(), batches([3, 8, 19]), IDS, LABELS, CPU)
    monkeypatch.setattr(distributed, "sum_over_processes_", lambda t: t.add_(theirs.pop(0)))
    check(evaluate(Table(), batches([2, 7], [11, 20]), IDS, LABELS, CPU))
    assert theirs == []
