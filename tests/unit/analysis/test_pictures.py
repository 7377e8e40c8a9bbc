"""Seeds and pictures: both parts of an error against loops over the predictions, and what rests on them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_up_records import FIRST, make_race, make_sweep, make_trial
from scipy import stats as scipy_stats

from lora_vit.analysis import export
from lora_vit.analysis.core import summarize
from lora_vit.analysis.pictures import Sums, each_adds
from lora_vit.analysis.power import Design
from lora_vit.analysis.race import Rules, decide, half_width
from lora_vit.analysis.stats import compare, dunnett_critical, share_interval, tukey_critical
from lora_vit.metrics import METRICS
from lora_vit.records import PREDICTIONS


def predictions(rng: np.random.Generator, size: int = 300, classes: int = 4) -> Any:
    labels = rng.permutation(np.arange(size) ** 2 * classes // size**2)  # the first class has half of the pictures
    predicted = np.where(rng.random(size) < 0.7, labels, rng.integers(0, classes, size))
    return SimpleNamespace(labels=labels, predicted=predicted, in_first_five=predicted < 3)


def without(p: Any, i: int) -> Any:
    return SimpleNamespace(**{name: np.delete(values, i) for name, values in vars(p).items()})


@pytest.mark.parametrize("name", METRICS)
def test_what_each_picture_adds_is_the_jackknifes(name: str) -> None:
    """By leaving out each of 300 pictures in turn, also where alike ones are left out once; and one picture's step."""
    p, metric = predictions(np.random.default_rng(1)), METRICS[name]
    each = each_adds(metric, p)
    left_out = np.array([metric.of(without(p, i)) for i in range(300)])
    np.testing.assert_allclose(each, 300 * metric.of(p) - 299 * left_out, atol=1e-10)
    images = np.bincount(p.labels)
    least = np.flatnonzero((p.labels == images.argmin()) & (p.predicted == p.labels))[0]
    wrong = SimpleNamespace(**vars(p) | {"predicted": np.where(np.arange(300) == least, 0, p.predicted)})
    if name in ("accuracy", "balanced_accuracy"):
        assert metric.of(p) - metric.of(wrong) == pytest.approx(metric.step(images))


def drawn(m: int, seeds: int, size: int = 400, seed: int = 0) -> np.ndarray:
    """Right predictions [m, seeds, size] with all that the model knows; cells share half of each seed's luck."""
    rng = np.random.default_rng(seed)
    p = np.where(rng.random(size) < 0.3, 0.5, 0.95) + rng.choice([-0.2, 0.05], (m, size))
    u = np.where(rng.random((m, seeds, size)) < 0.5, rng.random((seeds, size)), rng.random((m, seeds, size)))
    return u < p[:, None]


def summed(right: np.ndarray, there: np.ndarray | None = None) -> Sums:
    sums = Sums("accuracy")
    for c, s in np.ndindex(*right.shape[:2]):
        if there is None or there[c, s]:
            sums.count(str(c), s, np.zeros(right.shape[2], dtype=int), right[c, s])
    return sums


def names(m: int) -> list[str]:
    return list(map(str, range(m)))


def test_the_pictures_part_is_that_of_the_paired_predictions() -> None:
    """Of two cells ``shared`` is the pair's own, and the part that of Owen's crossed random effects, by hand."""
    right = drawn(2, 4)
    d = right[0].astype(float) - right[1]
    each, rest = d.mean(0), d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
    want = each.var(ddof=1) / 400 - (rest**2).sum() / (3 * 399) / (400 * 4) + 1 / 400**2
    pictures = summed(right).of(names(2))
    assert pictures is not None
    got = pictures.of_differences(np.array([0]), np.arange(2))
    assert got[0] == pytest.approx([0, want], rel=1e-5)  # float32


