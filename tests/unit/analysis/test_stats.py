"""Every statistic against another computation of it: scipy's own tests, ordinary least squares, tables in books."""

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


def draw(seed: int, m: int, n: int, spread: np.ndarray | float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, n) + np.linspace(0, 4, m)[:, None] + rng.normal(size=(m, n)) * np.reshape(spread, (-1, 1))


def holes(y: np.ndarray, seed: int, count: int) -> np.ndarray:
    out = y.copy()
    places = np.random.default_rng(seed).choice(y.size, count, replace=False)
    out.flat[places] = NAN
    return out


def unshared(y: np.ndarray) -> np.ndarray:
    """The same values, each cell with seeds of its own."""
    m, n = y.shape
    out = np.full((m, m * n), NAN)
    for i in range(m):
        out[i, i * n : (i + 1) * n] = y[i]
    return out


UNEQUAL = np.full((3, 9), NAN)  # no seed is shared, and each cell has another number of them
UNEQUAL[0, :2], UNEQUAL[1, 2:5], UNEQUAL[2, 5:] = [1, 4], [2, 3, 7], [0, 1, 1, 8]


@pytest.mark.parametrize("values", [[0.91, 0.93, 0.925, NAN], [0.91, 0.93]])
def test_t_interval_equals_scipys(values: list[float]) -> None:
    got, x = t_interval(np.array(values)), np.array(values)
    x = x[np.isfinite(x)]
    low, high = scipy_stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (got.low, got.high, got.n) == (pytest.approx(low), pytest.approx(high), len(x))
    assert (got.mean, got.sd) == (pytest.approx(x.mean()), pytest.approx(np.std(x, ddof=1)))


def test_t_interval_of_one_value_of_none_and_of_equal_ones() -> None:
    one, none = t_interval(np.array([0.9])), t_interval(np.array([NAN]))
    assert (one.n, one.mean, none.n) == (1, 0.9, 0)
    assert np.isnan([one.sd, one.low, one.high, none.mean]).all()
    got = t_interval(np.array([0.9, 0.9, 0.9]), resolution=1 / 720)
    assert got.sd == 0
    assert got.high - got.mean == pytest.approx(4.302653 / 720 / np.sqrt(36)), "never finer than the images allow"


@pytest.mark.parametrize("missing", [0, 3])
def test_block_fit_equals_least_squares(missing: int) -> None:
    """With one column for each cell and each seed but the first: differences, their variances, error, df."""
    y = holes(draw(1, 6, 4), 2, missing)
    cell, seed = np.nonzero(np.isfinite(y))
    x = (cell[:, None] == np.arange(6)).astype(float)
    x = np.column_stack([x, seed[:, None] == np.arange(1, 4)]).astype(float)
    b, *_ = np.linalg.lstsq(x, y[cell, seed], rcond=None)
    df = len(cell) - np.linalg.matrix_rank(x)
    covariance = np.linalg.inv(x.T @ x)[:6, :6]
    fit = fit_blocks(y)
    assert (fit.blocked, fit.df) == (True, df)
    assert fit.mse == pytest.approx(((y[cell, seed] - x @ b) ** 2).sum() / df)
    assert fit.dof.sum() == pytest.approx(df)
    np.testing.assert_allclose(fit.means - fit.means[0], b[:6] - b[0], atol=1e-10)
    spread = np.diag(covariance)
    expected = spread[:, None] + spread - 2 * covariance
    np.testing.assert_allclose(fit.difference_variance(np.arange(6)), expected, atol=1e-10)


def test_fits_without_blocks_and_without_degrees_of_freedom() -> None:
    fit = fit_blocks(UNEQUAL)
    want = [[0, 1 / 2 + 1 / 3, 1 / 2 + 1 / 4], [1 / 2 + 1 / 4, 1 / 3 + 1 / 4, 0]]
    np.testing.assert_allclose(fit.difference_variance(np.array([0, 2])), want)
    np.testing.assert_allclose(fit.means, [2.5, 4, 2.5])
    np.testing.assert_allclose(fit.dof, [1, 2, 3])
    np.testing.assert_allclose(fit.ss, [4.5, 14, 41])
    assert (fit.blocked, fit.df) == (False, 6)
    one = fit_blocks(np.arange(3.0)[:, None])
    assert (one.blocked, one.df) == (False, 0)
    assert math.isnan(one.mse)
    y = holes(draw(1, 4, 4), 1, 3)
    plain = fit_blocks(y, block=False)
    np.testing.assert_allclose(plain.means, np.nanmean(y, axis=1))
    assert (plain.blocked, plain.df) == (False, 13 - 4)


