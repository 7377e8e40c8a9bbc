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
    """How tables call it, what it means, its value, and what each picture adds to it.

    ``each`` gives values [N] whose mean is the metric and whose spread over pictures is its error: where it is no mean,
    from its derivatives by the pictures' weights (the infinitesimal jackknife; Jaeckel, 1972). None: only seeds are
    counted. ``step``: the least change that one picture makes, from the pictures of each class.
    """

    title: str
    meaning: str
    of: Callable[[Predictions], Any]
    counts_images: bool = False  # a share of the images: Wilson's interval holds
    each: Callable[[Predictions], np.ndarray] | None = None
    step: Callable[[np.ndarray], float] = lambda images: 1 / images.sum()


def _recalls(p: Predictions) -> np.ndarray:
    import numpy as np

    images = np.bincount(p.labels)
    return np.bincount(p.labels, p.predicted == p.labels)[images > 0] / images[images > 0]


def _each_recall(p: Predictions, worst: bool = False) -> np.ndarray:
    """Of the mean of the recalls, or of the lowest: the variance within classes, of k pictures with k - 1."""
    import numpy as np

    recalls, (_, of, images) = _recalls(p), np.unique(p.labels, return_inverse=True, return_counts=True)
    share = np.arange(len(images)) == recalls.argmin() if worst else np.full(len(images), 1 / len(images))
    weight = share * len(of) / images * np.sqrt(images / np.maximum(images - 1, 1))
    return share @ recalls + weight[of] * ((p.predicted == p.labels) - recalls[of])


def _f1(p: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Of each class: F1, and how many pictures have it as label or prediction (twice, if both)."""
    import numpy as np

    size, right = 1 + max(p.labels.max(), p.predicted.max()), p.labels[p.predicted == p.labels]
    true, said, both = (np.bincount(x, minlength=size) for x in (p.labels, p.predicted, right))
    return 2 * both / np.maximum(true + said, 1), true + said


def _macro_f1(p: Predictions) -> float:
    f1, there = _f1(p)
    return f1[there > 0].mean()


def _each_f1(p: Predictions) -> np.ndarray:
    (f1, there), label, said = _f1(p), p.labels, p.predicted
    slope = (2 * (label == said) - f1[label]) / there[label] - f1[said] / there[said]
    return f1[there > 0].mean() + slope * len(label) / (there > 0).sum()


def _calibration_error(p: Predictions) -> float:
    import numpy as np

    bins, right = np.searchsorted(np.arange(1, 15) / 15, p.top_probability), p.predicted == p.labels
    return np.abs(np.bincount(bins, right - p.top_probability.astype(float))).sum() / len(bins)


METRICS = {
    "accuracy": Metric("accuracy", "share of right predictions", lambda p: (p.predicted == p.labels).mean(), True,
                       lambda p: p.predicted == p.labels),
    "balanced_accuracy": Metric("balanced accuracy", "mean of the classes' recalls", lambda p: _recalls(p).mean(),
                                each=_each_recall, step=lambda images: 1 / (len(images) * images.min())),
    "macro_f1": Metric("macro-F1", "mean over classes of the harmonic mean of precision and recall", _macro_f1,
                       each=_each_f1, step=lambda images: 1 / (len(images) * images.min())),
    "top5_accuracy": Metric("top-5 accuracy", "labels within the first five", lambda p: p.in_first_five.mean(), True,
                            lambda p: p.in_first_five),
    "worst_class_recall": Metric("worst-class recall", "least of the classes' recalls", lambda p: _recalls(p).min(),
                                 each=lambda p: _each_recall(p, worst=True), step=lambda images: 1 / images.min()),
}  # fmt: skip
LOSSES = {
    "loss": Metric("NLL", "mean negative log likelihood", lambda p: p.loss),
    "brier": Metric("Brier", "mean squared error of all probabilities", lambda p: p.brier.mean(dtype=float)),
    "ece": Metric("ECE", "calibration error in 15 bins of equal width (Guo et al., 2017)", _calibration_error),
}


def figures(split: str, p: Predictions) -> dict[str, float]:
    """Every loss and metric, as records name them: ``val_loss``, ``val_accuracy``, ..."""
    return {f"{split}_{name}": float(metric.of(p)) for name, metric in (LOSSES | METRICS).items()}