def test_the_parts_are_found_whichever_trials_are_missing() -> None:
    """Means over 300 populations against what each was drawn from: the differences of the cells' p. Two errors: 6 %."""
    there = np.ones((3, 4), dtype=bool)
    there[1, 2:], there[2, 0] = False, False
    got, want = [], []
    for seed in range(300):
        right = drawn(3, 4, seed=seed)
        pictures = summed(right, there).of(names(3))
        assert pictures is not None
        own = np.random.default_rng(seed)
        own.random(400)
        g = own.choice([-0.2, 0.05], (3, 400))
        got.append(pictures.of_differences(np.arange(3), np.arange(3)))
        want.append([[np.var(a - b, ddof=1) / 400 + bool((a != b).any()) / 400**2 for a in g] for b in g])
    np.testing.assert_allclose(np.mean(got, axis=0), np.mean(want, axis=0), rtol=0.1)


def test_one_picture_of_719_is_no_difference_and_more_seeds_do_not_make_it_one() -> None:
    right = np.arange(719) < np.array([690, 689])[:, None, None] * np.ones((2, 5, 1))
    y = right.mean(2)
    assert compare(y, 1 / 719).worse[1], "on these pictures it is one"
    got = compare(y, 1 / 719, pictures=summed(right).of(names(2)))
    assert not got.worse.any()
    assert got.candidate.all()
    assert got.half[1] == pytest.approx(np.hypot(got.half_seeds[1], got.half_pictures[1]))
    assert got.pictures == pytest.approx(2 / 719**2, rel=0.01)
    apart = np.arange(719) < np.array([690, 640])[:, None, None] * np.ones((2, 5, 1))
    assert compare(apart.mean(2), 1 / 719, pictures=summed(apart).of(names(2))).worse[1]


def test_both_parts_by_loops_over_the_pairs() -> None:
    right = drawn(4, 5)
    y, pictures = right.mean(2), summed(right).of(names(4))
    assert pictures is not None
    got, alone = compare(y, spreads="equal", pictures=pictures), compare(y, spreads="equal")
    parts = pictures.of_differences(np.arange(4), np.arange(4))
    seeds = 2 * alone.sd**2 / 5
    below = np.zeros(4)
    for i, j in np.ndindex(4, 4):
        if i != j:
            both = [math.hypot(critical(k, alone.df) * seeds**0.5, critical(k, 1e6) * parts[i, j] ** 0.5)
                    for critical, k in ((dunnett_critical, 3), (tukey_critical, 4))]  # fmt: skip
            below[i] = max(below[i], y.mean(1)[j] - y.mean(1)[i] + both[0])
            if i == got.best:
                assert got.half[j] == pytest.approx(both[1] / math.sqrt(2), rel=1e-3)  # interpolated
    np.testing.assert_allclose(got.below, below, rtol=2e-3)
    assert (got.half[got.half > 0] > alone.half[alone.half > 0]).all()


def test_an_interval_lies_within_0_and_100_percent_and_is_one_at_both() -> None:
    """At 100 % it is Wilson's of the pictures."""
    want = scipy_stats.binomtest(719, 719).proportion_ci(0.95, "wilson")
    got = share_interval(np.ones(3), 1 / 719)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=2e-3)
    for x in ([0.98, 1.0], [0.02, 0.0], [0.999, 1.0, 1.0], [0.5, 0.9]):
        low, high = share_interval(np.array(x), 1 / 719)[3:]
        assert 0 <= low < np.mean(x) < high <= 1
    few = share_interval(np.array([0.9, 0.9, 0.9]), 1 / 100)
    want = scipy_stats.binomtest(90, 100).proportion_ci(0.95, "wilson")
    assert (few.low, few.high) == pytest.approx((want.low, want.high), abs=2e-3), "hardly anything of seeds"


def test_power_with_pictures_is_that_of_a_simulation_and_has_a_floor() -> None:
    rng, n = np.random.default_rng(0), 200_000
    seeds, s2 = 2 * 0.004**2 / 3, rng.chisquare(14, n) / 14
    few, many = tukey_critical(8, 14) / math.sqrt(2), tukey_critical(8, 1e6) / math.sqrt(2)
    half = np.hypot(few * np.sqrt(s2 * seeds), many * math.sqrt(1e-5))
    found = 0.02 + rng.normal(0, np.sqrt(seeds + 1e-5), n) > half
    assert Design(0.004, 8, 1e-5).power(0.02, 3) == pytest.approx(found.mean(), abs=0.004)  # three errors
    floor = Design(0.0, 8, 1e-5).detectable(3, 14)
    assert Design(0.0, 8, 1e-5).pictures_needed(floor, 700) == pytest.approx(700, abs=1)
    assert Design(0.004, 8, 1e-5).seeds_needed(floor * 0.99) is None
    assert Design(0.004, 8, 1e-5).seeds_needed(floor * 1.2) is not None


