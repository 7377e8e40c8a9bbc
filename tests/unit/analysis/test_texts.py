"""The numbers and sentences that people read of a fixed sweep, on cells written by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lora_vit.analysis import texts
from lora_vit.analysis.effects import Effects
from lora_vit.analysis.fixed import FixedVerdict
from lora_vit.analysis.stats import Comparison
from lora_vit.analysis.summary import Chosen, Design, Summary, Within

NAN = math.nan
BEST, CANDIDATE, OPEN, WORSE, ALONE = (
    ("best", 0.9), ("candidate", 0.89), ("open", 0.88), ("worse", 0.8), ("no verdict", 0.99),
)  # fmt: skip


def summary(*rows: tuple[str, float], sizes: Any = 1000.0, n: int = 3, low: float = 0.01, **comparison: Any) -> Summary:
    """Of cells A, B, ... of ``(mark, mean)``, best first, each with an interval of 1 point to either side."""
    cells = pd.DataFrame(rows, columns=["mark", "mean"])
    cells = cells.assign(label=list("ABCDEFG"[: len(rows)]), n=n, low=cells["mean"] - low, high=cells["mean"] + 0.01,
                         trainable_parameters=sizes)  # fmt: skip
    compared, nothing = (cells["mark"] != "no verdict").to_numpy(), np.zeros(len(rows))
    values = {"best": 0 if compared.any() else None, "seeds": 3, "df": 4, "sd": 0.00561, "pooled_sd": 0.00432,
              "repeats": 3.0, **comparison}  # fmt: skip
    empty = pd.DataFrame()
    return Summary(
        folders=[], where=None, cells=cells, unfinished=empty, settings=[], learning_rates=empty, environment=empty,
        trials=pd.DataFrame({"status": ["completed"] * 5 + ["failed"]}),
        comparison=Comparison(compared, nothing, nothing, nothing, nothing, nothing, nothing, **values),
        effects=Effects(), design=Design(0.0206, 39, 0.0046), chosen=Chosen("A", "a", 0.9536, 0.0121, 0.0154, 1719),
        within=None, warnings=[], problems=[], says=FixedVerdict(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "worse", "candidates"),
    [
        ([BEST, WORSE], "1 of 1 other cell;", 0),
        ([BEST, CANDIDATE], "0 of 1 other cell;", 1),
        ([BEST, OPEN], "0 of 1 other cell;", 0),
        ([BEST, WORSE, WORSE], "2 of 2 other cells;", 0),
        ([BEST, CANDIDATE, CANDIDATE, OPEN, WORSE, WORSE], "2 of 5 other cells;", 2),
        ([ALONE, BEST, WORSE], "1 of 1 other cell;", 0),
    ],
)
def test_the_verdict_counts_what_is_worse_and_what_may_be_best(rows, worse, candidates):
    got = summary(*rows).verdict
    assert "% (95 % interval 89.00 % to 91.00 %) over 3 seeds. " in got
    assert got.endswith(f"Shown to be worse: {worse} still candidates for the best: {candidates}.")


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ([9e3, 8e3, 7e3, 6e3, 5e3], "C (7,000 parameters)"),
        ([9e3, 6e3, 7e3, 6e3, 5e3], "B (6,000 parameters)"),
        ([9e3, 7e3, 7e3, 1.0, 1.0], "B (7,000 parameters)"),
        ([7e3, 8e3, 9e3, 6e3, 5e3], None),
        ([7e3, 7e3, 7e3, 7e3, 7e3], None),
        ([7e3, NAN, 5e3, 6e3, 5e3], None),
    ],
)
def test_the_verdict_names_the_smallest_candidate(sizes, named):
    got = summary(BEST, CANDIDATE, CANDIDATE, OPEN, WORSE, sizes=sizes).verdict
    assert got.endswith(f"for the best: 2; the smallest of all candidates is {named}." if named else "the best: 2.")


@pytest.mark.parametrize(
    ("rows", "comparison", "start"),
    [
        ([BEST, WORSE], {}, "A has the highest val accuracy, 90.00 %"),
        ([ALONE, BEST, WORSE], {}, "B has the highest val accuracy among the cells with two or more seeds, 90.00 %"),
        ([BEST, WORSE], {"complete": False}, "A has the highest val accuracy adjusted for missing seeds, 90.00 %"),
        ([BEST, WORSE], {"complete": False, "blocked": False}, "A has the highest val accuracy, 90.00 %"),
    ],
)
def test_the_verdict_says_what_the_means_are_of(rows, comparison, start):
    assert summary(*rows, **comparison).verdict.startswith(start)


def test_the_verdict_on_one_cell_and_on_one_seed(tmp_path):
    one = "One cell, nothing to compare: A has val accuracy 99.00 %"
    assert summary(ALONE, n=1, low=NAN).verdict == f"{one} (one seed)."
    assert summary(ALONE, n=2).verdict == f"{one} (95 % interval 98.00 % to 100.00 %) (2 seeds)."
    single = summary(ALONE, ("no verdict", 0.8), n=1)
    assert single.verdict.startswith("A has the highest val accuracy, 99.00 %, but too few cells have two or more")
    assert single.verdict.endswith("Repeat the sweep with seed=0,1,2.")
    single.folders = [str(tmp_path)]
    assert single.verdict.endswith("seed=0,1,2.")
    (tmp_path / "search.db").touch()
    assert "race its best cells over other seeds" in single.verdict


@pytest.mark.parametrize(
    ("within", "comparison", "end"),
    [
        (Within(0.02, "B", 12345.0, "B", 4.0), {}, " B (12,345 parameters) is within 2.00 points of the best."),
        (Within(0.02, "B", 12345.0, "C", 123.4), {},
         "is within 2.00 points of the best, and so is the fastest such cell, C (123 s a trial)."),
        (Within(0.02, seeds=16), {}, " No cell is shown to be within 2.00 points of the best; about 16 seeds per cell "
                                     "would be needed."),
        (Within(0.02), {}, "; about more than 400 seeds per cell would be needed."),
        (Within(0.02, seeds=3), {}, " No cell is shown to be within 2.00 points of the best."),  # as many are there
        (Within(0.02, seeds=3), {"compared": np.array([True, False])},
         " No cell is shown to be within 2.00 points of the best of the cells with two or more seeds."),
        (None, {}, "for the best: 0."),
    ],
)  # fmt: skip
def test_what_is_good_enough(within, comparison, end):
    got = summary(BEST, WORSE)
    got.within, got.comparison = within, replace(got.comparison, **comparison)
    assert got.verdict.endswith(end)


@pytest.mark.parametrize(
    ("value", "plain", "number", "signed", "points"),
    [
        (0.91234, "91.23", "91.23 %", "+91.23", "91.23 points"),
        (-0.01, "-1.00", "-1.00 %", "-1.00", "-1.00 points"),
        (-1e-6, "-0.00", "-0.00 %", "0.00", "-0.00 points"),
        (0.0, "0.00", "0.00 %", "0.00", "0.00 points"),
        (NAN, "–", "–", "–", "– points"),
    ],
)
def test_accuracies_are_shown_in_percent_and_differences_in_points(value, plain, number, signed, points):
    assert [f(value) for f in (texts.plain, texts.number, texts.signed, texts.points)] == [
        plain, number, signed, points,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value", "want"),
    [
        (texts.count, 999_999, "999,999"), (texts.count, 1e6, "1.00 M"), (texts.count, 85.8e6, "85.80 M"),
        (texts.count, NAN, "–"), (texts.count, 0, "0"),
        (texts.size, 999, "999 B"), (texts.size, 1000, "1.00 kB"), (texts.size, 1e6, "1.00 MB"),
        (texts.size, 2.5e9, "2.50 GB"), (texts.size, math.inf, "–"), (texts.size, 999_000, "999.00 kB"),
        (texts.duration, 99.94, "99.9"), (texts.duration, 100, "100"), (texts.duration, 1234.5, "1,234"),
        (texts.duration, NAN, "–"),
    ],
)  # fmt: skip
def test_costs_in_few_characters(text, value, want):
    assert text(value) == want


TEST = "± 1.21 between seeds, ± 1.54 from the 1,719 test images"


def test_the_lines_below_the_verdict():
    known = summary(BEST, WORSE)
    test, power = texts.closing(known)
    assert test == f"Test accuracy of that cell: 95.36 % ({TEST})."
    assert "a true difference of 2.06 points" in power
    assert "80 % power; half a point would take 39 seeds per cell." in power
    known.chosen.between_seeds = NAN
    assert texts.closing(known)[0].endswith("95.36 % (± 1.54 from the 1,719 test images).")
    known.chosen.test = NAN
    assert texts.closing(known) == [power]
    known.design.seeds_for_half_a_point = None
    assert "more than 400 seeds per cell" in texts.closing(known)[0]
    nothing = summary(ALONE)
    nothing.chosen.test = NAN
    assert texts.closing(nothing) == []


def test_the_most_important_figures():
    known = summary(BEST, WORSE)
    assert [(figure, what.split()[0]) for figure, what in texts.facts(known)] == [
        ("90.00 %", "val"), ("95.36 %", "test"), ("2.06 points", "smallest"), ("39", "seeds"), ("5 of 6", "trials"),
    ]  # fmt: skip
    assert texts.facts(known)[:2] == [
        ("90.00 %", "val accuracy of A, n = 3"), ("95.36 %", f"test accuracy of that cell alone ({TEST})"),
    ]  # fmt: skip
    assert texts.facts(known)[-1][1] == "trials completed, in 2 cells"
    known.chosen.test = NAN
    assert [figure for figure, _ in texts.facts(known)] == ["90.00 %", "2.06 points", "39", "5 of 6"]
    assert [figure for figure, _ in texts.facts(summary(ALONE))] == ["99.00 %", "95.36 %", "5 of 6"]


@pytest.mark.parametrize(
    ("comparison", "said", "not_said"),
    [
        ({}, ["the seed is a block; 2 cells and 3 seeds leave 4 degrees", "0.56 points (pooled over all cells: 0.43)",
              "Tukey", "Hsu", "2.06 points", "39 seeds", "0.46 points above"], ["wider", "Main effects", "fewer"]),
        ({"complete": False}, ["3 seeds, some missing leave 4"], []),
        ({"wide": True, "repeats": 4.9}, ["The wider error", "With fewer than five seeds"], []),
        ({"wide": True, "repeats": 5.0}, ["The wider error"], ["With fewer than five seeds"]),
        ({"blocked": False}, ["Cells share no seeds"], ["is a block;"]),
        ({"best": None}, ["No cells were compared: at least two cells with two seeds"], ["Tukey", "degrees"]),
    ],
)  # fmt: skip
def test_the_methods_in_words(comparison, said, not_said):
    lines = texts.methods(summary(BEST, WORSE, **comparison))
    assert "after the last epoch" in lines[0]
    assert all(lines)
    text = " ".join(lines)
    assert [words for words in said if words not in text] == []
    assert [words for words in not_said if words in text] == []


def test_main_effects_are_explained_where_there_are_some():
    known = summary(BEST, WORSE)
    known.effects.table = pd.DataFrame({"effect": [0.1]})
    assert texts.methods(known)[-1].startswith("Main effects come from a linear model with the seed as block")


def test_the_legend_explains_every_mark():
    legend = summary(BEST).legend
    assert [f"*{mark}*" in legend for mark in ("best", "candidate", "worse", "open", "no verdict")] == [True] * 5
    assert "95 %" in legend
    assert "5 %" in legend
