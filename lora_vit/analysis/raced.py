"""A race: results decided which cells got more seeds, so that its marks are the race's own and claim no more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lora_vit.analysis import texts
from lora_vit.analysis.race import Race, one_stage, standing
from lora_vit.analysis.summary import Summary, Verdict
from lora_vit.analysis.tables import best_cell

CLAIMS = ["difference_low", "difference_high"]
ORDER = {"selected": 0, "left": 1, "out": 2, "failed": 3, "not raced": 4}


def replay(plan: Mapping[str, Any], trials: pd.DataFrame) -> RaceVerdict:
    """The race of a ``sweep.json``, from the records of its trials."""
    ended = trials[trials["status"].isin(["completed", "failed"])]
    accuracies = ended["val_accuracy"].where(ended["status"] == "completed")
    return RaceVerdict(standing(plan, zip(ended["cell"], ended["seed"], accuracies, ended["data.val"], strict=True)),
                       plan.get("command"))  # fmt: skip


class RaceVerdict(Verdict):
    """Marks by the race: *selected, left* (in the race, or not resolved)*, out, failed, not raced*."""

    legend = (
        "A race: *selected* is the cell that was left; *left* ones are not separated; *out* ones fell behind after n "
        "seeds (later ones, if any, decide nothing and are not in the table); *failed*: a trial failed. How long a "
        "cell ran depended on its results: a mean and its interval describe the trials and claim nothing. A star "
        "marks the Pareto front of val accuracy against that cost."
    )
    same_seeds = False
    race: Race

    def __init__(self, race: Race, command: str | None) -> None:
        self.race, self.command, self.margin = race, command, race.rules.margin

    def counted(self, done: pd.DataFrame) -> pd.DataFrame:
        """Until a cell left or the race ended, else as many as may come; of other cells the race's first seeds."""
        race, first = self.race, self.race.rules.first_seeds
        racing = () if race.ended else race.survivors
        seeds = {cell: race.rules.most_seeds if i in racing else max(first, race.seeds_of(i))
                 for i, cell in enumerate(race.cells)}  # fmt: skip
        return done[done["seed"].between(race.first, race.first + done["cell"].map(seeds).fillna(first) - 1)]

    def compared(self, done: pd.DataFrame) -> pd.DataFrame:
        return done[done["seed"].between(self.race.first, self.race.first + self.race.rules.first_seeds - 1)]

    def judged(self, cells: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
        """With ``seeds_raced`` (when a cell left), and ``difference`` over the seeds that it shares with the first row.

        The claims of fixed sweeps go.
        """
        race, frame = self.race, cells.set_index("cell")
        frame = frame.drop(columns=["worse", "candidate"]).assign(
            adjusted=frame["mean"], mark="not raced", seeds_raced=0, **dict.fromkeys(CLAIMS, math.nan)
        )
        for i, cell in enumerate(race.cells):
            if cell in frame.index:
                frame.loc[cell, ["mark", "seeds_raced"]] = _mark(race, i), race.seeds_of(i)
        keys = pd.DataFrame({"mark": frame["mark"].map(ORDER), "seeds": -frame["seeds_raced"], "mean": -frame["mean"]})
        frame = frame.loc[keys.sort_values(["mark", "seeds", "mean"], kind="stable").index]
        frame["difference"] = (values.loc[frame.index] - values.loc[frame.index[0]]).mean(axis=1)
        return frame.reset_index()

    def within(self, cells: pd.DataFrame, margin: float) -> pd.Series:
        """Also the selected one, if the race was about this margin."""
        by_race = self._shows(margin) and not (cells["mark"] == "not raced").any()
        return super().within(cells, margin) | ((cells["mark"] == "selected") & by_race)

    def _shows(self, margin: float) -> bool:
        """Whether the race has shown the selected cell to be so close to the best."""
        return self.chooses() and margin >= self.race.rules.margin - 1e-12

    def chooses(self) -> bool:
        return self.race.selected is not None

    def sentence(self, summary: Summary) -> str:
        cells, within = summary.cells, summary.within
        if len(cells) == len(self.race.cells) == 1:
            return texts.alone(best_cell(cells))
        shown = within is not None and self._shows(within.margin) and cells["within"][0]
        good = texts.within_text(summary, cells.iloc[0] if shown else None, "By the first seeds alone, ")
        return " ".join(line for line in (self._outcome(summary), *_others(self.race, cells), good) if line)

    def _outcome(self, summary: Summary) -> str:
        """What the race has come to; what is not decided yet is not said."""
        race, k, margin = self.race, len(self.race.cells), texts.points(self.race.rules.margin)
        in_race = summary.cells["mark"] != "not raced"
        trials, completed = int(summary.cells.loc[in_race, "n"].sum()), int(np.isfinite(race.y).sum())
        if race.selected is not None:
            ahead = f" of {completed} decided it" if completed > trials else ""
            stage = one_stage(summary.comparison.sd, k, race.rules)
            instead = f"; one stage with the same guarantee would take {k * stage}" if stage else ""
            return (
                f"{best_cell(summary.cells)['label']} selected: with 95 % no other of {k} cells is better by more than "
                f"{margin}. {trials} trials{ahead}{instead}."
            )
        left = summary.cells.loc[summary.cells["mark"] == "left", "label"]
        if race.ended and left.empty:
            return "Nothing is selected: a trial of each cell failed."
        if race.ended:
            names = ", ".join(left.head(5)) + (" ..." if len(left) > 5 else "")
            return (
                f"Not resolved: {len(left)} of {k} cells are left after {race.seeds} seeds ({names}). To say which of "
                f"them is best to within {margin} takes more than sweep.most_seeds={race.rules.most_seeds}."
            )
        seeds = f"after {race.seeds} seeds" if race.seeds else "before all have their first seeds"
        again = f": {self.command}" if self.command else ""
        return (
            f"The race has not ended: {len(race.survivors)} of {k} cells are in it {seeds}, {trials} trials so "
            f"far. Nothing is selected yet; the sweep's command resumes it{again}."
        )

    def methods(self, summary: Summary) -> list[str]:
        rules, k = self.race.rules, len(self.race.cells)
        lines = [
            f"A race (Paulson, 1964; Kim and Nelson, 2001): every cell got the same {rules.first_seeds} seeds, and "
            f"those that stayed got more, up to {rules.most_seeds}. A cell left when another one that was still in was "
            "ahead by more than a boundary. The spread of the paired differences over the first seeds sets this "
            f"boundary; it falls with each seed. A cell at most {texts.points(rules.margin)} below the best is then "
            "selected with 95 %, however often one looks; docs/race.md says how often that is wrong if cells "
            "spread unequally.",
            "How long a cell ran depended on its results. The mean of the selected cell is therefore a little too "
            "high, that of a cell that left a little too low, and the t intervals are not adjusted for it. Main "
            "effects, and which cells besides the selected one are within the margin, come from the first seeds alone, "
            "which every cell has. The test figure was not used to choose and has no such bias.",
        ]
        if stage := one_stage(summary.comparison.sd, k, rules):
            lines.append(f"One stage with the same guarantee would take {k * stage:,} trials if the spread that was "
                         "seen had been known beforehand (Bechhofer, 1954).")  # fmt: skip
        return lines


def _mark(race: Race, cell: int) -> str:
    out = race.exits.get(cell)
    if out is None:
        return "selected" if cell == race.selected else "left"
    return "failed" if out.behind is None else "out"


def _others(race: Race, cells: pd.DataFrame) -> list[str]:
    """What the race itself says nothing about."""
    lines = []
    if failed := sum(out.behind is None for out in race.exits.values()):
        lines.append(f"{failed} of the cells {'is' if failed == 1 else 'are'} out because a trial failed.")
    if others := int((cells["mark"] == "not raced").sum()):
        lines.append(f"{others} more cell{'s' * (others > 1)} took no part in the race.")
    return lines
