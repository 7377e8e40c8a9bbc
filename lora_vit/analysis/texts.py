"""Numbers and sentences that people read: the same words on the terminal, in the files and on the page."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from lora_vit.analysis.stats import MOST_SEEDS
from lora_vit.analysis.summary import Chosen, Metric, Raced, Summary
from lora_vit.analysis.tables import best_cell
from lora_vit.records import SEARCH

LEGEND = (
    "Marks: *best* has the highest mean; *candidate* may still be the true best (the true best is among best and "
    "candidates with 95 %); *worse* is shown to be worse than the best (5 % risk over all pairs together); *open* is "
    "no candidate, yet not shown to be worse; *no verdict*: one seed. A star marks the Pareto front of the metric "
    "against that cost."
)
"""What the cells table's marks mean, in Markdown."""
RACE_LEGEND = (
    "A race: *selected* is the cell that was left; *left* ones were not told apart; *out* ones fell behind after n "
    "seeds (later ones, if any, decide nothing and are not in the table); *failed*: a trial failed. Cells ran as long "
    "as they did because of their results: a mean and its interval describe the trials and claim nothing. A star marks "
    "the Pareto front of the metric against that cost."
)
"""The same for a race."""


def plain(metric: Metric, value: float) -> str:
    """A metric's value or spread without its unit: accuracies in % or points, losses as they are."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.2f}" if metric.accuracy else f"{value:.4f}"


def number(metric: Metric, value: float) -> str:
    """A metric's value with its unit."""
    return plain(metric, value) + (" %" if metric.accuracy and math.isfinite(value) else "")


def signed(metric: Metric, value: float) -> str:
    """A difference with its sign (none before a zero), accuracies in points."""
    text = plain(metric, value)
    if text == "–":
        return text
    return text.lstrip("-") if float(text) == 0 else text if value < 0 else f"+{text}"


def points(metric: Metric, value: float) -> str:
    """The size of a difference with its unit."""
    return plain(metric, value) + (" points" if metric.accuracy else "")


