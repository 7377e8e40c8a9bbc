"""A summary: everything that is computed goes in here, everything that is shown comes from here.

In a race results decided which cells got more seeds, so that its marks are the race's own and claim no more.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_vit.analysis.effects import Effects
from lora_vit.analysis.pictures import MOST_SEEDS, Sums
from lora_vit.analysis.power import Design
from lora_vit.analysis.questions import text
from lora_vit.analysis.race import Race, standing
from lora_vit.analysis.stats import ALPHA, Comparison, Interval, wilson
from lora_vit.analysis.tables import best_cell
from lora_vit.analysis.texts import number, plain, points, seeds, with_interval
from lora_vit.config.rules import one_of
from lora_vit.metrics import LOSSES, METRICS

ORDER = {mark: i for i, mark in enumerate(("selected", "in", "unresolved", "out", "failed", "not raced"))}


@dataclass
class Summary:
    """Of a fixed sweep: every cell was meant to get the same seeds, and claims come from all trials together.

    ``trials`` and ``cells`` are the tables of ``trials.csv`` and ``cells.csv``. ``margin``: cells shown to lie at most
    this difference of the metric below the best are good enough. ``test``: the metric of the chosen cell on
    ``test_images`` (0: not known), and of no other; NaN if none is chosen. ``pictures``: so many of val count in the
    claims (0: they hold on these alone). ``race``: if the sweep was one. ``command``: what was typed for the sweeps, a
    line each; it resumes them. ``answers``: of :mod:`.questions`; that of methods has their best cells' ``test``.
    """

    folders: list[str]
    where: str | None
    margin: float | None
    trials: pd.DataFrame
    cells: pd.DataFrame
    unfinished: pd.DataFrame
    settings: list[str]
    comparison: Comparison
    effects: Effects
    test: Interval
    test_images: int
    environment: pd.DataFrame
    warnings: list[str]
    problems: list[str]
    race: Race | None = None
    command: str | None = None
    metric: str = "accuracy"
    answers: dict[str, pd.DataFrame] = field(default_factory=dict)
    pictures: int = 0

    legend = (
        "Marks: *best* has the highest mean; *candidate* may still be the true best (the true best is among best and "
        "candidates with {sure}); *worse* is shown to be worse than the best ({risk} risk over all pairs together); "
        "*open* is no candidate, yet not shown to be worse; *no verdict*: one seed; *failed*: a trial failed, and "
        "the others alone are no verdict; *unstable*: it collapsed in some seeds. *seeds ±* and *pictures ±*: how far "
        "others of the kind may move the difference from the best; it is *worse* beyond the root of the sum of "
        "their squares. *P(best)*: how probably the cell is the true best, by both errors under a flat prior; no "
        "claim. A star marks the Pareto front of val {metric} against that cost."
    )
    """What the cells table's marks mean, in Markdown."""

    def __post_init__(self) -> None:
        self.title, self.meaning, _, self.counts_images, _ = METRICS[self.metric]
        losses = "".join(f" {m.title}: {m.meaning}." for n, m in LOSSES.items() if f"val_{n}" in self.cells)
        alpha = self.comparison.alpha if self.race is None else ALPHA * self.race.rules.margins
        self.sure, self.risk = f"{100 - 100 * alpha:.4g} %", f"{100 * alpha:.2g} %"  # of this look's claims
        self.unit = "splits" if self.comparison.overlap else "seeds"
        self.legend = self.legend.format(metric=self.title, sure=self.sure, risk=self.risk) + losses

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.verdict}>"

    def _repr_html_(self) -> str:
        from lora_vit.analysis.export import notebook  # above this module, as is what draws

        return notebook(self)

    @cached_property
    def figures(self) -> dict[str, Any]:
        """The pictures by name, as figures of matplotlib."""
        from lora_vit.analysis.plots import draw_all, render

        figures: dict[str, Any] = {**draw_all(self)}
        for figure in figures.values():  # else a notebook shows one as a line of text until pyplot is imported
            figure._repr_png_ = partial(render, figure, "png")
        return figures

    def figure(self, name: str) -> Any:
        """One of ``figures``. Raises ConfigError, which lists the names, for another."""
        one_of("figure", name, [*self.figures])
        return self.figures[name]

    @property
    def verdict(self) -> str:
        """What is best, what is shown to be worse, and what is still open."""
        cells, c, best = self.cells, self.comparison, best_cell(self.cells)
        if len(cells) == 1:
            return self._alone()
        start = f"{best['label']} has the highest val {self.title}"
        if c.best is None:
            return (
                f"{start}, {number(best['mean'])}, but too few cells have two or more seeds to say whether the "
                "difference is real. Train the best cells with seed=0,1,2, or race them (docs/race.md)."
            )
        start += " adjusted for missing seeds" if c.blocked and not c.complete else ""
        if cells["mark"].isin(["no verdict", "failed", "unstable"]).any():
            start += " among the cells with two or more seeds" + " and no failed trial" * ("failed" in cells)
            start += " and no collapse" * bool((cells["mark"] == "unstable").any())
        ties = cells.loc[(cells["difference"].abs() < 1e-12) & (cells["mark"] != "best"), "label"]
        equal = f", and so has {' and '.join(ties.head(3))}{' ...' * (len(ties) > 3)}" * bool(len(ties))
        counts, others = cells["mark"].value_counts(), int(c.compared.sum()) - 1
        lines = [
            f"{start}, {with_interval(best)} over {seeds(best['n'], c.overlap)}{equal}.",
            f"Shown to be worse: {counts.get('worse', 0)} of {others} other cell{'s' * (others > 1)}; still candidates "
            f"for the best: {counts.get('candidate', 0)}.",
            self._good_enough(),
            text(self.answers),
        ]
        return " ".join(filter(None, lines))

    @property
    def chosen(self) -> Path:
        """The folder of the trial to use: the best cell's first seed, since the best one of some seeds is luck."""
        of_best = self.trials[self.trials["cell"] == best_cell(self.cells)["cell"]]
        return Path(of_best[of_best["status"] == "completed"].sort_values(["seed", "trial"])["folder"].iloc[0])

    def _alone(self) -> str:
        cell = self.cells.iloc[0]
        figure = f"{with_interval(cell)} ({seeds(cell['n'], self.comparison.overlap)})"
        return f"One cell, nothing to compare: {cell['label']} has val {self.title} {figure}."

    def _good_enough(self, selected: pd.Series | None = None, seen: str = "") -> str:
        """Which cheapest cells are good enough, beside one selected by other means; empty without a margin."""
        c, margin = self.comparison, self.margin
        if margin is None or c.best is None:
            return ""
        of_them = "" if c.compared.all() else " of the cells that were compared"
        close = f"within {points(margin)} of the best{of_them}"
        found = self.cells[self.cells["below"] <= margin].sort_values("trainable_parameters", kind="stable")
        if found.empty or (selected is not None and found["label"].iloc[0] == selected["label"]):
            if selected is not None and selected["trainable_parameters"] <= self.cells["trainable_parameters"].min():
                return ""
            text = f"No {'' if selected is None else 'smaller '}cell is shown to be {close}"
            needed = self.design.seeds_within(margin)
            if needed is not None and needed <= c.repeats:  # as many are there already
                return f"{text}."
            return f"{text}; {self.takes(margin, needed, within=True)} would be needed."
        small = found.iloc[0]
        return f"{seen}{small['label']} ({small['trainable_parameters']:,.0f} parameters) is {close}."

    def takes(self, difference: float, seeds: int | None, within: bool = False) -> str:
        """What shows such a difference: seeds, or where no number of them does, pictures."""
        images = self.design.pictures_needed(difference, self.pictures, within) if self.pictures else 0
        if images > self.pictures:
            return f"more than {images:,} val pictures in place of the {self.pictures:,}"
        return f"{f'about {seeds}' if seeds else f'more than {MOST_SEEDS}'} {self.unit} per cell"

    @property
    def design(self) -> Design:
        c = self.comparison
        return Design(c.sd, int(c.compared.sum()), c.pictures, c.alpha)

    def power(self) -> tuple[str, str] | None:
        """The true difference that is detected with 80 % power, and what detects half a point."""
        if self.comparison.best is None or self.race is not None:  # there results decided who got which seeds
            return None
        design, c = self.design, self.comparison
        takes = self.takes(0.005, design.seeds_needed(0.005))
        of_splits = replace(design, pictures=0.0) if c.overlap else design  # the overlap is in what they are worth
        found = of_splits.detectable(c.repeats, c.df)
        return points(found) if found < 1 else "more than 100 points", takes

    def power_text(self) -> str:
        found = self.power()
        return "" if found is None else (
            f"With these seeds{' and pictures' * bool(self.pictures)} a true difference of {found[0]} from the best "
            f"would be detected with 80 % power; half a point would take {found[1]}."
        )

    def errors_of_test(self) -> str:
        """Both half widths of the test figure in words."""
        whence = f"between {self.unit}", f"from the {self.test_images:,} test images"
        halves = zip(self.halves_of_test(self.test), whence, strict=True)
        known = [f"± {plain(half)} {what}" for half, what in halves if math.isfinite(half)]
        return ", ".join(known) or f"{self.test_images:,} test images"

    def halves_of_test(self, test: Interval) -> tuple[float, float]:
        """At 95 %, over seeds and over images; that of the images for a share of them alone."""
        known = (n := self.test_images) and self.counts_images
        low, high = wilson(test.mean, n) if known else (math.nan, math.nan)  # no 0 where all images are right
        return (test.high - test.low) / 2, (high - low) / 2


