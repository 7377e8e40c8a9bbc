"""The pictures' part of an error: what other pictures of the kind would change, from the predictions.

What picture i adds to the metric of cell c with seed s (:func:`each_adds`) is ``mean[c] + seed[c, s] + picture[c, i] +
rest[c, s, i]``: crossed random effects (Owen, 2007; Bouthillier et al., 2021). A difference of cell means has the
seeds' part of :mod:`.stats`, which falls with their number and holds the rest's, and the pictures' part: the variance
over pictures of the paired difference ``d[i]``, averaged over seeds, without the rest that is in it,

    max(0, var(d) / N - (rest[a] / S_a + rest[b] / S_b - 2 shared S_ab / (S_a S_b)) / N) + 1 / N^2.

``rest[c]`` is a cell's own; ``shared`` is the covariance of two cells under one seed, the same for all pairs, as the
seed is one block for all cells. The last term is one more picture on which the two differ: the variance of few is
hardly known, and a normal's critical value too small. (With K of them it is about as wide as t's of 2 K + 4 degrees.)

Arrays: m cells, N pictures. Memory: 12 bytes for each cell and picture, 8 for each seed and picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lora_vit.metrics import METRICS, Metric
from lora_vit.records import PREDICTIONS

READ = ("labels", "predicted", "in_first_five")
MOST_SEEDS = 400  # with more the seeds are no blocks: so many were drawn at random for each cell


@dataclass
class Pictures:
    """What the predictions say of m cells; a cell without any has no pictures' part."""

    means: np.ndarray  # float32 [m, N] over seeds, less the cell's mean; 0 for a cell without predictions
    common: np.ndarray  # [m, m] seeds that two cells share; on the diagonal those of a cell
    rest: np.ndarray  # [m] variance over seeds of what a picture adds
    shared: float  # covariance of two cells' rests under one seed
    weight: float  # what one picture of the smallest class counts, in pictures

    def of_differences(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The pictures' part of each difference: [rows, columns]."""
        size, seeds = self.means.shape[1], np.maximum(np.diag(self.common), 1)
        middle = self.means[rows].mean(0)  # taken out of both: less is cancelled in float32
        a, b = self.means[rows] - middle, self.means[columns] - middle
        squares = np.add.outer(np.square(a).sum(1), np.square(b).sum(1)) - 2.0 * (a @ b.T)
        noise, both = self.rest / seeds, np.outer(seeds[rows], seeds[columns])
        noise = np.add.outer(noise[rows], noise[columns]) - 2 * self.shared * self.common[np.ix_(rows, columns)] / both
        part = np.clip(squares / (size - 1) - noise, 0.0, np.maximum(squares, 0.0)) / size + (self.weight / size) ** 2
        known = np.diag(self.common) > 0
        return np.where(np.outer(known[rows], known[columns]) & (rows[:, None] != columns), part, 0.0)


def each_adds(metric: Metric, val: Any) -> np.ndarray:
    """What each picture adds to the metric, its mean being about the metric: [N].

    Of a share of the pictures, whether it counts; else the jackknife's pseudo-value (Tukey, 1958), by leaving it out.
    Pictures of one label and prediction are left out once for all. Raises AttributeError for a metric of other arrays.
    """
    if metric.counts is not None:
        return np.asarray(metric.counts(val), dtype=float)
    _, first, alike = np.unique(np.stack([*vars(val).values()]), axis=1, return_index=True, return_inverse=True)
    without: list[Any] = [SimpleNamespace(**{k: np.delete(v, i) for k, v in vars(val).items()}) for i in first]
    left, n = np.array([metric.of(p) for p in without]), len(alike)
    return float(n * metric.of(val)) - (n - 1) * left[alike.ravel()]


class Sums:
    """Sums over seeds of what each val picture adds to a metric: the predictions of each trial are read once."""

    def __init__(self, metric: str, overlap: float = 0.0):
        self.metric = METRICS[metric]
        self.overlap = overlap  # of repeated splits (:mod:`.splits`): each has other pictures, and none are read
        self.step = 0.0  # of the metric: one picture of the smallest class; 0: not known
        self.without: list[tuple[str, str]] = []  # of a trial without predictions: its cell, and why
        self._labels: Any = None
        self.cells: dict[str, np.ndarray] = {}  # float32 [N] of those that have predictions
        self._of_seeds: dict[int, np.ndarray] = {}  # float [N]
        self._squares: dict[str, float] = {}
        self._seeds: dict[str, set[int]] = {}

    def add_all(self, trials: Any) -> None:
        """Count the trials of a table with their ``cell``, ``seed`` and ``folder``."""
        if self.overlap:
            return
        for cell, seed, folder in zip(trials["cell"], trials["seed"], trials["folder"], strict=True):
            self.add(cell, seed, Path(folder))

    def add(self, cell: str, seed: int, folder: Path) -> None:
        """Count a trial that has ended; where it has no usable predictions, note why."""
        try:
            with np.load(folder / PREDICTIONS) as arrays:
                val: Any = SimpleNamespace(**{k: arrays[f"val.{k}"] for k in READ if f"val.{k}" in arrays})
            self.count(cell, seed, val.labels, each_adds(self.metric, val))
        except FileNotFoundError:
            self.without.append((cell, f"{folder} has no {PREDICTIONS}"))
        except Exception as error:  # numpy and zipfile raise many kinds where a file is cut off or of another version
            self.without.append((cell, f"{folder / PREDICTIONS} cannot be used ({error})"))

    def count(self, cell: str, seed: int, labels: np.ndarray, each: np.ndarray) -> None:
        """Count what each picture adds to the metric of one trial. Raises ValueError if its pictures are others."""
        if self._labels is None:
            self._labels, self.step = labels, self.metric.step(np.unique(labels, return_counts=True)[1])
        if len(labels) < 2 or not np.array_equal(labels, self._labels):
            raise ValueError("it has other pictures")
        each = each - each.mean()
        self.cells[cell] = self.cells.get(cell, np.float32(0)) + each.astype(np.float32)
        self._squares[cell] = self._squares.get(cell, 0.0) + float(each @ each)
        self._seeds.setdefault(cell, set()).add(seed)
        if len(self._of_seeds) <= MOST_SEEDS:
            self._of_seeds[seed] = self._of_seeds.get(seed, 0.0) + each

    def of(self, cells: Sequence[str]) -> Pictures | None:
        """The sums of these cells; None without any predictions. ``shared`` comes from all cells that were added."""
        if not self.cells:
            return None
        every, size = [*dict.fromkeys([*cells, *self.cells])], len(self._labels)
        there = np.array([[s in self._seeds.get(cell, ()) for s in self._of_seeds] for cell in every], dtype=float)
        n = np.array([max(len(self._seeds.get(cell, ())), 1) for cell in every], dtype=float)
        sums = [self.cells.get(cell, np.zeros(size, dtype=np.float32)) for cell in every]
        means = np.stack(sums) / n[:, None].astype(np.float32)
        squares = np.array([self._squares.get(cell, 0.0) for cell in every])
        around = np.maximum(squares - n * np.square(means).sum(1, dtype=float), 0.0)
        common, shared = there @ there.T, 0.0
        free = common * (1 - np.add.outer(1 / n, 1 / n) + common / np.outer(n, n))
        if (pairs := free.sum() - np.trace(free)) > 1e-9 and len(self._of_seeds) <= MOST_SEEDS:
            seeds = zip(self._of_seeds.values(), there.T.astype(np.float32), strict=True)
            together = sum(float(np.square(own - row @ means).sum()) for own, row in seeds)
            shared = (together - around.sum()) / pairs / (size - 1)
        np.fill_diagonal(common, [len(self._seeds.get(cell, ())) for cell in every])
        rest, m = around / np.maximum((n - 1) * (size - 1), 1), len(cells)
        return Pictures(means[:m], common[:m, :m], rest[:m], shared, self.step * size)
