"""From folders to a summary: what goes into each of its parts, conditions, the chosen cell, and two named trials."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_records import IMAGES, make_frame, make_sweep, make_trial
from scipy import stats as scipy_stats

from lora_vit.analysis import checks, tables
from lora_vit.analysis.core import select, summarize
from lora_vit.analysis.load import load_trials
from lora_vit.analysis.power import power
from lora_vit.errors import RecordError
from lora_vit.records import PREDICTIONS, TrialRecord, read_predictions, write_predictions

Y = np.array([[0.800, 0.803, 0.801], [0.930, 0.932, 0.931], [0.927, 0.933, 0.930]])
"""Rank 4 is best; small errors, so that few seeds are needed and the search for them is short."""
RANKS = [{"lora__rank": 1}, {"lora__rank": 4}, {"lora__rank": 16}]
NAN = math.nan


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ranks with three seeds; only read."""
    return make_sweep(tmp_path_factory.mktemp("ranks"), RANKS, Y, curve=False, predictions=True)


def message(folder: Any, **options: Any) -> str:
    with pytest.raises(RecordError) as caught:
        summarize(folder, **options)
    return str(caught.value)


def alike(tmp_path: Path, edit: Any = None) -> Path:
    """Two cells whose seeds do not spread at all."""
    return make_sweep(tmp_path, RANKS[:2], np.array([[0.9] * 3, [0.8] * 3]), curve=False, edit=edit)


def test_a_summary_holds_everything_that_is_shown(sweep: Path) -> None:
    got = summarize(sweep)
    assert (got.metric, got.folders, got.where) == (tables.COMPARABLE["val_accuracy"], [str(sweep)], None)
    assert (got.pivot, got.pair, got.problems, got.settings) == (None, None, [], ["lora.rank"])
    assert list(got.cells["label"]) == ["rank 4", "rank 16", "rank 1"]
    assert (len(got.trials), got.trials["val_accuracy"][0]) == (9, 0.933)
    assert got.unfinished.empty
    assert got.learning_rates.empty
    assert set(got.effects.table["setting"]) == {"rank"}
    assert got.environment.equals(checks.environment(make_frame(RANKS, Y)))
    assert ["effect of rank" in line for line in got.warnings] == [True, True, False]
    assert got.warnings[2].startswith("3 seeds cannot show that all cells spread equally")
    assert got.verdict.startswith("rank 4 has the highest val accuracy, 93.10 %")
    assert got.comparison.wide
    assert not summarize([sweep], spreads="equal").comparison.wide


def test_lower_losses_win_and_are_no_counts_of_images(sweep: Path, tmp_path: Path) -> None:
    got = summarize(str(sweep), metric="val_loss")
    assert got.folders == [str(sweep)]
    assert list(got.cells["label"]) == ["rank 4", "rank 16", "rank 1"]
    assert got.comparison.means.max() == pytest.approx(2.5 * (0.931 - 1))
    assert got.design.seeds_for_half_a_point is None
    assert got.effects.table["effect"].tolist() == pytest.approx([2.5 * (Y[0] - Y[k]).mean() for k in (1, 2)])
    assert summarize(alike(tmp_path), metric="val_loss").comparison.sd == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("images", "sd"), [(IMAGES, 1 / IMAGES / math.sqrt(12)), (100, 0.01 / math.sqrt(12)), (0, 0)])
def test_no_error_is_finer_than_the_rounding_of_an_accuracy(tmp_path: Path, images: int, sd: float) -> None:
    def edit(record: TrialRecord) -> None:
        record.data["val"] = images

    got = summarize(alike(tmp_path, edit))
    assert got.comparison.sd == pytest.approx(sd, abs=1e-12)
    half = scipy_stats.t.ppf(0.975, 2) * sd / math.sqrt(3)
    np.testing.assert_allclose(got.cells["high"] - got.cells["mean"], half, atol=1e-12)