class RaceSummary(Summary):
    """Marks by the race: *selected, in, unresolved, out, failed, not raced*."""

    race: Race
    margin: float
    legend = (
        "A race: *selected* is the last one; *in* are those that still race, *unresolved* those that it did not "
        "separate; *out* ones fell behind after n seeds (later ones decide nothing and are not in the table); "
        "*failed*: a trial failed, and the others alone are no verdict. How long a cell ran depended on its results: a "
        "mean and its interval describe the trials and claim nothing. A star marks the Pareto front of val {metric} "
        "against that cost."
    )

    @property
    def verdict(self) -> str:
        """What the race has come to; what is not decided yet is not said."""
        cells, race, k, margin = self.cells, self.race, len(self.race.cells), points(self.race.rules.margin)
        if len(cells) == k == 1:
            return self._alone()
        trials, completed = int(cells.loc[cells["mark"] != "not raced", "n"].sum()), int(np.isfinite(race.y).sum())
        left = cells.loc[cells["mark"] == "unresolved", "label"]
        failed = sum(out.behind is None for out in race.exits.values())
        if race.selected is not None and failed == k - 1:
            outcome = f"{best_cell(cells)['label']} alone has no failed trial: nothing is claimed. {trials} trials."
        elif race.selected is not None:
            ahead = f" of {completed} decided it" if completed > trials else ""
            spent = f" (each of its {n} margins spends 5 %)" if (n := race.rules.margins) > 1 else ""
            outcome = (
                f"{best_cell(cells)['label']} selected: with {self.sure}{spent} no other of {k - failed} cells is "
                f"better by more than {margin}. {trials} trials{ahead}."
            )
        elif race.ended and left.empty:
            outcome = "Nothing is selected: a trial of each cell failed."
        elif race.ended:
            names = ", ".join(left.head(5)) + (" ..." if len(left) > 5 else "")
            outcome = (
                f"Not resolved: {len(left)} of {k} cells are left after {race.seeds} seeds ({names}). To say which of "
                f"them is best to within {margin} {self._would_take()}."
            )
        else:
            seeds = f"after {race.seeds} seeds" if race.seeds else "before all have their first seeds"
            again = f": {self.command}" * bool(self.command)
            outcome = (
                f"The race has not ended: {len(race.survivors)} of {k} cells are in it {seeds}, {trials} trials so "
                f"far. Nothing is selected yet; the sweep's command resumes it{again}."
            )
        lines = [outcome]
        if failed:
            lines.append(f"{failed} of the cells {'is' if failed == 1 else 'are'} out because a trial failed.")
        if others := int((cells["mark"] == "not raced").sum()):
            lines.append(f"{others} more cell{'s' * (others > 1)} took no part in the race.")
        shown = _shows(race, self.margin) and cells["within"][0]
        lines.append(self._good_enough(cells.iloc[0] if shown else None, "By the first seeds alone, "))
        lines.append(text(self.answers).replace("Each", "By the first seeds, each"))
        return " ".join(filter(None, lines))

    def _would_take(self) -> str:
        """What decides a race that has ended undecided, and what blocks it."""
        race, left = self.race, self.race.survivors
        names = self.cells.set_index("cell")["label"][[race.cells[i] for i in left]].tolist()
        if race.blocked:
            hidden = race.hidden[np.ix_(left, left)] / race.rules.margin
            pair = " and ".join(names[i] for i in np.unravel_index(hidden.argmax(), hidden.shape))
            images = f"{math.ceil(self.pictures * hidden.max() ** 2):,} val pictures in place of {self.pictures:,}"
            return f"takes about {images} or a wider margin: no number of seeds can decide, least of all between {pair}"
        sd = race.y[left, : race.seeds].std(axis=1, ddof=1)
        widest = f"{names[sd.argmax()]} spreads most, by {points(sd.max())} from seed to seed: leave it out if you can"
        return f"takes more than sweep.most_seeds={race.rules.most_seeds}, or a wider margin. {widest}"


