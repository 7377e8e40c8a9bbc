"""From folders to a summary: what goes into each of its parts, which trials count, conditions, the chosen cell."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_records import IMAGES, make_frame, make_sweep, make_trial
from scipy import stats as scipy_stats

from lora_vit.analysis import checks
from lora_vit.analysis.core import select, summarize
from lora_vit.analysis.stats import share_interval
from lora_vit.errors import RecordError
from lora_vit.records import TrialRecord

Y = np.array([[0.800, 0.803, 0.801], [0.930, 0.932, 0.931], [0.927, 0.933, 0.930]])
"""Rank 4 is best; small errors, so that few seeds are needed and the search for them is short."""
RANKS = [{"lora__rank": 1}, {"lora__rank": 4}, {"lora__rank": 16}]
NAN = math.nan


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ranks with three seeds; only read."""
    return make_sweep(tmp_path_factory.mktemp("ranks"), RANKS, Y, curve=False)


def message(folder: Any, **options: Any) -> str:
    with pytest.raises(RecordError) as caught:
        summarize(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_summary_holds_everything_that_is_shown(sweep: Path) -> None:
    got = summarize(sweep)
    assert (got.folders, got.where, got.race, got.margin) == ([str(sweep)], None, None, None)
    assert (got.problems, got.settings) == ([], ["lora.rank"])
    assert list(got.cells["label"]) == ["rank 4", "rank 16", "rank 1"]
    assert (len(got.trials), got.trials["val_accuracy"][0]) == (9, 0.933)
    assert got.unfinished.empty
    assert got.cells["p_best"].sum() == pytest.approx(1)
    assert list(got.answers) == ["rank"]
    assert set(got.effects.table["setting"]) == {"rank"}
    assert got.environment.equals(checks.environment(make_frame(RANKS, Y)))
    assert [words in line for words, line in zip(
        ("Only one learning rate", "includes that of scaling", "3 seeds cannot show", "of 9 trials no predictions"),
        got.warnings, strict=True
    )] == [True] * 4  # fmt: skip
    assert got.verdict.startswith("rank 4 has the highest val accuracy, 93.10 %")
    assert got.legend.startswith("Marks: ")


@pytest.mark.parametrize(
    ("images", "resolution"),
    [
        (lambda seed: IMAGES, 1 / IMAGES), (lambda seed: 100, 0.01), (lambda seed: 0, 0.0), (lambda seed: None, 0.0),
        (lambda seed: None if seed else 200, 1 / 200),
    ],
)  # fmt: skip
def test_no_error_is_finer_than_the_rounding_of_an_accuracy(tmp_path: Path, images: Any, resolution: float) -> None:
    def edit(record: TrialRecord) -> None:
        record.data["val"] = record.data["test"] = images(record.config["seed"])

    alike = np.array([[0.9] * 3, [0.8] * 3])
    got = summarize(make_sweep(tmp_path, RANKS[:2], alike, curve=False, edit=edit))
    sd = resolution / math.sqrt(12)
    assert got.comparison.sd == pytest.approx(sd, abs=1e-12)
    want = [share_interval(row, resolution)[3:] for row in alike]
    np.testing.assert_allclose(got.cells[["low", "high"]], want, atol=1e-12)
    effects, half = got.effects.table, scipy_stats.t.ppf(0.975, 2) * sd / math.sqrt(3)
    np.testing.assert_allclose(effects["high"] - effects["effect"], math.sqrt(2) * half, atol=1e-11)
    assert got.test_images == (round(1 / resolution) if resolution else 0)


def test_main_effects_are_among_the_adapters_by_short_names(tmp_path: Path) -> None:
    cells = [{"lora__rank": r, "lora__alpha": 2.0 * r, "optimizer__lr": lr} for r in (1, 2) for lr in (0.1, 0.2)]
    y = np.array([[0.5, 0.501], [0.6, 0.601], [0.7, 0.701], [0.8, 0.801], [0.1, 0.102], [0.1, 0.103]])
    make_sweep(tmp_path, [*cells, {"lora__method": "none"}, {"lora__method": "full"}], y, curve=False)
    got = summarize(tmp_path)
    table = got.effects.table
    assert table[["setting", "level", "against", "at"]].to_numpy().tolist() == [
        ["rank and alpha", "2, 4", "1, 2", "lr 0.2"], ["lr", "0.2", "0.1", "rank 2, alpha 4"],
    ]  # fmt: skip
    assert got.effects.notes[0].startswith("rank and alpha always move together")
    assert table["effect"].tolist() == pytest.approx([0.2, 0.1])
    assert list(got.answers) == ["method", "rank"], "a setting of each rank says no more than the rank"


def test_the_test_figure_is_that_of_the_chosen_cell(tmp_path: Path) -> None:
    """Each rank's test accuracies are made up, the test set shrinks with the seed: the least one counts."""
    test = {1: [0.99, 0.98, 0.97], 4: [0.7, 0.8, 0.72], 16: [0.6, 0.5, 0.4], 8: [0.1]}

    def edit(record: TrialRecord) -> None:
        seed = record.config["seed"]
        record.metrics["test_accuracy"] = test[record.config["lora"]["rank"]][seed]
        record.data.update(test=[300, 200, None][seed], fingerprint="f")

    y = np.vstack([Y, [[0.99, NAN, NAN]]])  # higher than the best, and not compared
    got = summarize(make_sweep(tmp_path, [*RANKS, {"lora__rank": 8}], y, curve=False, edit=edit))
    x = np.array(test[4])
    assert got.cells["mark"][:2].tolist() == ["no verdict", "best"]
    assert (got.test.mean, got.test_images) == (pytest.approx(x.mean()), 200)
    assert got.test.high - got.test.mean == pytest.approx(scipy_stats.t.ppf(0.975, 2) * x.std(ddof=1) / math.sqrt(3))
    z2 = scipy_stats.norm.ppf(0.975) ** 2 / 200  # ends: the p of which the mean is z standard errors away
    of_set = 100 * np.ptp(np.roots([1 + z2, -2 * x.mean() - z2, x.mean() ** 2])) / 2
    assert got.errors_of_test().endswith(f"± {of_set:.2f} from the 200 test images")


def test_intervals_end_where_accuracies_do(tmp_path):
    y = np.array([[0.98, 1.0], [0.02, 0.0]])
    got = summarize(make_sweep(tmp_path, RANKS[:2], y, curve=False))
    (low, high), (other_low, other_high) = got.cells[["low", "high"]].to_numpy()
    assert 0.8 < low < 0.99 < high <= 1
    assert (other_low, other_high) == pytest.approx((1 - high, 1 - low))


def test_trials_that_did_not_complete_or_have_no_figure_are_listed_and_never_averaged(tmp_path: Path) -> None:
    y = Y.copy()
    y[1, 2] = NAN
    clean = summarize(make_sweep(tmp_path, RANKS, y, curve=False))
    for seed, status in enumerate(("stopped", "failed", "interrupted", "running"), start=4):
        make_trial(tmp_path, 0.2, seed=seed, lora__rank=1, status=status)
    record = make_trial(tmp_path, 123, seed=3, lora__rank=1)
    got = summarize(tmp_path)
    own = ["cell", "n", "sd"]  # the means are adjusted by the cells that are compared, one less here
    pd.testing.assert_frame_equal(got.cells.sort_values("cell")[own], clean.cells.sort_values("cell")[own])
    assert list(got.unfinished["status"]) == ["completed", "failed", "interrupted", "running", "stopped"]
    assert any("1 failed" in line for line in got.warnings)
    assert got.unfinished["trial"][0] == record.trial_id


def test_nothing_that_counts(tmp_path: Path) -> None:
    running = make_sweep(tmp_path / "a", RANKS[:1], Y[:1], status="running", curve=False)
    assert message(running) == "no completed trial with a val_accuracy (3 running): nothing to summarize yet"

    def without(record: TrialRecord) -> None:
        record.metrics["val_accuracy"] = None

    folder = make_sweep(tmp_path / "b", RANKS[:1], Y[:1], status="failed", curve=False, edit=without)
    make_trial(folder, 0.9, status="stopped", seed=7, lora__rank=1, curve=False)
    assert "(3 failed, 1 stopped)" in message(folder)


@pytest.fixture
def trials() -> pd.DataFrame:
    return make_frame(RANKS, Y[:, :1]).assign(**{"model.weights": ["rank", "lr", "lora.rank"]})


@pytest.mark.parametrize(
    ("where", "ranks"),
    [
        ("lora.rank != 4", [1, 16]),
        ("`lora.rank` == 4", [4]),
        ("weights == 'rank'", [1]),
        ('weights == "lora.rank" or weights == "lr"', [4, 16]),
        ("rank < 1e1 and 2E0 < rank", [4]),
        ("rank in [1, 16] and not rank == 16", [1]),
        ("(dirty == True) | (rank == 1)", [1]),
        ("rank != None", [1, 4, 16]),
        ("status == 'completed' and effective_scaling <= 8", [4, 16]),
        ("train_per_class==10and rank<2", [1]),
    ],
)
def test_conditions_keep(trials: pd.DataFrame, where: str, ranks: list[int]) -> None:
    got = select(trials, where)
    assert list(got["lora.rank"]) == ranks
    assert list(got.index) == list(range(len(ranks)))


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("rank > 4 and ranc > 1 and foo < 2", "name 'ranc' is not defined"),
        ("optimizer.rate > 1", "no attribute 'rate'"),
        ("__import__('os')", "cannot be read"),
        ("rank > @trials", "'trials' is not defined"),
        ("rank == 2", "leaves none of the 9 trials"),
        ("0", "cannot be read"),
        ("rank >= ", 'for example --where "rank >= 4"'),
        ("rank", 'for example --where "rank >= 4"'),
        (f"`{'a' * 200}` > 1", 'for example --where "rank >= 4"'),
    ],
)
def test_conditions_that_keep_nothing_or_cannot_be_read(sweep: Path, where: str, words: str) -> None:
    got = message(sweep, where=where)
    assert got.startswith(f"--where '{where}'")
    assert words in got
    assert len(got) < 250 + len(where)


