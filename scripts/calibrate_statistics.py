"""How often do the report's claims err, and what do they find? Simulated sweeps through the report's own functions.

    python scripts/calibrate_statistics.py marks            # *worse* and *candidate*, several minutes
    python scripts/calibrate_statistics.py race             # the race: is the selected cell within the margin?
    python scripts/calibrate_statistics.py margin           # the mark *within margin*
    python scripts/calibrate_statistics.py effects          # effects of settings, and interactions
    python scripts/calibrate_statistics.py rates            # how the best learning rate goes with the rank
    python scripts/calibrate_statistics.py pictures         # the same claims about other pictures of the kind
    python scripts/calibrate_statistics.py questions        # methods and ranks, each at its best, and P(best)
    python scripts/calibrate_statistics.py looks            # *worse* at any look at a sweep that grows
    python scripts/calibrate_statistics.py collapses        # cells that collapse in some of their seeds
    python scripts/calibrate_statistics.py splits           # *worse* over repeated splits of one data set
    python scripts/calibrate_statistics.py race --runs 100  # seconds to a minute

A simulated accuracy is ``0.88 + seed effect + error``, rounded to 1/images. The seed effect (sd 0.5 points) is shared
by all cells; the error's sd is the "seed sd" of the table. "half 3x": half of the cells spread three times as much;
"one 10x": a single cell spreads ten times as much. ``pictures`` and ``questions`` draw predictions instead
(:class:`Population`). They, ``looks`` and ``collapses`` print CSV.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, special

from lora_vit.analysis.collapses import collapsed
from lora_vit.analysis.effects import main_effects, rate_by_rank
from lora_vit.analysis.pictures import Sums, each_adds
from lora_vit.analysis.power import Design
from lora_vit.analysis.questions import at_best, chances
from lora_vit.analysis.race import Race, Rules, decide, wanted
from lora_vit.analysis.stats import ALPHA, chi_nodes, compare, dunnett_critical, fit_blocks, tukey_critical
from lora_vit.metrics import METRICS

IMAGES = 10_000
LONG = 1000
"""Seeds of a race that is let run on, to see what its limit hides."""


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


def head(*columns: str) -> None:
    """Print the head of a table."""
    line(*columns)
    print("|" + "---|" * len(columns))


def line(*columns: object) -> None:
    """Print a line of a table; numbers are percentages."""
    texts = (f"{100 * c:.1f}" if isinstance(c, float) else str(c) for c in columns)
    print(f"| {' | '.join(texts)} |", flush=True)


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


def is_within(mean: np.ndarray, margin: float) -> np.ndarray:
    """Which cells truly lie less than ``margin`` below the best (just that much below is wrong)."""
    return mean > mean.max() - margin + 1e-9


@dataclass(frozen=True)
class RaceRates:
    """Of simulated races; the shares are of all races.

    Attributes:
        right: a cell within the margin of the true best is selected or, where the race ends unresolved, survives.
        unresolved: most_seeds came first.
        right_long: as ``right``, where unresolved races go on to LONG seeds (with ``long``).
        trials: trials a cell.
    """

    right: float
    unresolved: float
    right_long: float
    trials: float


def run_race(y: np.ndarray, rules: Rules, resolution: float, workers: int = 1) -> tuple[Race, int]:
    """A race over the true ``y`` and the trials it takes; ``workers`` trials start and end together.

    One worker trains what the replay looks at and nothing else.
    """
    none = np.zeros(y.shape, dtype=bool)
    if workers == 1:
        race = decide(y, none, rules, resolution)
        return race, sum(map(race.seeds_of, range(len(race.y))))
    seen = np.full(y.shape, np.nan)
    while not (race := decide(seen, none, rules, resolution)).ended:
        for trial in wanted(race, workers)[:workers]:
            seen[trial] = y[trial]
    return race, int(np.isfinite(seen).sum())


def simulate_race(
    case: Case, rules: Rules, runs: int, rng: np.random.Generator, workers: int = 1, long: bool = False
) -> RaceRates:
    """Error rates and trials over ``runs`` simulated races of at most ``case.seeds`` seeds."""
    totals = np.zeros(4)
    for _ in range(runs):
        mean = case.true_means(rng)
        within = is_within(mean, rules.margin)
        y = case.draw(mean, rng)
        race, trials = run_race(y, rules, 1 / case.images, workers)
        right = bool(within[race.survivors].any())
        on = right
        if long and race.selected is None:
            more = np.hstack([y, replace(case, seeds=LONG - case.seeds).draw(mean, rng)])
            on = bool(within[run_race(more, replace(rules, most_seeds=LONG), 1 / case.images)[0].survivors].any())
        totals += [right, race.selected is None, on, trials / case.cells]
    return RaceRates(*(totals / runs))


def bechhofer(case: Case, margin: float) -> float:
    """Trials a cell of Bechhofer's single stage (1954), every cell's spread known beforehand."""
    h = dunnett_critical(case.cells - 1, 1e6)
    return float(np.maximum(1, np.ceil(2 * (h * case.sds / margin) ** 2)).mean())


def rinott(case: Case, margin: float, first: int, rng: np.random.Generator) -> float:
    """Expected trials a cell of Rinott's two stages (1978), spreads unknown, without the seed effect in them."""
    s, weights = chi_nodes(first - 1)
    each = np.sqrt(1 / s[:, None] ** 2 + 1 / s**2)

    def right(h: float) -> float:
        return float(weights @ (special.ndtr(h / each) @ weights) ** (case.cells - 1))

    h = optimize.brentq(lambda x: right(x) - 0.95, 0.0, 1e4)
    variance = case.sds**2 * rng.chisquare(first - 1, (4000, case.cells)) / (first - 1)
    return float(np.maximum(first, np.ceil(h**2 * variance / margin**2)).mean())


