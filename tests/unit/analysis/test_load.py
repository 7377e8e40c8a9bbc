"""Records to rows: where they are looked for, what each column holds, and which of several counts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_records import make_record, make_sweep, make_trial

from lora_vit.analysis import load
from lora_vit.analysis.load import find_records, load_trials, row
from lora_vit.config import IDENTITY
from lora_vit.errors import RecordError
from lora_vit.records import PREDICTIONS, TrialRecord, write_predictions
from lora_vit.sweep import ledger

HERE = Path("there")


def read(record: TrialRecord) -> tuple[dict[str, Any], list[str]]:
    problems: list[str] = []
    return row(record, HERE, problems), problems


def test_records_are_looked_for_two_levels_down_in_order(tmp_path):
    for place in ("a/x", "a/b/y", "a/b/c/z", ".hidden/x", "summary/x", "b", "a/x/below"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "record.json").touch()
    (tmp_path / "file").touch()
    assert [str(p.relative_to(tmp_path)) for p in find_records(tmp_path)] == ["a/x", "b"]
    assert find_records(tmp_path / "b") == [tmp_path / "b"]
    assert [p.name for p in find_records(tmp_path / "a")] == ["y", "x"]


def test_a_row_holds_settings_figures_costs_and_facts():
    record = make_record(0.9, lora__rank=8, lora__scaling="rslora", seed=3)
    record.metrics["train_loss"] = 7
    record.error = {"message": " loss is bad\nat step", "step": 12}
    record.environment["versions"] = {"torch": "2.11", "a": 1}
    got, problems = read(record)
    assert problems == []
    want = {
        "trial": record.trial_id, "cell": record.cell_id, "status": "completed", "seed": 3, "epoch": 5.0,
        "lora.rank": 8, "lora.scaling": "rslora", "lora.targets": "all", "lora.blocks": "all", "model.name": "vit_tiny",
        "optimizer.betas": "0.9 0.999", "lora.effective_scaling": 32 / math.sqrt(8), "model.weights": "GLYPHS_V1",
        "val_accuracy": 0.9, "val_loss": 0.25, "train_loss": 7.0, "test_accuracy": 0.89, "test_loss": 0.25,
        "seconds": 4.5, "images_per_second": 892.0, "peak_memory_bytes": 200_000_000 + 8 * 27_648, "pack_size": 4.0,
        "adapter_bytes": 32 * 27_648 + 6000, "trainable_parameters": 8 * 27_648 + 1290, "head_parameters": 1290,
        "adapter_parameters": 8 * 27_648, "total_parameters": 1_200_000 + 8 * 27_648,
        "data.fingerprint": "f00d", "data.classes": 10, "data.train": 100, "data.val": 720, "data.test": 720,
        "environment.commit": "0123abc", "environment.dirty": False, "environment.host": "box",
        "environment.device": "cpu", "environment.precision": "fp32", "environment.world_size": 1,
        "environment.versions": "a 1, torch 2.11", "error": "loss is bad", "error_step": 12.0, "folder": "there",
        "started": 1000.0, "heartbeat": 0.0,
    }  # fmt: skip
    for name, value in want.items():
        assert got[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert set(got) - set(want) <= set(IDENTITY)
    assert "trainer.devices" not in got
    assert "data.root" not in got


def test_what_does_not_decide_the_numbers_is_no_setting():
    assert "lora.rank" in IDENTITY
    assert not {"data.root", "data.cache_dir", "trainer.devices", "trainer.resume", "trainer.log_every"} & set(IDENTITY)


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (["fc2", "fc1", "o", "v", "k", "q"], "all"), (["v", "q"], "q v"), (["k", "q", "o", "v"], "attention"),
        (["fc1", "fc2"], "mlp"), (["o", "q"], "q o"), (["fc1"], "fc1"),
    ],
)  # fmt: skip
def test_targets_by_their_names(targets, text):
    assert read(make_record(lora__targets=targets))[0]["lora.targets"] == text


def test_baselines_have_no_blocks_and_no_scaling():
    got, _ = read(make_record(lora__method="full"))
    assert got["lora.blocks"] is None
    assert math.isnan(got["lora.effective_scaling"])
    assert read(make_record(lora__blocks=[1, 2]))[0]["lora.blocks"] == "1 2"
    assert read(make_record(lora__rank=4, lora__alpha=6.0))[0]["lora.effective_scaling"] == 1.5


def test_sections_that_are_none_and_new_keys():
    record = make_record()
    record.config.update(note="text", model={**record.config["model"], "new": {"a": 1}})
    assert read(record)[0]["model.new"] == "{'a': 1}"
    assert "note" not in read(record)[0]


@pytest.mark.parametrize("field", ["started", "heartbeat"])
def test_a_time_that_is_none(field):
    record = make_record()
    setattr(record, field, "noon")
    with pytest.raises(RecordError) as caught:
        read(record)
    assert str(caught.value) == "there/record.json: 'started' or 'heartbeat' is no time"


@pytest.mark.parametrize(
    ("value", "number", "count", "fact"),
    [
        (3, 3.0, 3, 3), (0, 0.0, 0, 0), (-1, -1.0, None, -1), (2.5, 2.5, None, "2.5"), (True, math.nan, None, True),
        ("x", math.nan, None, "x"), (None, math.nan, None, None), ([1], math.nan, None, "[1]"),
        (math.inf, math.nan, None, "inf"), (-1e301, math.nan, None, "-1e+301"), (1e300, 1e300, None, "1e+300"),
        (2**63, float(2**63), None, 2**63), (2**63 - 1, float(2**63), 2**63 - 1, 2**63 - 1),
    ],
)  # fmt: skip
def test_odd_values_of_costs_counts_and_facts(value, number, count, fact):
    record = make_record()
    record.cost["seconds"] = record.data["val"] = record.environment["device"] = value
    record.data["fingerprint"] = record.error = None
    got, _ = read(record)
    assert got["seconds"] == pytest.approx(number, nan_ok=True)
    assert (got["data.val"], type(got["data.val"])) == (count, type(count))
    assert (got["environment.device"], type(got["environment.device"])) == (fact, type(fact))
    assert (got["error"], got["data.fingerprint"]) == ("", None)
    assert math.isnan(got["error_step"])


@pytest.mark.parametrize(
    ("name", "value", "status", "shown", "line"),
    [
        ("val_accuracy", 1.0, "completed", 1.0, None),
        ("val_accuracy", 0, "completed", 0.0, None),
        (
            "val_accuracy",
            1.01,
            "completed",
            math.nan,
            "val_accuracy = 1.01 is not a fraction in [0, 1]; taken as missing",
        ),
        ("val_accuracy", -0.1, "failed", math.nan, "val_accuracy = -0.1 is not a fraction in [0, 1]; taken as missing"),
        (
            "test_accuracy",
            90,
            "completed",
            math.nan,
            "test_accuracy = 90.0 is not a fraction in [0, 1]; taken as missing",
        ),
        ("val_accuracy", None, "completed", math.nan, "completed without val_accuracy; taken as missing"),
        ("val_accuracy", None, "failed", math.nan, None),
        ("test_accuracy", None, "completed", math.nan, None),
        ("val_loss", None, "completed", math.nan, None),
        ("val_loss", 12.5, "completed", 12.5, None),
        ("val_loss", -3, "completed", -3.0, None),
    ],
)
def test_figures_that_are_missing_or_impossible(name, value, status, shown, line):
    record = make_record(status=status)
    record.metrics[name] = value
    got, problems = read(record)
    assert got[name] == pytest.approx(shown, nan_ok=True)
    assert problems == ([f"there/record.json: {line}"] if line else [])


def test_a_running_trial_without_a_heartbeat_is_interrupted():
    assert read(make_record(status="running"))[0]["status"] == "interrupted"


def begun(started: float) -> Any:
    def edit(record: TrialRecord) -> None:
        record.started = started

    return edit


def test_of_one_trial_the_last_sign_of_life_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_vit.records.time.time", lambda: 50.0)  # the heartbeat on writing
    for folder, started in (("a", 10.0), ("b", 60.0), ("c", 20.0)):
        make_trial(tmp_path / folder, 0.5, edit=begun(started))
    loaded = load_trials([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    trial = loaded.trials["trial"][0]
    assert list(loaded.trials["folder"]) == [str(tmp_path / "b" / trial)]
    newer = f"trial {trial} is there twice: {tmp_path}/b/{trial} (completed) is newer and counts, {tmp_path}/"
    assert loaded.problems == [newer + f"{old}/{trial} (completed) is left out" for old in "ac"]
    tie = load_trials([tmp_path / "c", tmp_path / "a"])
    assert list(tie.trials["folder"]) == [str(tmp_path / "c" / trial)]  # alive at the same time: the later name


def test_trials_are_sorted_by_cell_and_seed(tmp_path):
    make_sweep(tmp_path, [{"lora__rank": 1}, {"lora__rank": 2}], np.full((2, 3), 0.9))
    trials = load_trials([tmp_path]).trials
    keys = list(zip(trials["cell"], trials["seed"], strict=True))
    assert keys == sorted(keys)
    assert list(trials.index) == list(range(6))


def test_folders_without_a_trial(tmp_path):
    with pytest.raises(RecordError) as caught:
        load_trials([tmp_path / "no"])
    assert str(caught.value) == f"{tmp_path}/no is not a folder: give the folder of a sweep or of a run"
    (tmp_path / "a").mkdir()
    with pytest.raises(RecordError) as caught:
        load_trials([tmp_path, tmp_path / "a"])
    assert str(caught.value) == f"no trial in {tmp_path}, {tmp_path}/a: no record.json there or up to two folders below"
    (tmp_path / "a" / "record.json").write_text("{")
    with pytest.raises(RecordError, match=rf"^none of the 1 records can be read; the first: {tmp_path}/a/record.json"):
        load_trials([tmp_path])


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def scandir(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(load.os, "scandir", scandir)
    with pytest.raises(RecordError) as caught:
        load_trials([str(tmp_path)])
    assert str(caught.value) == f"{tmp_path} cannot be read: Permission denied"


def test_a_record_that_was_removed_since_it_was_found_is_no_problem(tmp_path, monkeypatch):
    trial = make_trial(tmp_path, 0.9).trial_id
    monkeypatch.setattr(load, "find_records", lambda folder: [folder / "gone", folder / trial])
    loaded = load_trials([tmp_path])
    assert list(loaded.trials["trial"]) == [trial]
    assert loaded.problems == []


def test_one_folder_named_twice_is_read_once(tmp_path):
    make_trial(tmp_path, 0.9)
    loaded = load_trials([tmp_path, str(tmp_path)])
    assert len(loaded.trials) == 1
    assert loaded.problems == []


@pytest.mark.parametrize("versions", [None, [], "torch 2", 3])
def test_versions_that_are_no_table_are_none(versions):
    record = make_record()
    record.environment["versions"] = versions
    assert read(record)[0]["environment.versions"] == ""


def test_a_config_without_a_section_lacks_its_settings():
    record = make_record()
    del record.config["optimizer"]
    got, _ = read(record)
    assert got["optimizer.lr"] is None
    assert got["lora.effective_scaling"] == 8


def test_a_broken_record_is_left_out_by_name(tmp_path):
    make_trial(tmp_path, 0.9)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "record.json").write_text("{")
    loaded = load_trials([tmp_path])
    assert len(loaded.trials) == 1
    assert loaded.problems[0].startswith(f"{tmp_path}/0/record.json")
    assert loaded.problems[0].endswith("; left out")


def test_predictions_are_sorted_by_image(tmp_path):
    fields = {"ids": [3, 1, 2], "labels": [0, 1, 2], "predicted": [0, 1, 1], "true_probability": [0.5] * 3}
    write_predictions(tmp_path, {"val": {k: np.array(v) for k, v in fields.items()}})
    ids, right = load.correct(str(tmp_path), "val")
    assert ids.tolist() == [1, 2, 3]
    assert right.tolist() == [True, False, True]
    with pytest.raises(RecordError) as caught:
        load.correct(str(tmp_path), "test")
    assert str(caught.value) == f"{tmp_path / PREDICTIONS} has no split 'test'"


def test_what_a_sweep_was_asked_for_and_has_no_record_is_told(tmp_path):
    assert load.PLAN == ledger.PLAN
    make_sweep(tmp_path / "s", [{}], np.array([[0.9, 0.8]]))
    there = [p.name for p in find_records(tmp_path / "s")]
    plan = {"trials": dict.fromkeys([*there, "aaaa", "bbbb"]), "command": "again"}
    race = {"margin": 1.0, "first_seeds": 2, "most_seeds": 3, "seed": 0, "cells": ["a"]}
    edited = [{**race, "margin": 0}, {**race, "margin": "x"}, {**race, "seed": None}, {"margin": 1.0}, "x"]
    for text, lines in (
        (json.dumps(plan), ["2 of 4 trials asked for have no record (aaaa, bbbb); the sweep's command trains what is "
                            "missing: again"]),
        (json.dumps({"trials": dict.fromkeys(there)}), []),
        ("{", [f"{tmp_path}/s/sweep.json cannot be read"]),
        ("[]", [f"{tmp_path}/s/sweep.json cannot be read"]),
        *((json.dumps({**plan, "race": one}), [f"{tmp_path}/s/sweep.json cannot be read"]) for one in edited),
    ):  # fmt: skip
        (tmp_path / "s" / "sweep.json").write_text(text)
        for folder in (tmp_path / "s", tmp_path):
            got = load_trials([folder]).problems
            assert len(got) == len(lines)
            assert all(a.startswith(b) for a, b in zip(got, lines, strict=True))