@pytest.mark.parametrize("shift", [0.0, 1e6])
@pytest.mark.parametrize("missing", [0, 4])
def test_pair_variance_is_that_of_the_differences(missing: int, shift: float) -> None:
    """At 1e6 values are rounded to 1e-10; squares of them would be to 1e-4."""
    y = holes(draw(6, 5, 4), 3, missing)
    got = stats.pair_variance(y + shift, np.array([2, 0]), True)
    for k, i in enumerate((2, 0)):
        for j in range(5):
            d = (y[i] - y[j])[np.isfinite(y[i] - y[j])]
            want = d.var(ddof=1) / 2 if len(d) > 1 else NAN  # one common seed is no pair
            np.testing.assert_allclose(got[k, j], want, atol=1e-7 if shift else 1e-12)


def test_the_pairs_variance_without_common_seeds_is_welchs() -> None:
    got = stats.pair_variance(UNEQUAL, np.array([2, 0]), False)
    v, n = np.nanvar(UNEQUAL, axis=1, ddof=1), np.array([2, 3, 4])
    for k, i in enumerate((2, 0)):
        np.testing.assert_allclose(got[k], (v[i] / n[i] + v / n) / (1 / n[i] + 1 / n))


def test_critical_values_are_those_of_the_tables() -> None:
    # Tukey: Pearson & Hartley, table 29; Dunnett one-sided: Dunnett (1955), table 1a
    for m, df, q in [(3, 10, 3.88), (10, 18, 5.07), (2, 4, 3.93)]:
        assert stats.tukey_critical(m, df) == pytest.approx(q, abs=6e-3)
    for others, df, d in [(1, 10, 1.81), (2, 10, 2.15), (5, 10, 2.56), (9, 20, 2.60), (3, 5, 2.68)]:
        assert stats.dunnett_critical(others, df) == pytest.approx(d, abs=6e-3)
    shape = np.full((4, 4), 0.5) + np.eye(4) / 2
    for t in (0.5, 2.0, 3.5):
        cdf = scipy_stats.multivariate_t(shape=shape, df=7, seed=0).cdf(np.full(4, t), maxpts=200_000)
        assert stats.dunnett_tail(t, 4, 7) == pytest.approx(1 - cdf, abs=2e-4)


def test_two_cells_are_compared_by_the_paired_t_test() -> None:
    y = draw(3, 2, 5)
    got, want = compare(y), scipy_stats.ttest_rel(y[1], y[0])
    assert (got.best, got.worse[0]) == (1, want.pvalue < 0.05)
    assert got.candidate[0] == (scipy_stats.ttest_rel(y[1], y[0], alternative="greater").pvalue >= 0.05)
    bounds = got.difference[0] - got.half[0], got.difference[0] + got.half[0]
    assert bounds == pytest.approx(want.confidence_interval(0.95), rel=1e-4)


@pytest.mark.parametrize("seed", [4, 5])
def test_unpaired_cells_are_compared_as_scipys_tukey_hsd_and_dunnett_do(seed: int) -> None:
    y = draw(seed, 5, 4)
    got, want = compare(unshared(y), spreads="equal"), scipy_stats.tukey_hsd(*y)
    best = got.best
    assert best is not None
    others = np.delete(np.arange(5), best)
    bounds = want.confidence_interval(0.95)
    np.testing.assert_allclose((got.difference + got.half)[others], bounds.high[best, others], rtol=1e-5)
    assert got.worse[others].tolist() == (want.pvalue[best, others] < 0.05).tolist()
    assert np.isnan(got.half[best])
    for i in range(5):
        rest = [y[j] for j in range(5) if j != i]
        p = scipy_stats.dunnett(*rest, control=y[i], alternative="greater", rng=np.random.default_rng(0)).pvalue.min()
        assert got.candidate[i] == (p >= 0.05)


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
    bounds = fit.means - fit.means[:, None] + d * error
    below = np.array([max(0.0, *np.delete(bounds[i], i)) for i in range(m)])
    candidate = [all(fit.means[j] - fit.means[i] <= d * error[i, j] for j in range(m) if j != i) for i in range(m)]
    return difference, half, difference > np.nan_to_num(half, nan=math.inf), np.array(candidate), below


