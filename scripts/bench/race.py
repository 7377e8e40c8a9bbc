"""The race against other ways to select a cell: share within the margin of the best, and trials.

    python scripts/bench/race.py peers [--runs 500]
    python scripts/bench/race.py digits
    python scripts/bench/race.py truth [--runs 40]

``peers``: 30 simulated cells, margin 0.5 points, at most 30 seeds: our race, Optuna's WilcoxonPruner and SMAC's
intensifier, the real libraries (``pip install smac`` in an environment of its own; without it SMAC is left out).
``digits``: the commands of ``sweep=race`` and of one stage with the same guarantee; what they select is compared with
``race_truth.csv``, the cells' means over seeds that neither of them has, which ``truth`` trains. Overrides
(``lora.rank=1,2``) and ``--truth FILE`` make it another sweep, with a truth of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import machine, report

from lora_vit.analysis.core import summarize
from lora_vit.analysis.race import Rules, decide
from lora_vit.analysis.stats import dunnett_critical
from lora_vit.analysis.summary import Summary

CELLS, MARGIN, IMAGES = 30, 0.005, 10_000

Selected = tuple[int | None, int]  # cell and trials


def ours(y: np.ndarray, rng: np.random.Generator, first: int) -> Selected:
    race = decide(y, np.zeros(y.shape, dtype=bool), Rules(MARGIN, first, y.shape[1]), 1 / IMAGES)
    return race.selected, sum(map(race.seeds_of, range(len(race.y))))


def wilcoxon(y: np.ndarray, rng: np.random.Generator, seeds: int) -> Selected:
    """As Optuna's documentation says: each cell a trial, each seed a step, shuffled; a pruned trial gives its mean."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials = 0

    def objective(trial: Any) -> float:
        nonlocal trials
        cell, values = trial.suggest_int("cell", 0, len(y) - 1), []
        for seed in rng.permutation(seeds):
            values.append(float(y[cell, seed]))
            trial.report(values[-1], int(seed))
            trials += 1
            if trial.should_prune():
                break
        return sum(values) / len(values)

    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.WilcoxonPruner(p_threshold=0.1))
    for cell in rng.permutation(len(y)):
        study.enqueue_trial({"cell": int(cell)})
    study.optimize(objective, n_trials=len(y))
    return study.best_params["cell"], trials


def smac(y: np.ndarray, rng: np.random.Generator, most: int) -> Selected:
    """SMAC's intensifier over the shuffled cells until it wants no more trials; ``most`` is its max_config_calls."""
    from ConfigSpace import Configuration, ConfigurationSpace
    from smac import Scenario
    from smac.intensifier import Intensifier
    from smac.runhistory import RunHistory

    logging.disable(logging.WARNING)
    space = ConfigurationSpace({"cell": (0, len(y) - 1)})
    scenario = Scenario(space, deterministic=False, n_trials=10**6, seed=int(rng.integers(2**31)))
    intensifier = Intensifier(scenario, max_config_calls=most, max_incumbents=1)
    intensifier.runhistory = RunHistory()
    intensifier.config_selector = [Configuration(space, {"cell": int(i)}) for i in rng.permutation(len(y))]
    columns: dict[int, int] = {}
    trials = 0
    for trial in intensifier:
        cell, column = trial.config["cell"], columns.setdefault(trial.seed, len(columns))
        intensifier.runhistory.add_running_trial(trial)
        intensifier.runhistory.add(trial.config, cost=1 - float(y[cell, column]), seed=trial.seed, force_update=True)
        intensifier.update_incumbents(trial.config)
        trials += 1
    best = intensifier.get_incumbent()
    return (None if best is None else best["cell"]), trials


