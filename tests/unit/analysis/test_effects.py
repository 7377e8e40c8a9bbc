"""Main effects against the same model by dummies."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from lora_vit.analysis.effects import COLUMNS, Effects, main_effects


def factorial(sd: float = 0.1, seeds: int = 3, interaction: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 1, seeds)
    rows = []
    for k, (rank, dropout) in enumerate(itertools.product([2, 4, 8], [0.0, 0.1])):
        value = np.log2(rank) - 5 * dropout + interaction * (rank == 8) * (dropout > 0)
        rows += [(f"c{k}", seed, rank, dropout, value + luck[seed] + rng.normal(0, sd)) for seed in range(seeds)]
    return pd.DataFrame(rows, columns=["cell", "seed", "rank", "dropout", "y"])


def test_an_interaction_is_told_and_the_effect_is_the_average() -> None:
    flat, bent = (main_effects(factorial(interaction=x), ["rank", "dropout"], "y") for x in (0.0, 3.0))
    a, b = (e.table.set_index(["setting", "level"]).loc[("rank", 8)] for e in (flat, bent))
    assert b["effect"] - a["effect"] == pytest.approx(3.0 / 2)  # at one of two dropouts
    assert b["high"] - b["low"] == pytest.approx(a["high"] - a["low"])


def agrees(got: Effects, frame: pd.DataFrame, x: np.ndarray) -> None:
    """With the model by dummies: coefficients of ``x`` beside seeds, error between repeats, lack of fit."""
    y, cells, seeds = (frame[name].to_numpy() for name in ("y", "cell", "seed"))

    def dummies(values: np.ndarray) -> np.ndarray:
        return (values[:, None] == np.unique(values)[None, :]).astype(float)

    def fit(design: np.ndarray) -> tuple[np.ndarray, float, int]:
        b = np.linalg.pinv(design) @ y
        return b, float(((y - design @ b) ** 2).sum()), len(y) - int(np.linalg.matrix_rank(design))

    design = np.column_stack([dummies(seeds), x])
    b, all_ss, all_df = fit(design)
    _, pure_ss, df = fit(np.column_stack([dummies(seeds), dummies(cells)]))
    error, k = pure_ss / df, x.shape[1]
    v = np.linalg.inv(design.T @ design)[-k:, -k:]
    lack_df = all_df - df
    lack = scipy_stats.f.sf((all_ss - pure_ss) / lack_df / error, lack_df, df) if lack_df else np.nan
    half = scipy_stats.t.ppf(0.975, df) * np.sqrt(error * np.diag(v))
    for name, want in (("effect", b[-k:]), ("low", b[-k:] - half), ("high", b[-k:] + half)):
        np.testing.assert_allclose(got.table[name], want)
    assert got.lack_of_fit_p == pytest.approx(lack, nan_ok=True)


@pytest.mark.parametrize(
    "missing", [[], [4, 11], [2, 5, 7, 8, 10, 11, 13, 14, 16, 17], [3, 4, 5, 9, 10, 11, 15, 16, 17]]
)
def test_three_levels_beside_seeds_by_dummies(missing: list[int]) -> None:
    """In any order of the trials; one degree of freedom; without a dropout nothing is left to test for lack of fit."""
    frame = factorial(sd=0.5).drop(index=missing).sample(frac=1, random_state=0)
    x = np.column_stack([frame["rank"] == 4, frame["rank"] == 8]).astype(float)
    got = main_effects(frame, ["rank"], "y")
    agrees(got, frame, x)
    assert list(got.table.columns) == COLUMNS
    assert got.table[["setting", "level", "against"]].to_numpy().tolist() == [["rank", 4, 2], ["rank", 8, 2]]
    assert list(got.table["trials"]) == [(frame["rank"] == level).sum() for level in (4, 8)]


@pytest.mark.parametrize(
    ("name", "values", "level"),
    [
        ("rank", 2.0 ** np.arange(9), "per doubling"),
        ("lora.lr", 1e-4 * np.arange(1, 10), "per doubling"),
        ("alpha", np.arange(9.0), "per unit"),  # zero has no logarithm
        ("dropout", np.arange(9) / 10, "per unit"),
    ],
)
def test_nine_levels_are_a_slope_by_dummies(name: str, values: np.ndarray, level: str) -> None:
    rng = np.random.default_rng(2)
    frame = pd.DataFrame([{"cell": f"c{k}", "seed": s, name: v} for k, v in enumerate(values) for s in range(3)])
    frame["y"] = rng.normal(size=len(frame)) + frame[name] / values.max()
    x = frame[name].to_numpy(float)[:, None]
    x = np.log2(x) if level == "per doubling" else x
    got = main_effects(frame, [name], "y")
    agrees(got, frame, x)
    assert got.table[["setting", "level", "against", "trials"]].to_numpy().tolist() == [[name, level, "", 27]]


def test_eight_levels_have_an_effect_each_and_nine_names_none() -> None:
    rng = np.random.default_rng(2)
    names = [f"t{k}" for k in range(9)]
    frame = pd.DataFrame([{"cell": t, "seed": s, "targets": t, "y": rng.normal()} for t in names for s in range(2)])
    eight = main_effects(frame[frame["targets"] != "t8"], ["targets"], "y")
    assert list(eight.table["level"]) == names[1:8]
    assert eight.notes == []
    nine = main_effects(frame, ["targets"], "y")
    assert nine.table.empty
    assert list(nine.table.columns) == COLUMNS
    assert nine.notes == ["targets has 9 levels: too many for an effect each"]


def test_what_cannot_be_separated_is_named_with_what_came_before() -> None:
    frame = factorial()
    frame["scaling"] = 32 / frame["rank"]
    frame["luck"] = frame["seed"]
    frame["partly"] = frame["rank"].where(frame.index > 2)
    frame["fixed"] = 1
    got = main_effects(frame, ["luck", "fixed", "partly", "rank", "dropout", "scaling"], "y")
    assert got.notes == [
        "luck cannot be separated from the seeds: no effect is shown",
        "scaling cannot be separated from rank and dropout: no effect is shown",
    ]
    assert list(got.table["setting"]) == ["rank", "rank", "dropout"]
    assert main_effects(frame, ["fixed"], "y").table.empty


def test_mixed_levels_sort_numbers_before_words() -> None:
    frame = factorial(seeds=2)
    frame["mixed"] = frame["rank"].map({2: "a", 4: 10, 8: 9}).astype(object)
    got = main_effects(frame, ["mixed"], "y").table
    assert got[["level", "against"]].to_numpy().tolist() == [[10, 9], ["a", 9]]


def test_lack_of_fit_is_told_below_5_percent() -> None:
    found = [main_effects(factorial(interaction=x), ["rank", "dropout"], "y") for x in np.linspace(0, 0.6, 13)]
    for got in found:
        told = f"do not simply add up (lack of fit, p = {got.lack_of_fit_p:.2g})"
        assert [told in note for note in got.notes] == [True] * (got.lack_of_fit_p < 0.05)
    assert {len(got.notes) for got in found} == {0, 1}


@pytest.mark.parametrize("scale", [1.0, 1e-6, -1e6])
@pytest.mark.parametrize("interaction", [0.0, 1.0])
def test_trials_without_any_noise(interaction: float, scale: float) -> None:
    """The seeds' luck, a third, leaves rounding of 1e-16 of the values: no error, whatever the unit."""
    frame = pd.DataFrame(
        [{"cell": f"{a}{b}", "seed": s, "a": a, "b": b, "y": scale * (a + 2 * b + interaction * a * b + s / 3)}
         for a in (0, 1) for b in (0, 1) for s in (0, 1, 2)]
    )  # fmt: skip
    got = main_effects(frame, ["a", "b"], "y")
    want = np.array([1 + interaction / 2, 2 + interaction / 2]) * scale
    for name in ("effect", "low", "high"):
        np.testing.assert_allclose(got.table[name], want)
    assert got.lack_of_fit_p == pytest.approx(0.0 if interaction else 1.0)


