"""Every statistic against another computation of it: scipy's own tests, ordinary least squares, tables in books."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lora_vit.analysis import stats
from lora_vit.analysis.stats import compare, fit_blocks, t_interval


def draw(seed: int, m: int, n: int, spread: np.ndarray | float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, n) + np.linspace(0, 4, m)[:, None] + rng.normal(size=(m, n)) * np.reshape(spread, (-1, 1))


def holes(y: np.ndarray, seed: int, count: int) -> np.ndarray:
    out = y.copy()
    places = np.random.default_rng(seed).choice(y.size, count, replace=False)
    out.flat[places] = np.nan
    return out


def least_squares(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Ordinary least squares with one column per cell and per seed but the first: cell means at the average seed."""
    m, s = y.shape
    cell, seed = np.nonzero(np.isfinite(y))
    x = np.zeros((len(cell), m + s - 1))
    x[np.arange(len(cell)), cell] = 1
    later = seed > 0
    x[np.flatnonzero(later), m + seed[later] - 1] = 1
    b, *_ = np.linalg.lstsq(x, y[cell, seed], rcond=None)
    df = len(cell) - np.linalg.matrix_rank(x)
    ss = ((y[cell, seed] - x @ b) ** 2).sum()
    return b[:m], np.linalg.inv(x.T @ x)[:m, :m], ss / df, df


def test_t_interval_equals_scipys() -> None:
    x = np.array([0.91, 0.93, 0.925, np.nan])
    got = t_interval(x)
    low, high = scipy_stats.ttest_1samp(x[:3], 0).confidence_interval(0.95)
    assert (got.low, got.high, got.n) == (pytest.approx(low), pytest.approx(high), 3)
    assert got.sd == pytest.approx(np.std(x[:3], ddof=1))


def test_t_interval_of_one_value_and_of_none() -> None:
    one, none = t_interval(np.array([0.9])), t_interval(np.array([np.nan]))
    assert one.n == 1
    assert one.mean == 0.9
    assert np.isnan([one.sd, one.low, one.high, none.mean]).all()


def test_an_interval_is_never_finer_than_the_images_allow() -> None:
    got = t_interval(np.array([0.9, 0.9, 0.9]), resolution=1 / 720)
    assert got.sd == 0
    assert got.high - got.mean == pytest.approx(4.302653 / 720 / np.sqrt(36))


@pytest.mark.parametrize("missing", [0, 3])
def test_block_fit_equals_least_squares(missing: int) -> None:
    y = holes(draw(1, 6, 4), 2, missing)
    fit = fit_blocks(y)
    means, covariance, mse, df = least_squares(y)
    assert fit.blocked
    assert fit.df == df
    assert fit.mse == pytest.approx(mse)
    assert fit.dof.sum() == pytest.approx(df)
    np.testing.assert_allclose(fit.means - fit.means[0], means - means[0], atol=1e-10)
    spread = np.diag(covariance)
    expected = spread[:, None] + spread - 2 * covariance
    np.testing.assert_allclose(fit.difference_variance(np.arange(6)), expected, atol=1e-10)


def test_cells_without_common_seeds_are_not_blocked() -> None:
    y = np.full((2, 6), np.nan)
    y[0, :3], y[1, 3:] = [1, 2, 3], [4, 6, 5]
    fit = fit_blocks(y)
    assert not fit.blocked
    assert fit.df == 4
    np.testing.assert_allclose(fit.means, [2, 5])


def test_two_cells_are_compared_by_the_paired_t_test() -> None:
    y = draw(3, 2, 5)
    got = compare(y)
    assert got.best == 1
    assert got.p_worse[0] == pytest.approx(scipy_stats.ttest_rel(y[0], y[1]).pvalue, rel=1e-4)
    one_sided = scipy_stats.ttest_rel(y[1], y[0], alternative="greater").pvalue
    assert got.p_candidate[0] == pytest.approx(one_sided, abs=1e-5)
    low, high = scipy_stats.ttest_rel(y[1], y[0]).confidence_interval(0.95)
    assert got.difference[0] + got.half[0] == pytest.approx(high, rel=1e-4)
    assert got.difference[0] - got.half[0] == pytest.approx(low, rel=1e-4)


def unshared(y: np.ndarray) -> np.ndarray:
    """The same values, each cell with seeds of its own."""
    m, n = y.shape
    out = np.full((m, m * n), np.nan)
    for i in range(m):
        out[i, i * n : (i + 1) * n] = y[i]
    return out


