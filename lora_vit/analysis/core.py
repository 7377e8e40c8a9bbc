"""From folders to one :class:`Summary`: what the report, the files and a notebook show."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lora_vit.analysis import checks, tables, texts
from lora_vit.analysis.effects import Effects, main_effects
from lora_vit.analysis.load import Loaded, correct, load_trials
from lora_vit.analysis.power import (
    PairedImages,
    detectable,
    expected_maximum,
    mcnemar,
    proportion_error,
    seeds_needed,
    seeds_within,
)
from lora_vit.analysis.race import Rules, decide, one_stage
from lora_vit.analysis.stats import SPREADS, Comparison, compare, t_interval
from lora_vit.analysis.summary import Chosen, Design, Metric, Raced, Summary, Within
from lora_vit.config import nearest
from lora_vit.errors import RecordError

HALF_POINT = 0.005


def summarize(
    folders: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    metric: str = "val_accuracy",
    where: str | None = None,
    pivot: tuple[str, str] | None = None,
    compare_trials: tuple[str, str] | None = None,
    spreads: str = "auto",
    margin: float | None = None,
) -> Summary:
    """Compare the trials below the folders.

    Args:
        folders: of sweeps or runs.
        metric: one of ``tables.COMPARABLE``; the last epoch's.
        where: a condition on the trials, for example ``"rank >= 4 and dropout == 0"``.
        pivot: two settings, for a table of one against the other.
        compare_trials: two trial ids (or unique beginnings) for McNemar's test on the val images.
        spreads: see :func:`lora_vit.analysis.stats.compare`.
        margin: cells shown to be at most so far below the best are *within margin* (percentage points of an accuracy,
            else units of the metric); None: a race's own.

    Of a race, all that is no race's own (``comparison``, effects) is computed from the first seeds, which every cell
    has whatever came out; and with ``where`` or another metric than its own, nothing else is looked at.

    Raises:
        RecordError: nothing to summarize, an unknown name, or records that must not be compared.
    """
    if spreads not in SPREADS:
        raise RecordError(f"spreads={spreads} is unknown (one of: {', '.join(SPREADS)})")
    by = tables.metric(metric)
    listed = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    if margin is not None and not 0 < margin < math.inf:
        raise RecordError(f"--margin {margin:g} is impossible: give a difference above 0 that matters to you")
    loaded = load_trials(listed)
    trials = select(loaded.trials, where) if where else loaded.trials
    alone = len(listed) == len(loaded.races) == loaded.sweeps == 1
    race = loaded.races[0] if alone and not where and by == tables.RACED_BY else None
    if loaded.races and race is None and len(trials) > 1:
        trials = _first_seeds_alone(trials, loaded)
    checks.refuse(trials)
    settings = tables.varying(trials)
    trials = trials.assign(label=tables.labels(trials, settings))
    images = trials.loc[tables.averaged(trials, by), "data.val"].dropna()
    resolution = 1 / float(images.min()) if by.accuracy and len(images) and images.min() > 0 else 0.0
    raced = None if race is None else _raced(race, trials, resolution)
    done = _done(trials, by, loaded.problems, raced)
    first = done if race is None else _first_seeds(done, race)
    values = tables.matrix(done, by)
    result = compare(by.sign * tables.matrix(first, by).reindex(values.index).to_numpy(float), resolution, spreads)
    if raced is not None and len(raced.cells) > 1 and math.isfinite(result.sd):
        raced.one_stage = len(raced.cells) * one_stage(result.sd, len(raced.cells), raced.rules)
    cells = tables.cells_table(done, values, result, by, settings, resolution)
    if raced is not None:
        cells = tables.by_race(cells, values, raced)
        margin = 100 * raced.rules.margin if margin is None else margin
    summary = Summary(
        metric=by,
        folders=[str(f) for f in listed],
        trials=tables.trials_table(trials, by, settings),
        cells=cells,
        unfinished=checks.unfinished(trials, by, raced is not None),
        settings=settings,
        comparison=result,
        effects=_effects(first, settings, by),
        learning_rates=pd.DataFrame() if raced else tables.learning_rates(cells, settings, by),
        pivot=None if pivot is None else tables.pivot(cells, trials, pivot),
        design=_design(result, by),
        chosen=_chosen(tables.best_cell(cells), done if raced is None or raced.selected else done[:0]),
        environment=checks.environment(done),
        pair=None if compare_trials is None else _pair(trials, compare_trials, loaded.problems),
        problems=loaded.problems,
        where=where,
        race=raced,
        within=None if margin is None else _within(cells, result, margin / 100 if by.accuracy else margin, raced),
    )
    summary.warnings = checks.warnings(done, summary)
    summary.verdict = texts.verdict(summary)
    return summary


def _first_seeds(trials: pd.DataFrame, race: dict[str, Any]) -> pd.DataFrame:
    """The trials that the race's results did not ask for."""
    return trials[trials["seed"].between(race["seed"], race["seed"] + race["first_seeds"] - 1)]


