"""The tables of cells, trials and learning rates, column by column, on trials that never were on a disk."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_records import make_frame
from scipy import stats as scipy_stats

from lora_vit.analysis import tables
from lora_vit.analysis.stats import compare
from lora_vit.analysis.tables import COMPARABLE, LR, METHOD, SCALING
from lora_vit.errors import RecordError

ACCURACY, LOSS = COMPARABLE["val_accuracy"], COMPARABLE["val_loss"]


def table(trials: pd.DataFrame, metric: Any = ACCURACY, resolution: float = 0.0) -> pd.DataFrame:
    """The cells table as ``summarize`` makes it."""
    settings = tables.varying(trials)
    trials = trials.assign(label=tables.labels(trials, settings))
    values = tables.matrix(trials, metric)
    result = compare(metric.sign * values.to_numpy(float), resolution)
    return tables.cells_table(trials, values, result, metric, settings, resolution)


RANKS = [{"lora__rank": 1}, {"lora__rank": 4}, {"lora__rank": 16}]
Y = np.array([[0.80, 0.83, 0.81], [0.93, 0.95, 0.94], [0.92, 0.96, 0.93]])


@pytest.fixture
def by_rank() -> pd.DataFrame:
    return make_frame(RANKS, Y)


def test_the_metrics():
    assert [(m.name, m.title, m.accuracy, m.sign) for m in COMPARABLE.values()] == [
        ("val_accuracy", "Val accuracy", True, 1),
        ("val_loss", "Val loss", False, -1),
        ("train_loss", "Training loss", False, -1),
    ]
    assert tables.metric("val_loss") is LOSS
    with pytest.raises(RecordError) as caught:
        tables.metric("test_accuracy")
    assert str(caught.value) == (
        "--metric test_accuracy: cells are chosen on val only; the report shows test accuracy of the chosen cell"
    )
    with pytest.raises(RecordError) as caught:
        tables.metric("val_acuracy")
    assert str(caught.value).startswith("--metric val_acuracy is unknown")
    assert str(caught.value).endswith(" (one of: val_accuracy, val_loss, train_loss)")


def test_a_cell_has_the_figures_of_its_trials(by_rank):
    got = table(by_rank)
    assert list(got["lora.rank"]) == [4, 16, 1]
    assert list(got["label"]) == ["rank 4", "rank 16", "rank 1"]
    y = Y[[1, 2, 0]]
    half = scipy_stats.t.ppf(0.975, 2) * y.std(1, ddof=1) / np.sqrt(3)
    for name, want in {
        "n": [3, 3, 3], "mean": y.mean(1), "sd": y.std(1, ddof=1), "low": y.mean(1) - half, "high": y.mean(1) + half,
        "adjusted": y.mean(1), "trainable_parameters": np.array([4, 16, 1]) * 27_648 + 1290,
        "seconds": [4.25, 5.0, 4.0625], "images_per_second": [896, 884, 899],
        "peak_memory_bytes": 2e8 + np.array([4, 16, 1]) * 27_648,
        "adapter_bytes": np.array([4, 16, 1]) * 110_592 + 6000, SCALING: [8, 2, 32],
    }.items():  # fmt: skip
        np.testing.assert_allclose(got[name].astype(float), want, err_msg=name)
    assert not {"pack_size", "index"} & set(got)
    assert "vs_probe" not in got
    order = np.argsort([list(tables.matrix(by_rank, ACCURACY).index).index(cell) for cell in got["cell"]])
    result = compare(tables.matrix(by_rank, ACCURACY).to_numpy())
    back = got.iloc[order]
    np.testing.assert_allclose(back["difference"], -result.difference)
    np.testing.assert_allclose(back["difference_high"], -result.difference + result.half)
    np.testing.assert_allclose(back["difference_low"], -result.difference - result.half)
    for name in ("p_worse", "worse", "p_candidate", "candidate"):
        np.testing.assert_array_equal(back[name], getattr(result, name))
    assert got["difference"].tolist() == pytest.approx([0, -0.01 / 3, -0.38 / 3])
    assert list(got["mark"]) == ["best", "candidate", "worse"]
    assert list(got["pareto_parameters"]) == [True, False, True]


def test_lower_losses_are_better(by_rank):
    got = table(by_rank, LOSS)
    assert list(got["lora.rank"]) == [4, 16, 1]
    assert got["difference"].tolist() == pytest.approx(
        [0, 2.5 * 0.01 / 3, 2.5 * 0.38 / 3]
    )  # loss is 2.5 (1 - accuracy)
    assert got["adjusted"].tolist() == pytest.approx(got["mean"].tolist())
    assert list(got["mark"]) == ["best", "candidate", "worse"]
    assert list(got["pareto_seconds"]) == [True, False, True]


def test_every_mark(by_rank):
    y = np.array(
        [[0.90, 0.91, 0.905], [0.899, 0.911, 0.902], [0.897, 0.906, 0.9], [0.80, 0.81, 0.806], [0.99, np.nan, np.nan]]
    )
    trials = make_frame([{"lora__rank": rank} for rank in (1, 2, 4, 8, 16)], y)
    got = table(trials).set_index("lora.rank")
    result = compare(y)
    assert result.candidate.tolist() == [True, True, False, False, False]
    assert result.worse.tolist() == [False, False, False, True, False]
    assert got["mark"].to_dict() == {1: "best", 2: "candidate", 4: "open", 8: "worse", 16: "no verdict"}
    assert list(got.index) == [16, 1, 2, 4, 8]
    assert got.loc[16, "adjusted"] == 0.99


def test_intervals_are_never_finer_than_the_images_allow():
    trials = make_frame(RANKS[:2], np.array([[0.9, 0.9], [0.8, 0.8]])).pipe(
        lambda t: pd.concat([t, make_frame([{"lora__method": "none"}], np.array([[0.7, 0.7]]))], ignore_index=True)
    )
    got = table(trials, resolution=0.01)
    half = scipy_stats.t.ppf(0.975, 1) * 0.01 / math.sqrt(12) / math.sqrt(2)
    np.testing.assert_allclose(got["high"] - got["mean"], half)
    np.testing.assert_allclose((got["vs_probe_high"] - got["vs_probe"])[:2], half)


def test_baselines_are_the_best_of_their_kind_and_paired_by_seed():
    cells = [
        {"lora__rank": 1},
        {"lora__method": "none", "optimizer__lr": 1e-4},
        {"lora__method": "none"},
        {"lora__method": "full"},
        {"lora__method": "full", "optimizer__lr": 1e-2},
    ]
    y = np.array([[0.9, 0.95, np.nan], [0.6, 0.7, 0.8], [0.71, 0.79, 0.9], [0.8, 0.82, 0.9], [0.5, 0.6, 0.7]])
    got = table(make_frame(cells, y)).set_index("label")
    assert got["vs_probe"].to_dict() == pytest.approx(
        {"lr 0.001": 0.175, "linear probe, lr 0.0001": -0.1, "linear probe, lr 0.001": math.nan,
         "full fine-tuning, lr 0.001": 0.04, "full fine-tuning, lr 0.01": -0.2}, nan_ok=True,
    )  # fmt: skip
    assert got["vs_full"].to_dict() == pytest.approx(
        {"lr 0.001": 0.115, "linear probe, lr 0.0001": -0.14, "linear probe, lr 0.001": -0.04,
         "full fine-tuning, lr 0.001": math.nan, "full fine-tuning, lr 0.01": -0.24}, nan_ok=True,
    )  # fmt: skip
    low, high = scipy_stats.ttest_rel(y[0, :2], y[2, :2]).confidence_interval(0.95)
    row = got.loc["lr 0.001"]
    assert (row["vs_probe_low"], row["vs_probe_high"]) == (pytest.approx(low), pytest.approx(high))
    assert got.loc["linear probe, lr 0.001", ["vs_probe_low", "vs_probe_high"]].isna().all()
    by_loss = table(make_frame(cells, y), LOSS).set_index("label")
    assert by_loss.loc["linear probe, lr 0.001", "vs_full"] == pytest.approx(2.5 * 0.04)
    assert math.isnan(by_loss.loc["linear probe, lr 0.001", "vs_probe"])


@pytest.mark.parametrize(
    ("score", "cost", "front"),
    [
        ([1, 2, 3], [1, 2, 3], [True, True, True]),
        ([3, 2, 1], [1, 2, 3], [True, False, False]),
        ([2, 2, 2], [1, 1, 2], [True, True, False]),
        ([1, 2, 2], [1, 1, 1], [False, True, True]),
        ([1, math.nan, 3], [1, 0, math.nan], [True, False, False]),
        ([-math.inf, 0], [0, 1], [False, True]),
    ],
)
def test_the_pareto_front(score, cost, front):
    assert tables.pareto_front(np.array(score, float), np.array(cost, float)).tolist() == front


def test_both_fronts_have_their_own_cost(by_rank):
    got = table(by_rank.assign(seconds=np.repeat([9.0, 5.0, 1.0], 3)))
    assert list(got["pareto_parameters"]) == [True, False, True]  # rank 4, 16, 1
    assert list(got["pareto_seconds"]) == [True, True, False]


def test_equal_cells_keep_the_order_of_their_ids():
    trials = make_frame(RANKS, np.full((3, 2), 0.9))
    assert list(table(trials)["cell"]) == sorted(trials["cell"].unique())


def test_the_best_cell_is_the_marked_one_or_the_first():
    cells = pd.DataFrame({"mark": ["no verdict", "best", "candidate"], "label": list("abc")})
    assert tables.best_cell(cells)["label"] == "b"
    assert tables.best_cell(cells.iloc[[2, 0]])["label"] == "c"


def test_what_varies_in_the_order_of_interest():
    cells = [
        {"lora__rank": 1, "lora__dropout": 0.1, "optimizer__lr": 1e-4, "model__weights": "A", "data__batch_size": 10},
        {"lora__rank": 1, "lora__alpha": 1.0, "lora__scaling": "rslora", "trainer__epochs": 6, "optimizer__eps": 1e-6},
        {"lora__method": "none", "lora__targets": None, "optimizer__betas": [0.9, 0.99]},
    ]
    assert tables.varying(make_frame(cells, np.full((3, 1), 0.9))) == [
        METHOD, "lora.alpha", "lora.scaling", "lora.dropout", "trainer.epochs", "optimizer.betas", "optimizer.eps",
        "optimizer.lr", "data.batch_size", "model.weights",
    ]  # fmt: skip


def test_facts_costs_and_empty_adapters_do_not_vary(by_rank):
    frame = by_rank.assign(**{"data.train": range(9), "seconds": range(9), "data.fingerprint": list("abcdefghi")})
    assert tables.varying(frame) == ["lora.rank"]
    both = make_frame([{"lora__rank": 2}, {"lora__method": "full"}], np.full((2, 1), 0.9))
    assert tables.varying(both) == [METHOD]
    missing = by_rank.assign(**{"model.weights": ["A"] * 8 + [None]})
    assert tables.varying(missing) == ["lora.rank", "model.weights"]


def test_short_names_and_aliases():
    columns = ["lora.rank", "model.name", "data.name", "model.image_size", "data.image_size", "seed"]
    assert tables.short_names(columns) == {
        "lora.rank": "rank", "model.name": "model", "data.name": "data", "model.image_size": "model.image_size",
        "data.image_size": "data.image_size", "seed": "seed",
    }  # fmt: skip
    aliases = tables.aliases(columns)
    assert {k: v for k, v in aliases.items() if k != v} == {
        "rank": "lora.rank",
        "model": "model.name",
        "data": "data.name",
    }
    assert set(columns) <= set(aliases)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "–"), (np.float64("nan"), "–"), (0.1, "0.1"), (np.float32(0.5), "0.5"), (1e-5, "1e-05"),
     (1 / 3, "0.333333"), (1234567, "1234567"), (32.0, "32"), ("q v", "q v"), (True, "True")],
)  # fmt: skip
def test_values_as_a_person_writes_them(value, text):
    assert tables.value_text(value) == text


def test_labels_name_what_varies_and_tell_equal_ones_apart():
    cells = [
        {"lora__rank": 1},
        {"lora__method": "none"},
        {"lora__method": "full", "model__weights": None},
        {"lora__rank": 1, "model__weights": None},
    ]
    frame = make_frame(cells, np.full((4, 1), 0.9))
    got = tables.labels(frame, [METHOD, "lora.rank", "model.weights"])
    assert list(got) == [
        "rank 1, weights GLYPHS_V1", "linear probe, weights GLYPHS_V1", "full fine-tuning, weights –",
        "rank 1, weights –",
    ]  # fmt: skip
    assert list(tables.labels(frame, [])) == [
        f"rank 1 [{frame['cell'][0]}]", "linear probe", "full fine-tuning", f"rank 1 [{frame['cell'][3]}]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "settings", "want"),
    [
        (RANKS, ["lora.rank", METHOD], ["lora.rank", SCALING]),
        ([{"lora__rank": r, "lora__alpha": 8.0 * r, "optimizer__lr": 0.1 / r} for r in (1, 2)],
         [LR, "lora.rank", "lora.alpha"], ["lora.rank", "lora.alpha", LR]),
        ([{"lora__rank": 2, "lora__alpha": 8.0}, {"lora__rank": 4, "lora__alpha": 8.0}, {"lora__rank": 4,
          "lora__alpha": 4.0, "lora__scaling": "rslora"}], ["lora.alpha", "lora.rank", "lora.scaling"],
         ["lora.rank", SCALING]),
        ([{"lora__alpha": 1.0}, {"lora__alpha": 2.0, "optimizer__eps": 1e-6, "lora__dropout": 0.1,
          "lora__targets": ["q"], "data__batch_size": 10}],
         ["data.batch_size", "optimizer.eps", "lora.alpha", "lora.targets", "lora.dropout", "lora.rank"],
         ["lora.alpha", "lora.dropout", "lora.targets", "data.batch_size", "optimizer.eps"]),
    ],
)  # fmt: skip
def test_the_settings_of_the_main_effects(cells, settings, want):
    assert tables.factors(make_frame(cells, np.full((len(cells), 1), 0.9)), settings) == want


def test_the_trials_table_is_sorted_with_what_does_not_count_last(by_rank):
    frame = by_rank.assign(label="x", status=["stopped", *["completed"] * 7, "failed"])
    frame.loc[8, "val_accuracy"] = math.nan
    got = tables.trials_table(frame, ACCURACY, ["lora.rank"])
    assert list(got.columns) == [
        "trial", "cell", "label", "lora.rank", SCALING, "seed", "status", "epoch", "val_accuracy", "val_loss",
        "train_loss", "trainable_parameters", "seconds", "images_per_second", "peak_memory_bytes", "adapter_bytes",
        "pack_size", "error", "folder",
    ]  # fmt: skip
    assert got["val_accuracy"].tolist()[:7] == sorted(Y.ravel()[1:8], reverse=True)
    assert set(got["status"][7:]) == {"stopped", "failed"}
    assert list(got["trial"][7:]) == sorted(frame["trial"].iloc[[0, 8]])
    assert tables.trials_table(frame, LOSS, [])["val_loss"].tolist()[:7] == sorted(frame["val_loss"][1:8])
    assert SCALING not in tables.trials_table(frame, ACCURACY, [LR])
    tied = tables.trials_table(frame.assign(val_accuracy=0.9, status="completed"), ACCURACY, [])
    assert list(tied["trial"]) == sorted(frame["trial"])


def rates(means: dict[tuple[int, float], float], settings: list[str], sign: int = 1) -> pd.DataFrame:
    """The table of cells with (rank, lr): mean, each with an interval of 1 to either side and n = rank."""
    frame = pd.DataFrame([(*key, mean) for key, mean in means.items()], columns=["lora.rank", LR, "mean"])
    frame = frame.assign(low=frame["mean"] - 1, high=frame["mean"] + 1, n=frame["lora.rank"])
    return tables.learning_rates(frame, settings, ACCURACY if sign > 0 else LOSS)


MEANS = {
    (1, 0.1): 5.0, (1, 0.2): 7.0, (1, 0.3): 6.0,
    (2, 0.1): 9.0, (2, 0.2): 3.0, (2, 0.3): 8.0,
    (3, 0.3): 7.5,
}  # fmt: skip


def test_each_settings_best_rate_and_the_shared_one():
    got = rates(MEANS, ["lora.rank", LR])
    assert list(got.columns) == [
        "setting", "best_lr", "best_mean", "best_low", "best_high", "best_n", "rates", "edge", "shared_lr",
        "shared_mean", "shared_low", "shared_high", "shared_n",
    ]  # fmt: skip
    assert got.to_numpy().tolist() == [
        ["rank 2", 0.1, 9.0, 8.0, 10.0, 2, 3, True, 0.3, 8.0, 7.0, 9.0, 2],
        ["rank 3", 0.3, 7.5, 6.5, 8.5, 3, 1, False, 0.3, 7.5, 6.5, 8.5, 3],
        ["rank 1", 0.2, 7.0, 6.0, 8.0, 1, 3, False, 0.3, 6.0, 5.0, 7.0, 1],
    ]


def test_the_best_rate_of_a_loss_is_the_lowest():
    got = rates(MEANS, ["lora.rank", LR], -1)
    assert got[["setting", "best_lr", "edge"]].to_numpy().tolist() == [
        ["rank 2", 0.2, False], ["rank 1", 0.1, True], ["rank 3", 0.3, False],
    ]  # fmt: skip
    assert set(got["shared_lr"]) == {0.3}


def test_the_highest_rate_tried_is_an_edge_as_well():
    got = rates({(1, 0.1): 1.0, (1, 0.2): 2.0}, ["lora.rank", LR])
    assert list(got["edge"]) == [True]
    assert list(got["shared_lr"]) == [0.2]


def test_the_shared_rate_is_judged_by_the_settings_that_ran_at_all_of_them():
    """Three of four are enough for a rate to count; rank 4 alone would make 0.2 the best."""
    means = {(rank, lr): value for rank in (1, 2, 3) for lr, value in ((0.1, 5.0), (0.2, 4.9))}
    got = rates({**means, (4, 0.2): 99.0}, ["lora.rank", LR])
    assert set(got["shared_lr"]) == {0.1}
    two_of_four = {key: value for key, value in means.items() if key != (3, 0.1)}
    assert set(rates({**two_of_four, (4, 0.2): 1.0}, ["lora.rank", LR])["shared_lr"]) == {0.2}
    nowhere_all = {(1, 0.1): 5.0, (2, 0.1): 5.0, (2, 0.2): 6.0, (3, 0.2): 4.0, (1, 0.3): 1.0, (3, 0.3): 1.0}
    assert set(rates(nowhere_all, ["lora.rank", LR])["shared_lr"]) == {0.1}


def test_a_setting_without_the_shared_rate_has_nothing_there():
    row = rates({(1, 0.1): 5.0, (2, 0.1): 5.0, (3, 0.1): 1.0, (4, 0.2): 9.0}, ["lora.rank", LR]).iloc[0]
    assert (row["setting"], row["best_lr"], row["shared_lr"]) == ("rank 4", 0.2, 0.1)
    assert row[["shared_mean", "shared_low", "shared_high", "shared_n"]].isna().all()


def test_rates_alone_are_all_one_setting():
    got = rates({(1, 0.1): 5.0, (1, 0.2): 6.0, (1, 0.3): 4.0}, [LR])
    assert got[["setting", "best_lr", "rates"]].to_numpy().tolist() == [["all", 0.2, 3]]


@pytest.mark.parametrize(
    ("means", "settings"), [({(1, 0.1): 5.0, (2, 0.1): 5.0}, ["lora.rank", LR]), (MEANS, ["lora.rank"])]
)
def test_no_table_of_rates_with_one_rate(means, settings):
    assert rates(means, settings).empty


def test_equally_good_rates_go_to_the_first():
    assert rates({(1, 0.1): 5.0, (1, 0.2): 5.0, (1, 0.3): 5.0}, ["lora.rank", LR])["best_lr"].tolist() == [0.1]


def pivoted(wanted: tuple[str, str]) -> pd.DataFrame:
    cells = [
        {"lora__rank": r, "lora__dropout": d, "optimizer__lr": lr}
        for r in (1, 2)
        for d in (0.0, 0.1)
        for lr in (0.1, 0.3)
    ]
    trials = make_frame(cells, np.arange(8)[:, None] / 10 + np.array([[0.0, 0.02]]))
    return tables.pivot(table(trials), trials, wanted)


def test_a_pivot_averages_over_what_it_does_not_show():
    got = pivoted(("rank", "dropout"))
    assert (got.index.name, got.columns.name) == ("rank", "dropout")
    np.testing.assert_allclose(got.loc[[1, 2], [0.0, 0.1]], [[0.06, 0.26], [0.46, 0.66]])
    np.testing.assert_allclose(
        pivoted(("effective_scaling", "lora.rank")).loc[[32.0, 16.0]].to_numpy(), [[0.16, np.nan], [np.nan, 0.56]]
    )


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (("rank", "lora.rank"), "--pivot rank lora.rank: give two different settings"),
        (("rank", "clip_norm"), "--pivot rank clip_norm: no cell has both"),
        (("rnk", "lr"), "--pivot rnk: there is no such setting, did you mean 'rank'?"),
        (("rank", "seconds"), "--pivot seconds: there is no such setting"),
    ],
)
def test_pivots_that_cannot_be(wanted, line):
    with pytest.raises(RecordError) as caught:
        pivoted(wanted)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("first", [0.7, 0.8])
@pytest.mark.parametrize(("method", "column"), [("none", "vs_probe"), ("full", "vs_full")])
def test_the_best_baseline_is_found_wherever_it_stands(method: str, column: str, first: float) -> None:
    cells = [{"lora__rank": 1}, {"lora__method": method}, {"lora__method": method, "optimizer__lr": 1e-4}]
    y = np.array([0.9, first, 1.5 - first])[:, None] + np.zeros(2)
    for metric, want in ((ACCURACY, 0.1), (LOSS, -0.25)):
        got = table(make_frame(cells, y), metric).set_index(METHOD)
        assert got.loc["lora", column] == pytest.approx(want)


def test_adjusted_means_are_freed_of_missing_seeds_for_both_signs() -> None:
    """The second cell lacks the bad seed: at the average seed it has 0.875 instead of its plain 0.905."""
    trials = make_frame([{"lora__rank": 1}, {"lora__rank": 2}], np.array([[0.90, 0.92, 0.82], [0.90, 0.91, np.nan]]))
    got = table(trials).set_index("lora.rank")
    assert got["mean"].to_dict() == pytest.approx({1: 0.88, 2: 0.905})
    assert got["adjusted"].to_dict() == pytest.approx({1: 0.88, 2: 0.875})
    assert list(got.index) == [1, 2]
    lost = table(trials, LOSS).set_index("lora.rank")
    assert lost["adjusted"].to_dict() == pytest.approx({1: 0.3, 2: 0.3125})
    assert list(lost.index) == [1, 2]