def replay(plan: Mapping[str, Any], trials: pd.DataFrame, value: str, sums: Sums) -> Race:
    ended = trials[trials["status"].isin(["completed", "failed"])]
    values = ended[value].where(ended["status"] == "completed")
    return standing(plan, zip(ended["cell"], ended["seed"], values, ended["data.val"], strict=True), sums)


def first_seeds(plan: Mapping[str, Any], trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that every cell was meant to have, whatever came out: what claims about any pair come from."""
    return trials[trials["seed"].between(plan["seed"], plan["seed"] + plan["first_seeds"] - 1)]


def counted(race: Race, done: pd.DataFrame) -> pd.DataFrame:
    """Until a cell left or the race ended, else as many as may come; of other cells the race's first seeds."""
    first, racing = race.rules.first_seeds, () if race.ended else race.survivors
    seeds = {cell: race.rules.most_seeds if i in racing else max(first, race.seeds_of(i))
             for i, cell in enumerate(race.cells)}  # fmt: skip
    return done[done["seed"].between(race.first, race.first + done["cell"].map(seeds).fillna(first) - 1)]


def judged(race: Race, cells: pd.DataFrame, values: pd.DataFrame, margin: float) -> pd.DataFrame:
    """The cells with the race's marks and order, without the claims of fixed sweeps.

    ``seeds_raced``: when a cell left; ``difference``: over the seeds that it shares with the first row.
    """
    frame, raced = cells.set_index("cell").drop(columns=["worse", "candidate", "p_best"]), {}
    frame = frame.loc[:, ~frame.columns.str.startswith(("d_", "difference_seeds", "difference_pictures"))]
    for i, cell in enumerate(race.cells):
        stays = "selected" if i == race.selected else "unresolved" if race.ended else "in"
        mark = stays if i not in race.exits else "out" if race.exits[i].behind is not None else "failed"
        raced[cell] = mark, race.seeds_of(i)
    frame["difference_low"] = frame["difference_high"] = math.nan
    frame["mark"], frame["seeds_raced"] = zip(*(raced.get(cell, ("not raced", 0)) for cell in frame.index), strict=True)
    frame = frame.sort_values(["mark", "seeds_raced", "mean"], key=lambda c: c.map(ORDER) if c.name == "mark" else -c)
    frame["difference"] = (values.loc[frame.index] - values.loc[frame.index[0]]).mean(axis=1)
    by_race = _shows(race, margin) and not (frame["mark"] == "not raced").any()
    frame["within"] = (frame["below"] <= margin) | ((frame["mark"] == "selected") & by_race)
    return frame.reset_index()


def _shows(race: Race, margin: float) -> bool:
    """Whether the race has shown the selected cell to be so close to the best."""
    compared = sum(out.behind is not None for out in race.exits.values())
    return race.selected is not None and compared > 0 and margin >= race.rules.margin - 1e-12
