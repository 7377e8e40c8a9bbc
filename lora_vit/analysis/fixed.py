"""A fixed sweep: every cell was meant to get the same seeds, and claims about cells come from all trials together."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lora_vit.analysis import texts
from lora_vit.analysis.summary import Summary, Verdict
from lora_vit.analysis.tables import best_cell
from lora_vit.records import SEARCH


class FixedVerdict(Verdict):
    """Marks by the comparison with the best cell: *best, candidate, open, worse, no verdict*."""

    legend = (
        "Marks: *best* has the highest mean; *candidate* may still be the true best (the true best is among best and "
        "candidates with 95 %); *worse* is shown to be worse than the best (5 % risk over all pairs together); *open* "
        "is no candidate, yet not shown to be worse; *no verdict*: one seed. A star marks the Pareto front of val "
        "accuracy against that cost."
    )

    def sentence(self, summary: Summary) -> str:
        cells, c, best = summary.cells, summary.comparison, best_cell(summary.cells)
        if len(cells) == 1:
            return texts.alone(best)
        start = f"{best['label']} has the highest val accuracy"
        if not c.possible:
            return (
                f"{start}, {texts.number(best['mean'])}, but too few cells have two or more seeds to say whether the "
                f"difference is real. {_what_to_repeat(summary.folders)}"
            )
        start += " adjusted for missing seeds" if c.blocked and not c.complete else ""
        start += " among the cells with two or more seeds" if (cells["mark"] == "no verdict").any() else ""
        counts, others = cells["mark"].value_counts(), int(c.compared.sum()) - 1
        lines = [
            f"{start}, {texts.with_interval(best)} over {texts.seeds(best['n'])}.",
            f"Shown to be worse: {counts.get('worse', 0)} of {others} other cell{'s' * (others > 1)}; still candidates "
            f"for the best: {counts.get('candidate', 0)}{_smallest_candidate(cells)}.",
            texts.within_text(summary),
        ]
        return " ".join(line for line in lines if line)

    def methods(self, summary: Summary) -> list[str]:
        c = summary.comparison
        if not c.possible:
            return ["No cells were compared: at least two cells with two seeds each are needed."]
        block = "Cells share no seeds, so seeds are no blocks"
        if c.blocked:
            block = "Trials with the same seed see the same data order, so the seed is a block"
        wide = few = effects = ""
        if c.wide:
            wide = " The wider error is used: that of the half of the cells that spreads most, or the pair's own."
            if c.repeats < 5:
                few = (" With fewer than five seeds, verdicts about one cell that spreads far more than the others are "
                       "wrong more often.")  # fmt: skip
        if not summary.effects.table.empty:
            effects = (
                "Main effects come from a linear model with the seed as block, over the trials with adapters. Each "
                "level is compared with the setting's first level; each interval holds with 95 %, not all together."
            )
        lines = [
            f"{block}; {int(c.compared.sum())} cells and {c.seeds} seeds{'' if c.complete else ', some missing'} leave "
            f"{c.df} degrees of freedom. A trial's error is {texts.points(c.sd)} (pooled over all cells: "
            f"{texts.plain(c.pooled_sd)}).{wide}",
            "'Worse' is a claim over all pairs, because the best cell is itself picked by its result: Tukey's "
            "studentized range, 5 % risk that any such claim is false. 'Candidate for best' is Hsu's comparison with "
            "the best: the true best is among best and candidates with 95 %. docs/statistics.md says how often both "
            f"are wrong in simulations.{few}",
            texts.power_text(summary),
            "Winner's curse: the best of several cells looks better than it is. If all cells were equally good, the "
            f"best mean would still lie about {texts.points(summary.design.optimism)} above them. The test figure was "
            "not used to choose and has no such bias.",
            effects,
        ]
        return [line for line in lines if line]


def _what_to_repeat(folders: list[str]) -> str:
    if any((Path(folder) / SEARCH).is_file() for folder in folders):
        return "Run the search's command again: it names the commands that race its best cells over other seeds."
    return "Repeat the sweep with seed=0,1,2."


def _smallest_candidate(cells: pd.DataFrame) -> str:
    """The smallest of the best and the candidates, if that is not the best."""
    group = cells[cells["mark"].isin(["best", "candidate"])]
    sizes = group["trainable_parameters"]
    small = group.iloc[int(sizes.to_numpy().argmin())]  # the better one of equals
    if sizes.isna().any() or small["mark"] == "best":
        return ""
    return f"; the smallest of all candidates is {small['label']} ({sizes.min():,.0f} parameters)"
