"""Refusals, warnings and the list of what is not averaged, on trials that never were on a disk."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_records import make_frame, make_record

from lora_vit.analysis import checks
from lora_vit.analysis.load import row
from lora_vit.analysis.stats import compare
from lora_vit.errors import RecordError

TWO = np.array([[0.80, 0.81], [0.90, 0.91]])
QUIET = {**vars(compare(TWO)), "spread_p": 0.5, "wide": False}
"""A comparison that gives no reason for a warning."""
NOTHING = pd.DataFrame({"status": []})


@pytest.fixture
def trials() -> pd.DataFrame:
    """Ranks 1 and 2 with two seeds each."""
    frame = make_frame([{"lora__rank": 1}, {"lora__rank": 2}], TWO)
    named = [f"rank {rank}" for rank in frame["lora.rank"]]
    return frame.assign(**{"label": named, "data.content": "1000 images"})


@pytest.fixture
def quiet() -> pd.DataFrame:
    """Two dropouts at one learning rate: nothing to warn of."""
    return make_frame([{"lora__dropout": 0.0}, {"lora__dropout": 0.1}], TWO)


def assert_told(
    words: list[tuple[str, ...]], done: pd.DataFrame, edges: Any = (),
    left_out: pd.DataFrame = NOTHING, **comparison: Any,
) -> None:
    """The warnings are as many as ``words``, and each says its words."""
    lines = list(checks.warnings(done, SimpleNamespace(**{**QUIET, **comparison}), list(edges), left_out))
    assert len(lines) == len(words), lines
    for line, some in zip(lines, words, strict=True):
        assert all(word in line for word in some), (line, some)


def one_rate(names: str) -> tuple[str, ...]:
    return "Only one learning rate (0.001)", f"values of {names} better", "Sweep optimizer.lr"


FALLING = ("alpha is the same for every rank", "effective scaling falls", "includes that of scaling")
OWN_RATE = ("Each rank was tried at one learning rate", "several rates")


@pytest.mark.parametrize(
    ("cells", "lines"),
    [
        ([{"lora__rank": 1}, {"lora__rank": 2}], [one_rate("rank"), FALLING]),
        ([{"lora__rank": 1, "lora__alpha": 4.0}, {"lora__rank": 2, "lora__alpha": 6.0}], [one_rate("rank and alpha")]),
        ([{"lora__rank": 1, "lora__alpha": 4.0}, {"lora__rank": 2, "lora__alpha": 4.0, "lora__scaling": "rslora"}],
         [one_rate("rank and scaling"), FALLING]),
        ([{"lora__scaling": "rslora"}, {"lora__scaling": "standard"}], [one_rate("scaling")]),
        ([{"lora__rank": 1, "optimizer__lr": 0.1}, {"lora__rank": 2}], [OWN_RATE, FALLING]),
        ([{"lora__rank": 1}, {"lora__rank": 2}, {"lora__rank": 2, "optimizer__lr": 0.1}], [FALLING]),
        ([{"lora__rank": 1}, {"lora__method": "none"}], []),
        ([{"lora__rank": 1}, {"lora__rank": 2}, {"lora__method": "none", "optimizer__lr": 0.1}],
         [one_rate("rank"), FALLING]),
    ],
)  # fmt: skip
def test_effects_that_the_learning_rate_may_explain(cells, lines):
    assert_told(lines, make_frame(cells, np.full((len(cells), 2), 0.9)))


@pytest.mark.parametrize(
    ("edges", "lines"),
    [([True, False, True], [("For 2 of 3 settings", "lowest or highest tried")]), ([False, False], [])],
)
def test_best_rates_at_the_edge(edges, lines):
    two = make_frame([{"lora__rank": 1}, {"lora__rank": 1, "optimizer__lr": 0.1}, {"lora__rank": 2}],
                     np.full((3, 1), 0.9))  # fmt: skip
    assert_told([*lines, FALLING], two, edges=edges)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("environment.commit", ["a", "b", "c", "c"], "different code versions: c (2), a (1), b (1)."),
        ("environment.commit", ["a", "b", "c", "d"], "different code versions: a (1), b (1), c (1) and 1 more."),
        ("environment.versions", ["x" * 70] * 3 + ["y"], f"different library versions: {'x' * 60} (3), y (1)."),
        ("environment.precision", ["fp32", "bf16", "bf16", "bf16"], "different precisions: bf16 (3), fp32 (1)."),
        ("data.train", [100, 100, 100, 90], "different numbers of training images: 100 (3), 90 (1)."),
        ("data.fingerprint", ["f"] * 3 + ["g"], "different data fingerprints: f (3), g (1)."),
        ("trainer.epochs", [5, 5, 5, 4], "different numbers of epochs (unequal budgets): 5 (3), 4 (1)."),
        ("environment.dirty", [False, None, True, False], "uncommitted changes"),
        ("environment.device", ["a", "b", "b", None], "2 kinds of device: seconds, images/s and memory"),  # no packs
        ("pack_size", [4.0, 1.0, math.nan, 2.0], "packs of different size (1, 2, 4)"),
    ],
)
def test_what_is_not_the_same_in_all_trials(quiet, column, values, words):
    sizes = [1.0, 2.0, 2.0, 2.0] if column == "environment.device" else 4.0
    assert_told([(words,)], quiet.assign(**{"pack_size": sizes, column: pd.Series(values, dtype=object)}))


WIDER = "the wider error is used"


@pytest.mark.parametrize(
    ("comparison", "lines"),
    [
        ({"wide": True, "spread_p": 0.0123}, [("2 seeds cannot show", "(p = 0.012)", WIDER, "More seeds")]),
        ({"wide": True, "spread_p": math.nan}, [("2 seeds cannot show that all cells spread equally:", WIDER)]),
        ({"blocked": False, "complete": False}, [("The cells do not share seeds", "unpaired")]),
        ({"complete": False}, [("Some seeds are missing", "adjusted")]),
        (vars(compare(TWO[:, :1])), []),  # one seed: nothing is compared
    ],
)
def test_what_the_design_cannot_show(quiet, comparison, lines):
    assert_told(lines, quiet, **comparison)


def test_what_is_missing_is_counted(quiet):
    said = "Not in the averages: 3 failed, 2 stopped, 1 no val_accuracy ("
    status = ["failed", "failed", "completed", "stopped", "failed", "stopped"]
    reason = ["nan", "nan", "no val_accuracy", "", "nan", ""]
    assert_told([(said,)], quiet, left_out=pd.DataFrame({"status": status, "reason": reason}))


def test_what_the_data_lack_is_told(quiet):
    record = make_record()
    record.data |= {"test": 0, "left_out": {"broken files": ["a.png (cut)"] * 21}}
    lacking = {key: value for key, value in row(record, Path("x")).items() if key in ("data.left_out", "data.test")}
    told = [("Left out of the data: broken files: 21 (a.png (cut), ",), ("No test part: nothing is tested.",)]
    assert_told(told, quiet.assign(**lacking))


@pytest.mark.parametrize(
    ("name", "weights", "warned"),
    [("tiny_imagenet", "IMAGENET1K_V1", True), ("tiny_imagenet", None, False), ("cifar100", "IMAGENET1K_V1", False)],
)
def test_tiny_imagenets_classes_were_seen_before(quiet, name, weights, warned):
    trials = quiet.assign(**{"data.name": name, "model.weights": ["GLYPHS_V1"] * 3 + [weights]})
    assert_told([("Tiny-ImageNet's classes are a subset of ImageNet-1k's",)] * warned, trials)


def refusal(trials: pd.DataFrame) -> str:
    with pytest.raises(RecordError) as caught:
        checks.refuse(trials)
    return str(caught.value)


@pytest.mark.parametrize("column", checks.VAL_SET)
def test_trials_validated_on_other_images_are_refused(trials, column):
    checks.refuse(trials)
    other = trials[column].astype(object).copy()
    other[0] = "other" if column == "data.name" else 3
    usual = trials[column][1]
    quoted = f"'{usual}'" if isinstance(usual, str) else str(usual)
    got = refusal(trials.assign(**{column: other}))
    assert f"different {column} ({usual}: 3 trials, {other[0]}: 1 trials)" in got
    assert f'--where "{column} == {quoted}"' in got
    checks.refuse(trials.assign(**{column: other, "status": ["failed", "completed", "completed", "completed"]}))


def test_a_missing_setting_is_another_one_and_a_missing_fact_is_not(trials):
    got = refusal(trials.assign(**{"data.val_fraction": [0.4, None, None, None]}))
    assert "null: 3 trials, 0.4: 1 trials" in got
    assert '--where "data.val_fraction == 0.4"' in got
    for fact in ("data.val", "data.classes"):
        checks.refuse(trials.assign(**{fact: [10, None, None, None]}))


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, True),
        ({"data.batch_size": [1, 2, 2, 2], "data.augment": list("abbb"), "data.cache_size": [1, 2, 2, 2]}, True),
        ({"data.train_per_class": [9, 10, 10, 10]}, False),  # another config may have other files
        ({"data.fingerprint": ["g", "f", "h", "h"], "data.train_per_class": [9, 9, 10, 10]}, True),  # one of several
    ],
)
def test_files_that_changed_between_runs_of_one_config_are_refused(trials, changes, refused):
    frame = trials.assign(**{"data.fingerprint": ["f", "h", "h", "h"], **changes})
    if refused:
        assert refusal(frame).endswith("--where \"data.fingerprint == 'h'\"")
    else:
        checks.refuse(frame)


def test_what_is_not_averaged_has_its_reason(trials):
    frame = pd.concat([trials, trials.iloc[[0] * 5]], ignore_index=True)
    frame["trial"] = [f"t{k}" for k in range(9)]
    frame["seed"] = [0, 1, 0, 1, 2, 3, 4, 5, 6]
    frame["status"] = ["completed"] * 4 + ["failed", "stopped", "stopped", "completed", "running"]
    frame["error"] = [""] * 4 + ["loss is not finite", "", "asked to", "", ""]
    frame["error_step"] = [math.nan] * 4 + [12.0, math.nan, 3.0, math.nan, math.nan]
    frame.loc[7, "val_accuracy"] = math.nan
    got = checks.unfinished(frame)
    assert list(got.columns) == ["trial", "label", "seed", "status", "epoch", "value", "reason"]
    assert got[["trial", "status", "seed", "reason"]].to_numpy().tolist() == [
        ["t7", "completed", 5, "no val_accuracy"],
        ["t4", "failed", 2, "loss is not finite (step 12)"],
        ["t8", "running", 6, ""],
        ["t5", "stopped", 3, ""],
        ["t6", "stopped", 4, "asked to (step 3)"],
    ]
    assert list(got["epoch"]) == [5] * 5
    assert got["value"].tolist() == pytest.approx([math.nan, 0.8, 0.8, 0.8, 0.8], nan_ok=True)


def test_the_environment_is_counted(trials):
    frame = trials.assign(**{"environment.commit": ["a", "a", None, "b"], "data.val": [720, 720, 720, None]})
    got = checks.environment(frame)
    assert {"data.fingerprint", "environment.device", "environment.host", "environment.precision"} < set(got["fact"])
    counts = {fact: dict(zip(rows["value"], rows["trials"], strict=True)) for fact, rows in got.groupby("fact")}
    assert counts["environment.commit"] == {"a": 2, "b": 1, "–": 1}
    assert counts["data.val"] == {"720": 3, "–": 1}
    assert counts["environment.versions"] == {"lora_vit 0.1.0, torch 2.11.0": 4}