def test_unknown_numbers_of_images_have_no_rounding(tmp_path: Path) -> None:
    def edit(record: TrialRecord) -> None:
        del record.data["val"], record.data["test"]

    got = summarize(alike(tmp_path, edit))
    assert got.comparison.sd == pytest.approx(0, abs=1e-12)
    assert got.chosen.images == 0
    assert math.isnan(got.chosen.of_test_set)
    some = alike(tmp_path / "some", lambda record: record.data.update(val=None if record.config["seed"] else 200))
    assert summarize(some).comparison.sd == pytest.approx(1 / 200 / math.sqrt(12))


def test_main_effects_are_among_the_adapters_by_short_names(tmp_path: Path) -> None:
    cells = [{"lora__rank": r, "lora__alpha": 2.0 * r, "optimizer__lr": lr} for r in (1, 2) for lr in (0.1, 0.2)]
    y = np.array([[0.5, 0.501], [0.6, 0.601], [0.7, 0.701], [0.8, 0.801], [0.1, 0.102], [0.1, 0.103]])
    make_sweep(tmp_path, [*cells, {"lora__method": "none"}, {"lora__method": "full"}], y, curve=False)
    got = summarize(tmp_path)
    table = got.effects.table
    assert table[["setting", "level", "against", "trials"]].to_numpy().tolist() == [
        ["rank", 2, 1, 4], ["lr", 0.2, 0.1, 4],
    ]  # fmt: skip
    assert got.effects.notes == ["alpha cannot be separated from rank: no effect is shown"]
    assert table["effect"].tolist() == pytest.approx([0.2, 0.1])
    rates = got.learning_rates.set_index("setting")
    assert rates.loc["rank 2, alpha 4", "best_mean"] == pytest.approx(0.8005)


@pytest.mark.parametrize("cells", [2, 3])
def test_what_the_design_can_find(tmp_path: Path, cells: int) -> None:
    """By the definitions: 80 % power at ``detectable``, and at half a point with that many seeds but not with one less.

    One more cell has one seed and takes no part.
    """
    y = np.vstack([Y[:cells], [[0.99, NAN, NAN]]])
    make_sweep(tmp_path, [*RANKS[:cells], {"lora__rank": 8}], y, curve=False)
    got = summarize(tmp_path, spreads="equal")
    sd, needed = got.comparison.sd, got.design.seeds_for_half_a_point
    assert needed is not None
    assert power(got.design.detectable, sd, cells, 3, got.comparison.df) == pytest.approx(0.8, abs=1e-4)  # rtol 1e-6
    assert power(0.005, sd, cells, needed) >= 0.8 > power(0.005, sd, cells, needed - 1)
    largest_of_normals = {2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi)}[cells]
    assert got.design.optimism == pytest.approx(sd / math.sqrt(3) * largest_of_normals)


def test_a_missing_seed_costs_the_design_a_degree_of_freedom(tmp_path: Path) -> None:
    y = Y.copy()
    y[0, 2] = NAN
    got = summarize(make_sweep(tmp_path, RANKS, y, curve=False), spreads="equal")
    sd, repeats = got.comparison.sd, got.comparison.repeats
    assert power(got.design.detectable, sd, 3, repeats, df=8 - 3 - 2) == pytest.approx(0.8, abs=1e-4)  # rtol 1e-6


def test_one_cell_has_no_design(tmp_path: Path) -> None:
    make_sweep(tmp_path, RANKS[:1], Y[:1], curve=False)
    design = summarize(tmp_path).design
    assert math.isnan(design.detectable)
    assert math.isnan(design.optimism)
    assert design.seeds_for_half_a_point is None