def _first_seeds_alone(trials: pd.DataFrame, loaded: Loaded) -> pd.DataFrame:
    """What of races can be compared like fixed sweeps. Raises RecordError where they began differently."""
    race = loaded.races[0]
    if any((other["seed"], other["first_seeds"]) != (race["seed"], race["first_seeds"]) for other in loaded.races):
        raise RecordError("these races began with different seeds: summarize one folder at a time")
    kept = _first_seeds(trials, race)
    loaded.problems.append(f"a race: only the first {race['first_seeds']} seeds, from {race['seed']} on, are compared "
                           f"here ({len(trials) - len(kept)} trials are left out): later ones were trained where "
                           "results asked for them")  # fmt: skip
    return kept


def _raced(plan: dict[str, Any], trials: pd.DataFrame, resolution: float) -> Raced:
    """The race again, from the records."""
    rules, cells = Rules.of(plan), plan["cells"]
    of_race = trials[trials["cell"].isin(cells) & trials["status"].isin(["completed", "failed"])]
    seeds = range(plan["seed"], plan["seed"] + rules.most_seeds)
    of_race = of_race[of_race["seed"].isin(seeds)]
    y, failed = np.full((len(cells), len(seeds)), np.nan), np.zeros((len(cells), len(seeds)), dtype=bool)
    for cell, seed, status, accuracy in of_race[["cell", "seed", "status", "val_accuracy"]].itertuples(index=False):
        place = cells.index(cell), seed - plan["seed"]
        y[place], failed[place] = accuracy, status == "failed" or math.isnan(accuracy)
    y[failed] = np.nan
    return Raced(rules, decide(y, failed, rules, resolution), cells, plan["seed"], y, plan.get("command"))


def _within(cells: pd.DataFrame, result: Comparison, margin: float, raced: Raced | None) -> Within:
    """The cheapest cells that are good enough, or how many seeds it would take to find one."""
    cells["within"] = cells["below"] <= margin
    found, k = cells[cells["within"]], int(result.compared.sum())
    if raced is not None and raced.shows(margin) and not (cells["mark"] == "not raced").any():
        cells["within"] |= cells["mark"] == "selected"
    seeds = seeds_within(margin, result.sd, k)
    if found.empty:
        return Within(margin, seeds=seeds)
    small, fast = (found.sort_values(cost, kind="stable").iloc[0] for cost in ("trainable_parameters", "seconds"))
    return Within(margin, small["label"], small["trainable_parameters"], fast["label"], fast["seconds"], seeds)


def _done(trials: pd.DataFrame, metric: Metric, problems: list[str], raced: Raced | None) -> pd.DataFrame:
    """The trials that count. Raises RecordError where there is none."""
    done = trials[tables.averaged(trials, metric)]
    if raced is not None:
        seeds = done["cell"].map(raced.seeds_of).fillna(raced.rules.first_seeds)
        done = done[done["seed"].between(raced.first, raced.first + seeds - 1)]
    if done.empty:
        counts = ", ".join(f"{n} {status}" for status, n in trials["status"].value_counts().items())
        why = [f"; trial {r['trial']}: {r['error']}" for _, r in trials[trials["error"] != ""].head(1).iterrows()]
        why += [f"; {problem}" for problem in problems[:1]]
        raise RecordError(
            f"no completed trial with a {metric.name} ({counts}): nothing to summarize yet{''.join(why)}"
        )
    return done


