"""Refusals, warnings and the list of what is not averaged, on trials that never were on a disk."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_records import make_frame

from lora_vit.analysis import checks
from lora_vit.analysis.tables import COMPARABLE
from lora_vit.errors import RecordError

ACCURACY = COMPARABLE["val_accuracy"]
TWO = np.array([[0.80, 0.81], [0.90, 0.91]])


@pytest.fixture
def trials() -> pd.DataFrame:
    """Ranks 1 and 2 with two seeds each."""
    frame = make_frame([{"lora__rank": 1}, {"lora__rank": 2}], TWO)
    named = [f"rank {rank}" for rank in frame["lora.rank"]]
    return frame.assign(**{"label": named, "data.content": "1000 images"})


def told(done: pd.DataFrame, **summary: Any) -> list[str]:
    """All warnings of trials whose comparison gives no reason for one."""
    comparison = {"possible": True, "wide": False, "spread_p": 0.5, "blocked": True, "complete": True, "seeds": 2}
    values: dict[str, Any] = {
        "learning_rates": pd.DataFrame(),
        "cells": pd.DataFrame({"n": [2, 2, 3]}),
        "unfinished": pd.DataFrame({"status": []}),
        **summary,
    }
    values["comparison"] = SimpleNamespace(**{**comparison, **values.get("comparison", {})})
    return checks.warnings(done, SimpleNamespace(**values))  # type: ignore[arg-type]


@pytest.fixture
def quiet() -> pd.DataFrame:
    """Two dropouts at one learning rate: nothing to warn of."""
    return make_frame([{"lora__dropout": 0.0}, {"lora__dropout": 0.1}], TWO)


def test_nothing_is_warned_of_without_a_reason(quiet):
    assert told(quiet) == []


ONE_RATE = (
    "Only one learning rate (0.001) was tried: an effect of {} cannot be told from a learning rate that suits some of "
    "the values better. Sweep optimizer.lr too."
)
FALLING = (
    "alpha is the same for every rank, so the effective scaling falls as the rank rises: the effect of rank includes "
    "that of scaling."
)
OWN_RATE = (
    "Each {} was tried at one learning rate, not all at the same: their effects cannot be told apart. Try each at "
    "several rates."
)


@pytest.mark.parametrize(
    ("cells", "lines"),
    [
        ([{"lora__rank": 1}, {"lora__rank": 2}], [ONE_RATE.format("rank"), FALLING]),
        ([{"lora__rank": 1, "lora__alpha": 1.0}, {"lora__rank": 2, "lora__alpha": 2.0}],
         [ONE_RATE.format("rank and alpha")]),
        ([{"lora__alpha": 1.0}, {"lora__alpha": 2.0}], [ONE_RATE.format("alpha")]),
        ([{"lora__scaling": "rslora"}, {"lora__scaling": "standard"}], [ONE_RATE.format("scaling")]),
        ([{"lora__rank": 1, "optimizer__lr": 0.1}, {"lora__rank": 2}], [OWN_RATE.format("rank"), FALLING]),
        ([{"lora__rank": 1}, {"lora__rank": 2}, {"lora__rank": 2, "optimizer__lr": 0.1}], [FALLING]),
        ([{"lora__method": "none"}, {"lora__method": "full"}], []),
        ([{"lora__rank": 1}, {"lora__method": "none"}], []),
        ([{"lora__rank": 1}, {"lora__rank": 2}, {"lora__method": "none", "optimizer__lr": 0.1}],
         [ONE_RATE.format("rank"), FALLING]),
    ],
)  # fmt: skip
def test_effects_that_the_learning_rate_may_explain(cells, lines):
    assert told(make_frame(cells, np.full((len(cells), 2), 0.9))) == lines


@pytest.mark.parametrize(
    ("edge", "rates", "lines"),
    [
        ([True, False, True], [3, 3, 3],
         ["For 2 of 3 settings the best learning rate is the lowest or highest tried: rates beyond it may be better."]),
        ([False, False], [3, 2],
         ["Not every setting was run at every learning rate: 'best over lr' favours those with more."]),
        ([False, False], [2, 2], []),
    ],
)  # fmt: skip
def test_best_rates_at_the_edge_and_unequal_numbers_of_rates(edge, rates, lines):
    two = make_frame(
        [{"lora__rank": 1}, {"lora__rank": 1, "optimizer__lr": 0.1}, {"lora__rank": 2}], np.full((3, 1), 0.9)
    )
    assert told(two, learning_rates=pd.DataFrame({"edge": edge, "rates": rates})) == [*lines, FALLING]


@pytest.mark.parametrize(
    ("column", "values", "line"),
    [
        ("environment.commit", ["a", "a", "a", "b"], "The trials have different code versions: a (3), b (1)."),
        ("environment.versions", ["x" * 70] * 3 + ["y"],
         f"The trials have different library versions: {'x' * 60} (3), y (1)."),
        ("environment.precision", ["fp32", "bf16", "bf16", "bf16"],
         "The trials have different precisions: bf16 (3), fp32 (1)."),
        ("data.train", [100, 100, 100, 90], "The trials have different numbers of training images: 100 (3), 90 (1)."),
        ("data.fingerprint", ["f"] * 3 + ["g"], "The trials have different data fingerprints: f (3), g (1)."),
        ("trainer.epochs", [5, 5, 5, 4],
         "The trials have different numbers of epochs: the budgets are unequal: 5 (3), 4 (1)."),
        ("environment.commit", ["a", "b", "c", "d"],
         "The trials have different code versions: a (1), b (1), c (1) and 1 more."),
        ("environment.dirty", [False, None, True, False], "Some trials ran with uncommitted changes in the code."),
        ("epoch", [5.0, 4.0, 3.0, 6.0], "2 completed trials have fewer epochs than their config asks for."),
        ("environment.device", ["a", "b", "b", None],
         "The trials ran on 2 kinds of device: seconds, images/s and memory do not compare."),
        ("pack_size", [4.0, 1.0, math.nan, 4.0],
         "The trials ran in packs of different size (1, 4): a trial's seconds are its share of its pack's, and "
         "memory is the whole pack's."),
        ("pack_size", [4.0, 1.0, math.nan, 2.0],
         "The trials ran in packs of different size (1, 2, 4): a trial's seconds are its share of its pack's, and "
         "memory is the whole pack's."),
    ],
)  # fmt: skip
def test_what_is_not_the_same_in_all_trials(quiet, column, values, line):
    assert told(quiet.assign(**{column: pd.Series(values, dtype=object if column != "epoch" else float)})) == [line]


def test_three_commits_are_all_named(quiet):
    assert told(quiet.assign(**{"environment.commit": ["a", "b", "c", "c"]})) == [
        "The trials have different code versions: c (2), a (1), b (1)."
    ]


WIDER = "the wider error is used. More seeds would sharpen the comparison."


@pytest.mark.parametrize(
    ("comparison", "lines"),
    [
        ({"wide": True, "spread_p": 0.0123},
         ["The cells spread unequally from seed to seed (p = 0.012): the wider error is used."]),
        ({"wide": True, "spread_p": 0.05}, [f"2 seeds cannot show that all cells spread equally (p = 0.05): {WIDER}"]),
        ({"wide": True, "spread_p": math.nan}, [f"2 seeds cannot show that all cells spread equally: {WIDER}"]),
        ({"wide": False, "spread_p": 0.0123},
         ["The cells spread unequally from seed to seed (p = 0.012), yet one common error is used."]),
        ({"wide": False, "spread_p": 0.05}, []),
        ({"wide": False, "spread_p": math.nan}, []),
        ({"blocked": False, "complete": False},
         ["The cells do not share seeds: comparisons are unpaired, and the seeds' own spread blurs them."]),
        ({"complete": False},
         ["Some seeds are missing in some cells: comparisons use means adjusted for the seeds that each cell has."]),
        ({"possible": False, "complete": False, "wide": True}, []),
    ],
)  # fmt: skip
def test_what_the_design_cannot_show(quiet, comparison, lines):
    assert told(quiet, comparison=comparison) == lines


def test_cells_with_one_seed_are_counted(quiet):
    assert told(quiet, cells=pd.DataFrame({"n": [1, 1, 2]})) == [
        "2 of 3 cells have one seed only: no interval and no verdict for them."
    ]


def test_what_is_not_averaged_is_counted(quiet):
    status = ["failed", "failed", "completed", "missing", "failed", "missing"]
    assert told(quiet, unfinished=pd.DataFrame({"status": status})) == [
        "Not in the averages: 3 failed, 2 missing, 1 without metric (listed under 'Not averaged')."
    ]


@pytest.mark.parametrize(
    ("name", "weights", "warned"),
    [("tiny_imagenet", "IMAGENET1K_V1", True), ("tiny_imagenet", None, False), ("cifar100", "IMAGENET1K_V1", False)],
)
def test_tiny_imagenets_classes_were_seen_before(quiet, name, weights, warned):
    lines = told(quiet.assign(**{"data.name": name, "model.weights": ["GLYPHS_V1"] * 3 + [weights]}))
    caveat = (
        "Tiny-ImageNet's classes are a subset of ImageNet-1k's, on which these weights were trained: the accuracies "
        "say little about classes that the model has never seen."
    )
    assert lines == [caveat] * warned


@pytest.mark.parametrize("column", checks.VAL_SET)
def test_trials_validated_on_other_images_are_refused(trials, column):
    checks.refuse(trials)
    other = trials[column].astype(object).copy()
    other[0] = "other" if column == "data.name" else 3
    usual = trials[column][1]
    quoted = f"'{usual}'" if isinstance(usual, str) else str(usual)
    with pytest.raises(RecordError) as caught:
        checks.refuse(trials.assign(**{column: other}))
    assert str(caught.value) == (
        f"trials with different {column} ({usual}: 3 trials, {other[0]}: 1 trials) were validated on different images "
        f'and cannot be compared: choose with --where "{column} == {quoted}"'
    )
    checks.refuse(trials.assign(**{column: other, "status": ["failed", "completed", "completed", "completed"]}))


def test_a_missing_setting_is_another_one_and_a_missing_fact_is_not(trials):
    with pytest.raises(
        RecordError, match=r'null: 3 trials, 0.4: 1 trials\).*choose with --where "data.val_fraction == 0.4"'
    ):
        checks.refuse(trials.assign(**{"data.val_fraction": [0.4, None, None, None]}))
    checks.refuse(trials.assign(**{"data.val": [720, None, None, None]}))
    checks.refuse(trials.assign(**{"data.classes": [10, None, None, None]}))


def test_files_that_changed_between_runs_of_one_config_are_refused(trials):
    with pytest.raises(RecordError) as caught:
        checks.refuse(trials.assign(**{"data.fingerprint": ["f", "g", "g", "g"]}))
    assert str(caught.value) == (
        "trials of one data config have different data fingerprints: the files changed between the runs; "
        "choose with --where \"data.fingerprint == 'g'\""
    )


@pytest.mark.parametrize("column", ["data.batch_size", "data.augment", "data.cache_size"])
def test_settings_of_training_do_not_make_it_another_data_config(trials, column):
    frame = trials.assign(**{"data.fingerprint": ["f", "g", "g", "g"], column: [1, 2, 2, 2]})
    with pytest.raises(RecordError, match="files changed"):
        checks.refuse(frame)


def test_another_data_config_has_another_fingerprint(trials):
    checks.refuse(trials.assign(**{"data.fingerprint": ["f", "g", "g", "g"], "data.train_per_class": [9, 10, 10, 10]}))


def test_what_is_not_averaged_has_its_reason(trials):
    frame = pd.concat([trials, trials.iloc[[0] * 5]], ignore_index=True)
    frame["trial"] = [f"t{k}" for k in range(9)]
    frame["seed"] = [0, 1, 0, 1, 2, 3, 4, 5, 6]
    frame["status"] = ["completed"] * 4 + ["failed", "stopped", "stopped", "completed", "running"]
    frame["error"] = [""] * 4 + ["loss is not finite", "", "asked to", "", ""]
    frame["error_step"] = [math.nan] * 4 + [12.0, math.nan, 3.0, math.nan, math.nan]
    frame.loc[7, "val_accuracy"] = math.nan
    got = checks.unfinished(frame, ACCURACY)
    assert list(got.columns) == ["trial", "label", "seed", "status", "epoch", "value", "reason"]
    own = got[got["status"] != "missing"]
    assert own[["trial", "status", "seed", "reason"]].to_numpy().tolist() == [
        ["t7", "completed", 5, "no val_accuracy"],
        ["t4", "failed", 2, "loss is not finite (step 12)"],
        ["t8", "running", 6, ""],
        ["t5", "stopped", 3, "stopped early: censored, its value is not the last epoch's"],
        ["t6", "stopped", 4, "asked to (step 3)"],
    ]
    assert list(own["epoch"]) == [5] * 5
    assert own["value"].tolist() == pytest.approx([math.nan, 0.8, 0.8, 0.8, 0.8], nan_ok=True)


def test_a_seed_that_half_of_the_cells_have_is_missing_elsewhere():
    some = np.array(
        [[0.8, 0.8, 0.8, np.nan], [0.8, 0.8, np.nan, np.nan], [0.8, np.nan, np.nan, 0.8], [0.8, 0.8, 0.8, 0.8]]
    )
    cells = [{"lora__rank": rank} for rank in (1, 2, 3, 4)]
    frame = make_frame(cells, some)
    got = checks.unfinished(frame.assign(label=[f"rank {rank}" for rank in frame["lora.rank"]]), ACCURACY)
    want = [["rank 1", 3], ["rank 2", 2], ["rank 2", 3], ["rank 3", 1], ["rank 3", 2]]
    assert got[["label", "seed"]].to_numpy().tolist() == want
    assert set(got["reason"]) == {"no record"}
    assert set(got["status"]) == {"missing"}
    assert set(got["trial"]) == {""}
    assert got[["epoch", "value"]].isna().all().all()
    rarer = np.array([[0.8, 0.8], [0.8, np.nan], [0.8, np.nan]])
    frame = make_frame(cells[:3], rarer)
    assert checks.unfinished(frame.assign(label=frame["cell"]), ACCURACY).empty


def test_the_environment_is_counted(trials):
    frame = trials.assign(**{"environment.commit": ["a", "a", None, "b"], "data.val": [720, 720, 720, None]})
    got = checks.environment(frame)
    assert list(got.columns) == ["fact", "value", "trials"]
    assert list(dict.fromkeys(got["fact"])) == [
        "data.name", "data.split_seed", "data.fingerprint", "data.train", "data.val", "data.test",
        "environment.commit", "environment.dirty", "environment.versions", "environment.precision",
        "environment.device", "environment.host", "environment.world_size",
    ]  # fmt: skip
    counts = {fact: dict(zip(rows["value"], rows["trials"], strict=True)) for fact, rows in got.groupby("fact")}
    assert counts["environment.commit"] == {"a": 2, "b": 1, "–": 1}
    assert counts["data.val"] == {"720": 3, "–": 1}
    assert counts["environment.versions"] == {"lora_vit 0.1.0, torch 2.11.0": 4}


def test_one_changed_data_config_among_several_is_enough(trials):
    frame = trials.assign(**{"data.fingerprint": ["f", "g", "h", "h"], "data.train_per_class": [9, 9, 10, 10]})
    with pytest.raises(RecordError, match="files changed"):
        checks.refuse(frame)


def test_a_rank_that_moves_with_its_alpha_leaves_the_scaling_out():
    cells = [{"lora__rank": 1, "lora__alpha": 4.0}, {"lora__rank": 2, "lora__alpha": 4.0, "lora__scaling": "rslora"}]
    assert FALLING in told(make_frame(cells, TWO))
    moved = [{"lora__rank": 1, "lora__alpha": 4.0}, {"lora__rank": 2, "lora__alpha": 6.0}]
    assert FALLING not in told(make_frame(moved, TWO))


def test_the_rows_of_the_list_are_counted_anew(trials):
    frame = trials.iloc[[3, 0, 2, 1]].assign(status="failed")
    assert list(checks.unfinished(frame, ACCURACY).index) == [0, 1, 2, 3]
