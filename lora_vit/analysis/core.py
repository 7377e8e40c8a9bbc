"""From folders to one :class:`Summary`: what the report, the files and a notebook show."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence

import pandas as pd

from lora_vit.analysis import checks, tables
from lora_vit.analysis.effects import Effects, main_effects
from lora_vit.analysis.fixed import FixedVerdict
from lora_vit.analysis.load import Loaded, load_trials
from lora_vit.analysis.power import detectable, expected_maximum, proportion_error, seeds_needed, seeds_within
from lora_vit.analysis.raced import replay
from lora_vit.analysis.stats import Comparison, compare, t_interval
from lora_vit.analysis.summary import Chosen, Design, Summary, Within
from lora_vit.config import nearest
from lora_vit.config.names import METHOD, short_names
from lora_vit.errors import RecordError

HALF_POINT = 0.005


def summarize(
    folders: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    where: str | None = None,
    margin: float | None = None,
) -> Summary:
    """Compare the trials below the folders by their val accuracy after the last epoch.

    Args:
        folders: of sweeps or runs.
        where: a condition on the trials, for example ``"rank >= 4 and dropout == 0"``.
        margin: cells shown to be at most so many percentage points below the best are *within margin*; None: a race's
            own.

    All that is no race's own (``comparison``, effects) is computed from a race's first seeds, which every cell has
    whatever came out. With ``where``, nothing else of a race is looked at.

    Raises:
        RecordError: nothing to summarize, an unknown name, or records that must not be compared.
    """
    listed = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    if margin is not None and not 0 < margin < math.inf:
        raise RecordError(f"--margin {margin:g} is impossible: give a difference above 0 that matters to you")
    loaded = load_trials(listed)
    trials = select(loaded.trials, where) if where else loaded.trials
    race = loaded.races[0] if not where and len(listed) == len(loaded.races) == loaded.sweeps == 1 else None
    if loaded.races and race is None and len(trials) > 1:
        trials = _first_seeds_alone(trials, loaded)
    checks.refuse(trials)
    trials, settings = tables.named(trials)
    says = FixedVerdict() if race is None else replay(race, trials)
    averaged = trials[tables.averaged(trials)]
    done = says.counted(averaged)
    if done.empty:
        raise RecordError(_nothing_counts(trials, loaded.problems))
    first, images = says.compared(done), averaged["data.val"].dropna()
    resolution = 1 / float(images.min()) if len(images) and images.min() > 0 else 0.0
    values = tables.matrix(done)
    result = compare(tables.matrix(first).reindex(values.index).to_numpy(float), resolution)
    cells = says.judged(tables.cells_table(done, values, result, settings, resolution), values)
    margin = says.margin if margin is None else margin / 100
    rates = tables.learning_rates(cells, settings) if says.same_seeds else pd.DataFrame()
    unfinished = checks.unfinished(trials, says.same_seeds)
    return Summary(
        folders=[str(f) for f in listed],
        where=where,
        trials=tables.trials_table(trials, settings),
        cells=cells if margin is None else cells.assign(within=says.within(cells, margin)),
        unfinished=unfinished,
        settings=settings,
        comparison=result,
        effects=_effects(first, settings),
        learning_rates=rates,
        design=_design(result),
        chosen=_chosen(tables.best_cell(cells), done if says.chooses() else done[:0]),
        within=None if margin is None else _within(cells, result, margin),
        environment=checks.environment(done),
        warnings=list(checks.warnings(done, cells, result, rates, unfinished)),
        problems=loaded.problems,
        says=says,
    )


def _first_seeds_alone(trials: pd.DataFrame, loaded: Loaded) -> pd.DataFrame:
    """The first seeds of races, comparable as a fixed sweep. Raises RecordError if their seeds differ at the start."""
    seeds = {(race["seed"], race["first_seeds"]) for race in loaded.races}
    if len(seeds) > 1:
        raise RecordError("these races started with different seeds: summarize one folder at a time")
    first, count = seeds.pop()
    kept = trials[trials["seed"].between(first, first + count - 1)]
    loaded.problems.append(f"a race: only the first {count} seeds, from {first} on, are compared here "
                           f"({len(trials) - len(kept)} trials are left out): results decided which cells got later "
                           "ones")  # fmt: skip
    return kept


def _nothing_counts(trials: pd.DataFrame, problems: list[str]) -> str:
    counts = ", ".join(f"{n} {status}" for status, n in trials["status"].value_counts().items())
    why = [f"; trial {r['trial']}: {r['error']}" for _, r in trials[trials["error"] != ""].head(1).iterrows()]
    why += [f"; {problem}" for problem in problems[:1]]
    return f"no completed trial with a val_accuracy ({counts}): nothing to summarize yet{''.join(why)}"


_WORD = re.compile(r"""("[^"]*"|'[^']*'|`[^`]*`)|(?<![\w.])([A-Za-z_][\w.]*)""")  # not the e6 of 1e6


def select(trials: pd.DataFrame, where: str) -> pd.DataFrame:
    """The trials that meet a condition in which settings go by short or dotted name. Raises RecordError."""
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


def _effects(done: pd.DataFrame, settings: list[str]) -> Effects:
    """Main effects among the trials with adapters (baselines have no rank)."""
    adapted = done[done[METHOD] == "lora"]
    short = short_names(tables.factors(adapted, settings))
    return main_effects(adapted.rename(columns=short), list(short.values()), "val_accuracy")


def _design(result: Comparison) -> Design:
    if not result.possible:
        return Design()
    cells = int(result.compared.sum())
    return Design(
        detectable=detectable(result.sd, cells, result.repeats, result.df),
        seeds_for_half_a_point=seeds_needed(HALF_POINT, result.sd, cells),
        optimism=result.sd / math.sqrt(result.repeats) * expected_maximum(cells),
    )


def _chosen(best: pd.Series, done: pd.DataFrame) -> Chosen:
    """The test figure of the best cell, and of no other."""
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


def _within(cells: pd.DataFrame, result: Comparison, margin: float) -> Within:
    """The cheapest cells that are good enough, and how many seeds it would take to find one."""
    found, seeds = cells[cells["below"] <= margin], seeds_within(margin, result.sd, int(result.compared.sum()))
    if found.empty:
        return Within(margin, seeds=seeds)
    small, fast = (found.sort_values(cost, kind="stable").iloc[0] for cost in ("trainable_parameters", "seconds"))
    return Within(margin, small["label"], small["trainable_parameters"], fast["label"], fast["seconds"], seeds)
