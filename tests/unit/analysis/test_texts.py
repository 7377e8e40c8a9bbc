"""The numbers and sentences that people read of a fixed sweep, on cells written by hand."""

from __future__ import annotations

import html
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lora_vit.analysis import export, texts
from lora_vit.analysis.effects import Effects
from lora_vit.analysis.power import Design
from lora_vit.analysis.stats import Interval
from lora_vit.analysis.summary import Summary

NAN = math.nan
BEST, CANDIDATE, OPEN, WORSE, ALONE = (
    ("best", 0.9), ("candidate", 0.89), ("open", 0.88), ("worse", 0.8), ("no verdict", 0.99),
)  # fmt: skip


def summary(*rows: tuple[str, float], sizes: Any = 1000.0, n: int = 3, low: float = 0.01, **comparison: Any) -> Summary:
    """Of cells A, B, ... of ``(mark, mean)``, best first, each with an interval of 1 point to either side."""
    cells = pd.DataFrame(rows, columns=["mark", "mean"])
    cells = cells.assign(label=list("ABCDEFG"[: len(rows)]), n=n, low=cells["mean"] - low, high=cells["mean"] + 0.01,
                         difference=-np.arange(len(rows)) / 1e3, cell="a",
                         trainable_parameters=sizes, seconds=9.0, below=1.0,
                         pareto_parameters=False, pareto_seconds=False)  # fmt: skip
    compared = (cells["mark"] != "no verdict").to_numpy()
    values = {"best": 0 if compared.any() else None, "seeds": 3, "df": 4, "sd": 0.00561, "pooled_sd": 0.00432,
              "repeats": 3.0, "blocked": True, "complete": True, "wide": False, "pictures": 0.0, "alpha": 0.05,
              "overlap": 0.0, **comparison}  # fmt: skip
    empty = pd.DataFrame()
    return Summary(
        folders=[], where=None, margin=None, cells=cells, unfinished=empty, settings=[],
        trials=pd.DataFrame({"status": ["completed"] * 5 + ["failed"], "cell": "a", "folder": "there", "seed": 0,
                             "trial": "t", "seconds": 9.0}),
        environment=pd.DataFrame({"fact": ["environment.commit"], "value": ["–"], "trials": [6]}),
        comparison=SimpleNamespace(compared=compared, **values),
        effects=Effects(), test=Interval(0.9536, NAN, 3, 0.9415, 0.9657), test_images=1719, warnings=[], problems=[],
    )  # fmt: skip


HIGHEST = "A has the highest val accuracy, 90.00 % (95 % interval 89.00 % to 91.00 %) over 3 seeds. "
COMPARED = "B has the highest val accuracy among the cells with two or more seeds, 90.00 % ("
ADJUSTED = "A has the highest val accuracy adjusted for missing seeds, 90.00 % ("
ONE = "One cell, nothing to compare: A has val accuracy 99.00 %"
THREE = [BEST, CANDIDATE, CANDIDATE, OPEN, WORSE]


@pytest.mark.parametrize(
    ("rows", "how", "start", "end"),
    [
        ([BEST, CANDIDATE], {}, HIGHEST, "Shown to be worse: 0 of 1 other cell; still candidates for the best: 1."),
        ([BEST, OPEN], {}, HIGHEST, "worse: 0 of 1 other cell; still candidates for the best: 0."),
        ([*THREE, WORSE], {}, HIGHEST, "worse: 2 of 5 other cells; still candidates for the best: 2."),
        ([ALONE, BEST, WORSE], {}, COMPARED, "worse: 1 of 1 other cell; still candidates for the best: 0."),
        ([BEST, WORSE], {"complete": False}, ADJUSTED, "best: 0."),
        ([BEST, WORSE], {"complete": False, "blocked": False}, HIGHEST, "best: 0."),
        ([ALONE], {"n": 1, "low": NAN}, ONE, "99.00 % (one seed)."),
        ([ALONE], {"n": 2}, ONE, "99.00 % (95 % interval 98.00 % to 100.00 %) (2 seeds)."),
        ([ALONE, ("no verdict", 0.8)], {"n": 1}, "A has the highest val accuracy, 99.00 %, but too few cells have two",
         "Train the best cells with seed=0,1,2, or race them (docs/race.md)."),
    ],
)  # fmt: skip
def test_the_verdict(rows, how, start, end):
    """What the best is and what its figure is of, what is worse, what may be best, and the smallest of those."""
    got = summary(*rows, **how).verdict
    assert got.startswith(start)
    assert got.endswith(end)


