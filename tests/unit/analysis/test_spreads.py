"""Equal or unequal spreads, and whole comparisons against plain loops over the formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lora_vit.analysis import stats
from lora_vit.analysis.stats import compare, fit_blocks, t_interval

NAN = math.nan
HOLES = np.array([[5.0, 7.0, NAN, 6.2], [3.0, 5.5, 4.0, NAN], [2.0, NAN, 3.0, 3.7], [1.0, 2.0, 2.5, 0.5]])


def test_confidence_of_an_interval() -> None:
    x = np.array([0.91, 0.93, 0.925])
    for confidence in (0.9, 0.95):
        low, high = scipy_stats.ttest_1samp(x, 0).confidence_interval(confidence)
        got = t_interval(x, confidence=confidence)
        assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))
    assert t_interval(x).low == t_interval(x, confidence=0.95).low
    assert t_interval(x[:1]) == stats.Interval(
        0.91, pytest.approx(NAN, nan_ok=True), 1, *[pytest.approx(NAN, nan_ok=True)] * 2
    )
    assert t_interval(x[:0]).n == 0


@pytest.mark.parametrize(
    ("ss", "dof", "want"),
    [
        ([2, 2, 2], [1, 1, 1], 1.0),
        ([1, 3], [1, 1], 1.25),
        ([2, 3], [2, 1], 1.25),
        ([0, 0], [1, 0], 0.0),
        ([[1, 3], [1, 1]], [1, 1], [1.25, 1.0]),
        ([1e-5, 3e-5], [1, 1], 1.25),
    ],
)
def test_the_statistic_of_unequal_spreads(ss: Any, dof: Any, want: Any) -> None:
    np.testing.assert_allclose(stats.spread_statistic(np.array(ss, float), np.array(dof, float)), want)


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("missing", [True, False])
def test_the_spread_test_equals_a_simulation(missing: bool, block: bool) -> None:
    """4,000 draws against the test's 2,000: three errors are 0.041. Three data sets, from alike to unlike spreads."""
    y = HOLES if missing else np.where(np.isfinite(HOLES), HOLES, 4.4)
    rng = np.random.default_rng(3)

    def statistic(values: np.ndarray) -> float:
        fit = fit_blocks(np.where(np.isfinite(y), values, NAN), block)
        return float(stats.spread_statistic(fit.ss, fit.dof))

    null = np.array([statistic(rng.normal(size=y.shape)) for _ in range(4000)])
    noise = np.random.default_rng(1).normal(size=y.shape)
    for spread in (1.0, 2.0, 4.0):
        values = y + noise * np.array([[spread], [1.0], [1.0], [1.0]])
        fit = fit_blocks(np.where(np.isfinite(y), values, NAN), block)
        assert stats.spread_test(fit) == pytest.approx((null >= statistic(values)).mean(), abs=0.041)


@pytest.mark.parametrize(("cells", "seeds", "draws"), [(5, 4, 2000), (100, 40, 1000), (200, 60, 400), (400, 60, 200)])
def test_the_smallest_p_of_the_spread_test(cells: int, seeds: int, draws: int) -> None:
    """The larger the sweep, the fewer draws: about 4 million numbers."""
    y = np.random.default_rng(0).normal(size=(cells, seeds)) * 1e-3
    y[0] += 100 * np.arange(seeds) ** 2
    assert stats.spread_test(fit_blocks(y)) == 1 / (1 + draws)


def test_three_cells_with_two_seeds_always_spread_alike() -> None:
    """The statistic is the same for any data there (a + b + c = 0 makes (a^2 + b^2 + c^2)^2 = 2 (a^4 + b^4 + c^4))."""
    for seed in range(5):
        assert stats.spread_test(fit_blocks(np.random.default_rng(seed).normal(size=(3, 2)))) == 1.0


def test_spreads_that_cannot_be_tested() -> None:
    noise = np.random.default_rng(0).normal(size=(2, 5))
    assert math.isnan(stats.spread_test(fit_blocks(noise)))
    assert math.isnan(stats.spread_test(fit_blocks(np.ones((4, 3)) * np.arange(4)[:, None])))
    assert math.isnan(stats.spread_test(fit_blocks(np.arange(4.0)[:, None])))


@pytest.mark.parametrize("scale", [1e-6, 1.0, -1e6])
def test_rounding_is_no_spread_and_a_small_spread_is_no_rounding(scale: float) -> None:
    """Sums of tenths and thirds leave 1e-16 of the values; real spreads of 1e-9 of them are far above."""
    y = scale * (np.array([0.1, 0.7, 1.3])[:, None] + np.array([0.0, 0.3, 1 / 3, 1.1]))
    fit = fit_blocks(y)
    assert 0 < fit.ss.sum() < (1e-14 * abs(scale)) ** 2
    assert math.isnan(stats.spread_test(fit))
    assert 0 < stats.spread_test(fit_blocks(y + scale * 1e-9 * HOLES[:3, [0, 1, 3, 3]] ** 2)) <= 1


