"""Equal or unequal spreads: the test of them, the level from which it counts, and the wider error."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lora_vit.analysis import stats
from lora_vit.analysis.stats import compare, fit_blocks

NAN = math.nan
HOLES = np.array([[5.0, 7.0, NAN, 6.2], [3.0, 5.5, 4.0, NAN], [2.0, NAN, 3.0, 3.7], [1.0, 2.0, 2.5, 0.5]])


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


def test_three_cells_with_two_seeds_always_spread_alike() -> None:
    """The statistic is the same for any data there (a + b + c = 0 makes (a^2 + b^2 + c^2)^2 = 2 (a^4 + b^4 + c^4))."""
    for seed in range(5):
        assert stats.spread_test(fit_blocks(np.random.default_rng(seed).normal(size=(3, 2)))) == 1.0


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
