"""Metrics, which trials are compared by, and losses, which are only shown: functions of a trial's predictions.

A metric is a fraction, better when higher. To add one, add an entry to METRICS (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the configuration names metrics, also where nothing is installed
    import numpy as np


@dataclass
class Predictions:
    """A trial's predictions on a split of N images, in the split's order; ``predictions.npz`` has the arrays."""

    ids: np.ndarray  # int64 [N]
    labels: np.ndarray  # int64 [N]
    predicted: np.ndarray  # int64 [N]
    true_probability: np.ndarray  # float32 [N], of the label
    top_probability: np.ndarray  # float32 [N], of the predicted class
    in_first_five: np.ndarray  # bool [N], whether the label is among the five most probable classes
    brier: np.ndarray  # float32 [N], squared error of the probabilities, summed over classes (Brier, 1950)
    loss: float  # mean cross entropy, without label smoothing


class Metric(NamedTuple):
    """How tables call it, what it means, its value, and the least change of it that one picture makes."""

    title: str
    meaning: str
    of: Callable[[Predictions], Any]
    counts: Callable[[Predictions], Any] | None = None  # which images count, where it is a share of them
    step: Callable[[np.ndarray], float] = lambda images: 1 / (len(images) * images.min())  # of those of each class


def _recalls(p: Predictions) -> np.ndarray:
    import numpy as np

    images = np.bincount(p.labels)
    return np.bincount(p.labels, p.predicted == p.labels)[images > 0] / images[images > 0]


def _macro_f1(p: Predictions) -> float:
    import numpy as np

    size, right = 1 + max(p.labels.max(), p.predicted.max()), p.labels[p.predicted == p.labels]
    true, said, both = (np.bincount(x, minlength=size) for x in (p.labels, p.predicted, right))
    return (2 * both / np.maximum(true + said, 1))[true + said > 0].mean()


def _calibration_error(p: Predictions) -> float:
    import numpy as np

    bins, right = np.searchsorted(np.arange(1, 15) / 15, p.top_probability), p.predicted == p.labels
    return np.abs(np.bincount(bins, right - p.top_probability.astype(float))).sum() / len(bins)


METRICS = {
    "accuracy": Metric("accuracy", "share of right predictions", lambda p: (p.predicted == p.labels).mean(),
                       lambda p: p.predicted == p.labels, lambda images: 1 / images.sum()),
    "balanced_accuracy": Metric("balanced accuracy", "mean of the classes' recalls", lambda p: _recalls(p).mean()),
    "macro_f1": Metric("macro-F1", "mean over classes of the harmonic mean of precision and recall", _macro_f1),
    "top5_accuracy": Metric("top-5 accuracy", "labels within the first five", lambda p: p.in_first_five.mean(),
                            lambda p: p.in_first_five, lambda images: 1 / images.sum()),
    "worst_class_recall": Metric("worst-class recall", "least of the classes' recalls", lambda p: _recalls(p).min(),
                                 step=lambda images: 1 / images.min()),
}  # fmt: skip
LOSSES = {
    "loss": Metric("NLL", "mean negative log likelihood", lambda p: p.loss),
    "brier": Metric("Brier", "mean squared error of all probabilities", lambda p: p.brier.mean(dtype=float)),
    "ece": Metric("ECE", "calibration error in 15 bins of equal width (Guo et al., 2017)", _calibration_error),
}


def figures(split: str, p: Predictions) -> dict[str, float]:
    """Every loss and metric, as records name them: ``val_loss``, ``val_accuracy``, ..."""
    return {f"{split}_{name}": float(metric.of(p)) for name, metric in (LOSSES | METRICS).items()}