def test_two_cells_with_two_seeds_are_the_least() -> None:
    rows = [("a", 0, 1, 0.1), ("a", 1, 1, 0.2), ("b", 0, 2, 0.5), ("b", 1, 2, 0.55), ("c", 0, 4, 0.9)]
    frame = pd.DataFrame(rows, columns=["cell", "seed", "rank", "y"])
    assert list(main_effects(frame[:4], ["rank"], "y").table["level"]) == [2]
    assert main_effects(frame.drop(index=3), ["rank"], "y").table.empty
    assert main_effects(factorial(seeds=1), ["rank", "dropout"], "y").table.empty


def test_repeats_that_share_no_seed_leave_the_error_around_the_model() -> None:
    """Two cells of two seeds and one seed more in each: nothing is left between repeats; x = 1, 1, 2, 2 by hand."""
    frame = pd.DataFrame(
        {"cell": ["a", "a", "b", "b", "c", "d"], "seed": [0, 1, 1, 2, 0, 2], "x": [1, 1, 2, 2, 2, 1],
         "y": [1.0, 2.0, 4.0, 3.0, 2.5, 2.0]}
    )  # fmt: skip
    got = main_effects(frame, ["x"], "y")
    seeds = (frame["seed"].to_numpy()[:, None] == np.arange(3)).astype(float)
    design = np.column_stack([seeds, frame["x"] == 2]).astype(float)
    b, ss, *_ = np.linalg.lstsq(design, frame["y"].to_numpy(), rcond=None)
    half = scipy_stats.t.ppf(0.975, 2) * np.sqrt(ss[0] / 2 * np.linalg.inv(design.T @ design)[3, 3])
    assert got.table.loc[0, "effect"] == pytest.approx(b[3])
    assert got.table.loc[0, "high"] - b[3] == pytest.approx(half)
    assert np.isnan(got.lack_of_fit_p)


def test_more_seeds_than_blocks_are_made_for() -> None:
    frame = pd.DataFrame({"cell": np.arange(802) // 401, "seed": np.arange(802) % 401})
    frame["rank"], frame["y"] = frame["cell"] + 1, np.random.default_rng(0).normal(size=802)
    got = main_effects(frame, ["rank"], "y")
    assert got.table.empty
    assert got.notes == ["more than 400 seeds: no main effects"]
    assert not main_effects(frame[frame["seed"] < 400], ["rank"], "y").table.empty