def test_the_test_figure_is_that_of_the_chosen_cell(tmp_path: Path) -> None:
    """Each rank's test accuracies are made up anew, the test set shrinks with the seed: the least one counts."""
    test = {1: [0.99, 0.98, 0.97], 4: [0.7, 0.8, 0.72], 16: [0.6, 0.5, 0.4]}

    def edit(record: TrialRecord) -> None:
        seed = record.config["seed"]
        record.metrics["test_accuracy"] = test[record.config["lora"]["rank"]][seed]
        record.data.update(test=[300, 200, None][seed], fingerprint="f")

    got = summarize(make_sweep(tmp_path, RANKS, Y, curve=False, edit=edit))
    chosen, x = got.chosen, np.array(test[4])
    assert (chosen.label, chosen.cell, chosen.images) == ("rank 4", got.cells["cell"][0], 200)
    assert chosen.test == pytest.approx(x.mean())
    assert chosen.between_seeds == pytest.approx(scipy_stats.t.ppf(0.975, 2) * x.std(ddof=1) / math.sqrt(3))
    assert chosen.of_test_set == pytest.approx(scipy_stats.norm.ppf(0.975) * math.sqrt(x.mean() * (1 - x.mean()) / 200))


def test_conditions_choose_before_anything_is_looked_at(tmp_path: Path) -> None:
    make_sweep(tmp_path, RANKS, Y, curve=False)
    make_trial(tmp_path, 0.5, lora__rank=2, data__name="cifar10", curve=False)
    got = summarize(tmp_path, where="rank >= 4 and data != 'cifar10'", pivot=("rank", "effective_scaling"))
    assert got.where == "rank >= 4 and data != 'cifar10'"
    assert list(got.trials["lora.rank"].unique()) == [16, 4]
    assert got.pivot is not None
    np.testing.assert_allclose(got.pivot.loc[[4, 16], [8.0, 2.0]], [[0.931, NAN], [NAN, 0.93]])


def test_names_that_are_unknown(sweep: Path) -> None:
    assert message(sweep, spreads="own") == "spreads=own is unknown (one of: auto, equal, unequal)"
    assert message(sweep, metric="loss").startswith("--metric loss is unknown")
    assert message(sweep, pivot=("rank", "rnk")).startswith("--pivot rnk: there is no such setting")


def test_nothing_that_counts(tmp_path: Path) -> None:
    assert message(make_sweep(tmp_path / "a", RANKS[:1], Y[:1], status="running", curve=False)) == (
        "no completed trial with a val_accuracy (3 running): nothing to summarize yet"
    )

    def why(record: TrialRecord) -> None:
        record.error = {"message": "loss is not finite"} if record.config["seed"] >= 1 else None
        record.metrics["val_accuracy"] = None

    folder = make_sweep(tmp_path / "b", RANKS[:1], Y[:1], status="failed", curve=False, edit=why)
    failed = make_trial(tmp_path / "c", 0.9, status="failed", seed=1, lora__rank=1, edit=why).trial_id
    stopped = make_trial(folder, 0.9, status="stopped", seed=7, lora__rank=1, curve=False).trial_id
    for name in ("broken", "cut"):
        (folder / name).mkdir()
        (folder / name / "record.json").write_text("{")
    assert stopped != failed
    assert message(folder, metric="train_loss") == (
        "no completed trial with a train_loss (3 failed, 1 stopped): nothing to summarize yet; "
        f"trial {failed}: loss is not finite; {summary_problem(folder / 'broken')}"
    )


def summary_problem(place: Path) -> str:
    """The line about a record that cannot be read, from a summary of it and one good trial."""
    other = place.parent.parent / "good"
    make_trial(other, 0.9, curve=False)
    return summarize([other, place]).problems[0]


@pytest.fixture
def trials() -> pd.DataFrame:
    frame = make_frame(RANKS, Y[:, :1])
    return frame.assign(**{"model.weights": ["rank", "lr", "lora.rank"]})


