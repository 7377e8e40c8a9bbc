"""Effects of settings at the best of the others, against the same figures by hand and by scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from lora_vit.analysis.effects import COLUMNS, exponent, interaction_p, main_effects, rate_by_rank
from lora_vit.analysis.pictures import Sums


def crossed(values: np.ndarray, **levels: list) -> pd.DataFrame:
    """Trials of a full factorial; ``values`` [a level of each setting ..., seeds]."""
    rows = []
    for k, (row, y) in enumerate(
        zip(itertools.product(*levels.values()), values.reshape(-1, values.shape[-1]), strict=True)
    ):
        rows += [
            {"cell": f"c{k:03}", "seed": s, **dict(zip(levels, row, strict=True)), "y": v} for s, v in enumerate(y)
        ]
    return pd.DataFrame(rows)


def factorial(sd: float = 0.1, seeds: int = 3, interaction: float = 0.0) -> pd.DataFrame:
    """Rank 2, 4, 8 by dropout 0, 0.1; ``interaction`` is added to rank 8 with dropout."""
    rng = np.random.default_rng(0)
    mean = np.log2([2, 4, 8])[:, None] - 5 * np.array([0.0, 0.1]) + interaction * np.outer([0, 0, 1], [0, 1])
    y = mean[..., None] + rng.normal(0, 1, seeds) + rng.normal(0, sd, (3, 2, seeds))
    return crossed(y, rank=[2, 4, 8], dropout=[0.0, 0.1])


def test_an_effect_is_that_at_the_rate_that_one_would_use() -> None:
    """Dropout costs two points at a rate that is bad for both and gains a tenth at the good one: -0.95 on average."""
    y = 90 + np.array([[0.0, -30.0], [0.1, -32.0]])[..., None] + np.array([0.0, 0.4, -0.3])
    got = main_effects(crossed(y, dropout=[0.0, 0.1], lr=[1e-3, 1e-2]), ["dropout", "lr"], "y")
    assert list(got.table.columns) == COLUMNS
    assert got.table[["setting", "level", "against", "at"]].to_numpy().tolist() == [
        ["dropout", "0.1", "0", "lr 0.001"], ["lr", "0.01", "0.001", "dropout 0"],
    ]  # fmt: skip
    assert got.table["effect"].tolist() == pytest.approx([0.1, -30.0])


def test_of_places_about_as_good_the_weighted_mean_decides_and_of_others_the_plain_one() -> None:
    """At rate 1 both ranks are good. At rate 2 rank 8 has collapsed, at rate 3 its seeds, which differ, were lucky."""
    rng = np.random.default_rng(0)
    y = np.array([[90.1, 90.2, 90.0], [91.0, 80.0, 91.6]])[..., None] + rng.normal(0, 0.01, (2, 3, 5))
    y[1] += [np.roll([-1, -0.5, 0, 0.5, 1], k) for k in (0, 1, 3)]
    got = main_effects(crossed(y, rank=[1, 8], lr=[1, 2, 3]), ["rank", "lr"], "y")
    assert got.table["at"][0] == "lr 1"
    assert got.table["effect"][0] == pytest.approx(0.9, abs=0.05)


def test_settings_that_move_together_have_one_effect_of_both() -> None:
    """Epochs go with targets, and alone have no effect; what differs only where others differ has none either."""
    frame = factorial()
    frame["alpha"] = 4 * frame["rank"]
    frame["nested"] = np.where(frame["rank"] == 8, frame["dropout"], 0.5)
    frame["fixed"] = 1
    got = main_effects(frame, ["rank", "fixed", "alpha", "dropout"], "y")
    assert got.notes == ["rank and alpha always move together: the effect that is shown is of them together"]
    assert got.table[["setting", "level", "against"]].to_numpy().tolist() == [
        ["rank and alpha", "4, 16", "2, 8"], ["rank and alpha", "8, 32", "2, 8"], ["dropout", "0.1", "0"],
    ]  # fmt: skip
    got = main_effects(frame, ["rank", "dropout", "nested"], "y")
    assert "no trials differ in nested alone: no effect of it is shown" in got.notes
    assert "nested" not in set(got.table["setting"])
    half = frame[(frame["rank"] == 2) == (frame["dropout"] == 0)]  # rank 8 is there with dropout alone, as rank 4 is
    got = main_effects(half, ["rank", "dropout"], "y")
    assert got.table[["setting", "level", "against", "at"]].to_numpy().tolist() == [["rank", "8", "4", "dropout 0.1"]]
    assert got.notes == ["rank: 2 not compared, since not run at the same others",
                         "no trials differ in dropout alone: no effect of it is shown"]  # fmt: skip


def test_the_interval_of_two_cells_is_that_of_the_paired_t_test() -> None:
    frame = factorial(seeds=4).query("dropout == 0 and rank < 8")
    a, b = (frame.loc[frame["rank"] == r, "y"].to_numpy() for r in (2, 4))
    want = scipy_stats.ttest_rel(b, a).confidence_interval()
    assert main_effects(frame, ["rank"], "y").table[["low", "high"]].to_numpy()[0] == pytest.approx(tuple(want))


@pytest.mark.parametrize("missing", [[], [7]])
def test_each_cell_has_a_variance_of_its_own(missing: list[int]) -> None:
    """Satterthwaite's interval; the variances from residuals around cells and seeds, corrected by hand."""
    frame = factorial(sd=0.5, seeds=5).query("dropout == 0").reset_index(drop=True).drop(index=missing)
    frame.loc[frame["rank"] == 8, "y"] += 5 * np.random.default_rng(1).normal(size=5)
    got = main_effects(frame, ["rank"], "y").table
    x = np.column_stack([pd.get_dummies(frame["rank"]), pd.get_dummies(frame["seed"]).iloc[:, 1:]]).astype(float)
    inverse = np.linalg.inv(x.T @ x)
    b = inverse @ x.T @ frame["y"]
    ss = pd.Series((frame["y"] - x @ b) ** 2).groupby(frame["rank"]).sum().to_numpy()
    dof = pd.Series(1 - np.diag(x @ inverse @ x.T)).groupby(frame["rank"].to_numpy()).sum().to_numpy()
    n, mse = frame["rank"].value_counts().sort_index().to_numpy(), ss.sum() / dof.sum()
    v = np.maximum(ss / dof, (2 / 3 * ss / dof - mse / 3) / (1 / 3)) / n
    for k in (1, 2):
        df = (v[0] + v[k]) ** 2 / (v[0] ** 2 / dof[0] + v[k] ** 2 / dof[k])
        adjusting = inverse[0, 0] + inverse[k, k] - 2 * inverse[0, k] - 1 / n[0] - 1 / n[k]
        half = scipy_stats.t.ppf(0.975, df) * np.sqrt(v[0] + v[k] + mse * adjusting)
        assert got["effect"][k - 1] == pytest.approx(b[k] - b[0])
        assert got["high"][k - 1] - got["effect"][k - 1] == pytest.approx(half)