@pytest.mark.parametrize(
    ("margin", "below", "seconds", "comparison", "end"),
    [
        (0.02, [1, 0.02], [1, 9], {}, " B (12,345 parameters) is within 2.00 points of the best."),
        (0.02, [1, 0.03], [1, 9], {"sd": 0.01}, "No cell is shown to be within 2.00 points of the best; about 5 seeds "
                                                "per cell would be needed."),
        (0.0001, [1, 1], [1, 9], {}, "; more than 400 seeds per cell would be needed."),
        (0.02, [1, 1], [1, 9], {"repeats": 20.0}, " No cell is shown to be within 2.00 points of the best."),
        (0.02, [1, 1], [1, 9], {"repeats": 20.0, "compared": np.array([True, False])},
         " No cell is shown to be within 2.00 points of the best of the cells that were compared; more than 400 "
         "seeds per cell would be needed."),
        (None, [0, 0], [1, 9], {}, "for the best: 0."),
    ],
)  # fmt: skip
def test_what_is_good_enough(margin, below, seconds, comparison, end):
    got = summary(BEST, WORSE, sizes=[50_000.0, 12_345.0])
    got.margin = margin
    vars(got.comparison).update(comparison)
    got.cells = got.cells.assign(below=below, seconds=seconds)
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
        (texts.size, 999, "999 bytes"), (texts.size, 1000, "1.00 kB"), (texts.size, 1e6, "1.00 MB"),
        (texts.size, 2.5e9, "2.50 GB"), (texts.size, math.inf, "–"), (texts.size, 999_000, "999.00 kB"),
        (texts.duration, 99.94, "99.9"), (texts.duration, 100, "100"), (texts.duration, 1234.5, "1,234"),
        (texts.duration, NAN, "–"),
    ],
)  # fmt: skip
def test_costs_in_few_characters(text, value, want):
    assert text(value) == want


TEST = "± 1.21 between seeds, ± 1.00 from the 1,719 test images"


def test_what_the_design_can_find_and_both_errors_of_the_test_figure():
    """By the definition of power, with the comparison's cells, seeds, error and degrees of freedom."""
    known = summary(BEST, WORSE)
    found, takes = known.power()
    seeds = takes.split()[1]
    assert (found.split()[1], takes) == ("points", f"about {seeds} seeds per cell")
    power = Design(0.00561, 2).power
    assert power(float(found.split()[0]) / 100, 3.0, 4) == pytest.approx(0.8, abs=2e-3)  # of 0.005 points
    assert power(0.005, int(seeds)) >= 0.8 > power(0.005, int(seeds) - 1)
    assert f"a true difference of {found}" in known.power_text()
    assert f"80 % power; half a point would take {takes}." in known.power_text()
    assert known.errors_of_test() == TEST
    known.test = known.test._replace(low=NAN)
    assert known.errors_of_test() == "± 1.00 from the 1,719 test images"
    assert summary(BEST, WORSE, sd=0.1).power()[1] == "more than 400 seeds per cell"
    assert (summary(ALONE).power(), summary(ALONE).power_text()) == (None, "")


@pytest.mark.parametrize(("pictures", "takes"), [(0.0, "400 seeds per cell"), (0.01, "61,208 val pictures")])
def test_the_page_says_what_it_takes_where_no_seeds_do(pictures, takes):
    """By hand: 99 pictures, of whose part of 0.01 a hundredth is to be seen with 1.645 + 0.842 standard errors."""
    known = summary(BEST, OPEN, sd=0.1, pictures=pictures)
    known.command, known.pictures, known.margin = "python -m lora_vit.train sweep.name=x", 99, 0.01
    assert f"not compared. To show one to be within 1.00 points takes more than {takes}" in page(known)


def page(known: Summary) -> str:
    return " ".join(html.unescape(export.html_report(known, {}, "command")).split())


def test_the_most_important_figures():
    known = summary(BEST, WORSE)
    found, takes = known.power()
    figures = re.findall('<div class="fact"><b>(.*?)</b><span>(.*?)</span>', page(known))
    assert figures == [
        ("90.00 %", "val accuracy of A, n = 3"), ("95.36 %", f"test accuracy of that cell alone ({TEST})"),
        (found, "smallest true difference that is detected with 80 % power"),
        (takes, "detect half a point with 80 % power"),
        ("5 of 6", "trials completed, in 2 cells"),
    ]  # fmt: skip
    known.test, known.comparison.best = known.test._replace(mean=NAN), None
    assert re.findall("<b>(.*?)</b>", page(known)) == ["90.00 %", "5 of 6"]


@pytest.mark.parametrize(
    ("comparison", "said", "not_said"),
    [
        ({}, ["the seed is a block; 2 cells and 3 seeds leave 4 degrees", "0.56 points (pooled over all cells: 0.43)",
              "Tukey", "Hsu", "With these seeds", "winner's curse", "after the last epoch"],
         ["wider", "Effects are", "fewer"]),
        ({"complete": False}, ["3 seeds, some missing leave 4"], []),
        ({"wide": True, "repeats": 4.9}, ["The wider error", "With fewer than five seeds"], []),
        ({"wide": True, "repeats": 5.0}, ["The wider error"], ["With fewer than five seeds"]),
        ({"blocked": False}, ["Cells share no seeds"], ["is a block;"]),
        ({"best": None}, ["No cells were compared: at least two cells with two seeds"], ["Tukey", "degrees"]),
    ],
)  # fmt: skip
def test_the_page_says_what_was_done(comparison, said, not_said):
    known = summary(BEST, WORSE, **comparison)
    text = page(known)
    assert [words for words in said if words not in text] == []
    assert [words for words in not_said if words in text] == []
    known.effects.table = pd.DataFrame({"effect": [0.1]})
    explained = "Effects are those among the trials with adapters" in page(known)
    assert explained == (known.comparison.best is not None)
