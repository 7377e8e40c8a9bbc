"""From folders to one :class:`Summary`: what the report, the files and a notebook show."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lora_vit.analysis import checks, collapses, splits, tables
from lora_vit.analysis.effects import main_effects
from lora_vit.analysis.load import Loaded, load_trials
from lora_vit.analysis.pictures import Sums
from lora_vit.analysis.questions import answers
from lora_vit.analysis.stats import ALPHA, Interval, compare, t_interval
from lora_vit.analysis.summary import RaceSummary, Summary, counted, first_seeds, judged, replay
from lora_vit.config.names import short_names
from lora_vit.config.rules import one_of
from lora_vit.errors import RecordError
from lora_vit.metrics import METRICS


def summarize(
    folders: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    where: str | None = None,
    margin: float | None = None,
    metric: str | None = None,
) -> Summary:
    """Compare the trials below the folders, of sweeps or runs, by a metric on val after the last epoch.

    ``where``: a condition on the trials, for example ``"rank >= 4 and dropout == 0"``. ``margin``: cells shown to be at
    most so many percentage points below the best are *within margin*; None: a race's own. ``metric``: one of METRICS;
    None: the trials' own ``trainer.metric``. All that is no race's own (``comparison``, effects) is computed from a
    race's first seeds, which every cell has whatever came out. With ``where``, or another metric than the race's,
    nothing else of a race is looked at. Raises RecordError: nothing to summarize, an unknown name (of a metric:
    ConfigError), or records that must not be compared.
    """
    listed = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    if margin is not None and not 0 < margin < math.inf:
        raise RecordError(f"--margin {margin:g} is impossible: give a difference above 0 that matters to you")
    margin = None if margin is None else margin / 100
    loaded = load_trials(listed)
    plan, metric = _looked_at(loaded, len(listed), where, metric)
    value = f"val_{metric}"
    together, overlap, repeated = splits.grouped(loaded.trials) if plan is None else (loaded.trials, 0.0, [])
    checks.refuse(together)
    trials, settings = tables.named(together)
    averaged = trials[tables.averaged(trials, value)]
    first = averaged if plan is None else first_seeds(plan, averaged)
    sums, raced = Sums(metric, overlap), first["cell"].isin([] if plan is None else plan["cells"])
    sums.add_all(first[raced])
    race = None if plan is None else replay(plan, trials, value, sums)
    sums.add_all(first[~raced])  # only now: its workers do not know them
    seen = trials if race is None else counted(race, trials)
    done = seen[tables.averaged(seen, value)]
    if done.empty:
        counts = ", ".join(f"{n} {status}" for status, n in trials["status"].value_counts().items())
        why = "".join(f"; trial {r['trial']}: {r['error']}" for _, r in trials[trials["error"] != ""][:1].iterrows())
        raise RecordError(f"no completed trial with a {value} ({counts}){why}: nothing to summarize yet")
    images = averaged["data.val"].astype(float).min()
    resolution = max(1 / float(images) if images > 0 else 0.0, sums.step)
    values = tables.matrix(done, value)
    pictures = sums.of(list(values.index))
    sound, failed, unstable = _sound(first, seen, value, resolution)
    compared = tables.matrix(sound, value).reindex(values.index).to_numpy(float)
    alpha = ALPHA / (1 + len(loaded.looks)) ** 3  # all looks together err in 5 % (1 + 1/8 + 1/27 + ...) = 6 % at most
    result = compare(compared, resolution, pictures=pictures, alpha=alpha, overlap=overlap)
    cells = tables.cells_table(done, values, result, settings, resolution)
    if race is not None:
        margin = race.rules.margin if margin is None else margin
        cells = judged(race, cells, values, margin)
    elif margin is not None:
        cells["within"] = cells["below"] <= margin
    _mark_unsound(cells, failed, unstable)
    effects = main_effects(*tables.factors(sound, settings), value, resolution, sums)
    tested, of_test = _tested(done, f"test_{metric}", overlap)
    asked, chosen = answers(done, values.index, result, settings, margin), tables.best_cell(cells)["cell"]
    if race is None and "method" in asked:  # a race chooses one cell, if any
        asked["method"]["test"] = asked["method"]["cell"].map(of_test)
    unfinished = checks.unfinished(trials, value)
    edges = tables.at_edges(cells, settings) if race is None else []
    return (Summary if race is None else RaceSummary)(
        folders=[str(f) for f in listed],
        where=where,
        margin=margin,
        trials=tables.trials_table(trials, settings, value),
        cells=cells,
        unfinished=unfinished,
        settings=settings,
        comparison=result,
        effects=effects,
        test=of_test[chosen] if race is None or race.selected is not None else t_interval(np.empty(0)),
        test_images=tested,
        environment=checks.environment(done),
        warnings=[
            *repeated,
            *checks.looked(loaded.looks, result.alpha),
            *checks.collapsed(cells, unstable),
            *checks.warnings(done, result, edges, unfinished),
            *checks.unseen(sums, len(first)),
        ],
        problems=loaded.problems,
        race=race,
        command=loaded.command,
        metric=metric,
        answers=asked,
        pictures=0 if pictures is None else pictures.means.shape[1],
    )


def _sound(
    first: pd.DataFrame, seen: pd.DataFrame, value: str, resolution: float
) -> tuple[pd.DataFrame, pd.Series, dict[str, str]]:
    """The trials that claims rest on, and of the other cells how many trials failed, or how they collapsed."""
    failed = seen[seen["status"] == "failed"].groupby("cell").size()
    sound = first[~first["cell"].isin(failed.index)]  # the seeds that a cell survived say nothing of the others
    unstable = collapses.named(tables.matrix(sound, value), resolution)
    return sound[~sound["cell"].isin(unstable)], failed, unstable


def _mark_unsound(cells: pd.DataFrame, failed: pd.Series, unstable: dict[str, str]) -> None:
    """Count the trials of each cell that ``failed``, and say in ``mark`` why a cell gets no verdict."""
    no_verdict = cells["mark"] == "no verdict"
    cells["mark"] = cells["mark"].mask(cells["cell"].isin(unstable) & no_verdict, "unstable")
    if (lost := cells["cell"].map(failed).fillna(0).astype(int)).any():
        cells["failed"] = [f"{n} of {n + there}" if n else "" for n, there in zip(lost, cells["n"], strict=True)]
        cells["mark"] = cells["mark"].mask((lost > 0) & no_verdict, "failed")


def _tested(done: pd.DataFrame, figure: str, overlap: float) -> tuple[int, dict[str, Interval]]:
    """The number of test images (0: not known), and the figure of each cell on them."""
    images = int(np.nan_to_num(done["data.test"].astype(float).min()))
    step, figures = 1 / images if images else 0.0, tables.matrix(done, figure).reindex(done["cell"].unique())
    return images, {str(cell): t_interval(x.to_numpy(float), step, overlap) for cell, x in figures.iterrows()}


def _looked_at(loaded: Loaded, folders: int, where: str | None, metric: str | None) -> tuple[Any, str]:
    """Leave the trials that are looked at; the race if all of them are of one, and the metric that they have."""
    if where:
        loaded.trials = select(loaded.trials, where)
    if metric is None and len(asked := loaded.trials["metric"].unique()) > 1:
        raise RecordError(f"the trials have several trainer.metric ({', '.join(map(str, asked))}): give --metric")
    one_of("--metric", metric := metric or asked[0], [*METRICS])
    races = [plan["race"] for plan in loaded.plans.values() if plan.get("race")]
    one = folders == len(races) == loaded.sweeps == loaded.trials["sweep"].nunique() == 1
    if not where and one and races[0]["metric"] == metric:
        return races[0], metric
    if races and len(loaded.trials) > 1:  # the first seeds alone compare as a fixed sweep
        race, *others = races
        if any((other["seed"], other["first_seeds"]) != (race["seed"], race["first_seeds"]) for other in others):
            raise RecordError("these races started with different seeds: summarize one folder at a time")
        whole, loaded.trials = len(loaded.trials), first_seeds(race, loaded.trials)
        loaded.problems.append(f"a race: only the first {race['first_seeds']} seeds, from {race['seed']} on, are "
                               f"compared here ({whole - len(loaded.trials)} trials are left out): results decided "
                               "which cells got later ones")  # fmt: skip
    return None, metric


def select(trials: pd.DataFrame, where: str) -> pd.DataFrame:
    """The trials that meet a condition in which settings go by short or dotted name. Raises RecordError."""
    dotted = "|".join(re.escape(c) for c in map(str, trials.columns) if "." in c)
    quoted = rf"""("[^"]*"|'[^']*'|`[^`]*`)|\b({dotted})\b"""  # pandas wants a name with a dot in backticks
    condition = re.sub(quoted, lambda match: match[1] or f"`{match[2]}`", where)
    both = pd.DataFrame({**trials, **{short: trials[c] for c, short in short_names(trials.columns).items()}})
    try:
        kept = trials.loc[both.query(condition, engine="python", local_dict={}, global_dict={}).index]
    except Exception as error:  # pandas raises many kinds here, SyntaxError among them
        text = str(error).split("\n")[0][:120]
        raise RecordError(f"--where '{where}' cannot be read ({text}); for example --where \"rank >= 4\"") from None
    if kept.empty:
        raise RecordError(f"--where '{where}' leaves none of the {len(trials)} trials")
    return kept.reset_index(drop=True)
