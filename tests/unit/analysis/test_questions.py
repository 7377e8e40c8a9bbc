"""Methods, ranks and settings each at its best, and P(best): against the textbook where one cell is a control."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_records import make_frame
from scipy import stats as scipy_stats

from lora_vit.analysis import questions, tables
from lora_vit.analysis.pictures import Sums
from lora_vit.analysis.stats import compare

NAN = math.nan


def lead(a: np.ndarray, b: np.ndarray, found: Any) -> tuple[float, float]:
    return questions.least_lead(a, b, 2, found), -questions.least_lead(b, a, 2, found)


def errors(y: np.ndarray, **how: Any) -> Any:
    return compare(y, **how)


def test_of_two_cells_the_lead_is_the_paired_t_interval():
    y = np.array([[0.91, 0.93, 0.90, 0.94], [0.90, 0.90, 0.89, 0.91]])
    got = lead(np.array([0]), np.array([1]), errors(y))
    want = scipy_stats.ttest_rel(y[0], y[1]).confidence_interval(0.95)
    np.testing.assert_allclose(got, (want.low, want.high), rtol=1e-4, err_msg="of a quadrature")


def test_the_best_of_several_against_one_is_dunnetts():
    """Cells that share no seeds are a one-way layout; each end has 2.5 %. Scipy integrates by quasi-Monte Carlo."""
    rng = np.random.default_rng(3)
    y = np.full((4, 24), NAN)
    samples = [rng.normal(0.9 + 0.01 * i, 0.02, 6) for i in range(4)]
    for i, sample in enumerate(samples):
        y[i, 6 * i : 6 * i + 6] = sample
    several, one = np.arange(1, 4), np.array([0])
    found = errors(y, spreads="equal")
    low, high = lead(several, one, found)
    of_each = scipy_stats.dunnett(*samples[1:], control=samples[0], alternative="greater", rng=np.random.default_rng(0))
    assert low == pytest.approx(of_each.confidence_interval(0.975).low.max(), abs=2e-4)
    t = scipy_stats.t.ppf(0.975, found.fit.df) * math.sqrt(found.variance / 3)
    assert high == pytest.approx(max(x.mean() for x in samples[1:]) - samples[0].mean() + t, abs=1e-6)


@pytest.mark.parametrize("pictures", [0, 400])
def test_p_best_of_two_cells(pictures: int):
    """A t of the seeds, and a normal of the pictures beside it: the share of their sums above minus the lead."""
    rng = np.random.default_rng(1)
    right, sums = rng.random((2, 4, 400)) < np.reshape([0.9, 0.875], (2, 1, 1)), Sums("accuracy")
    y, labels = right.mean(2), np.zeros(400, dtype=int)
    for c, s in np.ndindex(2, 4):
        sums.count(str(c), s, labels, right[c, s].astype(float))
    result = compare(y, pictures=sums.of(["0", "1"]) if pictures else None)
    seeds, part = result.variances(*np.array([[0], [1]]))[:, 0, 0]
    noise = math.sqrt(seeds) * rng.standard_t(3, 400_000) + math.sqrt(part) * rng.standard_normal(400_000)
    got = questions.chances(result)
    assert bool(part) == bool(pictures)
    want = (noise < y[0].mean() - y[1].mean()).mean()
    assert got[0] == pytest.approx(want, abs=0.015), "three errors of 10,000 draws"
    assert got.sum() == pytest.approx(1)


def test_p_best_where_cells_tie_or_are_many(monkeypatch):
    y = np.array([[0.9, 0.92, 0.91], [0.92, 0.91, 0.9], [0.91, 0.9, 0.92], [0.99, NAN, NAN], [0.5, 0.51, 0.5]])
    assert questions.chances(errors(y)) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.02)
    monkeypatch.setattr(questions, "MOST", 2)
    assert questions.chances(errors(y[[4, 0, 1]])) == pytest.approx([0, 0.5, 0.5], abs=0.02)


@pytest.mark.parametrize(
    ("low", "high", "margin", "said"),
    [
        (0.001, 0.02, 0.01, "better than"), (-0.02, -0.001, None, "worse than"),
        (-0.02, 0.03, None, "not told apart from"), (-0.02, 0.03, 0.02, "not told apart from"),
        (-0.02, 0.03, 0.021, "at most 2.10 points worse than"),
        (-0.03, 0.02, 0.021, "at most 2.10 points better than"),
        (-0.02, 0.02, 0.021, "at most 2.10 points worse or better than"),
    ],
)  # fmt: skip
def test_claims(low: float, high: float, margin: float | None, said: str):
    assert questions.claim(low, high, margin) == said


def ask(cells: list[dict[str, Any]], y: np.ndarray, margin: float | None = None) -> dict[str, pd.DataFrame]:
    trials, settings = tables.named(make_frame(cells, y))
    values = tables.matrix(trials)
    return questions.answers(trials, values.index, compare(values.to_numpy(float), 0.001), settings, margin)


RATES = [{"lora__rank": r, "optimizer__lr": lr} for r in (1, 16, 4) for lr in (0.1, 0.01)]
BASES = [{"lora__method": "none"}, {"lora__method": "full"}]
SEEDS = np.array([0.001, -0.002, 0.001])


def test_each_question_has_its_table():
    """The best rate differs by rank; DoRA is no baseline, and is best here; a cell of one seed takes no part."""
    means = [0.80, 0.86, 0.90, 0.70, 0.91, 0.89, 0.85, 0.93, 0.92, 0.99]
    y = np.add.outer(means, SEEDS) + np.random.default_rng(0).normal(0, 1e-3, (10, 3))
    y[9, 1:] = NAN
    cells = [*RATES, *BASES, {"lora__method": "dora", "lora__rank": 4, "optimizer__lr": 0.1}, {"lora__rank": 64}]
    got = ask(cells, y)
    assert list(got) == ["method", "rank", "setting"]
    methods, ranks = got["method"].set_index("method"), got["rank"].set_index("rank")
    assert list(methods.index) == ["full fine-tuning", "DoRA", "LoRA", "linear probe"]
    assert {*methods["base"]} == {"DoRA"}
    assert list(methods["is"]) == ["worse than", "", "better than", "better than"]
    assert methods.loc["LoRA", "difference"] == pytest.approx(y[8].mean() - y[4].mean())
    found = errors(y, resolution=0.001)
    half = scipy_stats.t.ppf(1 - 0.05 / 12, found.fit.df) * math.sqrt(found.variances(*np.array([[8], [6]]))[0, 0, 0])
    probe = methods.loc["linear probe"]
    assert probe["high"] - probe["difference"] == pytest.approx(half, rel=1e-3), "twelve ends share the 5 %"
    assert list(ranks.index) == ["4", "16", "1"]
    assert [label.split(", ")[-1] for label in ranks["label"]] == ["lr 0.1", "lr 0.1", "lr 0.01"]
    assert list(got["setting"]["setting"])[:2] == ["full fine-tuning", "DoRA, rank 4"]
    assert questions.text(got) == (
        "Each at its best cell: DoRA is worse than full fine-tuning, better than LoRA, linear probe; rank 4 is better "
        "than 16, 1."
    )


@pytest.mark.parametrize(
    ("cells", "asked"),
    [(RATES, ["rank"]), ([*RATES[:2], *BASES], ["method"]), (RATES[:2], []), (BASES, ["method"]),
     ([*RATES, BASES[0]], ["method", "rank"]), ([{**c, "lora__dropout": d} for c in RATES[:2] for d in (0.0, 0.1)],
                                                ["setting"])],
)  # fmt: skip
def test_what_is_not_there_is_not_asked(cells: list[dict[str, Any]], asked: list[str]):
    y = np.random.default_rng(0).normal(0.9, 0.01, (len(cells), 3))
    assert list(ask(cells, y)) == asked
    assert ask(cells, y[:, :1]) == {}, "one seed"
    assert questions.text({}) == ""


def test_cut_ranks_take_no_part():
    trials, settings = tables.named(make_frame(RATES[::2], np.full((3, 3), 0.9)))
    cut = trials["lora.rank"] == 4
    trials.loc[cut, "lora.method"] = "LoRA cut from 16"
    values = tables.matrix(trials)
    y = np.random.default_rng(0).normal(0.9, 0.01, values.shape)
    got = questions.answers(trials, values.index, compare(y), settings, None)
    assert sorted(got["rank"]["rank"]) == ["1", "16"]
    assert "method" not in got
