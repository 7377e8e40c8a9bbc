"""Main effects on balanced designs, where they are differences of plain means."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from lora_vit.analysis.effects import main_effects


def factorial(sd: float = 0.1, seeds: int = 3, interaction: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 1, seeds)
    rows = []
    for k, (rank, dropout) in enumerate(itertools.product([2, 4, 8], [0.0, 0.1])):
        for seed in range(seeds):
            value = np.log2(rank) - 5 * dropout + interaction * (rank == 8) * (dropout > 0)
            rows.append(
                {
                    "cell": f"c{k}",
                    "seed": seed,
                    "rank": rank,
                    "dropout": dropout,
                    "y": value + luck[seed] + rng.normal(0, sd),
                }
            )
    return pd.DataFrame(rows)


def test_effects_and_intervals_of_a_balanced_design() -> None:
    frame = factorial()
    table = main_effects(frame, ["rank", "dropout"], "y").table.set_index(["setting", "level"])
    means = frame.groupby("rank")["y"].mean()
    assert table.loc[("rank", 8), "effect"] == pytest.approx(means[8] - means[2])
    by_dropout = frame.groupby("dropout")["y"].mean()
    row = table.loc[("dropout", 0.1)]
    assert row["effect"] == pytest.approx(by_dropout[0.1] - by_dropout[0.0])
    # error: between repeats, cells and seeds taken out, by textbook sums of squares
    cells = frame.pivot(index="cell", columns="seed", values="y").to_numpy()
    centred = cells - cells.mean(0) - cells.mean(1, keepdims=True) + cells.mean()
    error, df = (centred**2).sum() / 10, 10
    half = scipy_stats.t.ppf(0.975, df) * np.sqrt(error * 2 / 9)
    assert row["high"] - row["effect"] == pytest.approx(half)
    assert row["p"] == pytest.approx(2 * scipy_stats.t.sf(abs(row["effect"]) / np.sqrt(error * 2 / 9), df))


def test_an_interaction_is_told_and_the_effect_is_the_average() -> None:
    flat, bent = (main_effects(factorial(interaction=x), ["rank", "dropout"], "y") for x in (0.0, 3.0))
    a, b = (e.table.set_index(["setting", "level"]).loc[("rank", 8)] for e in (flat, bent))
    assert b["effect"] - a["effect"] == pytest.approx(3.0 / 2)  # at one of two dropouts
    assert b["high"] - b["low"] == pytest.approx(a["high"] - a["low"])
    assert any("do not simply add up" in n for n in bent.notes)
    assert not any("do not simply add up" in n for n in flat.notes)
    # lack of fit, by textbook sums of squares
    cells = factorial(interaction=3.0).pivot(index="cell", columns="seed", values="y").to_numpy()
    centred = cells - cells.mean(0) - cells.mean(1, keepdims=True) + cells.mean()
    grid = cells.mean(1).reshape(3, 2)
    left = grid - grid.mean(0) - grid.mean(1, keepdims=True) + grid.mean()
    lack = 3 * (left**2).sum() / 2
    assert bent.lack_of_fit_p == pytest.approx(scipy_stats.f.sf(lack / ((centred**2).sum() / 10), 2, 10))


def test_intervals_hold_with_the_probability_they_claim() -> None:
    """With an interaction: the average effect is inside in 95 % (400 sweeps: within 3.3 points, three errors)."""
    inside = []
    for k in range(400):
        rng = np.random.default_rng(k)
        frame = factorial(sd=0.0, interaction=0.5)
        frame["y"] += rng.normal(0, 0.3, len(frame))
        row = main_effects(frame, ["rank", "dropout"], "y").table.set_index(["setting", "level"]).loc[("rank", 8)]
        inside.append(row["low"] <= 2 + 0.25 <= row["high"])
    assert np.mean(inside) == pytest.approx(0.95, abs=0.033)


def test_a_setting_that_goes_along_with_another_is_named_not_guessed() -> None:
    frame = factorial()
    frame["scaling"] = 32 / frame["rank"]
    got = main_effects(frame, ["rank", "scaling", "dropout"], "y")
    assert set(got.table["setting"]) == {"rank", "dropout"}
    assert any("scaling cannot be separated from rank" in n for n in got.notes)


def test_many_levels_become_a_slope_per_doubling() -> None:
    rng = np.random.default_rng(1)
    ranks = 2.0 ** np.arange(12)
    frame = pd.DataFrame(
        [
            {"cell": f"{r}", "seed": s, "rank": r, "y": 0.7 * np.log2(r) + rng.normal(0, 0.01)}
            for r in ranks
            for s in range(2)
        ]
    )
    table = main_effects(frame, ["rank"], "y").table
    assert table["level"].tolist() == ["per doubling"]
    assert table.loc[0, "effect"] == pytest.approx(0.7, abs=0.01)


def test_one_seed_gives_no_effects() -> None:
    assert main_effects(factorial(seeds=1), ["rank", "dropout"], "y").table.empty


def test_missing_trials_and_row_order_are_taken() -> None:
    frame = factorial().drop(index=[4, 11])
    a = main_effects(frame, ["rank", "dropout"], "y").table
    b = main_effects(frame.sample(frac=1, random_state=0), ["rank", "dropout"], "y").table
    pd.testing.assert_frame_equal(a, b)
    assert a.set_index(["setting", "level"]).loc[("rank", 8), "effect"] == pytest.approx(2, abs=0.3)