@pytest.mark.parametrize(("resolution", "sd"), [(0.01, 0.01 / np.sqrt(12)), (0.0, 0.0)])
def test_alike_values_leave_rounding(resolution: float, sd: float) -> None:
    frame = crossed(np.array([[0.9], [0.8]]) + np.array([0.0, 0.1, 0.3]), rank=[1, 2])
    row = main_effects(frame, ["rank"], "y", resolution).table.iloc[0]
    half = scipy_stats.t.ppf(0.975, 2) * sd * np.sqrt(2 / 3)
    assert row[["effect", "low", "high"]].tolist() == pytest.approx([-0.1, -0.1 - half, -0.1 + half], abs=1e-10)


def test_an_interaction_is_told_below_5_percent() -> None:
    found = [main_effects(factorial(interaction=x, seeds=5), ["rank", "dropout"], "y") for x in (0.0, 1.0)]
    assert found[0].notes == []
    assert found[1].notes[0].startswith("elsewhere these have other effects, as their pictures show: rank (p = ")


def test_the_interaction_of_two_by_two_is_a_paired_t_test() -> None:
    y = np.random.default_rng(0).normal(size=(4, 6))
    want = scipy_stats.ttest_1samp(y[0] - y[1] - y[2] + y[3], 0).pvalue
    assert interaction_p(y, np.arange(4).reshape(2, 2)) == pytest.approx(want)
    y[3, 5] = np.nan
    want = scipy_stats.ttest_1samp((y[0] - y[1] - y[2] + y[3])[:5], 0).pvalue
    assert interaction_p(y, np.array([[0, 1], [2, 3], [0, -1]])) == pytest.approx(want)
    assert interaction_p(y[:, :2], np.arange(4).reshape(2, 2)) == 1.0
    assert interaction_p(np.ones((4, 3)), np.arange(4).reshape(2, 2)) == 1.0