@pytest.mark.parametrize(
    ("where", "ranks"),
    [
        ("rank >= 4", [4, 16]),
        ("lora.rank != 4", [1, 16]),
        ("`lora.rank` == 4", [4]),
        ("weights == 'rank'", [1]),
        ('weights == "lora.rank" or weights == "lr"', [4, 16]),
        ("rank < 1e1 and 2E0 < rank", [4]),
        ("rank in [1, 16] and not rank == 16", [1]),
        ("dirty == False", [1, 4, 16]),
        ("(dirty == True) | (rank == 1)", [1]),
        ("rank != None", [1, 4, 16]),
        ("status == 'completed' and effective_scaling <= 8", [4, 16]),
        ("rank*lr>0.003", [4, 16]),
        ("train_per_class==10and rank<2", [1]),
    ],
)
def test_conditions_keep(trials: pd.DataFrame, where: str, ranks: list[int]) -> None:
    got = select(trials, where)
    assert list(got["lora.rank"]) == ranks
    assert list(got.index) == list(range(len(ranks)))


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("rank > 4 and ranc > 1 and foo < 2", "--where 'rank > 4 and ranc > 1 and foo < 2': there is no column 'ranc', "
                                              "did you mean 'rank'?"),
        ("rank.shape", "--where 'rank.shape': there is no column 'rank.shape', did you mean 'rank'?"),
        ("rank > @x", "--where 'rank > @x' cannot be read: @ is not allowed"),
        ("rank > 16", "--where 'rank > 16' leaves none of the 3 trials"),
        ("0", "--where '0' leaves none of the 3 trials"),
        ("rank >= ", "--where 'rank >= ' cannot be read (invalid syntax (<unknown>, line 1)); for example --where "
                     '"rank >= 4"'),
        ("rank is 4", "--where 'rank is 4' cannot be read ('Is' nodes are not implemented); for example --where "
                      '"rank >= 4"'),
    ],
)  # fmt: skip
def test_conditions_that_keep_nothing_or_cannot_be_read(trials: pd.DataFrame, where: str, line: str) -> None:
    with pytest.raises(RecordError) as caught:
        select(trials, where)
    assert str(caught.value) == line


def test_a_long_reason_is_cut_to_one_line_of_120_characters(trials: pd.DataFrame) -> None:
    where = f"`{'a' * 200}` > 1"
    with pytest.raises(Exception, match="is not defined") as reason:
        trials.query(where, engine="python")
    with pytest.raises(RecordError) as caught:
        select(trials, where)
    assert f" cannot be read ({str(reason.value)[:120]}); for" in str(caught.value)
    many = pd.concat([trials] * 20, ignore_index=True).assign(seed=range(1000, 1060))
    with pytest.raises(RecordError) as caught:
        select(many, "seed")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--where 'seed' cannot be read (\"None of [Index([1000, 1001, 1002,")


def named(sweep: Path, rank: int, seed: int) -> str:
    trials = load_trials([sweep]).trials
    return str(trials.loc[(trials["lora.rank"] == rank) & (trials["seed"] == seed), "trial"].iloc[0])


def test_two_named_trials_are_compared_on_their_images(sweep: Path) -> None:
    one, two = named(sweep, 4, 2), named(sweep, 1, 0)
    got = summarize(sweep, compare_trials=(one[:8], two))
    assert got.pair is not None
    first, second, result = got.pair
    assert (first, second) == (f"rank 4, seed 2 ({one})", f"rank 1, seed 0 ({two})")
    right = [v["labels"] == v["predicted"] for v in (read_predictions(sweep / t)["val"] for t in (one, two))]
    a, b = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    assert (result.images, result.only_first, result.only_second) == (IMAGES, a, b)
    assert result.p == pytest.approx(scipy_stats.binomtest(a, a + b).pvalue)
    assert got.problems == []


def test_trials_that_are_not_named_or_not_by_one_name(sweep: Path) -> None:
    one = named(sweep, 4, 2)
    unlike = "".join("0" if c != "0" else "1" for c in one[:9])
    assert message(sweep, compare_trials=(one, f"{one[:9]}x")) == (
        f"--compare {one[:9]}x: there is no such trial, did you mean '{one}'?"
    )
    assert message(sweep, compare_trials=(f"zz{unlike}", one)).startswith(f"--compare zz{unlike}: there is no such")
    assert message(sweep, compare_trials=("", one)) == "--compare : there is no such trial"
    starts = load_trials([sweep]).trials["trial"].str[0].value_counts()
    shared = starts.index[starts > 1][0]
    assert message(sweep, compare_trials=(shared, one)).startswith(
        f"--compare {shared}: {starts[shared]} trials begin so"
    )