@pytest.mark.parametrize(
    ("cells", "df", "level"),
    [
        (3, 2, 1.01), (19, 26, 1.01), (19, 27, 0.45), (20, 28, 0.7), (20, 29, 0.25),
        (3, 3, 0.45), (5, 9, 0.45), (5, 10, 0.3), (20, 47, 0.25), (20, 48, 0.1),
        (5, 13, 0.3), (5, 14, 0.2), (5, 40, 0.2), (19, 63, 0.2), (20, 100, 0.1),
    ],
)  # fmt: skip
def test_from_which_p_on_spreads_count_as_equal(cells: int, df: int, level: float) -> None:
    fit: Any = SimpleNamespace(counts=np.ones(cells), df=df, blocked=True)
    assert stats.equal_spread_level(fit) == level


def test_two_cells_spread_equally_if_they_share_seeds() -> None:
    pair: Any = SimpleNamespace(counts=np.ones(2), df=2, blocked=True)
    assert stats.equal_spread_level(pair) == 0
    pair.blocked = False
    assert stats.equal_spread_level(pair) > 1


@pytest.mark.parametrize(
    ("ss", "dof", "want"),
    [([6, 4, 3], [6, 1, 1], 3.5), ([1, 4, 9], [1, 2, 3], 2.6), ([1, 2, 3, 4], [1, 1, 1, 1], 3.5), ([5], [2], 2.5)],
)
def test_the_wide_variance_is_that_of_the_upper_half(ss: list, dof: list, want: float) -> None:
    fit: Any = SimpleNamespace(ss=np.array(ss, float), dof=np.array(dof, float))
    assert stats.wide_variance(fit) == pytest.approx(want)


def test_the_pairs_variance_without_common_seeds() -> None:
    y = np.full((3, 9), NAN)
    y[0, :2], y[1, 2:5], y[2, 5:] = [1, 4], [2, 3, 7], [0, 1, 1, 8]
    got = stats.pair_variance(y, np.array([2, 0]), False)
    v, n = np.nanvar(y, axis=1, ddof=1), np.array([2, 3, 4])
    for k, i in enumerate((2, 0)):
        for j in range(3):
            assert got[k, j] == pytest.approx((v[i] / n[i] + v[j] / n[j]) / (1 / n[i] + 1 / n[j]))


def test_one_common_seed_is_no_pair() -> None:
    y = np.array([[1.0, 2.0, NAN], [NAN, 3.0, 4.0], [1.0, 2.5, 4.0]])
    got = stats.pair_variance(y, np.arange(3), True)
    assert math.isnan(got[0, 1])
    assert got[0, 2] == pytest.approx(np.var([0, -0.5], ddof=1) / 2)


def test_fits_without_blocks_and_without_degrees_of_freedom() -> None:
    y = np.full((3, 9), NAN)
    y[0, :2], y[1, 2:5], y[2, 5:] = [1, 4], [2, 3, 7], [0, 1, 1, 8]
    fit = fit_blocks(y)
    want = [[0, 1 / 2 + 1 / 3, 1 / 2 + 1 / 4], [1 / 2 + 1 / 4, 1 / 3 + 1 / 4, 0]]
    np.testing.assert_allclose(fit.difference_variance(np.array([0, 2])), want)
    np.testing.assert_allclose(fit.means, [2.5, 4, 2.5])
    np.testing.assert_allclose(fit.dof, [1, 2, 3])
    np.testing.assert_allclose(fit.ss, [4.5, 14, 41])
    one = fit_blocks(np.arange(3.0)[:, None])
    assert (one.blocked, one.df) == (False, 0)
    assert math.isnan(one.mse)
    plain = fit_blocks(HOLES, block=False)
    np.testing.assert_allclose(plain.means, np.nanmean(HOLES, axis=1))
    assert not plain.blocked
    assert plain.df == 13 - 4


def expected(y: np.ndarray, common: float, wide: bool) -> tuple[np.ndarray, ...]:
    """Difference to the best, its half width, worse, candidate and below, by loops over the pairs."""
    fit = fit_blocks(y)
    m, best = len(y), int(np.argmax(fit.means))
    variance = fit.difference_variance(np.arange(m))
    error = np.zeros((m, m))
    for i in range(m):
        for j in range(m):
            d = y[i] - y[j]
            d = d[np.isfinite(d)]
            own = d.var(ddof=1) / 2 if wide and len(d) > 1 else 0.0
            error[i, j] = math.sqrt(max(common, own) * variance[i, j])
    q = scipy_stats.studentized_range.ppf(0.95, m, fit.df)
    d = stats.dunnett_critical(m - 1, fit.df)
    difference = fit.means[best] - fit.means
    half = q / math.sqrt(2) * error[best]
    half[best] = NAN
    candidate = [
        all(fit.means[j] - fit.means[i] <= d * error[i, j] for j in range(m) if j != i) for i in range(m)
    ]  # fmt: skip
    bounds = fit.means - fit.means[:, None] + d * error
    below = [max(0.0, *np.delete(bounds[i], i)) for i in range(m)]
    return difference, half, difference > np.nan_to_num(half, nan=math.inf), np.array(candidate), np.array(below)


