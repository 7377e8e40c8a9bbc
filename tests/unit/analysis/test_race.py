"""The race's decisions: what the formulas say, which trials are wanted, and that nothing else decides."""

import math

import numpy as np
import pytest

from lora_vit.analysis.race import Exit, Rules, boundary, decide, one_stage, typical_trials, wanted

RULES = Rules(margin=0.005, first_seeds=3, most_seeds=12)


def table(means: list[float], seeds: int = 12, sd: float = 0.002, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array(means)[:, None] + rng.normal(0, 0.005, seeds) + rng.normal(0, sd, (len(means), seeds))


def none_failed(y: np.ndarray) -> np.ndarray:
    return np.zeros(y.shape, dtype=bool)


def run(y: np.ndarray, failed: np.ndarray, rules: Rules, workers: int, rng: np.random.Generator):  # type: ignore[no-untyped-def]
    """Train what is wanted, one trial at a time in a random order, until the race ends."""
    seen = np.full(y.shape, np.nan)
    bad = none_failed(y)
    while not (race := decide(seen, bad, rules)).ended:
        trials = wanted(race, seen, bad, rules, workers)
        assert trials
        assert len(set(trials)) == len(trials)
        cell, seed = trials[rng.integers(len(trials))]
        assert np.isnan(seen[cell, seed]), "wanted although it is there"
        assert not bad[cell, seed], "wanted although it failed"
        seen[cell, seed], bad[cell, seed] = y[cell, seed], failed[cell, seed]
    return race, seen


@pytest.mark.parametrize(("lead", "leaves"), [(0.0018, False), (0.0020, True)])
def test_two_cells_leave_at_the_boundary_that_the_formulas_give(lead: float, leaves: bool) -> None:
    differences = np.array([0.004, -0.002, 0.001]) + lead
    y = np.stack([0.9 + differences, np.full(3, 0.9)])
    s2, df = differences.var(ddof=1), 2
    eta = ((2 * 0.05 / 1) ** (-2 / df) - 1) / 2
    np.testing.assert_allclose(boundary(y, RULES)[0, 1], 2 * eta * df * s2 / RULES.margin, rtol=1e-9)  # float noise
    width = max(0.0, RULES.margin / 6 * (2 * eta * df * s2 / RULES.margin**2 - 3))
    race = decide(y, none_failed(y), RULES)
    assert 0.0028 < width < 0.0030, "a point between the two leads"
    assert (1 in race.exits) == leaves == (differences.mean() > width)
    if not leaves:
        np.testing.assert_allclose(race.room[1], width - differences.mean(), rtol=1e-9)


def test_the_most_spread_half_and_the_pair_decide_the_variance() -> None:
    y = table([0.9] * 6, seeds=3)
    y[0] += [0.03, -0.03, 0.0]
    bound = boundary(y, RULES)
    assert bound[0, 1:].min() > bound[1:, 1:].max(), "the noisy cell's own pairs are wider"
    df = 3 * 5 * 2 / 6  # three of the six cells, which share (6 - 1) * (3 - 1) degrees of freedom
    eta = ((2 * 0.05 / 5) ** (-2 / df) - 1) / 2
    paired = (y[0] - y[1]).var(ddof=1)
    np.testing.assert_allclose(bound[0, 1], 2 * eta * df * paired / RULES.margin, rtol=1e-9)  # float noise
    df = 2 * 3 * 2 / 4
    eta = ((2 * 0.05 / 3) ** (-2 / df) - 1) / 2
    rounding = 2 * eta * df * 2 * 0.001**2 / 12 / RULES.margin
    np.testing.assert_allclose(boundary(np.full((4, 3), 0.9), RULES, 0.001), rounding, rtol=1e-9)


def test_of_three_cells_two_are_the_half_that_spreads_most() -> None:
    y = np.array([[0.90, 0.93, 0.96, 0.93], [0.90, 0.92, 0.91, 0.93], [0.90, 0.91, 0.91, 0.90]])
    e = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
    own, df = (e**2).sum(1) / (2 * 3 / 3), 2 * (2 * 3 / 3)
    s2 = max(2 * np.sort(own)[1:].mean(), (y[1] - y[2]).var(ddof=1))
    eta = ((2 * 0.05 / 2) ** (-2 / df) - 1) / 2
    np.testing.assert_allclose(boundary(y, RULES)[1, 2], 2 * eta * df * s2 / RULES.margin, rtol=1e-9)  # float noise


def test_a_cell_left_behind_the_one_whose_bar_it_fell_below() -> None:
    """Not behind the best, which spreads more and so proves less; and cells that have left keep their numbers."""
    y = np.array([[898, 899, 905, 914, 893, 905], [899, 896, 898, 897, 898, 896],
                  [895, 895, 898, 895, 895, 895], [904, 904, 905, 902, 906, 906]]) / 1000  # fmt: skip
    race = decide(y, none_failed(y), Rules(0.005, 3, 6))
    assert race.exits == {2: Exit(3, 3), 1: Exit(4, 3)}
    assert y[:, :4].mean(1).argmax() == 0


def test_bars_of_which_some_are_0_let_ties_stay() -> None:
    """The noisy cell might still be the best of them."""
    y = np.tile([[0.9, 0.9, 0.9], [0.9, 0.9, 0.9], [0.92, 0.88, 0.9]], 4)[:, :12]
    widths = boundary(y[:, :3], Rules(1.0, 3, 12))  # times the margin: without it
    calm, noisy = widths[0, 1], widths[0, 2]
    assert calm < noisy
    rules = Rules(float(np.sqrt((calm + noisy) / 2 / 3)), 3, 12)
    assert decide(y[:, :3], none_failed(y[:, :3]), rules).survivors == [0, 1, 2]


def test_a_clear_leader_is_selected_and_who_is_behind_is_told() -> None:
    race, seen = run(table([0.95, 0.8, 0.7]), none_failed(table([0, 0, 0])), RULES, 1, np.random.default_rng(0))
    assert (race.selected, race.survivors, race.seeds) == (0, [0], 3)
    assert race.exits == {1: Exit(3, 0), 2: Exit(3, 0)}
    assert np.isfinite(seen).sum() == 9


@pytest.mark.parametrize("seed", range(8))
def test_neither_order_nor_workers_change_a_decision(seed: int) -> None:
    y = table([0.9, 0.899, 0.897, 0.893, 0.888], seed=seed)
    failed = none_failed(y)
    failed[2, 4] = True
    outcomes = []
    for workers in (1, 2, 7, 40):
        race, _ = run(y, failed, RULES, workers, np.random.default_rng(workers))
        outcomes.append((race.survivors, race.exits, race.selected, race.seeds))
        later = decide(y, failed, RULES)  # records beyond the end decide nothing
        assert (later.survivors, later.exits, later.selected, later.seeds) == outcomes[0]
    assert outcomes.count(outcomes[0]) == 4


def test_nothing_is_decided_before_a_round_is_complete() -> None:
    y = table([0.95, 0.8, 0.7])
    y[1, 2] = np.nan
    race = decide(y, none_failed(y), RULES)
    assert (race.seeds, race.survivors, race.exits, race.ended) == (0, [0, 1, 2], {}, False)
    assert wanted(race, y, none_failed(y), RULES) == [(1, 2)]
    failed = none_failed(y)
    failed[0, 0], y[0, 0] = True, np.nan
    assert wanted(decide(y, failed, RULES), y, failed, RULES) == [(1, 2)], "a failed one is not tried again"


def test_a_failed_trial_puts_its_cell_out_and_the_others_go_on() -> None:
    y = table([0.9, 0.9, 0.7])
    failed = none_failed(y)
    failed[0, 1] = True
    race = decide(y, failed, RULES)
    assert race.exits[0] == Exit(2, None)
    assert 0 not in race.survivors
    assert math.isnan(race.room[0])
    failed[:, 0] = True
    race = decide(y, failed, RULES)
    assert race.ended
    assert race.selected is None
    assert race.survivors == []


def test_ties_end_undecided_at_most_seeds_or_by_the_margin() -> None:
    y = table([0.9, 0.9, 0.9], sd=0.02)
    race = decide(y, none_failed(y), RULES)
    assert race.ended
    assert race.selected is None
    assert race.seeds == 12
    assert len(race.survivors) > 1
    same = np.full((3, 12), 0.9)
    race = decide(same, none_failed(same), RULES)
    assert (race.selected, race.seeds) == (0, 3), "no spread: one is as good as another"
    last = np.tile([[0.89], [0.9], [0.9]], 12)
    assert decide(last, none_failed(last), RULES).selected == 1, "the first of the best"


def test_a_cell_that_joins_late_begins_with_its_first_seeds() -> None:
    old = table([0.95, 0.8, 0.7])
    y = np.vstack([old, np.full(12, np.nan)])
    race = decide(y, none_failed(y), RULES)
    assert wanted(race, y, none_failed(y), RULES) == [(3, 0), (3, 1), (3, 2)]
    y[3, :3] = old[0, :3] + 0.02
    race = decide(y, none_failed(y), RULES)
    assert race.selected == 3
    assert race.exits[0].behind == 3


def test_idle_workers_get_the_survivors_next_seeds() -> None:
    y = table([0.9, 0.9, 0.7])
    y[:, 3:] = np.nan
    race = decide(y, none_failed(y), RULES)
    assert race.survivors == [0, 1]
    assert wanted(race, y, none_failed(y), RULES, 1) == [(0, 3), (1, 3)]
    assert wanted(race, y, none_failed(y), RULES, 3) == [(0, 3), (1, 3), (0, 4), (1, 4)]


@pytest.mark.parametrize("bad", [{"margin": 0.0}, {"first_seeds": 1}, {"most_seeds": 2}, {"alpha": 0.6}])
def test_rules_that_cannot_be_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a race"):
        Rules(**{"margin": 0.005, "first_seeds": 3, "most_seeds": 30, **bad})  # type: ignore[arg-type]


def test_what_the_race_still_takes_if_the_means_stay() -> None:
    """Of two cells by the boundary itself, and of all by going on with seeds that change no mean."""
    for lead, k in ((0.0, 2), (0.002, 2), (0.001, 5), (0.02, 4)):
        y = table([0.9] * k, seeds=3, sd=0.004, seed=3)
        y += 0.9 + np.linspace(lead, 0, k)[:, None] - y.mean(1, keepdims=True)
        whole = np.hstack([y, np.repeat(y.mean(1, keepdims=True), 27, axis=1)])
        rules = Rules(0.005, 3, 30)
        race = decide(np.where(np.arange(30) < 3, whole, np.nan), none_failed(whole), rules)
        assert race.seeds == 3
        end = decide(whole, none_failed(whole), rules)
        used = sum(e.seeds for e in end.exits.values()) + len(end.survivors) * end.seeds
        assert race.expected(rules) == used - 3 * k, (lead, k)
        assert end.expected(rules) == 0


@pytest.mark.parametrize("seed", [4, 14, 18, 74])
def test_what_it_still_takes_where_cells_leave_that_others_were_behind(seed: int) -> None:
    """Pairs differ in their bars: a cell puts others out only while it is in itself."""
    rng = np.random.default_rng(seed)
    y = table([0.9] * 10, seeds=3, sd=0.003, seed=seed) + rng.normal(0, 0.006, (10, 1))
    y[-1] += rng.normal(0, 0.02, 3)
    whole = np.hstack([y, np.repeat(y.mean(1, keepdims=True), 25, axis=1)])
    rules = Rules(0.02, 3, 28)
    race = decide(np.where(np.arange(28) < 3, whole, np.nan), none_failed(whole), rules)
    before = (race.survivors, dict(race.exits), race.room.copy(), race.seeds)
    assert race.expected(rules) == decide(whole, none_failed(whole), rules).trials - race.trials
    assert (race.survivors, race.exits, race.seeds) == (before[0], before[1], before[3])
    np.testing.assert_array_equal(race.room, before[2])


def test_one_stage_takes_as_many_seeds_as_select_the_best_with_95_percent() -> None:
    """Simulated: the best of ten, ahead by the margin. 20,000 draws: two Monte Carlo errors are 0.3 %."""
    rules, sd, rng = Rules(0.005, 3, 30), 0.006, np.random.default_rng(0)
    n = one_stage(sd, 10, rules)
    right = {}
    for seeds in (n - 1, n):
        means = rng.normal(0, sd / np.sqrt(seeds), (20_000, 10))
        means[:, 0] += rules.margin
        right[seeds] = (means.argmax(1) == 0).mean()
    tables = {2: 1.645, 4: 2.062, 10: 2.417}  # of the largest of k - 1 normals with correlation 1/2, 95 %
    for k, point in tables.items():
        assert one_stage(sd, k, rules) == math.ceil(2 * (point * sd / rules.margin) ** 2)
    assert one_stage(0.0, 4, rules) == 1
    assert right[n - 1] < 0.953
    assert right[n] > 0.947


def test_a_typical_race_takes_more_the_more_the_seeds_spread() -> None:
    counts = [typical_trials(10, sd, Rules(0.005, 5, 30)) for sd in (1e-6, 0.003, 0.01)]
    assert counts[0] == 50
    assert 50 < counts[1] < counts[2] <= 300