def test_unpaired_cells_are_compared_as_scipys_tukey_hsd_does() -> None:
    y = draw(4, 5, 4)
    got = compare(unshared(y), spreads="equal")
    want = scipy_stats.tukey_hsd(*y)
    best = got.best
    assert best is not None
    others = np.delete(np.arange(5), best)
    np.testing.assert_allclose(got.p_worse[others], want.pvalue[best, others], rtol=1e-5, atol=1e-8)
    bounds = want.confidence_interval(0.95)
    np.testing.assert_allclose((got.difference + got.half)[others], bounds.high[best, others], rtol=1e-5)
    assert np.isnan(got.p_worse[best])


def test_candidates_are_those_that_no_dunnett_test_excludes() -> None:
    y = draw(5, 4, 4)
    got = compare(unshared(y), spreads="equal")
    for i in range(4):
        others = [y[j] for j in range(4) if j != i]
        p = scipy_stats.dunnett(*others, control=y[i], alternative="greater", rng=np.random.default_rng(0)).pvalue.min()
        assert got.p_candidate[i] == pytest.approx(1 if i == got.best else p, abs=2e-3)
        assert got.candidate[i] == (p >= 0.05)


def test_critical_values_are_those_of_the_tables() -> None:
    # Tukey: Pearson & Hartley, table 29; Dunnett one-sided: Dunnett (1955), table 1a
    for m, df, q in [(3, 10, 3.88), (10, 18, 5.07), (2, 4, 3.93)]:
        assert stats.tukey_critical(m, df) == pytest.approx(q, abs=6e-3)
    for others, df, d in [(1, 10, 1.81), (2, 10, 2.15), (5, 10, 2.56), (9, 20, 2.60), (3, 5, 2.68)]:
        assert stats.dunnett_critical(others, df) == pytest.approx(d, abs=6e-3)


def test_dunnett_tail_equals_the_multivariate_t() -> None:
    shape = np.full((4, 4), 0.5) + np.eye(4) / 2
    for t in (0.5, 2.0, 3.5):
        cdf = scipy_stats.multivariate_t(shape=shape, df=7, seed=0).cdf(np.full(4, t), maxpts=200_000)
        assert stats.dunnett_p(np.array([t]), 4, 7)[0] == pytest.approx(1 - cdf, abs=2e-4)


def test_many_p_values_are_interpolated_closely() -> None:
    q = np.linspace(0.01, 9, 300)
    got = stats.tukey_p(q, 20, 38)
    np.testing.assert_allclose(got[::37], scipy_stats.studentized_range.sf(q[::37], 20, 38), atol=2e-4)


@pytest.mark.parametrize("missing", [0, 4])
def test_pair_variance_is_that_of_the_differences(missing: int) -> None:
    y = holes(draw(6, 5, 4), 3, missing)
    got = stats.pair_variance(y, np.array([2, 0]), True)
    for k, i in enumerate((2, 0)):
        for j in range(5):
            d = (y[i] - y[j])[np.isfinite(y[i] - y[j])]
            want = d.var(ddof=1) / 2 if len(d) > 1 else np.nan
            np.testing.assert_allclose(got[k, j], want, atol=1e-12)


def test_wide_error_is_that_of_the_wilder_half() -> None:
    spread = np.array([1, 1, 1, 10.0])
    fit = fit_blocks(draw(7, 4, 6, spread))
    v = fit.ss / fit.dof
    assert stats.wide_variance(fit) == pytest.approx(np.sort(v)[-2:].mean())  # equal dof in a complete design


def test_unequal_spreads_are_noticed_and_widen_the_error() -> None:
    equal = [stats.spread_test(fit_blocks(draw(k, 10, 5))) for k in range(40)]
    unequal = [stats.spread_test(fit_blocks(draw(k, 10, 5, np.repeat([1, 4.0], 5)))) for k in range(40)]
    assert np.mean(np.array(equal) < 0.05) < 0.2
    assert np.mean(np.array(unequal) < 0.05) > 0.7
    y = draw(1, 10, 5, np.repeat([1, 4.0], 5))
    assert compare(y).wide
    assert compare(y).sd > compare(y, spreads="equal").sd


def test_marks_agree_with_the_p_values() -> None:
    for seed in range(6):
        for m, n in ((2, 3), (6, 3), (8, 2)):
            got = compare(draw(seed, m, n))
            others = np.arange(m) != got.best
            np.testing.assert_array_equal(got.worse[others], got.p_worse[others] < 0.05)
            np.testing.assert_array_equal(got.candidate, got.p_candidate >= 0.05)
            assert got.candidate[got.best]
            assert not (got.worse & got.candidate).any()
            assert not got.worse[got.best]
            np.testing.assert_array_equal(got.worse[others], (got.difference - got.half)[others] > 0)


