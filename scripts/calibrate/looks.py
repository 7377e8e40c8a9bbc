"""What breaks the rules of one look at sound cells: a sweep that grows, and cells that collapse."""

from __future__ import annotations

import csv
import itertools
import sys
from typing import Any

import numpy as np
from calibrate.designs import Case

from lora_vit.analysis.collapses import collapsed
from lora_vit.analysis.power import Design
from lora_vit.analysis.stats import ALPHA, compare, tukey_critical


def simulate_looks(case: Case, first: int, grow: str, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Shares of sweeps where a cell is called worse: at the first look, at any, at any if each erred in 5 %.

    ``grow``: so many seeds a time, until there are ``case.seeds``; "adaptive": one if something is nearly worse, else
    five; "leaders": two for the two best cells alone.
    """
    totals = np.zeros(3)
    for _ in range(runs):
        y, n, worse = case.draw(case.true_means(rng), rng), np.full(case.cells, first), list[tuple[bool, bool]]()
        while n.max() <= case.seeds:
            order = np.argsort(-n, kind="stable")  # so that fewer patterns of missing trials have to be simulated
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
