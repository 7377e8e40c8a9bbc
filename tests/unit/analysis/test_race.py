"""The race's decisions: what the formulas say, which trials are wanted, and that nothing else decides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lora_vit.analysis import race as race_module
from lora_vit.analysis.race import Exit, Race, Rules, decide, half_width, standing, wanted

RULES = Rules(margin=0.005, first_seeds=3, most_seeds=12)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The half widths by which cells that are in were judged, each time."""
    seen: list[np.ndarray] = []
    monkeypatch.setattr(race_module, "half_width", lambda *given: seen.append(half_width(*given)) or seen[-1])
    return seen


def table(means: list[float], seeds: int = 12, sd: float = 0.002, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array(means)[:, None] + rng.normal(0, 0.005, seeds) + rng.normal(0, sd, (len(means), seeds))


def bound(variance: float, share: float, df: float, seeds: int = 3) -> float:
    """The one-sided t bound of a difference, of twice the variance of a trial's error."""
    return float(stats.t.isf(share, df) * np.sqrt(2 * variance / seeds))


def raced(y: np.ndarray, failed: np.ndarray | None = None, rules: Rules = RULES) -> Race:
    return decide(y, np.zeros(y.shape, dtype=bool) if failed is None else failed, rules)


def run(y: np.ndarray, failed: np.ndarray, rules: Rules, workers: int, rng: np.random.Generator) -> Race:
    """Train what is wanted, one trial at a time in a random order, until the race ends."""
    seen, bad = np.full(y.shape, np.nan), np.zeros(y.shape, dtype=bool)
    while not (race := decide(seen, bad, rules)).ended:
        trials = wanted(race, workers)
        assert trials
        assert len(set(trials)) == len(trials)
        cell, seed = trials[rng.integers(len(trials))]
        assert np.isnan(seen[cell, seed]), "wanted although it is there"
        assert not bad[cell, seed], "wanted although it failed"
        seen[cell, seed], bad[cell, seed] = y[cell, seed], failed[cell, seed]
    return race


@pytest.mark.parametrize(("lead", "leaves"), [(0.0018, False), (0.0019, True)])
def test_two_cells_leave_at_the_bar_that_the_paired_t_test_gives(lead: float, leaves: bool, halves) -> None:
    differences = np.array([0.004, -0.002, 0.001]) + lead
    y = np.stack([0.9 + differences, np.full(3, 0.9)])
    test = stats.ttest_rel(y[0], y[1])
    high = test.confidence_interval(1 - 2 * 0.9 * 0.05 / 2).high  # half of the error is for the first look
    race = raced(y)
    np.testing.assert_allclose(halves[0][0, 1], high - differences.mean(), rtol=1e-9)  # float noise
    width = halves[0][0, 1] - RULES.margin
    assert 0.0028 < width < 0.0029, "a point between the two leads"
    assert (1 in race.exits) == leaves == (differences.mean() > width)
    assert race.bars == {3: pytest.approx((width, width))}


def test_the_most_spread_half_and_the_pair_decide_the_variance() -> None:
    y = table([0.9] * 6, seeds=3)
    y[0] += [0.03, -0.03, 0.0]
    got = half_width(y, 0.01)
    assert got[0, 1:].min() > got[1:, 1:].max(), "the noisy cell's own pairs are wider"
    df = 3 * 5 * 2 / 6  # three of the six cells, which share (6 - 1) * (3 - 1) degrees of freedom
    np.testing.assert_allclose(got[0, 1], bound((y[0] - y[1]).var(ddof=1) / 2, 0.009, df), rtol=1e-9)  # float noise
    rounding = bound(0.001**2 / 12, 0.009, 2 * 3 * 2 / 4)
    np.testing.assert_allclose(half_width(np.full((4, 3), 0.9), 0.01, 0.001), rounding, rtol=1e-9)


def test_of_three_cells_two_are_the_half_that_spreads_most() -> None:
    y = np.array([[0.90, 0.93, 0.96, 0.93], [0.90, 0.92, 0.91, 0.93], [0.90, 0.91, 0.91, 0.90]])
    e = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
    own, df = (e**2).sum(1) / (2 * 3 / 3), 2 * (2 * 3 / 3)
    variance = max(np.sort(own)[1:].mean(), (y[1] - y[2]).var(ddof=1) / 2)
    np.testing.assert_allclose(half_width(y, 0.01)[1, 2], bound(variance, 0.009, df, 4), rtol=1e-9)  # float noise


def test_a_cell_that_spreads_blocks_neither_those_that_stay_nor_those_after_it(halves) -> None:
    """While it is in, others have their own variance and a tenth of the error; once it has left it does not count."""
    y = np.vstack([table([0.9, 0.9, 0.9], sd=0.003), np.full(12, 0.0)])
    share = 0.05 / 3 / 2
    for behind in (0.05, 0.5):
        y[3, :3] = y[0, :3] - behind + [0.03, -0.03, 0.0]
        race = raced(y[:, :3])
        assert (3 in race.exits) == (behind > bound(0.03**2 / 2, 0.9 * share, 3))
        own = bound((y[0, :3] - y[1, :3]).var(ddof=1) / 2, share / 10, 2)
        alone = half_width(y[:3, :3], share)
        np.testing.assert_allclose(halves[-1][0, 1], alone[0, 1] if behind == 0.5 else own, rtol=1e-9)
    assert alone[0, 1] < own


def test_a_race_looks_after_ever_more_seeds(halves) -> None:
    assert list(Rules(0.005, 5, 30).looks()) == [5, 7, 10, 13, 17, 23, 30]
    assert list(Rules(0.005, 5, 20).looks()) == [5, 7, 10, 13, 17, 20]
    assert list(Rules(0.005, 2, 2).looks()) == [2]
    y = table([0.9, 0.9], sd=0.01)
    race = raced(y[:, :9], rules=Rules(0.005, 3, 12))
    assert race.seeds == 8
    assert wanted(race) == [(i, n) for n in (9, 10) for i in (0, 1)]
    share = 0.05 / 4 / 5  # the fourth look
    np.testing.assert_allclose(halves[-1][0, 1], half_width(y[:, :8], share)[0, 1])


def test_a_cell_left_behind_the_one_whose_bar_it_fell_below() -> None:
    """Not behind the best, which spreads more and so proves less; and cells that have left keep their numbers."""
    y = np.array([[897, 908, 910, 902], [898, 896, 896, 896], [895, 897, 896, 896], [902, 901, 901, 902]]) / 1000
    race = raced(y, rules=Rules(0.005, 3, 4))
    assert race.exits == {1: Exit(3, 3), 2: Exit(4, 3)}
    assert y.mean(1).argmax() == 0


def test_bars_of_which_some_are_0_let_ties_stay() -> None:
    """The noisy cell might still be the best of them."""
    y = np.tile([[0.9, 0.9, 0.9], [0.9, 0.9, 0.9], [0.92, 0.88, 0.9]], 4)[:, :12]
    half = half_width(y[:, :3], 0.05 / 2 / 2)
    assert half[0, 1] < half[0, 2]
    rules = Rules(float(half[0, 1:].mean()), 3, 12)
    assert raced(y[:, :3], rules=rules).survivors == [0, 1, 2]


@pytest.mark.parametrize("seed", range(4))
def test_neither_order_nor_workers_change_a_decision(seed: int) -> None:
    y = table([0.9, 0.899, 0.897, 0.893, 0.888], seed=seed)
    failed = np.zeros(y.shape, dtype=bool)
    failed[2, 4] = True
    outcomes = []
    for workers in (1, 2, 7, 40):
        for race in (run(y, failed, RULES, workers, np.random.default_rng(workers)), raced(y, failed)):
            outcomes.append((race.survivors, race.exits, race.selected, race.seeds))
    assert outcomes.count(outcomes[0]) == 8, "also with records beyond the end"


def test_nothing_is_decided_before_a_round_is_complete() -> None:
    y, failed = table([0.95, 0.8, 0.7], seeds=3), np.zeros((3, 3), dtype=bool)
    whole = raced(y)
    assert (whole.selected, whole.exits) == (0, {1: Exit(3, 0), 2: Exit(3, 0)})
    y[1, 2] = np.nan
    race = raced(y)
    assert (race.seeds, race.survivors, race.exits, race.ended) == (0, [0, 1, 2], {}, False)
    assert wanted(race) == [(1, 2)]
    failed[0, 0], y[0, 0] = True, np.nan
    assert wanted(raced(y, failed)) == [(1, 2)], "a failed one is not tried again"


def test_a_failed_trial_puts_its_cell_out() -> None:
    y = table([0.9, 0.9, 0.7])
    failed = np.zeros(y.shape, dtype=bool)
    failed[0, 1] = True
    race = raced(y, failed)
    assert race.exits[0] == Exit(2, None)
    assert 0 not in race.survivors
    failed[:, 0] = True
    race = raced(y, failed)
    assert (race.ended, race.selected, race.survivors) == (True, None, [])


def test_ties_end_undecided_at_most_seeds_or_by_the_margin() -> None:
    race = raced(table([0.9, 0.9, 0.9], sd=0.02))
    assert (race.ended, race.selected, race.seeds) == (True, None, 12)
    assert len(race.survivors) > 1
    race = raced(np.full((3, 12), 0.9))
    assert (race.selected, race.seeds) == (0, 3), "no spread: one is as good as another"
    assert raced(np.tile([[0.89], [0.9], [0.9]], 12)).selected == 1, "the first of the best"


def test_a_cell_that_joins_late_begins_with_its_first_seeds() -> None:
    old = table([0.95, 0.8, 0.7])
    y = np.vstack([old, np.full(12, np.nan)])
    assert wanted(raced(y)) == [(3, 0), (3, 1), (3, 2)]
    y[3, :3] = old[0, :3] + 0.02
    race = raced(y)
    assert race.selected == 3
    assert race.exits[0].behind == 3


def test_idle_workers_get_the_survivors_next_seeds() -> None:
    race = raced(table([0.9, 0.9, 0.7])[:, :3])
    assert race.survivors == [0, 1]
    assert wanted(race, 1) == [(0, 3), (1, 3)]
    assert wanted(race, 3) == [(0, 3), (1, 3), (0, 4), (1, 4)]


PLAN: dict[str, Any] = {"margin": 0.5, "first_seeds": 3, "most_seeds": 12, "seed": 7, "cells": ["a", "b"]}


def test_a_race_stands_where_the_records_of_its_trials_say() -> None:
    """By cell and seed, in any order; what is of other cells or seeds is left aside."""
    y = table([0.9, 0.9], seeds=5)
    trials = [(cell, 7 + n, float(y[i, n]), 720) for i, cell in enumerate("ab") for n in range(5)]
    others = [("c", 7, 0.99, 720), ("a", 6, 0.99, 720), ("a", 19, 0.99, 720)]
    race, same = standing(PLAN, [*others, *trials[::-1]]), decide(y, np.zeros(y.shape, dtype=bool), RULES, 1 / 720)
    assert (race.cells, race.first, race.rules) == (["a", "b"], 7, RULES)
    np.testing.assert_array_equal(race.y, y)
    assert (race.exits, race.seeds, race.survivors, race.bars) == (same.exits, same.seeds, same.survivors, same.bars)
    assert wanted(standing(PLAN, [])) == [(i, n) for n in range(3) for i in range(2)]


@pytest.mark.parametrize("accuracy", [None, math.nan, math.inf, 1.01, -0.1, "0.9", True])
def test_an_accuracy_that_is_none_is_a_failure(accuracy: object) -> None:
    trials = [(cell, 7 + n, 0.9 - n / 1000, 720) for cell in "ab" for n in range(3)]
    race = standing(PLAN, [*trials[:4], ("b", 8, accuracy, 720), *trials[5:]])
    assert (race.exits, race.selected) == ({1: Exit(2, None)}, 0)


@pytest.mark.parametrize(
    ("images", "resolution"),
    [([720] * 6, 1 / 720), ([720] * 5 + [100], 0.01), ([None, 0, "many", math.nan, None, None], 0)],
)
def test_the_fewest_images_give_the_rounding_of_the_accuracies(images: list[object], resolution: float, halves) -> None:
    trials = [(cell, 7 + n, 0.9 + i / 1000, images[3 * i + n]) for i, cell in enumerate("ab") for n in range(3)]
    want = half_width(np.tile([[0.9], [0.901]], 3), 0.025, resolution)[0, 1]
    standing(PLAN, trials)
    np.testing.assert_allclose(halves[0][0, 1], want, atol=1e-25)  # float noise


def test_as_many_seeds_as_it_takes_cost_no_more_than_those_that_there_are() -> None:
    """A million at most, of which each of two cells has three: no loop goes over what could be."""
    plan = {**PLAN, "most_seeds": 1_000_000, "margin": 0.02}
    y = table([0.9, 0.9], seeds=3, sd=0.01)
    race = standing(plan, [(cell, 7 + n, float(y[i, n]), None) for i, cell in enumerate("ab") for n in range(3)])
    assert race.y.shape == (2, 3)
    assert wanted(race, 4) == [(0, 3), (1, 3), (0, 4), (1, 4)]
