"""The marks of a sweep that is looked at once: *worse*, *candidate*, *within margin*, also over repeated splits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from calibrate.designs import Case, head, is_within, line

from lora_vit.analysis.stats import compare


@dataclass(frozen=True)
class Rates:
    """Shares of simulated sweeps, and of the inferior cells where marked *.

    Attributes:
        worse: some cell is called worse (an error in a null sweep).
        kept: the first cell, a true best one, stays a candidate.
        kept_last: the same of the last cell (in an unequal null sweep one of those that spread more).
        found: * inferior cells called worse while the first cell is the selected best (power).
        excluded: * inferior cells no longer candidates (Hsu's power).
    """

    worse: float
    kept: float
    kept_last: float
    found: float
    excluded: float


def simulate(case: Case, runs: int, rng: np.random.Generator, spreads: str = "auto") -> Rates:
    """Error and power rates over ``runs`` simulated sweeps; Monte Carlo error is sqrt(p (1 - p) / runs)."""
    totals = np.zeros(5)
    for _ in range(runs):
        result = compare(case.draw(case.true_means(rng), rng), resolution=1 / case.images, spreads=spreads)
        found = result.worse[1:].mean() if result.best == 0 else 0.0
        excluded = (~result.candidate[1:]).mean()
        totals += [result.worse.any(), result.candidate[0], result.candidate[-1], found, excluded]
    return Rates(*(totals / runs))


def print_marks(runs: int, rng: np.random.Generator) -> None:
    designs = [(m, n) for m in (2, 10, 30) for n in (2, 3, 5)]
    spreads = [("equal", 0.0), ("equal", 0.3), ("equal", 1.0), ("half 3x", 0.3), ("half 3x", 1.0), ("one 10x", 0.3)]
    head("spreads", "seed sd", "cells", "seeds", "'worse' errs %", "candidates keep the best %", "pooled: errs %")
    for case in (Case(m, n, sd, spread) for spread, sd in spreads for m, n in designs):
        r, pooled = simulate(case, runs, rng), simulate(case, runs, rng, "equal")
        kept = min(r.kept, r.kept_last)
        line(case.spread, str(case.sd), case.cells, case.seeds, r.worse, kept, pooled.worse)
    print()
    head("lead", "cells", "seeds", "'worse' finds %", "not a candidate %", "pooled error only: finds %")
    for case in (Case(m, n, 0.3, lead=lead) for lead in (0.5, 1.0) for m, n in designs):
        r, pooled = simulate(case, runs, rng), simulate(case, runs, rng, "equal")
        line(str(case.lead), case.cells, case.seeds, r.found, r.excluded, pooled.found)


@dataclass(frozen=True)
class MarginRates:
    """Of the mark *within margin*: share of sweeps with a false one, share found of the cells that truly are within."""

    errs: float
    found: float


def simulate_margin(case: Case, margin: float, runs: int, rng: np.random.Generator) -> MarginRates:
    """``margin`` in points."""
    errs, found, within_all = 0, 0, 0
    for _ in range(runs):
        mean = case.true_means(rng)
        within = is_within(mean, margin / 100)
        y = case.draw(mean, rng)
        marked = compare(y, resolution=1 / case.images).below <= margin / 100
        errs += bool((marked & ~within).any())
        found += int((marked & within).sum())
        within_all += int(within.sum())
    return MarginRates(errs / runs, found / within_all)


def print_margin(runs: int, rng: np.random.Generator) -> None:
    print("With 3 / 5 / 10 seeds; seed sd 0.3, margin 0.5.\n")
    head("spreads", "cells", "errs %, one ahead", "errs %, means spread", "finds %, tied", "finds %, means spread")
    for spread in ("equal", "half 3x", "half 3x, best", "one 10x", "one 10x, best"):
        for cells in (2, 10, 30):
            rates = []
            for case in (Case(cells, n, 0.3, spread) for n in (3, 5, 10)):
                cases = replace(case, lead=0.5), replace(case, means="spread"), case
                beyond, spread_out, tied = (simulate_margin(c, 0.5, runs, rng) for c in cases)
                rates.append([f"{100 * beyond.errs:.1f}", f"{100 * spread_out.errs:.1f}",
                              f"{100 * tied.found:.0f}", f"{100 * spread_out.found:.0f}"])  # fmt: skip
            line(spread, cells, *(" / ".join(column) for column in zip(*rates, strict=True)))


def splits_of(classes: np.ndarray, parts: tuple[int, int], cells: int, design: tuple[int, int], rng: Any) -> np.ndarray:
    """Accuracies [cells, splits] of real classifiers on one finite data set, each the mean over a split's seeds.

    A picture of a class has features around its mean (``classes`` [C, 6], equal for all cells). A
    cell sees features of its own, distributed alike, so that all are equal over data sets; it takes the nearest mean of
    the training pictures, of which a seed leaves a fifth out. ``parts``: train and val pictures; as many as val's test.
    """
    (n, val), (splits, seeds) = parts, design
    labels = rng.permutation(np.arange(n + 2 * val) % len(classes))
    x = classes[labels] + rng.normal(size=(cells, len(labels), 6))
    y, orders = np.zeros((cells, splits, seeds)), [rng.permutation(len(labels)) for _ in range(splits)]
    for split, seed in np.ndindex(splits, seeds):
        order = orders[split]
        kept, seen = rng.permutation(order[:n])[: n * 4 // 5], order[n : n + val]
        means = np.stack([x[:, kept[labels[kept] == c]].mean(1) for c in range(len(classes))], 1)
        away = (means**2).sum(2)[:, None] - 2 * x[:, seen] @ means.transpose(0, 2, 1)
        y[:, split, seed] = (away.argmin(2) == labels[seen]).mean(1)
    return y.mean(2)


def print_splits(runs: int, rng: np.random.Generator) -> None:
    head("train", "val", "cells", "splits", "seeds", "'worse' errs %", "without the correction %")
    classes = rng.normal(size=(8, 6)) * np.linspace(0.6, 2.0, 8)[:, None]  # from hard to easy
    parts = (800, 100), (400, 100), (160, 320)
    for (n, val), m, s, k in itertools.product(parts, (2, 8), (3, 5, 10), (1, 2)):
        errs = np.zeros(2)
        for _ in range(runs):
            y = splits_of(classes, (n, val), m, (s, k), rng)
            errs += [compare(y, 1 / val, overlap=overlap).worse.any() for overlap in (val / n, 0.0)]
        line(n, val, m, s, k, *(errs / runs))
