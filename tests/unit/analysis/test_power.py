"""Detectable differences, seeds needed, and image-level tests against simulation and hand calculation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lora_vit.analysis.power import (
    detectable,
    expected_maximum,
    mcnemar,
    power,
    proportion_error,
    seeds_needed,
)


@pytest.mark.parametrize(("cells", "seeds"), [(2, 5), (10, 3)])
def test_power_equals_simulation(cells: int, seeds: int) -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(0, 0.3, (20_000, cells, seeds))
    y[:, 0] += 1.0
    centred = y - y.mean(1, keepdims=True)
    residual = centred - centred.mean(2, keepdims=True)
    df = (cells - 1) * (seeds - 1)
    error = np.sqrt((residual**2).sum((1, 2)) / df / seeds)
    q = (y[:, 0].mean(1) - y[:, 1].mean(1)) / error
    found = (q > scipy_stats.studentized_range.ppf(0.95, cells, df)).mean()
    assert power(1.0, 0.3, cells, seeds) == pytest.approx(found, abs=0.012)


def test_detectable_and_seeds_needed_invert_power() -> None:
    smallest = detectable(0.003, 8, 4)
    assert power(smallest, 0.003, 8, 4) == pytest.approx(0.8, abs=1e-4)
    n = seeds_needed(0.005, 0.003, 8)
    assert n is not None
    assert power(0.005, 0.003, 8, n) >= 0.8 > power(0.005, 0.003, 8, n - 1)


def test_extremes() -> None:
    assert seeds_needed(0.005, 1.0, 8) is None
    assert seeds_needed(0.005, math.nan, 8) is None
    assert seeds_needed(0.005, 1e-5, 3) == 2
    assert math.isnan(detectable(0.003, 1, 4))
    assert power(0.01, 0.0, 3, 3) == 1.0


def test_expected_maximum_of_normal_values() -> None:
    # Harter (1961): 2 / 5 / 10 values
    for n, value in ((1, 0.0), (2, 1 / math.sqrt(math.pi)), (5, 1.16296), (10, 1.53875)):
        assert expected_maximum(n) == pytest.approx(value, abs=1e-4)


def test_error_of_a_test_set() -> None:
    assert 100 * proportion_error(0.88, 10_000) == pytest.approx(0.637, abs=1e-3)


def test_mcnemar_counts_and_p_by_hand() -> None:
    a = np.array([1] * 8 + [0] * 2 + [1] * 10, bool)
    b = np.array([0] * 8 + [1] * 2 + [1] * 10, bool)
    got = mcnemar(a, b)
    assert (got.only_first, got.only_second, got.images) == (8, 2, 20)
    p = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert got.p == pytest.approx(p)
    assert got.difference == pytest.approx(0.3)
    assert mcnemar(a, a).p == 1
    with pytest.raises(ValueError, match="equally long"):
        mcnemar(a, b[:5])