def test_the_interaction_by_the_contrasts_covariance() -> None:
    """Greenhouse and Geisser's epsilon from the eigenvalues of orthonormal contrasts (3 x 4 levels, 7 seeds)."""
    y = np.random.default_rng(0).normal(size=(12, 7)) * np.arange(1, 13)[:, None]
    a, b = (np.linalg.qr(np.column_stack([np.ones(k), np.eye(k)[:, 1:]]))[0][:, 1:] for k in (3, 4))
    z = np.kron(a, b).T @ y
    values = np.linalg.eigvalsh(np.cov(z))
    epsilon = values.sum() ** 2 / (6 * (values**2).sum())
    f = 7 * (z.mean(1) ** 2).sum() / values.sum()
    want = scipy_stats.f.sf(f, 6 * epsilon, 36 * epsilon)
    assert interaction_p(y, np.arange(12).reshape(3, 4)) == pytest.approx(want)


def test_levels_are_sorted_numbers_before_words_and_none_last() -> None:
    frame = crossed(np.random.default_rng(0).normal(size=(4, 2)), mixed=["a", 10, None, 9])
    assert list(main_effects(frame, ["mixed"], "y").table["level"]) == ["10", "a", "–"]
    many = crossed(np.random.default_rng(0).normal(size=(13, 2)), lr=list(range(13)))
    got = main_effects(many, ["lr"], "y")
    assert list(got.table["level"]) == [str(k) for k in range(1, 13)]


def test_two_cells_with_two_seeds_are_the_least() -> None:
    rows = [("a", 0, 1, 0.1), ("a", 1, 1, 0.2), ("b", 0, 2, 0.5), ("b", 1, 2, 0.55), ("c", 0, 4, 0.9)]
    frame = pd.DataFrame(rows, columns=["cell", "seed", "rank", "y"])
    assert list(main_effects(frame[:4], ["rank"], "y").table["level"]) == ["2"]
    one = main_effects(factorial(seeds=1), ["rank", "dropout"], "y")
    assert one.table.empty
    assert [f.places.index[f.chosen] for f in one.factors] == ["dropout 0", "rank 8"]
    assert main_effects(frame.drop(index=3), ["rank"], "y").table.empty


