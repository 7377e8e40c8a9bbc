"""Claims about other pictures of the kind: *worse*, the race, methods and ranks each at its best, P(best)."""

from __future__ import annotations

import csv
import itertools
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from calibrate.designs import Population, is_within
from scipy import special

from lora_vit.analysis.questions import at_best, chances
from lora_vit.analysis.race import Rules, decide
from lora_vit.analysis.stats import compare


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