def test_the_order_of_cells_and_seeds_and_a_seeds_own_luck_change_nothing() -> None:
    y = holes(draw(8, 6, 4), 5, 2)
    rows, columns = np.random.default_rng(0).permutation(6), np.random.default_rng(1).permutation(4)
    luck = np.array([5.0, -3.0, 0.5, 10.0])
    a, b = compare(y), compare((y + luck)[rows][:, columns])
    for name in ("difference", "half", "p_worse", "p_candidate"):
        np.testing.assert_allclose(getattr(a, name)[rows], getattr(b, name), rtol=1e-6, atol=1e-9)


def test_ties_without_any_spread_are_no_difference() -> None:
    got = compare(np.full((4, 3), 0.9), resolution=1e-4)
    assert not got.worse.any()
    assert got.candidate.all()
    assert (got.p_worse[1:] == 1).all()


def test_no_spread_at_all_and_a_clear_lead_is_worse() -> None:
    y = np.tile([[0.8], [0.9], [0.85]], (1, 3))
    got = compare(y, resolution=1e-4)
    assert got.best == 1
    assert got.worse.tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(1, 5), (4, 1)])
def test_one_cell_or_one_seed_gets_no_verdict(shape: tuple[int, int]) -> None:
    got = compare(np.random.default_rng(0).normal(size=shape))
    assert not got.possible
    assert not got.worse.any()
    assert not got.candidate.any()


def test_a_cell_with_one_seed_stays_out_of_the_comparison() -> None:
    y = draw(9, 4, 3)
    alone = np.array([[100.0, np.nan, np.nan]])
    a, b = compare(y), compare(np.concatenate([y, alone]))
    assert b.best == a.best
    assert b.compared.tolist() == [True] * 4 + [False]
    np.testing.assert_allclose(b.p_worse[:4], a.p_worse)


def test_seeds_drawn_anew_for_every_cell_are_taken_as_unpaired() -> None:
    y = unshared(draw(10, 150, 3))  # 450 seeds
    got = compare(y, p_values=False)
    assert not got.blocked
    assert got.df == 300


def test_unpaired_cells_of_unequal_size_and_spread_are_not_pooled() -> None:
    y = np.full((2, 8), np.nan)
    y[0, :2], y[1, 2:] = [0.90, 0.93], [0.87, 0.872, 0.871, 0.869, 0.87, 0.871]
    got, pooled = compare(y), compare(y, spreads="equal")
    assert not got.blocked
    assert got.wide
    welch = np.sqrt(np.var(y[0, :2], ddof=1) / 2 + np.var(y[1, 2:], ddof=1) / 6)
    own = stats.pair_variance(y, np.array([0]), False)[0, 1] * (1 / 2 + 1 / 6)
    assert own == pytest.approx(welch**2)
    assert got.half[1] > pooled.half[1]


def test_repeats_are_the_seeds_of_a_cell() -> None:
    y = draw(11, 3, 4)
    assert compare(y).repeats == 4
    assert compare(unshared(y)).repeats == 4
    y[0, :2] = np.nan
    assert compare(y).repeats == pytest.approx(3 / (1 / 2 + 1 / 4 + 1 / 4))


def test_how_far_another_cell_may_lie_above_is_hsus_bound_and_holds() -> None:
    """Three cells, complete: ``mean_j - mean_i + d sqrt(2 mse / n)`` by hand; the true distances are kept with 95 %."""
    rng = np.random.default_rng(3)
    truth, runs, held = np.array([0.90, 0.897, 0.88]), 400, 0
    for _ in range(runs):
        y = truth[:, None] + rng.normal(0, 0.005, 4) + rng.normal(0, 0.003, (3, 4))
        result = compare(y, spreads="equal", p_values=False)
        step = stats.dunnett_critical(2, 6) * result.sd * math.sqrt(2 / 4)
        lead = result.means[None, :] - result.means[:, None] + step
        np.fill_diagonal(lead, 0.0)
        np.testing.assert_allclose(result.below, np.maximum(lead.max(1), 0.0), rtol=1e-9)  # float noise
        held += bool((result.below >= truth.max() - truth - 1e-12).all())
    assert held / runs > 0.95 - 3 * math.sqrt(0.05 * 0.95 / runs), held  # three Monte Carlo errors