def test_conditions_choose_before_anything_is_looked_at(tmp_path: Path) -> None:
    make_sweep(tmp_path, RANKS, Y, curve=False)
    make_trial(tmp_path, 0.5, lora__rank=2, data__name="cifar10", curve=False)
    assert 'choose with --where "data.name == ' in message(tmp_path)
    got = summarize(tmp_path, where="rank >= 4 and data != 'cifar10'")
    assert got.where == "rank >= 4 and data != 'cifar10'"
    assert list(got.trials["lora.rank"].unique()) == [16, 4]


def test_the_cheapest_of_those_that_are_good_enough(sweep: Path) -> None:
    bounds = summarize(sweep).cells.set_index("lora.rank")["below"]
    got = summarize(sweep, margin=100 * (bounds[16] + 1e-5))
    assert got.cells.set_index("lora.rank")["within"].to_dict() == {1: False, 4: True, 16: True}
    assert "rank 4 (111,882 parameters) is within" in got.verdict
    narrow = summarize(sweep, margin=100 * (bounds.min() - 1e-5))
    assert not narrow.cells["within"].any()
    assert "No cell is shown to be within" in narrow.verdict


@pytest.mark.parametrize("margin", [math.inf, NAN, -1.0, 0.0])
def test_margins_that_cannot_be(sweep: Path, margin: float) -> None:
    assert message(sweep, margin=margin).startswith(f"--margin {margin:g} is impossible: give ")
