"""What is simulated, accuracies or predictions whose truth is known, and the lines of a table."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from lora_vit.analysis.pictures import Sums, each_adds
from lora_vit.metrics import METRICS

IMAGES = 10_000


@dataclass(frozen=True)
class Case:
    """One design; ``sd`` and ``lead`` in points, ``lead`` of the first cell over all others.

    ``spread``: equal, half 3x or one 10x; the cells that spread more are the last, or with ", best" the first. With
    "bad rates" the last two spread 10 and 30 times as much and lie 5 and 15 points behind all others.
    ``means``: one ahead (by ``lead``), three tied (the rest behind, 1 point on average), or spread (normal, sd 0.6).
    """

    cells: int
    seeds: int
    sd: float
    spread: str = "equal"
    lead: float = 0.0
    means: str = "one ahead"
    images: int = IMAGES

    @property
    def sds(self) -> np.ndarray:
        """Error sd of each cell, fraction."""
        sd = np.full(self.cells, self.sd / 100)
        if self.spread == "bad rates":
            return sd * np.r_[np.ones(self.cells - 2), 10, 30]
        many, factor = {"equal": (0, 1), "half 3x": (self.cells // 2, 3), "one 10x": (1, 10)}[
            self.spread.removesuffix(", best")
        ]
        sd[slice(many) if self.spread.endswith("best") else slice(self.cells - many, None)] *= factor
        return sd

    def true_means(self, rng: np.random.Generator) -> np.ndarray:
        """True accuracy of each cell, fraction."""
        mean = np.zeros(self.cells)
        if self.means == "spread":
            mean = rng.normal(0, 0.6, self.cells)
        elif self.means == "three tied":
            mean[3:] = np.minimum(rng.normal(-1, 0.5, self.cells - 3), -0.05)
        else:
            mean[0] = self.lead
        if self.spread == "bad rates":
            mean[-2:] = -5, -15
        return 0.88 + mean / 100

    def draw(self, mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Accuracies [cells, seeds]."""
        y = rng.normal(0, 0.005, self.seeds) + rng.normal(size=(self.cells, self.seeds)) * self.sds[:, None]
        return np.round((mean[:, None] + y) * self.images) / self.images


@dataclass(frozen=True)
class Population:
    """Trials that classify ``pictures``. Each sweep draws new ones; over all pictures of the kind the cells are equal.

    Of the pictures, 12 % are undecided: a trial is right on one with probability p + g[cell, picture] + e[cell, seed],
    p uniform in [0.25, 0.75], g = +- ``own`` min(p, 1 - p), e of sd ``sd`` points of accuracy; half of the draws are
    shared by the cells of a seed. The others are right always, or never (4 %). ``own`` = 0.5: the pictures' part of a
    difference has an sd of 9.4 points / sqrt(pictures). ``lead``: of the first cell or cells, in points.
    ``metric``: with ten classes whose sizes fall to a tenth, except for accuracy.
    """

    cells: int
    seeds: int
    pictures: int
    own: float = 0.5
    sd: float = 0.2
    spread: str = "equal"
    lead: Any = 0.0
    metric: str = "accuracy"

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Right predictions [cells, seeds, undecided], which pictures these are, and whether each picture is right."""
        m, n = self.cells, self.pictures
        fixed, undecided = rng.random(n) < 0.96, np.flatnonzero(rng.random(n) < 0.12)
        k = len(undecided)
        p = rng.uniform(0.25, 0.75, k).astype(np.float32)
        g = self.own * np.minimum(p, 1 - p) * rng.choice(np.array([-1, 1], np.float32), (m, k))
        sds = Case(m, self.seeds, self.sd, self.spread).sds
        e = rng.normal(size=(m, self.seeds)) * sds[:, None] + rng.normal(0, self.sd / 100, self.seeds)
        e[: np.size(self.lead)] += np.reshape(self.lead, (-1, 1)) / 100
        own = rng.random((m, self.seeds, k), dtype=np.float32)
        common = np.broadcast_to(rng.random((self.seeds, k), dtype=np.float32), own.shape)
        u = np.where(rng.random(own.shape, dtype=np.float32) < 0.5, own, common)
        return u < (p + g)[:, None] + (e / 0.12).astype(np.float32)[:, :, None], undecided, fixed

    def sweep(self, rng: np.random.Generator, first: int = 0) -> tuple[np.ndarray, Sums]:
        """The metric [cells, seeds], and the sums over the predictions of the first seeds (0: of all)."""
        right, undecided, fixed = self.draw(rng)
        metric, sums = METRICS[self.metric], Sums(self.metric)
        sizes = np.ones(10) if self.metric == "accuracy" else np.linspace(1, 0.1, 10)
        labels = np.sort(rng.choice(10, self.pictures, p=sizes / sizes.sum()))
        labels = rng.permutation(labels)
        wrong, y = (labels + rng.integers(1, 10, self.pictures)) % 10, np.empty(right.shape[:2])
        for c, s in np.ndindex(*y.shape):
            here = fixed.copy()
            here[undecided] = right[c, s]
            p: Any = SimpleNamespace(labels=labels, predicted=np.where(here, labels, wrong))
            y[c, s] = metric.of(p)
            if s < (first or self.seeds):
                sums.count(str(c), s, labels, each_adds(metric, p))
        return y, sums


def is_within(mean: np.ndarray, margin: float) -> np.ndarray:
    """Which cells truly lie less than ``margin`` below the best (just that much below is wrong)."""
    return mean > mean.max() - margin + 1e-9


def head(*columns: str) -> None:
    """Print the head of a table."""
    line(*columns)
    print("|" + "---|" * len(columns))


def line(*columns: object) -> None:
    """Print a line of a table; numbers are percentages."""
    texts = (f"{100 * c:.1f}" if isinstance(c, float) else str(c) for c in columns)
    print(f"| {' | '.join(texts)} |", flush=True)
