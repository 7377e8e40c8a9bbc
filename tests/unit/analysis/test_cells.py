"""The tables of cells, trials and learning rates, column by column, on trials that never were on a disk."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from made_up_records import make_frame

from lora_vit.analysis import tables
from lora_vit.analysis.stats import compare, share_interval
from lora_vit.analysis.tables import SCALING
from lora_vit.config.names import LR, METHOD, short_names

RANKS = [{"lora__rank": 1}, {"lora__rank": 4}, {"lora__rank": 16}]
Y = np.array([[0.80, 0.83, 0.81], [0.93, 0.95, 0.94], [0.92, 0.96, 0.93]])
NAN = math.nan


def table(trials: pd.DataFrame, resolution: float = 0.0) -> pd.DataFrame:
    """The cells table as ``summarize`` makes it."""
    trials, settings = tables.named(trials)
    values = tables.matrix(trials)
    result = compare(values.to_numpy(float), resolution)
    return tables.cells_table(trials, values, result, settings, resolution)


@pytest.fixture
def by_rank() -> pd.DataFrame:
    """With facts that differ and are no settings."""
    return make_frame(RANKS, Y).assign(**{"data.train": range(9), "data.fingerprint": list("abcdefghi")})


def test_a_cell_has_the_figures_of_its_trials(by_rank):
    got = table(by_rank)
    assert list(got["lora.rank"]) == [4, 16, 1]
    assert list(got["label"]) == ["rank 4", "rank 16", "rank 1"]
    y = Y[[1, 2, 0]]
    low, high = np.array([share_interval(row, 0.0)[3:] for row in y]).T
    for name, want in {
        "n": [3, 3, 3], "mean": y.mean(1), "sd": y.std(1, ddof=1), "low": low, "high": high,
        "trainable_parameters": np.array([4, 16, 1]) * 27_648 + 1290,
        "seconds": [4.25, 5.0, 4.0625], "images_per_second": [896, 884, 899],
        "peak_memory_bytes": 2e8 + np.array([4, 16, 1]) * 27_648,
        "adapter_bytes": np.array([4, 16, 1]) * 110_592 + 6000, SCALING: [8, 2, 32],
        "difference": [0, -0.01 / 3, -0.38 / 3],
    }.items():  # fmt: skip
        np.testing.assert_allclose(got[name].astype(float), want, err_msg=name, atol=1e-15)
    assert not {"pack_size", "index"} & set(got)
    fast = table(by_rank.assign(seconds=np.repeat([9.0, 5.0, 1.0], 3)))
    assert list(fast["pareto_seconds"]) == [True, True, False], "each front has its own cost"
    assert list(got["mark"]) == ["best", "candidate", "worse"]
    assert list(got["pareto_parameters"]) == [True, False, True]
    ids = list(tables.matrix(by_rank).index)
    back = got.iloc[np.argsort([ids.index(cell) for cell in got["cell"]])]
    result = compare(tables.matrix(by_rank).to_numpy())
    np.testing.assert_allclose(back["difference_high"], -result.difference + result.half)
    np.testing.assert_allclose(back["difference_low"], -result.difference - result.half)
    for name in ("worse", "candidate", "below"):
        np.testing.assert_array_equal(back[name], getattr(result, name))


def test_every_mark():
    y = np.array([[0.90, 0.91, 0.905], [0.899, 0.911, 0.902], [0.897, 0.906, 0.9], [0.80, 0.81, 0.806],
                  [0.99, NAN, NAN]])  # fmt: skip
    got = table(make_frame([{"lora__rank": rank} for rank in (1, 2, 4, 8, 16)], y)).set_index("lora.rank")
    result = compare(y)
    assert result.candidate.tolist() == [True, True, False, False, False]
    assert result.worse.tolist() == [False, False, False, True, False]
    assert got["mark"].to_dict() == {1: "best", 2: "candidate", 4: "open", 8: "worse", 16: "no verdict"}
    assert list(got.index) == [16, 1, 2, 4, 8]
    assert got.loc[16, "mean"] == 0.99


def test_intervals_are_never_finer_than_the_images_allow():
    y = np.array([[0.9, 0.9], [0.8, 0.8], [0.7, 0.7]])
    got = table(make_frame([*RANKS[:2], {"lora__method": "none"}], y), resolution=0.01)
    assert got[["low", "high"]].to_numpy() == pytest.approx(np.array([share_interval(row, 0.01)[3:] for row in y]))


def test_pareto_front_against_brute_force():
    rng = np.random.default_rng(5)
    for _ in range(50):
        score, cost = rng.integers(0, 5, 12).astype(float), rng.integers(0, 5, 12).astype(float)
        score[rng.integers(12)], cost[rng.integers(12)] = NAN, NAN
        score[rng.integers(12)] = -math.inf
        known = np.isfinite(score) & np.isfinite(cost)
        found = tables.pareto_front(score, cost)
        for k, front in enumerate(found):
            better = known & (score >= score[k]) & (cost <= cost[k]) & ((score > score[k]) | (cost < cost[k]))
            assert front == (not better.any() and known[k]), (score, cost, k)


@pytest.mark.parametrize(
    ("cells", "settings", "want"),
    [
        (RANKS, ["lora.rank", METHOD], ["lora.rank"]),
        ([{"lora__method": "dora"}, {}, {"lora__dropout": 0.1}], [METHOD, "lora.dropout"], [METHOD, "lora.dropout"]),
        ([{"lora__rank": r, "lora__alpha": 8.0 * r, "optimizer__lr": 0.1 / r} for r in (1, 2)],
         [LR, "lora.rank", "lora.alpha"], ["lora.rank", "lora.alpha", LR]),
        ([{"lora__rank": 2, "lora__alpha": 8.0}, {"lora__rank": 4, "lora__alpha": 8.0}, {"lora__rank": 4,
          "lora__alpha": 4.0, "lora__scaling": "rslora"}], ["lora.alpha", "lora.rank", "lora.scaling"],
         ["lora.rank", "lora.alpha", "lora.scaling"]),
        ([{"lora__rank": r, "lora__alpha": float(a * r)} for r in (1, 2, 4) for a in (2, 4)],
         ["lora.alpha", "lora.rank"], ["lora.rank", SCALING]),
        ([{"lora__alpha": 1.0}, {"lora__alpha": 2.0, "optimizer__eps": 1e-6, "lora__dropout": 0.1,
          "lora__targets": ["q"], "data__batch_size": 10}],
         ["data.batch_size", "optimizer.eps", "lora.alpha", "lora.targets", "lora.dropout", "lora.rank"],
         ["lora.alpha", "lora.dropout", "lora.targets", "data.batch_size", "optimizer.eps"]),
    ],
)  # fmt: skip
def test_the_settings_of_the_main_effects(cells, settings, want):
    of_baseline = {"lora__method": "none", "optimizer__lr": 0.7}
    frame, found = tables.factors(make_frame([*cells, of_baseline], np.full((len(cells) + 1, 1), 0.9)), settings)
    assert found == list(short_names(want).values())
    assert len(frame[found]) == len(cells), "a baseline has none"


def test_the_trials_table_is_sorted_with_what_does_not_count_last(by_rank):
    frame = by_rank.assign(label="x", status=["stopped", *["completed"] * 7, "failed"])
    frame.loc[8, "val_accuracy"] = NAN
    got = tables.trials_table(frame, ["lora.rank"])
    assert list(got.columns) == [
        "trial", "cell", "label", "lora.rank", SCALING, "seed", "status", "epoch", "val_accuracy", "val_loss",
        "train_loss", "trainable_parameters", "seconds", "images_per_second", "peak_memory_bytes", "adapter_bytes",
        "pack_size", "started", "error", "folder",
    ]  # fmt: skip
    assert got["val_accuracy"].tolist()[:7] == sorted(Y.ravel()[1:8], reverse=True)
    assert set(got["status"][7:]) == {"stopped", "failed"}
    assert list(got["trial"][7:]) == sorted(frame["trial"].iloc[[0, 8]])
    assert SCALING not in tables.trials_table(frame, [LR])
    tied = tables.trials_table(frame.assign(val_accuracy=0.9, status="completed"), [])
    assert list(tied["trial"]) == sorted(frame["trial"])


@pytest.mark.parametrize(
    ("rates", "settings", "edges"),
    [
        ([(2, 0.1), (3, 0.3), (1, 0.2), (2, 0.3), (1, 0.3), (1, 0.1)], ["lora.rank", LR], [True, False, False]),
        ([(1, 0.2), (1, 0.1), (1, 0.3)], [LR], [False]),
        ([(1, 0.2), (1, 0.1)], [LR], [True]),
        ([(None, 0.1), ("x", 0.2), (None, 0.2), ("x", 0.1)], ["lora.rank", LR], [True, True]),
        ([(1, 0.1), (2, 0.1)], ["lora.rank"], []),
    ],
)
def test_whether_the_best_rate_of_each_setting_is_at_an_edge(rates, settings, edges):
    """Of cells with (rank, lr), best first; one rate has no edge."""
    assert tables.at_edges(pd.DataFrame(rates, columns=["lora.rank", LR], dtype=object), settings) == edges


def test_adjusted_means_are_freed_of_missing_seeds() -> None:
    """The second cell lacks the bad seed: at the average seed it has 0.875 instead of its plain 0.905."""
    trials = make_frame([{"lora__rank": 1}, {"lora__rank": 2}], np.array([[0.90, 0.92, 0.82], [0.90, 0.91, NAN]]))
    got = table(trials).set_index("lora.rank")
    assert got["mean"].to_dict() == pytest.approx({1: 0.88, 2: 0.875})
    ends = np.array(share_interval(np.array([0.90, 0.91]), 0.0)[3:]) - 0.03
    np.testing.assert_allclose(got.loc[2, ["low", "high"]].astype(float), ends, err_msg="the interval moves along")
    assert list(got.index) == [1, 2]