NOISY = np.array([[9.0, 1.0, 5.5, 6.0], [1.0, 9.0, 4.0, 5.0], [3.0, 3.1, 3.0, 3.2], [2.0, 2.1, 2.2, 2.1]])
"""The first two spread more than the wide error: their pair has its own."""
HOLES = np.array([[5.0, 7.0, NAN, 6.2], [3.0, 5.5, 4.0, NAN], [2.0, NAN, 3.0, 3.7], [1.0, 2.0, 2.5, 0.5]])


@pytest.mark.parametrize("spreads", ["equal", "unequal"])
@pytest.mark.parametrize("y", [HOLES, NOISY], ids=["holes", "noisy"])
def test_a_whole_comparison_by_loops(y: np.ndarray, spreads: str) -> None:
    fit, wide = fit_blocks(y), spreads == "unequal"
    common = stats.wide_variance(fit) if wide else fit.mse
    got = compare(y, spreads=spreads)
    difference, half, worse, candidate, below = expected(y, common, wide)
    np.testing.assert_allclose(got.difference, difference, atol=1e-12)
    np.testing.assert_allclose(got.below, below, atol=1e-12)
    np.testing.assert_allclose(got.half, half, rtol=1e-4)
    assert (got.worse.tolist(), got.candidate.tolist()) == (worse.tolist(), candidate.tolist())
    assert (got.wide, got.blocked, got.best is None) == (wide, True, False)
    assert got.complete == np.isfinite(y).all()
    assert (got.seeds, got.df, got.best) == (4, fit.df, 0)
    assert got.repeats == pytest.approx(4 / (1 / np.isfinite(y).sum(1)).sum())
    assert got.sd == pytest.approx(math.sqrt(common))
    assert got.pooled_sd == pytest.approx(math.sqrt(fit.mse))
    if y is NOISY and wide:
        assert half[1] > 1.2 * expected(y, common, False)[1][1]
    least = compare(y, resolution=2 * got.sd * math.sqrt(12), spreads=spreads)
    assert (least.sd, least.pooled_sd) == (pytest.approx(2 * got.sd), got.pooled_sd), "no finer than the rounding"


@pytest.mark.parametrize("cells", [300, 257])
def test_candidates_among_more_cells_than_are_taken_at_once(cells: int) -> None:
    y = np.random.default_rng(0).normal(size=(cells, 3)) * 0.1 + np.linspace(0, 1, cells)[:, None]
    got, fit = compare(y, spreads="equal"), fit_blocks(y)
    error = math.sqrt(fit.mse * 2 / 3)
    want = fit.means.max() - fit.means <= stats.dunnett_critical(cells - 1, fit.df) * error
    assert 1 < want.sum() < cells - 1
    np.testing.assert_array_equal(got.candidate, want)


def test_the_order_of_cells_and_seeds_and_a_seeds_own_luck_change_nothing() -> None:
    y = holes(draw(8, 6, 4), 5, 2)
    rows, columns = np.random.default_rng(0).permutation(6), np.random.default_rng(1).permutation(4)
    luck = np.array([5.0, -3.0, 0.5, 10.0])
    a, b = compare(y), compare((y + luck)[rows][:, columns])
    for name in ("difference", "half", "below", "worse", "candidate"):
        np.testing.assert_allclose(getattr(a, name)[rows], getattr(b, name), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("means", "resolution", "worse", "candidate"),
    [
        ([0.9, 0.9, 0.9, 0.9], 1e-4, [False] * 4, [True] * 4),
        ([0.8, 0.9, 0.85], 1e-4, [True, False, True], [False, True, False]),
        ([0.5, 0.75, 0.75], 0.0, [True, False, False], [False, True, True]),
    ],
)
def test_without_any_spread_ties_are_ties_and_the_rest_is_worse(means, resolution, worse, candidate) -> None:
    got = compare(np.repeat(np.array(means)[:, None], 3, axis=1), resolution)
    assert (got.worse.tolist(), got.candidate.tolist()) == (worse, candidate)
    assert got.sd == pytest.approx(resolution / math.sqrt(12), abs=1e-15)
    assert not got.wide


@pytest.mark.parametrize("y", [draw(0, 1, 5), draw(0, 4, 1), np.array([[1.0, 2.0], [3.0, NAN]])])
def test_what_cannot_be_compared_gets_no_verdict(y: np.ndarray) -> None:
    got = compare(y)
    assert (got.best, got.wide, got.blocked, got.complete, got.sd == got.sd) == (None, False, True, True, False)
    assert np.isnan([*got.means, *got.below, got.sd, got.spread_p, got.repeats]).all()
    assert not (got.compared | got.worse | got.candidate).any()


