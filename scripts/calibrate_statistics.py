"""How often do the report's marks err, and what do they find? Simulated sweeps through the report's own functions.

    python scripts/calibrate_statistics.py              # the table of docs/statistics.md, several minutes
    python scripts/calibrate_statistics.py --small      # seconds

A simulated accuracy is ``0.88 + seed effect + error``, rounded to 1/10,000 (10,000 validation images). The seed
effect (sd 0.5 points) is shared by all cells; the error's sd is the "seed sd" of the table. "half 3x": half of the
cells spread three times as much; "one 10x": a single cell spreads ten times as much.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np

from lora_vit.analysis.stats import compare

IMAGES = 10_000


@dataclass(frozen=True)
class Case:
    """One design; ``sd`` and ``lead`` in points, ``lead`` of the first cell over all others.

    ``spread``: equal, half 3x or one 10x; the cells that spread more are the last.
    """

    cells: int
    seeds: int
    sd: float
    spread: str = "equal"
    lead: float = 0.0


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
    sd = np.full(case.cells, case.sd / 100)
    if case.spread == "half 3x":
        sd[case.cells - case.cells // 2 :] *= 3
    elif case.spread == "one 10x":
        sd[-1] *= 10
    totals = np.zeros(5)
    for _ in range(runs):
        y = 0.88 + rng.normal(0, 0.005, case.seeds) + rng.normal(size=(case.cells, case.seeds)) * sd[:, None]
        y[0] += case.lead / 100
        result = compare(np.round(y * IMAGES) / IMAGES, resolution=1 / IMAGES, spreads=spreads, p_values=False)
        found = result.worse[1:].mean() if result.best == 0 else 0.0
        excluded = (~result.candidate[1:]).mean()
        totals += [result.worse.any(), result.candidate[0], result.candidate[-1], found, excluded]
    return Rates(*(totals / runs))


def null_cases() -> list[Case]:
    even = [("equal", sd) for sd in (0.0, 0.3, 1.0)]
    return [
        Case(m, n, sd, spread)
        for spread, sd in (*even, ("half 3x", 0.3), ("half 3x", 1.0), ("one 10x", 0.3))
        for m in (2, 10, 30)
        for n in (2, 3, 5)
    ]


def power_cases() -> list[Case]:
    return [Case(m, n, 0.3, lead=lead) for lead in (0.5, 1.0) for m in (2, 10, 30) for n in (2, 3, 5)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="300 sweeps per line instead of 4,000")
    parser.add_argument("--runs", type=int, help="simulated sweeps per line")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    runs = args.runs or (300 if args.small else 4000)
    rng = np.random.default_rng(args.seed)
    error = 100 * 2 * math.sqrt(0.05 * 0.95 / runs)
    print(f"{runs} sweeps a line; two Monte Carlo errors at 5 %: {error:.1f} %\n")
    print("| spreads | seed sd | cells | seeds | 'worse' errs % | candidates keep the best % | pooled error: errs % |")
    print("|---|---|---|---|---|---|---|")
    for case in null_cases():
        r, pooled = simulate(case, runs, rng), simulate(case, runs, rng, "equal")
        kept = min(r.kept, r.kept_last)
        print(
            f"| {case.spread} | {case.sd} | {case.cells} | {case.seeds} | {100 * r.worse:.1f} | {100 * kept:.1f} "
            f"| {100 * pooled.worse:.1f} |",
            flush=True,
        )
    print("\n| lead | cells | seeds | 'worse' finds % | not a candidate % | pooled error only: finds % |")
    print("|---|---|---|---|---|---|")
    for case in power_cases():
        r, pooled = simulate(case, runs, rng), simulate(case, runs, rng, "equal")
        print(
            f"| {case.lead} | {case.cells} | {case.seeds} | {100 * r.found:.0f} | {100 * r.excluded:.0f} "
            f"| {100 * pooled.found:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