_WORD = re.compile(r"""("[^"]*"|'[^']*'|`[^`]*`)|(?<![\w.])([A-Za-z_][\w.]*)""")  # not the e6 of 1e6


def select(trials: pd.DataFrame, where: str) -> pd.DataFrame:
    """The trials that meet a condition in which settings go by short or dotted name."""
    aliases = tables.aliases(list(trials.columns))

    def named(match: re.Match[str]) -> str:
        word = match.group(2)
        if word in aliases:
            return f"`{aliases[word]}`"
        if word and word not in ("and", "or", "not", "in", "is", "True", "False", "None"):
            raise RecordError(f"--where '{where}': there is no column '{word}'{nearest(word, sorted(aliases))}")
        return match.group()

    if "@" in where:
        raise RecordError(f"--where '{where}' cannot be read: @ is not allowed")
    condition = _WORD.sub(named, where)
    try:
        kept = trials.query(condition, engine="python")
    except Exception as error:  # pandas raises many kinds here, SyntaxError among them
        text = str(error).split("\n")[0][:120]
        raise RecordError(f"--where '{where}' cannot be read ({text}); for example --where \"rank >= 4\"") from None
    if not isinstance(kept, pd.DataFrame) or kept.empty:
        raise RecordError(f"--where '{where}' leaves none of the {len(trials)} trials")
    return kept.reset_index(drop=True)


def _effects(done: pd.DataFrame, settings: list[str], metric: Metric) -> Effects:
    """Main effects among the trials with adapters (baselines have no rank)."""
    adapted = done[done[tables.METHOD] == "lora"]
    short = tables.short_names(tables.factors(adapted, settings))
    return main_effects(adapted.rename(columns=short), list(short.values()), metric.name)


def _design(result: Comparison, metric: Metric) -> Design:
    if not result.possible:
        return Design()
    cells = int(result.compared.sum())
    smallest = detectable(result.sd, cells, result.repeats, result.df)
    needed = seeds_needed(HALF_POINT, result.sd, cells) if metric.accuracy else None
    optimism = result.sd / math.sqrt(result.repeats) * expected_maximum(cells)
    return Design(smallest, needed, optimism)


def _chosen(best: pd.Series, done: pd.DataFrame) -> Chosen:
    """The test figure of the first row of the cells table, and of no other."""
    trials = done[done["cell"] == best["cell"]]
    interval = t_interval(trials["test_accuracy"].to_numpy(float))
    sizes = trials["data.test"].dropna()
    images = int(sizes.min()) if len(sizes) else 0
    return Chosen(
        label=str(best["label"]),
        cell=str(best["cell"]),
        test=interval.mean,
        between_seeds=(interval.high - interval.low) / 2,
        of_test_set=proportion_error(interval.mean, images),
        images=images,
    )


def _pair(trials: pd.DataFrame, wanted: tuple[str, str], problems: list[str]) -> tuple[str, str, PairedImages] | None:
    """McNemar's test of two named trials on the val images of both; None where their predictions do not allow it."""
    rows = []
    for name in wanted:
        found = trials[trials["trial"].str.startswith(name)] if name else trials[:0]
        if len(found) != 1:
            many = f"{len(found)} trials begin so" if len(found) else "there is no such trial"
            raise RecordError(f"--compare {name}: {many}{nearest(name, trials['trial'].tolist())}")
        rows.append(found.iloc[0])
    try:
        (ids_a, a), (ids_b, b) = (correct(r["folder"], "val") for r in rows)
        if len(ids_a) == 0 or len(ids_a) != len(ids_b) or (ids_a != ids_b).any():
            raise RecordError("the two trials have predictions of different val images, or of none")
    except RecordError as error:
        problems.append(f"--compare {' '.join(wanted)}: {error}")
        return None
    first, second = (f"{r['label']}, seed {r['seed']} ({r['trial']})" for r in rows)
    return first, second, mcnemar(a, b)