def test_more_seeds_than_blocks_are_made_for() -> None:
    frame = pd.DataFrame({"cell": np.arange(802) // 401, "seed": np.arange(802) % 401})
    frame["rank"], frame["y"] = frame["cell"] + 1, np.random.default_rng(0).normal(size=802)
    got = main_effects(frame, ["rank"], "y")
    assert got.table.empty
    assert got.notes == ["more than 400 seeds: no effects of settings"]
    assert not main_effects(frame[frame["seed"] < 400], ["rank"], "y").table.empty


RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]


def by_rate(power: float, sd: float, best: float = 2e-3) -> pd.DataFrame:
    """Rank 1, 4, 16 by RATES, five seeds: a parabola in log rate with its top at ``best * (rank / 4) ** power``."""
    away = np.log(RATES) - np.log(best) - power * np.log([1, 4, 16])[:, None] + power * np.log(4)
    return crossed(
        (95 - away**2)[..., None] + np.random.default_rng(0).normal(0, sd, (3, 5, 5)), rank=[1, 4, 16], lr=RATES
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("power", "sd", "best", "start"),
    [
        (0.0, 0.03, 2e-3, "one learning rate serves ranks 1 to 16: it goes as rank^0.0"),
        (-0.3, 0.03, 2e-3, "the best learning rate moves with the rank, by a factor of 0.4"),
        (0.0, 0.8, 2e-3, "whether one learning rate serves ranks 1 to 16 is open: it goes as rank^"),
        (-0.3, 0.03, 1e-2, "whether one learning rate serves ranks 1 to 16 is open: too few are best between"),
    ],
)
def test_whether_one_rate_serves_all_ranks(tied: bool, power: float, sd: float, best: float, start: str) -> None:
    frame = by_rate(power, sd, best).assign(alpha=lambda f: 2 * f["rank"])
    notes = main_effects(frame, ["rank", *["alpha"] * tied, "lr"], "y").notes
    told = [note for note in notes if note.startswith(start)]
    assert len(told) == 1, notes
    if "95 %" in told[0]:
        low, high = told[0].split("95 %: ")[1].rstrip(")").split(" to ")
        assert float(low) <= power <= float(high)


def test_the_power_of_the_rank_is_that_of_the_tops_and_its_interval_a_jackknife() -> None:
    """By the formulas of a parabola through three points and of a line; a rank that is best at an end is left out."""
    frame = by_rate(-0.4, sd=0.2)
    y = frame["y"].to_numpy().reshape(3, 5, 5)

    def by_hand(mean: np.ndarray) -> float:
        tops, x = [], np.log(RATES)
        for row in mean:
            k = row.argmax()
            left, right = row[k] - row[k - 1], row[k] - row[k + 1]
            tops.append(x[k] + np.log(2) / 2 * (left - right) / (left + right))
        return float((tops[2] - tops[0]) / np.log(16))  # of three ranks at equal distances

    b = by_hand(y.mean(2))
    assert exponent(np.array([1.0, 4, 16]), np.array(RATES), y.mean(2)) == pytest.approx(b)
    left_out = np.vstack([y.mean(2), [[0, 1, 2, 3, 4]]])
    assert exponent(np.array([1.0, 4, 16, 64]), np.array(RATES), left_out) == pytest.approx(b)
    without = [by_hand(np.delete(y, s, 2).mean(2)) for s in range(5)]
    half = scipy_stats.t.ppf(0.975, 4) * np.sqrt(4 / 5 * ((without - np.mean(without)) ** 2).sum())
    rows = frame.drop_duplicates("cell")[["rank", "lr"]]
    assert f"rank^{b:.2f} (95 %: {b - half:.2f} to {b + half:.2f})" in rate_by_rank(rows, y.reshape(15, 5))[0]
    assert rate_by_rank(rows, y.reshape(15, 5)[:, :2]) == [], "two seeds"
    assert rate_by_rank(rows[rows["lr"] < 2e-3], y[:, :2].reshape(6, 5)) == [], "two rates"
    edge = np.array([[0.0] * 3, [2.7, 0, 0], [0, 2.7, 0], [0, 0, 2.7], [1] * 3])  # best, but without any one seed
    assert "too few" in rate_by_rank(rows, np.tile(edge, (3, 1)))[0]


def test_an_effect_is_as_uncertain_as_other_pictures_make_it() -> None:
    """Wider by the variance over pictures of the paired difference of the two cells that are compared."""
    rng = np.random.default_rng(0)
    right = rng.random((2, 4, 500)) < np.where(rng.random((2, 1, 500)) < 0.3, 0.4, 0.95)
    frame, sums = crossed(right.mean(2), rank=[1, 8]), Sums("accuracy")
    for c, s in np.ndindex(2, 4):
        sums.count(f"c{c:03}", s, np.zeros(500, dtype=int), right[c, s])
    alone, both = (main_effects(frame, ["rank"], "y", sums=given).table.iloc[0] for given in (None, sums))
    assert both["effect"] == alone["effect"]
    halves = [row["high"] - row["effect"] for row in (both, alone)]
    within = right.var(1, ddof=1).mean(1)
    part = (right[1].mean(0) - right[0].mean(0)).var(ddof=1) - within.sum() / 4
    part = 1.96**2 * (part / 500 + 1 / 500**2)
    assert halves[0] ** 2 - halves[1] ** 2 == pytest.approx(part, rel=0.05)  # but for what cells of a seed share
