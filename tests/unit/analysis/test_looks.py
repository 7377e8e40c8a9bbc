"""Sweeps that grew after results were there, and cells that collapse in some of their seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_records import make_race, make_record, make_sweep
from scipy import stats as scipy_stats

from lora_vit.analysis import stats
from lora_vit.analysis.collapses import collapsed
from lora_vit.analysis.core import summarize
from lora_vit.analysis.export import table_tex
from lora_vit.analysis.stats import compare
from lora_vit.records import PLAN

RANKS = [{"lora__rank": rank} for rank in (1, 2, 4, 8, 16)]


def draw(seed: int, m: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 0.9 + rng.normal(0, 0.01, n) + rng.normal(0, 0.003, (m, n))


@pytest.mark.parametrize("look", [1, 2, 3])
def test_two_cells_are_compared_by_the_t_test_of_what_is_left_for_this_look(tmp_path: Path, look: int) -> None:
    y = np.array([[0.900, 0.902, 0.905, 0.903], [0.907, 0.912, 0.911, 0.911]])  # p = 0.007
    make_sweep(tmp_path, RANKS[:2], y, curve=False)
    looks = [[4, 0, 1], [6, 0, 2]][: look - 1]
    (tmp_path / PLAN).write_text(json.dumps({"trials": {}, **({"looks": looks} if looks else {})}))
    got, alpha = summarize(tmp_path, margin=1.0), 0.05 / look**3
    want = scipy_stats.ttest_rel(y[1], y[0])
    high = want.confidence_interval(1 - alpha)[1]
    mark = "worse" if want.pvalue < alpha else "open" if want.pvalue / 2 < alpha else "candidate"
    assert list(got.cells["mark"]) == ["best", mark]
    assert -got.cells["difference_low"][1] == pytest.approx(high, rel=1e-3)
    assert got.cells["below"][1] == pytest.approx(want.confidence_interval(1 - 2 * alpha)[1], rel=1e-3)
    sure, risk = {1: ("95 %", "5 %"), 2: ("99.38 %", "0.62 %"), 3: ("99.81 %", "0.19 %")}[look]
    assert f"candidates with {sure}" in got.legend
    assert f"({risk} risk" in got.legend
    assert f"simultaneous {sure.replace('%', chr(92) + '%')} interval" in table_tex(got)
    (line, *_), found = got.warnings, got.power()
    assert found is not None
    lead, sd = float(found[0].split()[0]) / 100, got.comparison.sd
    found_with = scipy_stats.nct.sf(scipy_stats.t.ppf(1 - alpha / 2, 3), 3, lead / (sd * np.sqrt(2 / 4)))
    assert found_with == pytest.approx(0.8, abs=0.01)  # of 0.005 points
    assert line.startswith("This is look") == (look > 1)
    if look == 3:
        assert "look 3" in line
        assert "4 with seeds 0 to 1, then 6 with seeds 0 to 2" in line
        assert "err in 0.19 %" in line


def test_looks_at_all_folders_count(tmp_path: Path) -> None:
    for name, ranks in (("a", RANKS[:2]), ("b", RANKS[2:])):
        make_sweep(tmp_path / name, ranks, draw(1, len(ranks), 3), curve=False)
        (tmp_path / name / PLAN).write_text(json.dumps({"trials": {}, "looks": [[4, 0, 1]]}))
    assert summarize([tmp_path / "a", tmp_path / "b"]).comparison.alpha == 0.05 / 27
    assert summarize(tmp_path / "a", where="rank == 1").comparison.alpha == 0.05 / 8


@pytest.mark.parametrize("holes", [0, 3])
def test_what_has_collapsed_is_found_and_nothing_else(holes: int) -> None:
    y, want = draw(3, 8, 6), np.zeros((8, 6), dtype=bool)
    want[2, 4] = want[5, 0] = want[5, 1] = True
    y[want] -= 0.06
    y[7, :holes] = np.nan
    np.testing.assert_array_equal(collapsed(y), want)
    np.testing.assert_array_equal(collapsed(y[:, ::-1] + np.arange(8)[:, None])[:, ::-1], want)
    assert not collapsed(np.where(want, y + 0.06, y)).any()
    assert not collapsed(y[:, 3:5]).any(), "of two seeds neither lies off the others"
    assert not collapsed(np.array([[0.9, 0.9, 0.901], [0.8] * 3, [0.7] * 3, [0.6] * 3]), 1 / 1000).any(), "one picture"
    assert collapsed(np.array([[0.9, 0.9, 0.901], [0.8] * 3, [0.7] * 3, [0.6] * 3])).any()


@pytest.mark.parametrize(("m", "n"), [(2, 3), (4, 5), (10, 3), (30, 5)])
def test_sweeps_of_normal_seeds_hardly_ever_name_a_cell(m: int, n: int) -> None:
    assert sum(collapsed(draw(seed, m, n)).any() for seed in range(300)) <= 0.01 * 300 + 3 * np.sqrt(3)


def test_a_cell_that_has_collapsed_is_named_and_nothing_rests_on_it(tmp_path: Path) -> None:
    y = draw(5, 5, 5)
    y[4] += 0.03
    y[4, 3] = 0.5  # the best one of the others
    make_sweep(tmp_path, RANKS, y, curve=False)
    got, rest = summarize(tmp_path, margin=1.0), compare(y[:4], 1 / 720)
    cells = got.cells.set_index("lora.rank")
    assert (cells["mark"][16], cells["within"][16]) == ("unstable", False)
    np.testing.assert_allclose(cells["difference"][[1, 2, 4, 8]], -rest.difference, atol=1e-12)
    assert got.warnings[0].startswith("rank 16 collapsed in 1 of 5 seeds (seed 3: 50.00 %; others from ")
    assert "5 without a collapse leave a rate of up to 45 %" in got.warnings[1]
    assert "no collapse" in got.verdict
    assert "16" not in set(got.effects.table["level"])
    assert make_record(lora__rank=16).cell_id in set(got.cells["cell"]), "its mean is shown"


def test_critical_values_of_less_than_5_percent() -> None:
    for alpha in (0.05, 0.05 / 8, 0.05 / 216):
        t: Any = scipy_stats.t.ppf(1 - alpha / 2, 7)
        assert stats.tukey_critical(2, 7, alpha) == pytest.approx(np.sqrt(2) * t, rel=1e-4)


@pytest.mark.parametrize(("margins", "sure"), [(None, "with 95 % no other"), ([3.0, 1.0], "with 90 % (each of its 2")])
def test_each_margin_of_a_race_spends_5_percent(tmp_path: Path, margins: Any, sure: str) -> None:
    values = {rank: 0.8 + 0.01 * rank + np.linspace(0, 0.004, 6) for rank in (1, 4)}
    got = summarize(make_race(tmp_path, values, **({"margins": margins} if margins else {})))
    assert f"rank 4 selected: {sure}" in got.verdict