def test_seeds_that_were_drawn_for_each_cell_are_no_blocks() -> None:
    """500 columns with two or three trials of each cell: the error is that within cells."""
    rng = np.random.default_rng(0)
    y = np.full((200, 500), NAN)
    for k in range(200):
        here = slice(2 * k, 2 * k + 2) if k % 2 else slice(2 * k, 2 * k + 3)
        y[k, here] = rng.normal(size=here.stop - here.start)
    got = compare(y, spreads="equal")
    assert (got.blocked, got.df) == (False, 300)
    assert got.sd == pytest.approx(math.sqrt(np.nansum(np.nanvar(y, axis=1) * np.isfinite(y).sum(1)) / 300))
    assert got.means == pytest.approx(np.nanmean(y, axis=1))
    for seeds, blocked in ((400, True), (401, False)):
        assert compare(rng.normal(size=(2, seeds))).blocked == blocked


@pytest.mark.parametrize(
    ("ss", "dof", "want"),
    [
        ([2, 2, 2], [1, 1, 1], 1.0),
        ([2, 3], [2, 1], 1.25),
        ([0, 0], [1, 0], 0.0),
        ([[1, 3], [1, 1]], [1, 1], [1.25, 1.0]),
        ([1e-5, 3e-5], [1, 1], 1.25),
    ],
)
def test_the_statistic_of_unequal_spreads(ss: Any, dof: Any, want: Any) -> None:
    np.testing.assert_allclose(stats.spread_statistic(np.array(ss, float), np.array(dof, float)), want)


@pytest.mark.parametrize(("missing", "block"), [(True, True), (False, False)])
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


@pytest.mark.parametrize(
    "y",
    [HOLES[[0, 3]], np.ones((4, 3)) * np.arange(4)[:, None], np.arange(4.0)[:, None]],  # two cells, no error, no df
)
def test_spreads_that_cannot_be_tested(y: np.ndarray) -> None:
    assert math.isnan(stats.spread_test(fit_blocks(y)))


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
        (5, 13, 0.3), (5, 14, 0.2), (5, 40, 0.2), (19, 63, 0.2), (20, 100, 0.1), (2, 2, 0.0),
    ],
)  # fmt: skip
def test_from_which_p_on_spreads_count_as_equal(cells: int, df: int, level: float) -> None:
    fit: Any = SimpleNamespace(counts=np.ones(cells), df=df, blocked=True)
    assert stats.equal_spread_level(fit) == level
    fit.blocked = False
    assert stats.equal_spread_level(fit) == (level if cells > 2 else 1.01)


@pytest.mark.parametrize(
    ("ss", "dof", "want"),
    [([6, 4, 3], [6, 1, 1], 3.5), ([1, 4, 9], [1, 2, 3], 2.6), ([1, 2, 3, 4], [1, 1, 1, 1], 3.5), ([5], [2], 2.5)],
)
def test_the_wide_variance_is_that_of_the_upper_half(ss: list, dof: list, want: float) -> None:
    fit: Any = SimpleNamespace(ss=np.array(ss, float), dof=np.array(dof, float))
    assert stats.wide_variance(fit) == pytest.approx(want)


def test_unpaired_cells_of_unequal_size_and_spread_are_not_pooled() -> None:
    y = np.full((2, 8), NAN)
    y[0, :2], y[1, 2:] = [0.90, 0.93], [0.87, 0.872, 0.871, 0.869, 0.87, 0.871]
    got, pooled = compare(y), compare(y, spreads="equal")
    assert (got.blocked, got.wide) == (False, True)
    assert got.half[1] > pooled.half[1]


@pytest.mark.parametrize(("cells", "paired", "wide"), [(2, True, False), (2, False, True), (3, True, True)])
def test_when_the_error_is_called_wide(cells: int, paired: bool, wide: bool) -> None:
    y = np.random.default_rng(0).normal(size=(cells, 4))
    if not paired:
        y = np.vstack([np.r_[y[0], np.full(4, NAN)], np.r_[np.full(4, NAN), y[1]]])
    got = compare(y, spreads="unequal")
    assert (got.wide, got.blocked) == (wide, paired)
