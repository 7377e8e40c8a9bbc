"""The sentences and numbers that people read, word for word, on cells written by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lora_vit.analysis import texts
from lora_vit.analysis.power import PairedImages
from lora_vit.analysis.summary import Chosen, Design
from lora_vit.analysis.tables import COMPARABLE

ACCURACY, LOSS = COMPARABLE["val_accuracy"], COMPARABLE["val_loss"]


def cells(*rows: tuple[str, float], sizes: list[float] | None = None, n: int = 3) -> pd.DataFrame:
    """Cells A, B, ... of ``(mark, mean)``, best first, each with an interval of 1 point to either side."""
    frame = pd.DataFrame(rows, columns=["mark", "mean"])
    frame["label"] = list("ABCDEFG"[: len(rows)])
    frame["n"] = n
    frame["low"], frame["high"] = frame["mean"] - 0.01, frame["mean"] + 0.01
    return frame.assign(trainable_parameters=sizes if sizes else 1000.0)


def summary(frame: pd.DataFrame, metric: Any = ACCURACY, **comparison: Any) -> Any:
    compared = (frame["mark"] != "no verdict").to_numpy()
    values = {
        "compared": compared, "possible": bool(compared.any()), "blocked": True, "complete": True, "wide": False,
        "seeds": 3, "df": 4, "sd": 0.00561, "pooled_sd": 0.00432, "repeats": 3.0, **comparison,
    }  # fmt: skip
    return SimpleNamespace(
        folders=[],
        cells=frame,
        metric=metric,
        comparison=SimpleNamespace(**values),
        design=Design(0.0206, 39, 0.0046),
        chosen=Chosen("A", "a", 0.9536, 0.0121, 0.0154, 1719),
        trials=pd.DataFrame({"status": ["completed"] * 5 + ["failed"]}),
        effects=SimpleNamespace(table=pd.DataFrame()),
        pair=None,
        race=None,
        within=None,
    )


BEST, CANDIDATE, OPEN, WORSE = ("best", 0.9), ("candidate", 0.89), ("open", 0.88), ("worse", 0.8)
START = "A has the highest val accuracy, 90.00 % (95 % interval 89.00 % to 91.00 %) over 3 seeds"


@pytest.mark.parametrize(
    ("rows", "end"),
    [
        ([BEST, WORSE], ", and the other cell is worse."),
        ([BEST, WORSE, WORSE], ", and all 2 other cells are worse."),
        ([BEST, CANDIDATE], ", but the other cell is not shown to be worse; it remains a candidate for the best."),
        ([BEST, OPEN], ", but the other cell is not shown to be worse; no other is a candidate for the best."),
        (
            [BEST, CANDIDATE, OPEN],
            ", but none of the 2 other cells is shown to be worse; 1 remains a candidate for the best.",
        ),
        ([BEST, CANDIDATE, WORSE], "; 1 of 2 other cells is worse; 1 remains a candidate for the best."),
        (
            [BEST, CANDIDATE, CANDIDATE, OPEN, WORSE, WORSE],
            "; 2 of 5 other cells are worse; 2 remain candidates for the best.",
        ),
        ([BEST, OPEN, WORSE], "; 1 of 2 other cells is worse; no other is a candidate for the best."),
    ],
)
def test_the_verdict_counts_what_is_worse_and_what_is_open(rows, end):
    assert texts.verdict(summary(cells(*rows))) == START + end


@pytest.mark.parametrize(
    ("sizes", "end"),
    [
        ([9e3, 8e3, 7e3, 6e3, 5e3], ", the smallest among all candidates is C (7,000 parameters)"),
        ([9e3, 6e3, 7e3, 6e3, 5e3], ", the smallest among all candidates is B (6,000 parameters)"),
        ([9e3, 7e3, 7e3, 1.0, 1.0], ", the smallest among all candidates is B (7,000 parameters)"),
        ([7e3, 8e3, 9e3, 6e3, 5e3], ""),
        ([7e3, 7e3, 7e3, 7e3, 7e3], ""),
        ([7e3, 7e3, 8e3, 7e3, 7e3], ""),
        ([7e3, math.nan, 5e3, 6e3, 5e3], ""),
    ],
)
def test_the_verdict_names_the_smallest_candidate(sizes, end):
    got = texts.verdict(summary(cells(BEST, CANDIDATE, CANDIDATE, OPEN, WORSE, sizes=sizes)))
    assert got == f"{START}; 1 of 4 other cells is worse; 2 remain candidates for the best{end}."


def test_the_verdict_says_what_the_means_are_of():
    some = summary(cells(("no verdict", 0.99), BEST, WORSE))
    start = "B has the highest val accuracy among the cells with two or more seeds, 90.00 % (95 % interval 89.00"
    assert texts.verdict(some).startswith(start)
    missing = summary(cells(BEST, WORSE), complete=False)
    assert texts.verdict(missing).startswith("A has the highest val accuracy adjusted for missing seeds, 90.00 %")
    unpaired = summary(cells(BEST, WORSE), complete=False, blocked=False)
    assert texts.verdict(unpaired).startswith("A has the highest val accuracy, 90.00 %")
    lower = texts.verdict(summary(cells(("best", 0.31234), ("worse", 0.4)), LOSS))
    assert lower == "A has the lowest val loss, 0.3123 (95 % interval 0.3023 to 0.3223) over 3 seeds, and the other " \
        "cell is worse."  # fmt: skip


@pytest.mark.parametrize(
    ("n", "low", "want"),
    [
        (1, math.nan, "One cell, nothing to compare: A has val accuracy 90.00 % (one seed)."),
        (2, 0.89, "One cell, nothing to compare: A has val accuracy 90.00 % (95 % interval 89.00 % to 91.00 %) "
                  "(2 seeds)."),
    ],
)  # fmt: skip
def test_the_verdict_on_one_cell(n, low, want):
    assert texts.verdict(summary(cells(("no verdict", 0.9), n=n).assign(low=low))) == want


def test_the_verdict_on_a_search(tmp_path):
    found = summary(cells(("no verdict", 0.9), ("no verdict", 0.8), n=1))
    found.folders = [str(tmp_path)]
    assert texts.verdict(found).endswith("Repeat the sweep with seed=0,1,2.")
    (tmp_path / "search.db").touch()
    assert texts.verdict(found).endswith("names the commands that race its best cells over other seeds.")


def test_the_verdict_on_cells_with_one_seed():
    got = texts.verdict(summary(cells(("no verdict", 0.9), ("no verdict", 0.8), n=1)))
    assert got == (
        "A has the highest val accuracy, 90.00 %, but too few cells have two or more seeds: whether the difference "
        "is real cannot be said. Repeat the sweep with seed=0,1,2."
    )


@pytest.mark.parametrize(
    ("value", "plain", "number", "signed", "points"),
    [
        (0.91234, "91.23", "91.23 %", "+91.23", "91.23 points"),
        (-0.01, "-1.00", "-1.00 %", "-1.00", "-1.00 points"),
        (-1e-6, "-0.00", "-0.00 %", "0.00", "-0.00 points"),
        (0.0, "0.00", "0.00 %", "0.00", "0.00 points"),
        (math.nan, "–", "–", "–", "– points"),
    ],
)
def test_accuracies_are_shown_in_percent_and_differences_in_points(value, plain, number, signed, points):
    assert [f(ACCURACY, value) for f in (texts.plain, texts.number, texts.signed, texts.points)] == [
        plain, number, signed, points,
    ]  # fmt: skip


def test_losses_are_shown_as_they_are():
    shown = [f(LOSS, 0.91236) for f in (texts.plain, texts.number, texts.signed, texts.points)]
    assert shown == ["0.9124", "0.9124", "+0.9124", "0.9124"]


@pytest.mark.parametrize(
    ("text", "value", "want"),
    [
        (texts.count, 999_999, "999,999"), (texts.count, 1e6, "1.00 M"), (texts.count, 85.8e6, "85.80 M"),
        (texts.count, math.nan, "–"), (texts.count, 0, "0"),
        (texts.size, 999, "999 B"), (texts.size, 1000, "1.00 kB"), (texts.size, 1e6, "1.00 MB"),
        (texts.size, 2.5e9, "2.50 GB"), (texts.size, math.inf, "–"), (texts.size, 999_000, "999.00 kB"),
        (texts.duration, 99.94, "99.9"), (texts.duration, 100, "100"), (texts.duration, 1234.5, "1,234"),
        (texts.duration, math.nan, "–"),
    ],
)  # fmt: skip
def test_costs_in_few_characters(text, value, want):
    assert text(value) == want


POWER = "This design finds a true difference of 2.06 points from the best with 80 %; half a point would take 39 " \
    "seeds per cell."  # fmt: skip
TEST = "± 1.21 between seeds, ± 1.54 from the 1,719 test images"


def test_the_lines_below_the_verdict():
    known = summary(cells(BEST, WORSE))
    assert texts.closing(known) == [f"Test accuracy of that cell: 95.36 % ({TEST}).", POWER]
    known.chosen.between_seeds = math.nan
    assert texts.closing(known)[0] == "Test accuracy of that cell: 95.36 % (± 1.54 from the 1,719 test images)."
    known.chosen.test = math.nan
    assert texts.closing(known) == [POWER]
    known.design.seeds_for_half_a_point = None
    assert texts.closing(known)[0].endswith("; half a point would take more than 400 seeds per cell.")
    loss = summary(cells(BEST, WORSE), LOSS)
    assert texts.closing(loss)[1] == "This design finds a true difference of 0.0206 from the best with 80 %."
    nothing = summary(cells(("no verdict", 0.9)))
    nothing.chosen.test = math.nan
    assert texts.closing(nothing) == []


def test_the_most_important_figures():
    known = summary(cells(BEST, WORSE))
    assert texts.facts(known) == [
        ("90.00 %", "val accuracy of A, n = 3"),
        ("95.36 %", f"test accuracy of that cell alone ({TEST})"),
        ("2.06 points", "smallest true difference that this design finds with 80 %"),
        ("39", "seeds needed to find half a point with 80 %"),
        ("5 of 6", "trials completed, in 2 cells"),
    ]
    known.chosen.test, known.metric = math.nan, LOSS
    assert [figure for figure, _ in texts.facts(known)] == ["0.9000", "0.0206", "5 of 6"]
    alone = summary(cells(("no verdict", 0.9)))
    assert [figure for figure, _ in texts.facts(alone)] == ["90.00 %", "95.36 %", "5 of 6"]


def test_mcnemars_result_in_words():
    known = summary(cells(BEST, WORSE))
    known.pair = ("one (a)", "two (b)", PairedImages(1000, 30, 50, 0.0331))
    assert texts.pair_text(known) == (
        "These two trained models differ on the 1,000 val images: one (a) alone is right on 30, two (b) alone on 50 "
        "(difference -2.00 points, exact McNemar p = 0.033). This is about these two models, not about their "
        "settings: another seed may come out the other way."
    )
    known.pair = ("one (a)", "two (b)", PairedImages(1000, 30, 31, 0.9))
    assert texts.pair_text(known).startswith("These two trained models are not shown to differ on the 1,000")


METHODS = [
    "Every figure is the val accuracy after the last epoch, never the best epoch. Trials that differ only in their "
    "seed are repeats of one cell; the interval of a cell is a t interval over its seeds.",
    "Trials with the same seed see the same data order, so the seed is a block; 2 cells and 3 seeds leave 4 degrees "
    "of freedom. A trial's error is 0.56 points (pooled over all cells: 0.43).",
    "'Worse' is a claim over all pairs, because the best cell is itself picked by its result: Tukey's studentized "
    "range, 5 % risk that any such claim is false. 'Candidate for best' is Hsu's comparison with the best: the true "
    "best is among best and candidates with 95 %. How often both err, by simulation: docs/statistics.md.",
    POWER,
    "Winner's curse: the best of several cells looks better than it is. If all cells were equally good, the best mean "
    "would still lie about 0.46 points above them. The test figure was not used to choose and has no such bias.",
]


def test_the_methods_in_words():
    assert texts.methods(summary(cells(BEST, WORSE))) == METHODS
    effects = summary(cells(BEST, WORSE))
    effects.effects.table = pd.DataFrame({"effect": [0.1]})
    assert texts.methods(effects)[:-1] == METHODS
    assert texts.methods(effects)[-1] == (
        "Main effects come from a linear model with the seed as block, over the trials with adapters. Each level is "
        "compared with the setting's first level; intervals are 95 % each for itself, not together."
    )


def test_the_methods_of_unequal_and_unpaired_cells():
    wide = texts.methods(summary(cells(BEST, WORSE), wide=True, complete=False, repeats=4.9))
    assert "; 2 cells and 3 seeds, some missing leave 4 degrees" in wide[1]
    assert wide[1].endswith(
        " (pooled over all cells: 0.43). The wider error is that of the half of the cells which spreads most, or the "
        "pair's own."
    )
    assert wide[2].endswith(
        "docs/statistics.md. With fewer than five seeds, verdicts about a single cell that spreads far more than all "
        "others err more often."
    )
    assert texts.methods(summary(cells(BEST, WORSE), wide=True, repeats=5.0))[2] == METHODS[2]
    assert texts.methods(summary(cells(BEST, WORSE), wide=False, repeats=3.0))[2] == METHODS[2]
    unpaired = texts.methods(summary(cells(BEST, WORSE), blocked=False))
    assert unpaired[1].startswith("Cells share no seeds, so there are no blocks; 2 cells")
    nothing = texts.methods(summary(cells(("no verdict", np.float64(0.9)))))
    assert nothing == [METHODS[0], "No cells were compared: at least two cells with two seeds each are needed."]


def test_the_legend_explains_every_mark():
    assert texts.LEGEND == (
        "Marks: *best* has the highest mean; *candidate* may still be the true best (the true best is among best and "
        "candidates with 95 %); *worse* is shown to be worse than the best (5 % risk over all pairs together); *open* "
        "is no candidate, yet not shown to be worse; *no verdict*: one seed. A star marks the Pareto front of the "
        "metric against that cost."
    )
