"""The report's marks on simulated sweeps: the small form of scripts/calibrate_statistics.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

RUNS = 400
ERROR = 3 * np.sqrt(0.05 * 0.95 / RUNS)
"""Three Monte Carlo errors; the draws are keyed, so that a passing test stays one."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[3] / "scripts" / "calibrate_statistics.py"
    spec = importlib.util.spec_from_file_location("calibrate_statistics", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("spread", ["equal", "half 3x"])
@pytest.mark.parametrize(("cells", "seeds"), [(2, 3), (10, 2), (10, 3), (10, 5), (30, 3)])
def test_null_sweeps_err_at_most_nominally(script: ModuleType, cells: int, seeds: int, spread: str) -> None:
    rates = script.simulate(script.Case(cells, seeds, 0.3, spread), RUNS, np.random.default_rng(7))
    assert rates.worse <= 0.05 + ERROR
    assert min(rates.kept, rates.kept_last) >= 0.95 - ERROR


def test_one_wild_cell_errs_nominally_from_five_seeds_on(script: ModuleType) -> None:
    """With fewer it errs more often; docs/statistics.md says how often."""
    rates = script.simulate(script.Case(10, 5, 0.3, "one 10x"), RUNS, np.random.default_rng(7))
    assert rates.worse <= 0.05 + ERROR
    assert min(rates.kept, rates.kept_last) >= 0.95 - ERROR


def test_a_sweep_without_any_noise_has_no_differences(script: ModuleType) -> None:
    rates = script.simulate(script.Case(10, 3, 0.0), 20, np.random.default_rng(0))
    assert rates.worse == 0
    assert rates.kept == 1


def test_a_true_lead_is_found(script: ModuleType) -> None:
    rates = script.simulate(script.Case(10, 5, 0.3, lead=1.0), RUNS, np.random.default_rng(7))
    assert rates.found > 0.85
    assert rates.excluded > rates.found
    assert rates.kept >= 0.95


def test_one_common_error_would_err_too_often_where_spreads_differ(script: ModuleType) -> None:
    rates = script.simulate(script.Case(30, 3, 0.3, "half 3x"), RUNS, np.random.default_rng(7), "equal")
    assert rates.worse > 0.15