def peers(args: argparse.Namespace) -> None:
    """Print one line for each contender and arrangement of the true means."""
    contenders: dict[str, Callable[[np.ndarray, np.random.Generator], Selected]] = {
        **{f"race, {n} first seeds": lambda y, rng, n=n: ours(y, rng, n) for n in (3, 5)},
        **{f"WilcoxonPruner, {n} seeds": lambda y, rng, n=n: wilcoxon(y, rng, n) for n in (5, 10)},
    }
    facts = {"runs": args.runs or 500, "optuna": version("optuna"), "smac": "not installed, left out"}
    if importlib.util.find_spec("smac"):
        contenders |= {f"SMAC, at most {n} seeds": lambda y, rng, n=n: smac(y, rng, n) for n in (3, 30)}
        facts["smac"] = version("smac")
    rows = []
    for means, sd in (("one ahead by 0.5", 0.3), ("spread, sd 0.6", 0.3), ("one ahead by 0.5", 0.6)):
        totals = {name: np.zeros(3) for name in contenders}  # within the margin, selects none, trials
        for run in range(facts["runs"]):
            rng = np.random.default_rng(run)
            true = np.r_[MARGIN, np.zeros(CELLS - 1)] if means.startswith("one") else rng.normal(0, 0.006, CELLS)
            y = 0.88 + true[:, None] + rng.normal(0, 0.005, 30) + rng.normal(0, sd / 100, (CELLS, 30))
            y = np.round(y * IMAGES) / IMAGES
            for name, select in contenders.items():
                cell, trials = select(y, np.random.default_rng([run, 1]))
                good = cell is not None and bool(true[cell] > true.max() - MARGIN + 1e-9)
                totals[name] += [good, cell is None, trials / CELLS]
        for name, total in totals.items():
            good, none, trials = total / facts["runs"]
            rows.append({"means": means, "seed sd": sd, "way": name, "within the margin %": round(100 * good, 1),
                         "selects none %": round(100 * none, 1), "trials a cell": round(trials, 1)})  # fmt: skip
    report(rows, facts, None)


FIRST_OF_TRUTH = 1000
"""The truth's first seed."""


def trained(*overrides: str) -> tuple[Summary, float]:
    """The summary of ``sweep=race`` so changed, run in an empty folder, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "lora_vit.train", "sweep=race", *overrides, "hydra.sweep.dir=s"]
        began = time.perf_counter()
        subprocess.run(line, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return summarize(Path(folder) / "s"), time.perf_counter() - began


def fixed(seeds: range, overrides: Sequence[str]) -> tuple[Summary, float]:
    """The same sweep without the race, every cell with the same seeds."""
    of_race = ("sweep.margin=", "sweep.first_seeds=", "sweep.most_seeds=")
    others = [line for line in overrides if not line.startswith(of_race)]
    return trained("sweep.margin=null", f"seed=range({seeds.start},{seeds.stop})", *others)


def truth(args: argparse.Namespace) -> None:
    """Write each cell's mean over so many seeds."""
    summary, _ = fixed(range(FIRST_OF_TRUTH, FIRST_OF_TRUTH + (args.runs or 40)), args.overrides)
    summary.cells[["label", "mean", "sd", "n"]].to_csv(args.truth, index=False, float_format="%.5f")


def digits(args: argparse.Namespace) -> None:
    """Print trials, seconds and what was selected, for the race and for one stage."""
    true = pd.read_csv(args.truth).set_index("label")["mean"]
    raced, seconds = trained(*args.overrides)
    assert raced.race is not None
    critical = dunnett_critical(len(raced.race.cells) - 1, 1e6)  # Bechhofer (1954), over seeds alone
    seeds = math.ceil(2 * (critical * raced.comparison.sd / raced.race.rules.margin) ** 2)
    stage, longer = fixed(range(seeds), args.overrides)
    rows = []
    for way, summary, took in (("race", raced, seconds), (f"one stage, {seeds} seeds", stage, longer)):
        selected = summary.cells["label"][0]
        below = round(100 * (true.max() - true[selected]), 2)
        rows.append({"way": way, "trials": len(summary.trials), "s": took, "selected": selected,
                     "below the best, points": below})  # fmt: skip
    report(rows, machine(), None)


MODES = {"peers": peers, "digits": digits, "truth": truth}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("overrides", nargs="*", help="of the sweep's command")
    parser.add_argument("--runs", type=int, help="simulated sweeps (500); seeds of the truth (40)")
    parser.add_argument("--truth", type=Path, metavar="FILE", default=Path(__file__).with_name("race_truth.csv"))
    args = parser.parse_intermixed_args()
    warnings.filterwarnings("ignore")
    MODES[args.mode](args)


if __name__ == "__main__":
    main()
