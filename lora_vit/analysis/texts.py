"""Numbers and sentences that people read: the same words on the terminal, in the files and on the page.

What only a fixed sweep or only a race says is in :mod:`.fixed` and :mod:`.raced`.
"""

from __future__ import annotations

import math

import pandas as pd

from lora_vit.analysis.stats import MOST_SEEDS
from lora_vit.analysis.summary import Chosen, Summary
from lora_vit.analysis.tables import best_cell


def plain(value: float) -> str:
    """An accuracy in % or a difference in points, without its unit."""
    return f"{100 * value:.2f}" if math.isfinite(value) else "–"


def number(value: float) -> str:
    """An accuracy with its unit."""
    return plain(value) + " %" * math.isfinite(value)


def signed(value: float) -> str:
    """A difference in points with its sign (none before a zero)."""
    text = plain(value)
    if text == "–":
        return text
    return text.lstrip("-") if float(text) == 0 else text if value < 0 else f"+{text}"


def points(value: float) -> str:
    """The size of a difference with its unit."""
    return f"{plain(value)} points"


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


def seeds(value: float) -> str:
    """How many seeds, in words."""
    return f"{int(value)} seeds" if value > 1 else "one seed"


def with_interval(cell: pd.Series) -> str:
    """A cell's mean accuracy with its interval, if it has one."""
    interval = f" (95 % interval {number(cell['low'])} to {number(cell['high'])})" if math.isfinite(cell["low"]) else ""
    return number(cell["mean"]) + interval


def alone(cell: pd.Series) -> str:
    """The verdict on a sweep of one cell."""
    return f"One cell, nothing to compare: {cell['label']} has val accuracy {with_interval(cell)} ({seeds(cell['n'])})."


def within_text(summary: Summary, selected: pd.Series | None = None, seen: str = "") -> str:
    """Which cheapest cells are good enough, or that none is known yet; empty if there is no margin.

    ``selected``: a cell that is good enough by other means, ``seen``: by which trials the others are.
    """
    within, comparison = summary.within, summary.comparison
    if within is None or not comparison.possible:
        return ""
    of_them = "" if comparison.compared.all() else " of the cells with two or more seeds"
    close = f"within {points(within.margin)} of the best{of_them}"
    if within.smallest is None or (selected is not None and within.smallest == selected["label"]):
        if selected is not None and selected["trainable_parameters"] <= summary.cells["trainable_parameters"].min():
            return ""
        text = f"No {'' if selected is None else 'smaller '}cell is shown to be {close}"
        if within.seeds is not None and within.seeds <= comparison.repeats:  # as many are there already
            return f"{text}."
        return f"{text}; about {within.seeds or f'more than {MOST_SEEDS}'} seeds per cell would be needed."
    text = f"{seen}{within.smallest} ({within.parameters:,.0f} parameters) is {close}"
    if within.fastest != within.smallest:
        text += f", and so is the fastest such cell, {within.fastest} ({duration(within.seconds)} s a trial)"
    return f"{text}."


def errors_of_test(chosen: Chosen) -> str:
    """Both errors of the chosen cell's test accuracy."""
    between = f"± {plain(chosen.between_seeds)} between seeds, " if math.isfinite(chosen.between_seeds) else ""
    return f"{between}± {plain(chosen.of_test_set)} from the {chosen.images:,} test images"


def power_text(summary: Summary) -> str:
    """What the design can detect; empty if nothing was compared, or if results decided who got which seeds."""
    if not summary.comparison.possible or not summary.says.same_seeds:
        return ""
    return (
        f"With these seeds a true difference of {points(summary.design.detectable)} from the best would be detected "
        f"with 80 % power; half a point would take {_seeds_needed(summary)} seeds per cell."
    )


def _seeds_needed(summary: Summary) -> str:
    return str(summary.design.seeds_for_half_a_point or f"more than {MOST_SEEDS}")


def closing(summary: Summary) -> list[str]:
    """Lines below the verdict on the terminal."""
    chosen, test = summary.chosen, ""
    if math.isfinite(chosen.test):
        test = f"Test accuracy of that cell: {number(chosen.test)} ({errors_of_test(chosen)})."
    return [line for line in (test, power_text(summary)) if line]


def facts(summary: Summary) -> list[tuple[str, str]]:
    """The page's most important figures, each with what it is."""
    best, chosen = best_cell(summary.cells), summary.chosen
    rows = [(number(best["mean"]), f"val accuracy of {best['label']}, n = {int(best['n'])}")]
    if math.isfinite(chosen.test):
        rows.append((number(chosen.test), f"test accuracy of that cell alone ({errors_of_test(chosen)})"))
    if power_text(summary):
        rows += [
            (points(summary.design.detectable), "smallest true difference that is detected with 80 % power"),
            (_seeds_needed(summary), "seeds per cell that detect half a point with 80 % power"),
        ]
    done = int((summary.trials["status"] == "completed").sum())
    return [*rows, (f"{done} of {len(summary.trials)}", f"trials completed, in {len(summary.cells)} cells")]


def methods(summary: Summary) -> list[str]:
    """Plain words: what the figures mean and how the marks were found."""
    return [
        "Every figure is the val accuracy after the last epoch, never that of the best epoch. Trials that differ only "
        "in their seed are repeats of one cell; the interval of a cell is a t interval over its seeds.",
        *summary.says.methods(summary),
    ]