def count(value: float) -> str:
    """A number in few characters: 1,234 or 85.8 M."""
    if not math.isfinite(value):
        return "–"
    return f"{value / 1e6:,.2f} M" if value >= 1e6 else f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes as kB, MB or GB (powers of 1000)."""
    if not math.isfinite(value):
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f} B"


def duration(value: float) -> str:
    """Seconds, with tenths below a hundred."""
    return "–" if not math.isfinite(value) else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def verdict(summary: Summary) -> str:
    """One sentence: what is best, what is shown to be worse, and what is still open."""
    cells, c, metric = summary.cells, summary.comparison, summary.metric
    best = best_cell(cells)
    what, extreme = metric.title.lower(), "highest" if metric.sign > 0 else "lowest"
    if len(cells) == 1 and (summary.race is None or len(summary.race.cells) == 1):
        seeds = f"{int(best['n'])} seeds" if best["n"] > 1 else "one seed"
        return f"One cell, nothing to compare: {best['label']} has {what} {_with_interval(metric, best)} ({seeds})."
    if summary.race is not None:
        return " ".join(filter(None, [_race_verdict(summary, summary.race), within_text(summary)]))
    if not c.possible:
        again = "Repeat the sweep with seed=0,1,2."
        if any((Path(folder) / SEARCH).is_file() for folder in summary.folders):
            again = "The search's command, given again, names the commands that race its best cells over other seeds."
        return (
            f"{best['label']} has the {extreme} {what}, {number(metric, best['mean'])}, but too few cells "
            f"have two or more seeds: whether the difference is real cannot be said. {again}"
        )
    others = int(c.compared.sum()) - 1
    worse = int((cells["mark"] == "worse").sum())
    above = " adjusted for missing seeds" if c.blocked and not c.complete else ""
    if (cells["mark"] == "no verdict").any():
        above += " among the cells with two or more seeds"
    start = (
        f"{best['label']} has the {extreme} {what}{above}, {_with_interval(metric, best)} over {int(best['n'])} seeds"
    )
    within = " " * bool(summary.within) + within_text(summary)
    if worse == others:
        return f"{start}, and {'the other cell is' if others == 1 else f'all {others} other cells are'} worse.{within}"
    if worse > 0:
        middle = f"; {worse} of {others} other cells {'is' if worse == 1 else 'are'} worse"
    elif others > 1:
        middle = f", but none of the {others} other cells is shown to be worse"
    else:
        middle = ", but the other cell is not shown to be worse"
    return f"{start}{middle}; {_candidates(cells, others)}.{within}"


def _race_verdict(summary: Summary, raced: Raced) -> str:
    """What the race has come to; what is not decided yet is not said."""
    race, rules, metric, k = raced.race, raced.rules, summary.metric, len(raced.cells)
    margin, best = points(metric, rules.margin), best_cell(summary.cells)
    failed = sum(out.behind is None for out in race.exits.values())
    out = f" {failed} of the cells {'is' if failed == 1 else 'are'} out because a trial failed." * bool(failed)
    others = int((summary.cells["mark"] == "not raced").sum())
    out += f" {others} more cell{'s' * (others > 1)} took no part in the race." * bool(others)
    if race.selected is not None:
        ahead = f" of {raced.completed} decided it" if raced.completed > raced.trials else ""
        stage = f"; one stage with the same guarantee would take {raced.one_stage}" if raced.one_stage else ""
        return (
            f"{best['label']} selected: with 95 % no other of {k} cells is better by more than {margin}. "
            f"{raced.trials} trials{ahead}{stage}.{out}"
        )
    left = summary.cells.loc[summary.cells["mark"] == "left", "label"]
    names = ", ".join(left.head(5)) + (" ..." if len(left) > 5 else "")
    if race.ended:
        if left.empty:
            return f"Nothing is selected: a trial of each cell failed.{out}"
        return (
            f"Not resolved: {len(left)} of {k} cells are left after {race.seeds} seeds ({names}): which of "
            f"them is best to within {margin} takes more than sweep.most_seeds={rules.most_seeds}.{out}"
        )
    seeds = f"after {race.seeds} seeds" if race.seeds else "before all have their first seeds"
    again = f": {raced.command}" if raced.command else ""
    return (f"The race has not ended: {len(race.survivors)} of {k} cells are in it {seeds}, {raced.trials} trials so "
            f"far. Nothing is selected yet; the sweep's command goes on with it{again}.{out}")  # fmt: skip


def within_text(summary: Summary) -> str:
    """Which cheapest cells are good enough, or that none can be named yet; empty where no margin was given."""
    within, metric = summary.within, summary.metric
    if within is None or not summary.comparison.possible:
        return ""
    compared = "" if summary.comparison.compared.all() else " of the cells with two or more seeds"
    below = f"at most {points(metric, within.margin)} below the best{compared}"
    shown = summary.race is not None and summary.race.shows(within.margin) and summary.cells["within"][0]
    selected = summary.cells.iloc[0] if shown else None
    if within.smallest is None or (selected is not None and within.smallest == selected["label"]):
        if selected is not None and selected["trainable_parameters"] <= summary.cells["trainable_parameters"].min():
            return ""
        none = "No cell" if selected is None else "No smaller one"
        if within.seeds is not None and within.seeds <= summary.comparison.repeats:  # as many are there already
            return f"{none} is shown to be {below}."
        seeds = within.seeds or f"more than {MOST_SEEDS}"
        return f"{none} is shown to be {below}: that would take about {seeds} seeds per cell."
    text = (
        "By the first seeds alone, " * (summary.race is not None)
        + f"{within.smallest} ({within.parameters:,.0f} parameters) is {below}"
    )
    if within.fastest != within.smallest:
        text += f", and so is the fastest such cell, {within.fastest} ({duration(within.seconds)} s a trial)"
    return text + "."


def _candidates(cells: pd.DataFrame, others: int) -> str:
    group = cells[cells["mark"].isin(["best", "candidate"])]
    candidates = len(group) - 1
    if candidates == 0:
        return "no other is a candidate for the best"
    text = f"{candidates} {'remains a candidate' if candidates == 1 else 'remain candidates'} for the best"
    if others == 1:
        text = "it remains a candidate for the best"
    sizes = group["trainable_parameters"]
    if sizes.notna().all():
        small = group.iloc[int(sizes.to_numpy().argmin())]  # the better one of equals
        if small["mark"] != "best":
            text += f", the smallest among all candidates is {small['label']} ({sizes.min():,.0f} parameters)"
    return text


def _with_interval(metric: Metric, cell: pd.Series) -> str:
    text = number(metric, cell["mean"])
    if math.isfinite(cell["low"]):
        text += f" (95 % interval {number(metric, cell['low'])} to {number(metric, cell['high'])})"
    return text


def errors_of_test(chosen: Chosen) -> str:
    """Both errors of the chosen cell's test accuracy."""
    seeds = f"± {100 * chosen.between_seeds:.2f} between seeds, " if math.isfinite(chosen.between_seeds) else ""
    return f"{seeds}± {100 * chosen.of_test_set:.2f} from the {chosen.images:,} test images"


def power_text(summary: Summary) -> str:
    """What the design can find; empty where nothing was compared, and of a race."""
    if not summary.comparison.possible or summary.race is not None:
        return ""
    smallest = points(summary.metric, summary.design.detectable)
    half = f"; half a point would take {_seeds_needed(summary)} seeds per cell" if summary.metric.accuracy else ""
    return f"This design finds a true difference of {smallest} from the best with 80 %{half}."


def _seeds_needed(summary: Summary) -> str:
    return str(summary.design.seeds_for_half_a_point or f"more than {MOST_SEEDS}")


def closing(summary: Summary) -> list[str]:
    """Lines below the verdict on the terminal."""
    chosen = summary.chosen
    lines = []
    if math.isfinite(chosen.test):
        lines.append(f"Test accuracy of that cell: {100 * chosen.test:.2f} % ({errors_of_test(chosen)}).")
    return [*lines, *filter(None, [power_text(summary)])]