def race_cases() -> Iterator[tuple[Case, float]]:
    """Designs and margins (points)."""
    case = Case(10, 30, 0.3, lead=0.5)
    spreads = ("equal", "half 3x", "half 3x, best", "one 10x", "one 10x, best")
    yield from ((replace(case, cells=k, spread=spread), 0.5) for spread in spreads for k in (2, 4, 10, 30, 100))
    yield from ((replace(case, cells=k, images=719, spread=spread), 0.5) for spread in spreads[:2] for k in (2, 10, 30))
    yield from ((replace(case, cells=k, lead=0.0), 0.5) for k in (2, 4, 10, 30, 100))
    for lead in (0.5, 0.0):
        yield from ((replace(case, cells=k, spread="bad rates", lead=lead), 0.5) for k in (4, 10, 30))
    for means in ("three tied", "spread"):
        yield from ((replace(case, cells=k, means=means), 0.5) for k in (4, 10, 30, 100))
        yield from ((replace(case, cells=30, means=means, spread=spread), 0.5) for spread in ("half 3x", "one 10x"))
    for means in ("one ahead", "three tied", "spread"):
        yield replace(case, cells=30, means=means, lead=0.25), 0.25
    yield replace(case, cells=30, means="spread", seeds=100), 0.25


def print_race(runs: int, rng: np.random.Generator) -> None:
    firsts = (2, 3, 5)
    print("With 2 / 3 / 5 first seeds, at most 30; seed sd 0.3.\n")
    head("means", "spreads", "cells", "right %", "without limit %", "not resolved %", "trials a cell", "Bechhofer",
         "Rinott")  # fmt: skip
    cases = list(race_cases())
    for (case, margin), of_line in zip(cases, rng.spawn(len(cases)), strict=True):  # draws of its own
        *draws, last = of_line.spawn(len(firsts) + 1)
        rates = [simulate_race(case, Rules(margin / 100, n, case.seeds), runs, own, long=True)
                 for n, own in zip(firsts, draws, strict=True)]  # fmt: skip
        notes = ["tied" if case.means == "one ahead" and not case.lead else case.means]
        notes += [f"margin {margin}"] * (margin != 0.5) + [f"at most {case.seeds}"] * (case.seeds != 30)
        notes += [f"{case.images} images"] * (case.images != IMAGES)
        shares = [" / ".join(f"{100 * getattr(r, name):.1f}" for r in rates)
                  for name in ("right", "right_long", "unresolved")]  # fmt: skip
        trials = " / ".join(f"{r.trials:.1f}" for r in rates)
        stages = f"{bechhofer(case, margin / 100):.0f}", f"{rinott(case, margin / 100, 5, last):.0f}"
        line(", ".join(notes), case.spread, case.cells, *shares, trials, *stages)
    print("\nIdle workers: the same races by 1 and by 16 workers, 5 first seeds.\n")
    head("means", "cells", "workers", "right %", "not resolved %", "trials a cell")
    for case in (Case(10, 30, 0.3, lead=0.5), Case(30, 30, 0.3, means="spread")):
        for workers in (1, 16):
            r = simulate_race(case, Rules(0.005, 5, 30), max(1, runs // 4), np.random.default_rng(1), workers)
            line(case.means, case.cells, workers, r.right, r.unresolved, f"{r.trials:.1f}")


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


@dataclass(frozen=True)
class Crossed:
    """A setting of ``levels`` levels beside ``others`` combinations of the other settings; the seeds' sd is 0.3 points.

    ``spread``: the cells that spread more, and how many times. ``apart``: sd of the combinations' means, points.
    """

    levels: int
    others: int
    seeds: int
    spread: str = "equal"
    apart: float = 0.0

    def draw(self, lead: float, rng: np.random.Generator) -> np.ndarray:
        """Accuracies [others, levels, seeds]; the last level is ahead by ``lead`` points."""
        sd, m, k = np.full((self.others, self.levels), 0.3), self.others // 2, self.levels - self.levels // 2
        wide = {"equal": sd[:0], "half of the levels 3x": sd[:, k:], "one level 10x": sd[:, -1:],
                "half of the others 3x": sd[m:], "one of the others 10x": sd[-1:],
                "one cell 10x": sd[-1:, -1:]}  # fmt: skip
        wide[self.spread] *= 10 if "10x" in self.spread else 3
        mean = rng.normal(0, self.apart, (self.others, 1)) + lead * (np.arange(self.levels) == self.levels - 1)
        error = rng.normal(0, 0.5, self.seeds) + rng.normal(size=(*sd.shape, self.seeds)) * sd[..., None]
        y = 88 + mean[..., None] + error
        return np.round(y / 100 * IMAGES) / IMAGES

    def frame(self) -> pd.DataFrame:
        """The trials, in the order of :meth:`draw`."""
        place = np.indices((self.others, self.levels, self.seeds)).reshape(3, -1)
        cells = np.char.zfill((place[0] * self.levels + place[1]).astype(str), 3)
        return pd.DataFrame({"cell": cells, "seed": place[2], "level": place[1], "other": place[0]})


def simulate_effects(case: Crossed, lead: float, runs: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Shares: the last level's interval against the first excludes 0; so it does with one pooled error where the plain
    mean is highest; an interaction is told.
    """
    found, frame = np.zeros(3), case.frame()
    for _ in range(runs):
        y = case.draw(lead, rng)
        effects = main_effects(frame.assign(y=y.ravel()), ["level", "other"], "y", 1 / IMAGES)
        row = effects.table[effects.table["setting"] == "level"].iloc[-1]
        fit = fit_blocks(y.reshape(-1, case.seeds))
        at = y.mean((1, 2)).argmax()
        t = abs(y[at, -1].mean() - y[at, 0].mean()) / math.sqrt(2 * fit.mse / case.seeds)
        told = any("other effects" in note for note in effects.notes)
        found += [row["low"] * row["high"] > 0, t > special.stdtrit(fit.df, 0.975), told]
    return tuple(found / runs)


def print_effects(runs: int, rng: np.random.Generator) -> None:
    print("With 2 / 3 / 5 seeds; no level differs, or the last one by a point.\n")
    head("spreads", "levels", "others", "others' sd", "errs %", "pooled, plain mean: errs %", "interaction errs %",
         "finds %")  # fmt: skip
    spreads = ("equal", "half of the levels 3x", "one level 10x", "half of the others 3x", "one of the others 10x",
               "one cell 10x")  # fmt: skip
    for spread in spreads:
        for levels, others, apart in ((4, 1, 0.0), (2, 9, 0.0), (3, 10, 0.0), (3, 10, 1.0)):
            cases = [Crossed(levels, others, n, spread, apart) for n in (2, 3, 5)]
            if others == 1 and "others" in spread:
                continue
            null = zip(*(simulate_effects(case, 0.0, runs, rng) for case in cases), strict=True)
            finds = [simulate_effects(case, 1.0, max(1, runs // 4), rng)[0] for case in cases]
            columns = [" / ".join(f"{100 * x:.1f}" for x in column) for column in (*null, finds)]
            line(spread, levels, others, str(apart), *columns)


def print_rates(runs: int, rng: np.random.Generator) -> None:
    print("Four ranks and five rates. Accuracy falls with the square of the rate's log distance")
    print("from the best, by 0.4 points at e times less, and far more steeply above e times the best.\n")
    head("rates apart", "true power", "seeds", "sd", "told %", "of these the interval covers %", "median width")
    for step, b, seeds, sd in itertools.product((2, 3), (0.0, -0.25, -0.5), (3, 5), (0.15, 0.4)):
        line(f"{step}x", f"{b:.2f}", seeds, str(sd), *simulate_rates(step, b, seeds, sd, runs, rng))


def simulate_rates(
    step: float, b: float, seeds: int, sd: float, runs: int, rng: np.random.Generator
) -> tuple[float, float, str]:
    """Shares of sweeps where the power of the rank has an interval, and of these where it holds ``b``; its width."""
    ranks, rates, widths, covers = np.array([1.0, 4, 16, 64]), step ** np.arange(5.0), list[float](), 0
    rows = pd.DataFrame(list(itertools.product(ranks, rates)), columns=["rank", "lr"])
    for _ in range(runs):
        best = np.log(rates[2]) + rng.uniform(-0.4, 0.4) * math.log(step) + b * (np.log(ranks) - np.log(ranks).mean())
        away = np.log(rates) - best[:, None]
        mean = 0.96 - (0.4 * away**2 + 12 * np.maximum(away - 1, 0) ** 2) / 100
        y = mean.reshape(-1, 1) + rng.normal(0, sd / 100, (len(rows), seeds))
        for text in rate_by_rank(rows, y):
            if "95 %" in text:
                low, high = map(float, re.findall(r"(-?[0-9.]+) to (-?[0-9.]+)\)", text)[0])
                widths.append(high - low)
                covers += low - 0.005 <= b <= high + 0.005  # two digits are told
    return len(widths) / runs, covers / max(len(widths), 1), f"{np.median(widths) if widths else math.nan:.2f}"


@dataclass(frozen=True)
class Population:
    """Trials that predict ``pictures`` drawn anew for each sweep. Cells are equal on all pictures of the kind.

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


def simulate_pictures(case: Population, runs: int, rng: np.random.Generator) -> list[float]:
    """Shares of sweeps: some cell is called worse, so by seeds alone, the first one stays a candidate."""
    totals = np.zeros(3)
    cells = list(map(str, range(case.cells)))
    for _ in range(runs):
        y, sums = case.sweep(rng)
        both, seeds = compare(y, sums.step, pictures=sums.of(cells)), compare(y, sums.step)
        totals += [both.worse.any(), seeds.worse.any(), both.candidate[0]]
    return list(totals / runs)


def simulate_pictures_race(case: Population, margin: float, runs: int, rng: np.random.Generator) -> list[float]:
    """Shares of races of five first seeds: with both parts and with seeds alone, right and not resolved; trials."""
    totals, rules = np.zeros(6), Rules(margin / 100, 5, case.seeds)
    within = is_within(np.array([case.lead] + [0.0] * (case.cells - 1)) / 100, rules.margin)
    for _ in range(runs):
        y, sums = case.sweep(rng, first=5)
        here = list[float]()
        for pictures in (sums.of(list(map(str, range(case.cells)))), None):
            race = decide(y, np.zeros(y.shape, dtype=bool), rules, sums.step, pictures)
            right = bool(within[race.survivors].any())
            here += [right, race.selected is None, sum(map(race.seeds_of, range(case.cells))) / case.cells]
        totals += here
    return list(totals / runs)


def print_pictures(runs: int, rng: np.random.Generator) -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["claim", "metric", "pictures", "own", "spreads", "cells", "seeds", "errs %",
                    "errs % by seeds alone", "candidates keep the best %", "not resolved %",
                    "trials a cell"])  # fmt: skip
    cases = [Population(m, s, n, spread=spread) for n in (200, 719, 10_000) for spread in ("equal", "half 3x")
             for m in (2, 8, 30) for s in (2, 3, 5, 10)]  # fmt: skip
    cases += [Population(8, s, 719, own, sd=0.1) for own in (0.0, 0.25, 1.0) for s in (3, 10)]
    others = "balanced_accuracy", "macro_f1", "worst_class_recall"
    cases += [Population(4, s, 719, metric=m) for m in others for s in (3, 5)]
    for c in cases:
        both, seeds, kept = simulate_pictures(c, runs if c.metric == "accuracy" else runs // 3, rng)  # these are slow
        shares = (f"{100 * share:.1f}" for share in (both, seeds, kept))
        table.writerow(["worse", c.metric, c.pictures, c.own, c.spread, c.cells, c.seeds, *shares, "", ""])
        sys.stdout.flush()
    races = [Population(m, 30, n, lead=margin)
             for n, margin in ((719, 1.5), (719, 1.0), (2000, 1.0), (10_000, 0.5)) for m in (2, 8, 30)]  # fmt: skip
    for c, own in zip(races, rng.spawn(len(races)), strict=True):  # draws of its own
        right, unresolved, trials, alone, _, _ = simulate_pictures_race(c, c.lead, runs, own)
        shares = (f"{100 * share:.1f}" for share in (1 - right, 1 - alone))
        table.writerow([f"race, margin {c.lead}", c.metric, c.pictures, c.own, c.spread, c.cells, "5 to 30", *shares,
                        "", f"{100 * unresolved:.1f}", f"{trials:.1f}"])  # fmt: skip
        sys.stdout.flush()


def simulate_question(
    case: Population, groups: dict[Any, np.ndarray], runs: int, rng: np.random.Generator
) -> list[float]:
    """Shares of sweeps in which some group is told apart from the base; the base is shown to be better than some (or at
    most a margin worse, if it truly is just that); t tests of the best cells over seeds tell some apart; the first
    group is shown to be better than all.
    """
    totals, cells = np.zeros(4), pd.DataFrame({"cell": np.arange(case.cells), "label": "", "trainable_parameters": 1})
    for _ in range(runs):
        y, sums = case.sweep(rng)
        errors = compare(y, sums.step, pictures=sums.of(list(map(str, range(case.cells)))))
        table = at_best("group", groups, cells, errors, None)
        best = y[table["cell"]]
        d = best[0] - best[1:]
        t = d.mean(1) / np.maximum(d.std(1, ddof=1), 1e-9) * math.sqrt(case.seeds)
        said, first = table["is"][table["is"] != ""], table["base"][0] == str(next(iter(groups)))
        totals += [(said != "not told apart from").any(), (said == "better than").any(),
                   (abs(t) > special.stdtrit(case.seeds - 1, 0.975)).any(),
                   first and (said == "better than").all()]  # fmt: skip
    return list(totals / runs)


def simulate_chances(case: Population, runs: int, rng: np.random.Generator) -> list[float]:
    """Where true means have an sd of 0.6 points: mean of the highest P(best), and how often that cell is the best."""
    totals = np.zeros(2)
    for _ in range(runs):
        drawn = replace(case, lead=rng.normal(0, 0.6, case.cells))
        y, sums = drawn.sweep(rng)
        errors: Any = compare(y, sums.step, pictures=sums.of(list(map(str, range(case.cells)))))
        p = chances(errors)
        totals += [p.max(), p.argmax() == drawn.lead.argmax()]
    return list(totals / runs)


def print_questions(runs: int, rng: np.random.Generator) -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["question", "groups", "pictures", "spreads", "seeds", "errs %", "'better' errs %",
                    "t tests over seeds err %", "finds a point %", "highest P(best) %",
                    "it is the best %"])  # fmt: skip
    methods = [(f"LoRA {m}, baseline {b}", {"LoRA": np.arange(m), "linear probe": m + np.arange(b)}, np.zeros(m + b))
               for m, b in ((2, 1), (8, 1), (8, 4), (30, 2))]  # fmt: skip
    ranks = [(f"{r} ranks, {k} rates, {'each its own best' if own else 'equal'}",
              {str(i): i * k + np.arange(k) for i in range(r)},
              np.array([-0.6 * own * abs(j - i % k) for i in range(r) for j in range(k)]))
             for r, k, own in ((2, 2, 0), (4, 3, 0), (4, 3, 1), (6, 5, 1))]  # fmt: skip
    for asked, (words, groups, lead) in [*(("method", g) for g in methods), *(("rank", g) for g in ranks)]:
        sizes = (719, 10_000) if len(lead) in (9, 12) else (719,)
        for n, spread, seeds in itertools.product(sizes, ("equal", "half 3x"), (3, 5)):
            case, first = Population(len(lead), seeds, n, spread=spread, lead=lead), np.zeros(len(lead))
            first[next(iter(groups.values()))] = 1
            null = simulate_question(case, groups, runs, rng)
            finds = simulate_question(replace(case, lead=lead + first), groups, max(1, runs // 6), rng)[3]
            shares = [f"{100 * s:.1f}" for s in (*null[:3], finds)]
            table.writerow([asked, words, n, spread, seeds, *shares, "", ""])
            sys.stdout.flush()
    for m, spread, seeds in itertools.product((2, 8, 30), ("equal", "half 3x"), (3, 5)):
        told = simulate_chances(Population(m, seeds, 719, spread=spread), runs, rng)
        table.writerow(["P(best)", f"{m} cells", 719, spread, seeds, *[""] * 4, *(f"{100 * s:.1f}" for s in told)])


def simulate_looks(case: Case, first: int, grow: str, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Shares of sweeps where a cell is called worse: at the first look, at any, at any if each erred in 5 %.

    ``grow``: so many seeds a time, until there are ``case.seeds``; "adaptive": one if something is nearly worse, else
    five; "leaders": two for the two best cells alone.
    """
    totals = np.zeros(3)
    for _ in range(runs):
        y, n, worse = case.draw(case.true_means(rng), rng), np.full(case.cells, first), list[tuple[bool, bool]]()
        while n.max() <= case.seeds:
            order = np.argsort(-n, kind="stable")  # fewer patterns, of which each is simulated
            seen = np.where(np.arange(n.max()) < n[order, None], y[order, : n.max()], np.nan)
            alpha = ALPHA / (len(worse) + 1) ** 3
            r = compare(seen, 1 / case.images, alpha=alpha)
            margin = tukey_critical(case.cells, r.df, alpha) / tukey_critical(case.cells, r.df)
            near = np.nanmax(r.difference / r.half) * margin
            worse.append((bool(r.worse.any()), bool(near > 1)))
            n[order[np.argsort(-r.means)[:2]] if grow == "leaders" else slice(None)] += {
                "leaders": 2, "adaptive": 1 if near > 0.7 else 5}.get(grow) or int(grow)  # fmt: skip
        totals += [worse[0][0], *np.any(worse, axis=0)]
    return totals / runs


def print_looks(runs: int, rng: np.random.Generator) -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["spreads", "cells", "first seeds", "more", "seeds", "first look errs %", "any look errs %",
                    "each look at 5 %: any errs %"])  # fmt: skip
    steps = [(str(more), looks * more) for more in (1, 2, 5) for looks in (1, 2, 5)]
    for spread, m, first in itertools.product(("equal", "half 3x"), (2, 8, 30), (2, 3, 5)):
        for more, added in [*steps, ("adaptive", 15), ("leaders", 6)] if spread == "equal" else steps[2::3]:
            rates = simulate_looks(Case(m, first + added, 0.3, spread), first, more, runs, rng)
            table.writerow([spread, m, first, more, first + added, *(f"{100 * rate:.1f}" for rate in rates)])
            sys.stdout.flush()
    table.writerow(["cells", *(f"look {look}: seeds that find half a point" for look in range(1, 7))])
    for m in (2, 8, 30):
        table.writerow([m, *(Design(0.3, m, alpha=ALPHA / look**3).seeds_needed(0.5) for look in range(1, 7))])


def simulate_collapses(case: Case, share: float, drop: float, who: str, runs: int, rng: np.random.Generator) -> Any:
    """Shares of sweeps: a claim is false of means, or of seeds that do not collapse, without and with the guard; a cell
    is named that has collapsed, or one that has not. ``drop`` in seed sds.

    ``who``: "one" cell, the better for it in its other seeds, so that all means are equal; "one lower", equal to the
    others in these; or "all" alike.
    """
    totals, first = np.zeros(6), np.arange(case.cells) == 0
    falls, lost = first | (who == "all"), share * drop * case.sd / 100
    normal = 0.88 + lost * (first & (who == "one"))
    means = normal - lost * falls
    for _ in range(runs):
        fell = (rng.random((case.cells, case.seeds)) < share) & falls[:, None]
        y, rates = case.draw(normal, rng) - fell * drop * case.sd / 100, list[bool]()
        named = collapsed(y, 1 / case.images).any(1)
        for guarded in (y, np.where(named[:, None], np.nan, y)):
            r = compare(guarded, 1 / case.images)
            rates += [bool((truth[r.worse] > truth[r.best or 0] - 1e-9).any()) for truth in (means, normal)]
        totals += [*rates, named[fell.any(1)].any(), named[~fell.any(1)].any()]
    return totals / runs


def print_collapses(runs: int, rng: np.random.Generator) -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["who collapses", "share", "drop", "cells", "seeds", "errs % of means", "of normal seeds",
                    "guarded: of means", "guarded: of normal seeds", "named %", "named falsely %"])  # fmt: skip
    none = [("none", 0.0, 0, spread) for spread in ("equal", "half 3x", "one 10x")]
    some = itertools.product(("one", "one lower", "all"), (0.1, 0.2), (5, 10, 20), ("equal",))
    for (who, share, drop, spread), m, n in itertools.product([*none, *some], (4, 10, 30), (3, 5, 10)):
        rates = simulate_collapses(Case(m, n, 0.3, spread), share, drop, who, runs, rng)
        shown = who if share else f"none, {spread}"
        table.writerow([shown, share, drop, m, n, *(f"{100 * rate:.1f}" for rate in rates)])
        sys.stdout.flush()


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


MODES: dict[str, tuple[Callable[[int, np.random.Generator], None], int]] = {
    "marks": (print_marks, 4000),
    "race": (print_race, 2000),
    "margin": (print_margin, 4000),
    "effects": (print_effects, 2000),
    "rates": (print_rates, 2000),
    "pictures": (print_pictures, 300),
    "questions": (print_questions, 300),
    "looks": (print_looks, 2000),
    "collapses": (print_collapses, 600),
    "splits": (print_splits, 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--runs", type=int, help="simulated sweeps per line")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    show, many = MODES[args.mode]
    runs = args.runs or many
    error = 100 * 2 * math.sqrt(0.05 * 0.95 / runs)
    told = f"{runs} sweeps a line; two Monte Carlo errors at 5 %: {error:.1f} %\n"
    print(told, file=sys.stderr if args.mode in ("pictures", "questions", "looks", "collapses") else sys.stdout)
    show(runs, np.random.default_rng(args.seed))


if __name__ == "__main__":
    main()