def test_a_race_bounds_seeds_and_pictures_together() -> None:
    right = drawn(3, 8)
    y, pictures = right.mean(2), summed(right[:, :3]).of(names(3))
    assert pictures is not None
    tau = np.sqrt(pictures.of_differences(np.arange(3), np.arange(3)))
    none = np.zeros(y.shape, dtype=bool)
    race, alone = (decide(y[:, :3], none[:, :3], Rules(0.01, 3, 8), pictures=part) for part in (pictures, None))
    np.testing.assert_allclose(race.hidden, scipy_stats.norm.isf(0.05 / 2 / 2) * tau)
    half = half_width(y[:, :3], 0.05 / 2 / 2)
    bars = (np.hypot(half, race.hidden) - 0.01)[~np.eye(3, dtype=bool)].clip(0)
    assert race.bars[3] == pytest.approx((bars.min(), bars.max()))
    assert race.bars[3] > alone.bars[3]
    narrow = decide(y, none, Rules(0.001, 3, 8), pictures=pictures)
    assert (narrow.ended, narrow.selected, narrow.seeds, narrow.blocked) == (True, None, 4, True), "no seed would help"


def leave(folder: str, right: np.ndarray) -> None:
    """A trial's predictions: which of the val pictures are right."""
    said = right.astype(int)
    np.savez(Path(folder) / PREDICTIONS, **{"val.labels": np.ones_like(said), "val.predicted": said})


RANKS = [{"lora__rank": 1}, {"lora__rank": 4}]


def test_a_summary_counts_both_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    y = np.array([[0.90, 0.90, 0.90], [0.88, 0.88, 0.88]])
    sweep = make_sweep(tmp_path, RANKS, y, curve=False)
    assert "about these val pictures" in summarize(sweep).warnings[-1]
    assert summarize(sweep).cells["mark"].tolist() == ["best", "worse"]
    folders = summarize(sweep).trials.set_index(["lora.rank", "seed"])["folder"]
    for (rank, _), folder in folders.items():
        leave(folder, np.roll(np.arange(720) < 720 * (0.90 if rank == 1 else 0.88), 0 if rank == 1 else 60))
    got = summarize(sweep)
    assert got.cells["mark"].tolist() == ["best", "candidate"]
    assert got.pictures == 720
    assert (got.effects.table["high"] - got.effects.table["effect"]).item() == pytest.approx(0.03, abs=0.005)
    assert got.cells["difference_pictures"][1] > got.cells["difference_seeds"][1]
    assert "predictions" not in " ".join(got.warnings)
    assert "half a point would take more than" in got.power_text()
    assert got.power_text().endswith("val pictures in place of the 720.")
    Path(folders[1, 2], PREDICTIONS).unlink()
    Path(folders[4, 2], PREDICTIONS).write_bytes(b"PK")
    line = summarize(sweep).warnings[-1]
    assert line.startswith("Of 2 of 6 trials no predictions count (")
    assert line.endswith("their cells' other seeds count.")
    leave(folders[4, 2], np.ones(9))
    assert "other pictures" in " ".join(summarize(sweep).warnings)


def test_the_summary_of_a_race_that_only_pictures_can_decide(tmp_path: Path) -> None:
    values = {1: np.full(6, 0.9), 4: np.full(6, 0.9)}
    make_race(tmp_path, values, 3)
    for _, trial in summarize(tmp_path).trials.iterrows():
        leave(trial["folder"], np.roll(np.arange(720) < 648, 70 * trial["lora.rank"] - 70))
    got = summarize(tmp_path)
    assert got.race is not None
    assert (got.race.ended, got.race.blocked, got.race.first) == (True, True, FIRST)
    images = math.ceil(720 * (got.race.hidden.max() / 0.01) ** 2)
    assert f"takes about {images:,} val pictures in place of 720 or a wider margin: no number of seeds" in got.verdict
    assert "between rank 1 and rank 4." in got.verdict or "between rank 4 and rank 1." in got.verdict


