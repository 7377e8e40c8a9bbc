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
(``calibrate.designs.Population``). They, ``looks`` and ``collapses`` print CSV.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

import numpy as np
from calibrate.effects import print_effects, print_rates
from calibrate.looks import print_collapses, print_looks
from calibrate.marks import print_margin, print_marks, print_splits
from calibrate.pictures import print_pictures, print_questions
from calibrate.race import print_race

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
