"""A trial's answers on labelled pictures: by picture, by class, and which class it takes for which."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lora_vit.analysis.stats import wilson
from lora_vit.metrics import Predictions


def confused(labels: np.ndarray, predicted: np.ndarray, class_names: list[str]) -> pd.DataFrame:
    """The number of pictures by class (rows) and predicted class."""
    counts = np.zeros((len(class_names), len(class_names)), dtype=int)
    np.add.at(counts, (labels, predicted), 1)
    return pd.DataFrame(counts, class_names, class_names)


@dataclass(kw_only=True)
class Evaluated(Predictions):
    """Predictions on one part of a data set, whose pictures and classes are known by name."""

    data: Any  # the ImageData; ``ids`` are those of its samples
    part: str

    def pictures(self) -> pd.DataFrame:
        """A row for each picture, by its sample id: wrong ones first and the surest of them on top, the surest last."""
        names, right = np.array(self.data.class_names, dtype=object), self.predicted == self.labels
        columns = {
            "path": [self.data.path(sample) for sample in self.ids],
            "true": names[self.labels],
            "predicted": names[self.predicted],
            "probability": self.top_probability,
            "part": self.part,
        }
        order = np.argsort(np.where(right, self.top_probability, -self.top_probability), kind="stable")
        return pd.DataFrame(columns, self.ids).iloc[order]

    def confusion(self) -> pd.DataFrame:
        return confused(self.labels, self.predicted, self.data.class_names)

    def classes(self) -> pd.DataFrame:
        """Each class with pictures, the least recall first: recall with Wilson's 95 % interval, and precision."""
        counts = self.confusion().to_numpy()
        images, right, said = counts.sum(1), counts.diagonal(), counts.sum(0)
        rows = [
            (name, n, r / n, *wilson(r / n, n), r / s if s else np.nan)
            for name, n, r, s in zip(self.data.class_names, images, right, said, strict=True)
            if n
        ]
        frame = pd.DataFrame(rows, columns=["class", "images", "recall", "low", "high", "precision"])
        return frame.sort_values("recall", kind="stable", ignore_index=True)