def test_survivors_of_a_cell_are_no_verdict_and_ties_are_named(tmp_path: Path) -> None:
    """Rank 1 is ahead with the two of its five seeds that did not diverge; ranks 4 and 8 have one mean."""
    y = np.array([[0.95, 0.951, math.nan, math.nan, math.nan], [0.9, 0.901, 0.902, 0.903, 0.904]])
    sweep = make_sweep(tmp_path, [*RANKS, {"lora__rank": 8}], np.vstack([y, y[1, ::-1]]), curve=False)
    for seed in (2, 3, 4):
        make_trial(sweep, 0.1, "failed", curve=False, lora__rank=1, seed=seed)
    got = summarize(sweep, margin=1.0)
    cells = got.cells.set_index("lora.rank")
    assert cells["mark"].to_dict() | {4: "", 8: ""} == {1: "failed", 4: "", 8: ""}
    assert set(cells["mark"]) == {"failed", "best", "candidate"}
    assert cells["failed"].to_dict() == {1: "3 of 5", 4: "", 8: ""}
    assert not cells["within"][1]
    assert got.effects.table[["level", "against"]].to_numpy().tolist() == [["8", "4"]]
    best, other = (4, 8) if cells["mark"][4] == "best" else (8, 4)
    assert got.verdict.startswith(f"rank {best} has the highest val accuracy among the cells with two or more seeds "
                                  "and no failed trial, 90.20 % (")  # fmt: skip
    assert f"over 5 seeds, and so has rank {other}. Shown to be worse: 0 of 1 other cell;" in got.verdict
    assert "failed" in export.readable(got)
    assert "3 of 5" in export.table_md(got)
    whole = make_sweep(tmp_path / "whole", RANKS, y[[1, 1], :3], curve=False)
    assert "failed" not in export.readable(summarize(whole))


def test_a_race_is_decided_by_the_predictions_of_its_own_cells(tmp_path: Path) -> None:
    """Those of a cell that is not raced, which its workers do not know, change nothing of it."""
    rng = np.random.default_rng(0)
    values = {rank: 0.9 + rng.normal(0, 0.004, 6) for rank in (1, 4, 8)}
    make_race(tmp_path, values, 6, margin=5.0)
    for trial in summarize(tmp_path).trials.to_dict("records"):
        leave(trial["folder"], rng.random(720) < np.where(np.arange(720) < 600, 0.99, 0.5))
    race = summarize(tmp_path).race
    make_sweep(tmp_path, [{"lora__rank": 16}], np.full((1, 6), 0.9), range(FIRST, FIRST + 6), curve=False)
    for trial in summarize(tmp_path, where="rank == 16").trials.to_dict("records"):
        leave(trial["folder"], rng.random(720) < 0.5)
    again = summarize(tmp_path)
    assert again.race is not None
    assert race is not None
    np.testing.assert_array_equal(again.race.hidden, race.hidden)
    assert race.hidden.any()
    assert (again.race.exits, again.cells["mark"].tolist()[-1]) == (race.exits, "not raced")


def test_seeds_beyond_400_are_no_blocks() -> None:
    right = drawn(2, 2, 50)
    few, many = Sums("accuracy"), Sums("accuracy")
    for sums, apart in ((few, 0), (many, 500)):
        for k in range(apart):
            sums.count(f"other {k}", 1000 + k, np.zeros(50, dtype=int), right[0, 0])
        for c, s in np.ndindex(2, 2):
            sums.count(str(c), s, np.zeros(50, dtype=int), right[c, s])
    parts = [sums.of(names(2)) for sums in (few, many)]
    assert parts[0] is not None
    assert parts[1] is not None
    assert (parts[0].shared != 0, parts[1].shared) == (True, 0)
    np.testing.assert_allclose(parts[0].rest, parts[1].rest)
