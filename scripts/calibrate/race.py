"""The race: how often the selected cell is within the margin, and its trials beside designs of one and two stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from calibrate.designs import IMAGES, Case, head, is_within, line
from scipy import optimize, special

from lora_vit.analysis.race import Race, Rules, decide, wanted
from lora_vit.analysis.stats import chi_nodes, dunnett_critical

LONG = 1000
"""Seeds of a race that is let run on, to see what its limit hides."""


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
