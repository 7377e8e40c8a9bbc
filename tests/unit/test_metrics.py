"""Metrics and losses against scikit-learn's, and what a record keeps of them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as theirs
from sklearn.calibration import calibration_curve

from lora_vit.metrics import LOSSES, METRICS, Predictions, figures


def made_up(classes: int, count: int, skew: float, seed: int) -> tuple[Predictions, np.ndarray]:
    """Predictions that are better than chance on classes of unequal size, and all probabilities [N, C]."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, count, p=(share := np.arange(1, classes + 1) ** skew) / share.sum())
    logits = 2 * rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += 1.5
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    true = p[np.arange(count), labels]
    found = Predictions(
        np.arange(count), labels, p.argmax(1), true.astype(np.float32), p.max(1).astype(np.float32),
        (p > true[:, None]).sum(1) < 5, ((p - np.eye(classes)[labels]) ** 2).sum(1).astype(np.float32),
        -float(np.log(true).mean()),
    )  # fmt: skip
    return found, p


@pytest.mark.parametrize(
    ("classes", "count", "skew"), [(2, 90, 3), (3, 40, 0), (10, 400, 1), (40, 60, 2)], ids=["2", "3", "10", "40"]
)
@pytest.mark.filterwarnings("ignore:.*(y_pred contains|meaningless)")
def test_figures_are_scikit_learns(classes, count, skew):
    """With 40 classes some have no image, and of these some are predicted. Arrays are float32: 1e-6."""
    pytest.importorskip("sklearn", "1.7")  # earlier ones have no Brier score of several classes
    found, p = made_up(classes, count, skew, seed=classes)
    y, said, every = found.labels, found.predicted, np.arange(classes)
    right, bins = said == y, np.histogram(found.top_probability, np.linspace(0, 1, 16))[0]
    share, confidence = calibration_curve(right, found.top_probability, n_bins=15)
    expected = {
        "accuracy": theirs.accuracy_score(y, said),
        "balanced_accuracy": theirs.balanced_accuracy_score(y, said),
        "macro_f1": theirs.f1_score(y, said, average="macro"),
        "top5_accuracy": theirs.top_k_accuracy_score(y, p, k=5, labels=every) if classes > 5 else 1.0,
        "worst_class_recall": min(theirs.recall_score(y, said, average=None, labels=np.unique(y))),
        "loss": theirs.log_loss(y, p, labels=every),
        "brier": theirs.brier_score_loss(y, p, labels=every, scale_by_half=False),
        "ece": (np.abs(share - confidence) * bins[bins > 0]).sum() / count,
    }
    assert set(expected) == METRICS.keys() | LOSSES.keys()
    got = figures("val", found)
    assert list(got) == [f"val_{name}" for name in (*LOSSES, *METRICS)]
    for name, value in expected.items():
        assert got[f"val_{name}"] == pytest.approx(value, abs=1e-6), name
        assert type(got[f"val_{name}"]) is float
    if classes == 40:
        assert set(y) < set(said) | set(y) < set(every), "a class without an image is predicted, another is not"


def test_a_certain_and_right_model_has_the_best_figures():
    """A top probability of 1 lies in the last bin."""
    n = np.arange(12) % 3
    one = np.ones(12, np.float32)
    perfect = Predictions(np.arange(12), n, n, one, one, one > 0, 0 * one, 0.0)
    assert figures("t", perfect) == {f"t_{name}": 0.0 for name in LOSSES} | {f"t_{name}": 1.0 for name in METRICS}