@pytest.mark.parametrize("spreads", ["equal", "unequal"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_whole_comparison_by_loops(missing: bool, spreads: str) -> None:
    y = HOLES if missing else np.where(np.isfinite(HOLES), HOLES, 4.4)
    fit, wide = fit_blocks(y), spreads == "unequal"
    common = stats.wide_variance(fit) if wide else fit.mse
    got = compare(y, spreads=spreads)
    difference, half, worse, candidate, below = expected(y, common, wide)
    np.testing.assert_allclose(got.difference, difference, atol=1e-12)
    np.testing.assert_allclose(got.below, below, atol=1e-12)
    np.testing.assert_allclose(got.half, half, rtol=1e-4)
    assert got.worse.tolist() == worse.tolist()
    assert got.candidate.tolist() == candidate.tolist()
    assert (got.wide, got.blocked, got.complete, got.possible) == (wide, True, not missing, True)
    assert (got.seeds, got.df, got.best) == (4, fit.df, 0)
    assert got.sd == pytest.approx(math.sqrt(common))
    assert got.pooled_sd == pytest.approx(math.sqrt(fit.mse))
    np.testing.assert_array_equal(compare(y, spreads=spreads, p_values=False).p_worse, np.full(4, NAN))
    np.testing.assert_array_equal(compare(y, spreads=spreads, p_values=False).p_candidate, np.full(4, NAN))


def test_a_pair_that_spreads_more_than_the_wide_error_has_its_own() -> None:
    y = np.array([[9.0, 1.0, 5.5, 6.0], [1.0, 9.0, 4.0, 5.0], [3.0, 3.1, 3.0, 3.2], [2.0, 2.1, 2.2, 2.1]])
    common = stats.wide_variance(fit_blocks(y))
    got = compare(y, spreads="unequal")
    _, half, worse, candidate, below = expected(y, common, True)
    np.testing.assert_allclose(got.half, half, rtol=1e-4)
    np.testing.assert_allclose(got.below, below, atol=1e-12)
    assert half[1] > 1.2 * expected(y, common, False)[1][1]
    assert got.worse.tolist() == worse.tolist()
    assert got.candidate.tolist() == candidate.tolist()


def test_candidates_among_more_cells_than_are_taken_at_once() -> None:
    y = np.random.default_rng(0).normal(size=(300, 3)) * 0.1 + np.linspace(0, 1, 300)[:, None]
    got = compare(y, spreads="equal", p_values=False)
    fit = fit_blocks(y)
    error = math.sqrt(fit.mse * 2 / 3)
    want = fit.means.max() - fit.means <= stats.dunnett_critical(299, fit.df) * error
    assert 1 < want.sum() < 299
    np.testing.assert_array_equal(got.candidate, want)


@pytest.mark.parametrize(("cells", "paired", "wide"), [(2, True, False), (2, False, True), (3, True, True)])
def test_when_the_error_is_called_wide(cells: int, paired: bool, wide: bool) -> None:
    y = np.random.default_rng(0).normal(size=(cells, 4))
    if not paired:
        y = np.vstack([np.r_[y[0], np.full(4, NAN)], np.r_[np.full(4, NAN), y[1]]])
    got = compare(y, spreads="unequal")
    assert (got.wide, got.blocked) == (wide, paired)


def test_no_spread_at_all_needs_no_wide_error_and_has_that_of_the_images() -> None:
    got = compare(np.tile([[0.8], [0.9], [0.85]], (1, 3)), resolution=0.01)
    assert not got.wide
    assert got.sd == pytest.approx(0.01 / math.sqrt(12))
    assert got.pooled_sd == pytest.approx(0, abs=1e-15)


def test_what_cannot_be_compared_has_no_reason_to_warn() -> None:
    got = compare(np.array([[1.0, 2.0], [3.0, NAN]]))
    assert (got.possible, got.wide, got.blocked, got.complete, got.seeds, got.df) == (False, False, True, True, 0, 0)
    assert np.isnan(got.means).all()
    assert not got.compared.any()
    assert all(math.isnan(value) for value in (got.sd, got.pooled_sd, got.spread_p, got.repeats))
    assert got.best is None
    two = compare(np.array([[1.0, 2.0], [3.0, 4.5]]), spreads="equal")
    assert two.possible
    assert not compare(np.array([[1.0, 2.0, NAN, NAN], [NAN, 3.0, 4.0, NAN]])[:1]).possible


def test_seeds_drawn_anew_are_packed_cell_by_cell() -> None:
    """500 columns with two or three trials of each cell: the error is that within cells."""
    rng = np.random.default_rng(0)
    y = np.full((200, 500), NAN)
    for k in range(200):
        here = slice(2 * k, 2 * k + 2) if k % 2 else slice(2 * k, 2 * k + 3)
        y[k, here] = rng.normal(size=here.stop - here.start)
    got = compare(y, spreads="equal", p_values=False)
    assert (got.blocked, got.df) == (False, 300)
    assert got.sd == pytest.approx(math.sqrt(np.nansum(np.nanvar(y, axis=1) * np.isfinite(y).sum(1)) / 300))
    assert got.means == pytest.approx(np.nanmean(y, axis=1))


@pytest.mark.parametrize(("seeds", "blocked"), [(400, True), (401, False)])
def test_more_than_400_seeds_are_no_blocks(seeds: int, blocked: bool) -> None:
    y = np.random.default_rng(0).normal(size=(2, seeds))
    assert compare(y, p_values=False).blocked == blocked


def test_tails_at_their_ends() -> None:
    np.testing.assert_array_equal(stats.tukey_p(np.array([-1, 0, math.inf, NAN]), 3, 6), [1, 1, 0, NAN])
    np.testing.assert_array_equal(stats.dunnett_p(np.array([-math.inf, 0.0]), 3, 6), [1, 1])
    got = stats.tukey_p(np.array([3, 1, 3]), 3, 6)  # whole numbers, twice the same, not in order
    np.testing.assert_allclose(got, scipy_stats.studentized_range.sf([3.0, 1.0, 3.0], 3, 6))


@pytest.mark.parametrize(("others", "df"), [(1, 1), (9, 1), (4, 7), (30, 60)])
def test_the_critical_value_is_where_the_tail_is_5_percent(others: int, df: int) -> None:
    critical = stats.dunnett_critical(others, df)
    assert stats.dunnett_p(np.array([critical]), others, df)[0] == pytest.approx(0.05, abs=1e-6)
    if others == 1:
        assert critical == pytest.approx(scipy_stats.t.ppf(0.95, df), rel=1e-3)


def test_the_nodes_give_the_moments_of_the_estimated_sd() -> None:
    """E s^2 = 1 for any df; 160 nodes leave 1e-4."""
    for df in (1, 4, 30):
        s, weights = stats.chi_nodes(df)
        assert weights.sum() == pytest.approx(1)
        assert weights @ s**2 == pytest.approx(1, abs=1e-4)
        assert weights @ s**4 == pytest.approx(1 + 2 / df, rel=2e-3)


def test_a_seed_that_no_cell_has_changes_nothing() -> None:
    wider = np.insert(HOLES, 2, NAN, axis=1)
    got, want = fit_blocks(wider), fit_blocks(HOLES)
    assert (got.df, got.blocked) == (want.df, True)
    for name in ("means", "ss", "dof", "counts"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-12)
    np.testing.assert_allclose(got.difference_variance(np.arange(4)), want.difference_variance(np.arange(4)))


def test_the_variance_of_pairs_far_from_zero() -> None:
    """At 1e6 values are rounded to 1e-10; squares of them would be to 1e-4."""
    for blocked in (True, False):
        want = stats.pair_variance(HOLES, np.arange(4), blocked)
        np.testing.assert_allclose(stats.pair_variance(HOLES + 1e6, np.arange(4), blocked), want, atol=1e-7)


def test_without_any_error_ties_are_ties_and_the_rest_is_worse() -> None:
    got = compare(np.repeat([[0.5], [0.75], [0.75]], 3, axis=1))
    assert (got.sd, got.best) == (0, 1)
    assert got.worse.tolist() == [True, False, False]
    assert got.candidate.tolist() == [False, True, True]
    np.testing.assert_array_equal(got.p_worse, [0, NAN, 1])
    np.testing.assert_array_equal(got.p_candidate, [0, 1, 1])


@pytest.mark.parametrize(("wide", "sd"), [(False, 0.3), (True, 0.3), (False, 0.001), (True, 0.001)])
def test_the_least_error_is_that_of_rounding(wide: bool, sd: float) -> None:
    y = HOLES * 0.01
    got = compare(y, resolution=sd * math.sqrt(12), spreads="unequal" if wide else "equal")
    fit = fit_blocks(y)
    assert got.sd == pytest.approx(max(sd, math.sqrt(stats.wide_variance(fit) if wide else fit.mse)))
    assert got.pooled_sd == pytest.approx(math.sqrt(fit.mse))