@pytest.mark.parametrize("broken", ["shorter", "longer", "one other", "none", "missing"])
def test_predictions_that_do_not_fit_together_are_told(sweep: Path, tmp_path: Path, broken: str) -> None:
    one, two = named(sweep, 4, 2), named(sweep, 1, 0)
    copy = shutil.copytree(sweep, tmp_path / "copy")
    reason = "the two trials have predictions of different val images, or of none"
    if broken == "missing":
        (copy / two / PREDICTIONS).unlink()
        reason = f"{copy / two / PREDICTIONS} does not exist"
    else:
        ids = {"shorter": np.arange(719), "longer": np.arange(721), "one other": np.r_[np.arange(719), 800],
               "none": np.arange(0)}[broken]  # fmt: skip
        fields = dict.fromkeys(("ids", "labels", "predicted", "true_probability"), ids)
        write_predictions(copy / two, {"val": fields})
        if broken == "none":
            write_predictions(copy / one, {"val": fields})
    got = summarize(copy, compare_trials=(one, two))
    assert got.pair is None
    assert len(got.problems) == 1
    assert got.problems[0].startswith(f"--compare {one} {two}: {reason}")


def test_the_cheapest_of_those_that_are_good_enough(sweep: Path) -> None:
    """By Hsu's upper bounds, computed here anew; the best's own bound is that by which another may lie above it."""
    y = Y - Y.mean(0) - Y.mean(1, keepdims=True) + Y.mean()
    error = math.sqrt((y**2).sum() / 4 * 2 / 3)
    critical = 2.6104  # of the bivariate t with correlation 1/2 and 4 degrees of freedom, 95 %
    means = Y.mean(1)
    bounds = [max(0.0, *(means[j] - means[i] + critical * error for j in range(3) if j != i)) for i in range(3)]
    got = summarize(sweep, margin=100 * (bounds[2] + 1e-5), spreads="equal")
    assert got.cells.set_index("lora.rank")["below"][[1, 4, 16]].to_numpy() == pytest.approx(bounds, rel=1e-3)
    assert got.cells.set_index("lora.rank")["within"].to_dict() == {1: False, 4: True, 16: True}
    assert got.within is not None
    assert (got.within.smallest, got.within.fastest) == ("rank 4", "rank 4")
    assert f"rank 4 (111,882 parameters) is at most {100 * bounds[2] + 0.001:.2f} points below the best." in got.verdict
    narrow = summarize(sweep, margin=100 * (min(bounds[1:]) - 1e-5), spreads="equal")
    assert narrow.within is not None
    assert narrow.within.smallest is None
    assert f"that would take about {narrow.within.seeds} seeds per cell." in narrow.verdict
    loss = summarize(sweep, metric="val_loss", margin=0.4)
    assert loss.within is not None
    assert loss.within.smallest == "rank 1"
    assert "is at most 0.4000 below the best" in loss.verdict


def test_the_fastest_that_is_good_enough_need_not_be_the_smallest(tmp_path: Path) -> None:
    def slower_with_fewer(record: TrialRecord) -> None:
        record.cost["seconds"] = 20.0 - record.config["lora"]["rank"]

    make_sweep(tmp_path, RANKS, Y, curve=False, edit=slower_with_fewer)
    got = summarize(tmp_path, margin=50.0)
    assert "rank 1 (28,938 parameters) is at most 50.00 points below the best, and so is the fastest" in got.verdict
    assert got.verdict.endswith("such cell, rank 16 (4.0 s a trial).")


def test_good_enough_is_said_of_the_cells_that_were_compared(tmp_path: Path) -> None:
    """The cell with the highest mean has one seed and takes no part."""
    y = np.vstack([Y, [[0.99, NAN, NAN]]])
    got = summarize(make_sweep(tmp_path, [*RANKS, {"lora__rank": 8}], y, curve=False), margin=5.0)
    below = "is at most 5.00 points below the best of the cells with two or more seeds."
    assert got.verdict.endswith(f"rank 4 (111,882 parameters) {below}")
    for margin in (math.inf, NAN, -1.0):
        assert message(tmp_path, margin=margin).startswith(f"--margin {margin:g} is impossible")