def facts(summary: Summary) -> list[tuple[str, str]]:
    """The page's most important figures, each with what it is."""
    best, chosen, metric = best_cell(summary.cells), summary.chosen, summary.metric
    rows = [(number(metric, best["mean"]), f"{metric.title.lower()} of {best['label']}, n = {int(best['n'])}")]
    if math.isfinite(chosen.test):
        rows.append((f"{100 * chosen.test:.2f} %", f"test accuracy of that cell alone ({errors_of_test(chosen)})"))
    if summary.comparison.possible and summary.race is None:
        smallest = points(metric, summary.design.detectable)
        rows.append((smallest, "smallest true difference that this design finds with 80 %"))
        if metric.accuracy:
            rows.append((_seeds_needed(summary), "seeds needed to find half a point with 80 %"))
    done = int((summary.trials["status"] == "completed").sum())
    return [*rows, (f"{done} of {len(summary.trials)}", f"trials completed, in {len(summary.cells)} cells")]


def pair_text(summary: Summary) -> str:
    """McNemar's result in words, with what it does not say."""
    assert summary.pair is not None
    first, second, r = summary.pair
    says = "differ" if r.differ else "are not shown to differ"
    return (
        f"These two trained models {says} on the {r.images:,} val images: {first} alone is right on {r.only_first}, "
        f"{second} alone on {r.only_second} (difference {100 * r.difference:+.2f} points, exact McNemar "
        f"p = {r.p:.2g}). This is about these two models, not about their settings: another seed may come out the "
        "other way."
    )


def methods(summary: Summary) -> list[str]:
    """Plain words: what the figures mean and how the marks were found."""
    c, metric = summary.comparison, summary.metric
    lines = [
        f"Every figure is the {metric.title.lower()} after the last epoch, never the best epoch. Trials that differ "
        "only in their seed are repeats of one cell; the interval of a cell is a t interval over its seeds.",
    ]
    if summary.race is not None:
        return lines + _race_methods(summary.race, metric)
    if not c.possible:
        return [*lines, "No cells were compared: at least two cells with two seeds each are needed."]
    block = (
        "Trials with the same seed see the same data order, so the seed is a block"
        if c.blocked
        else "Cells share no seeds, so there are no blocks"
    )
    wide = " The wider error is that of the half of the cells which spreads most, or the pair's own." if c.wide else ""
    few = (
        " With fewer than five seeds, verdicts about a single cell that spreads far more than all others err more "
        "often."
        if c.wide and c.repeats < 5
        else ""
    )
    lines += [
        f"{block}; {int(c.compared.sum())} cells and {c.seeds} seeds{'' if c.complete else ', some missing'} leave "
        f"{c.df} degrees of freedom. A trial's error is {points(metric, c.sd)} (pooled over all cells: "
        f"{plain(metric, c.pooled_sd)}).{wide}",
        "'Worse' is a claim over all pairs, because the best cell is itself picked by its result: Tukey's studentized "
        "range, 5 % risk that any such claim is false. 'Candidate for best' is Hsu's comparison with the best: "
        f"the true best is among best and candidates with 95 %. How often both err, by simulation: "
        f"docs/statistics.md.{few}",
        power_text(summary),
        "Winner's curse: the best of several cells looks better than it is. If all cells were equally good, the best "
        f"mean would still lie about {points(metric, summary.design.optimism)} above them. The test figure was not "
        "used to choose and has no such bias.",
    ]
    if not summary.effects.table.empty:
        lines.append(
            "Main effects come from a linear model with the seed as block, over the trials with adapters. Each level "
            "is compared with the setting's first level; intervals are 95 % each for itself, not together."
        )
    return lines


def _race_methods(raced: Raced, metric: Metric) -> list[str]:
    rules = raced.rules
    lines = [
        f"A race (Paulson, 1964; Kim and Nelson, 2001): every cell got the same {rules.first_seeds} seeds, and those "
        f"that stayed got more, up to {rules.most_seeds}. A cell left when another that was still in was ahead by "
        "more than a boundary, which the spread of the paired differences over the first seeds sets and which falls "
        f"with each seed. A cell that is at most {points(metric, rules.margin)} below the best is then selected with "
        "95 %, however often one looks; how often that errs where cells spread unequally: docs/statistics.md.",
        "How long a cell ran depended on its results. The mean of the selected cell is therefore a little too high, "
        "that of one which left a little too low, and the t intervals are not adjusted for it. Main effects, and which "
        "cells besides the selected one are within the margin, come from the first seeds alone, which every cell has. "
        "The test figure was not used to choose and has no such bias.",
    ]
    if raced.one_stage:
        lines.append(f"One stage with the same guarantee would take {raced.one_stage:,} trials if the spread that was "
                     "seen had been known beforehand (Bechhofer, 1954).")  # fmt: skip
    return lines
