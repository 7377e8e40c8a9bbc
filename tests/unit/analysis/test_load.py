"""Records to rows: where they are looked for, what each column holds, which of several counts, which are left out."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_records import make_record, make_sweep, make_trial

from lora_vit.analysis import export
from lora_vit.analysis.core import summarize
from lora_vit.analysis.load import FIGURES, find_records, load_trials, row
from lora_vit.config import IDENTITY
from lora_vit.errors import RecordError
from lora_vit.records import PLAN, RECORD, TrialRecord


def read(record: TrialRecord) -> dict[str, Any]:
    return row(record, Path("there"))


def test_records_are_looked_for_two_levels_down_in_order(tmp_path):
    for place in ("a/x", "a/b/y", "a/b/c/z", ".hidden/x", "summary/x", "b", "a/x/below"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / RECORD).touch()
    (tmp_path / "file").touch()
    for folder, found in ((".", ["a/x", "b"]), ("b", ["b"]), ("a", ["a/b/y", "a/x"])):
        assert [str(p.relative_to(tmp_path)) for p in find_records(tmp_path / folder)] == found


def test_a_row_holds_settings_figures_costs_and_facts():
    assert math.isnan(read(make_record(lora__method="full"))["lora.effective_scaling"])
    record = make_record(0.9, lora__rank=8, lora__scaling="rslora", seed=3)
    record.metrics["train_loss"] = 7
    record.error = {"message": " loss is bad\nat step", "step": 12}
    record.environment["versions"] = {"torch": "2.11", "a": 1}
    got = read(record)
    want = {
        "trial": record.trial_id, "cell": record.cell_id, "status": "completed", "seed": 3, "epoch": 5.0,
        "lora.rank": 8, "lora.scaling": "rslora", "lora.targets": "all", "lora.blocks": "all", "model.name": "vit_tiny",
        "optimizer.betas": "0.9 0.999", "lora.effective_scaling": 32 / math.sqrt(8), "model.weights": "GLYPHS_V1",
        "val_accuracy": 0.9, "val_loss": 0.25, "train_loss": 7.0, "test_accuracy": 0.89, "test_loss": 0.25,
        "seconds": 4.5, "images_per_second": 892.0, "peak_memory_bytes": 200_000_000 + 8 * 27_648, "pack_size": 4.0,
        "adapter_bytes": 32 * 27_648 + 6000, "trainable_parameters": 8 * 27_648 + 1290, "head_parameters": 1290,
        "adapter_parameters": 8 * 27_648, "total_parameters": 1_200_000 + 8 * 27_648,
        "data.fingerprint": "f00d", "data.classes": 10, "data.train": 100, "data.val": 720, "data.test": 720,
        "data.left_out": "", "environment.commit": "0123abc", "environment.dirty": False, "environment.host": "box",
        "environment.device": "cpu", "environment.precision": "fp32", "environment.world_size": 1,
        "environment.versions": "a 1, torch 2.11", "error": "loss is bad", "error_step": 12.0, "folder": "there",
        "sweep": str(Path.cwd()),
        "started": 1000.0, "heartbeat": 0.0, "metric": "accuracy",
    }  # fmt: skip
    for name, value in want.items():
        assert got[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert set(got) - set(want) <= {*IDENTITY, *FIGURES}


@pytest.mark.parametrize(
    ("value", "number"),
    [(0, 0.0), (-1, -1.0), (True, math.nan), ("x", math.nan), (None, math.nan), ([1], math.nan), (-1e301, math.nan),
     (1e300, 1e300), (2**63, float(2**63))],
)  # fmt: skip
def test_odd_values_of_figures_and_costs(value, number):
    record = make_record()
    record.cost["seconds"] = record.metrics["val_loss"] = value
    record.error = None
    got = read(record)
    assert [got["seconds"], got["val_loss"]] == pytest.approx([number, number], nan_ok=True)
    assert got["error"] == ""
    assert math.isnan(got["error_step"])


def test_a_running_trial_without_a_sign_of_life_is_interrupted():
    assert read(make_record(status="running"))["status"] == "interrupted"


def test_of_one_trial_the_last_sign_of_life_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_vit.records.time.time", lambda: 50.0)  # the heartbeat on writing
    for folder, started in (("a", 10.0), ("b", 60.0), ("c", 20.0)):
        make_trial(tmp_path / folder, 0.5, edit=lambda record, started=started: setattr(record, "started", started))
    loaded = load_trials([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    (trial,) = loaded.trials["trial"]
    assert list(loaded.trials["folder"]) == [str(tmp_path / "b" / trial)]
    (line,) = loaded.problems
    assert line.startswith("records left out for newer ones of their trials: 2 (0 with another val accuracy), ")
    assert line.endswith(f" {tmp_path}/c/{trial} (completed), for {tmp_path}/b/{trial} (completed)")
    tie = load_trials([tmp_path / "c", tmp_path / "a"])
    assert list(tie.trials["folder"]) == [str(tmp_path / "c" / trial)]  # alive at the same time: the later name


def test_trials_are_sorted_by_cell_and_seed_and_a_folder_named_twice_is_read_once(tmp_path):
    make_sweep(tmp_path, [{"lora__rank": 1}, {"lora__rank": 2}], np.full((2, 3), 0.9))
    loaded = load_trials([tmp_path, str(tmp_path)])
    keys = list(zip(loaded.trials["cell"], loaded.trials["seed"], strict=True))
    assert keys == sorted(keys)
    assert list(loaded.trials.index) == list(range(6))
    assert loaded.problems == []


def test_folders_without_a_trial(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / RECORD).write_text("{")
    for folders, said in (
        (["no"], "/no is not a folder"),
        ([".", "a"], "none of the 1 records.*/b/record.json"),
        (["a"], "no trial in .*/a.*up to two folders below"),
    ):
        with pytest.raises(RecordError, match=said):
            load_trials([tmp_path / folder for folder in folders])


RACE = {"margin": 1.0, "first_seeds": 2, "most_seeds": 3, "seed": 0, "cells": ["a"]}
OLD = {"schema": 3, "base": {}, "pack_sizes": {}, "command": "again"}
"""What plans held beside their trials before workers read the plan alone."""


@pytest.fixture
def planned(tmp_path):
    """Writes the plan of a sweep with two trials, ``more`` of which have no record; gives its folder."""
    make_sweep(tmp_path / "s", [{}], np.array([[0.9, 0.8]]))
    there = [p.name for p in find_records(tmp_path / "s")]

    def write(more: list[str], **plan: Any) -> Path:
        trials = {trial: {"cell": "c", "label": "seed=0", "overrides": []} for trial in [*there, *more]}
        (tmp_path / "s" / PLAN).write_text(json.dumps({"trials": trials, **plan}))
        return tmp_path / "s"

    return write


@pytest.mark.parametrize(("form", "more"), [({}, []), (OLD, ["aaaa", "bbbb"])])
def test_trials_of_the_plan_that_have_no_record_are_named_with_what_trains_them(planned, form, more):
    sweep = planned(more, **form)
    for folder in (sweep, sweep.parent):
        loaded = load_trials([folder])
        assert loaded.sweeps == 1
        assert len(loaded.problems) == len(more) // 2
        for line in loaded.problems:
            assert line.startswith("2 of 4 trials of the sweep have no record; ")
            assert f"python -m lora_vit.sweep work {sweep} " in line
    alone = load_trials([find_records(sweep)[0]])
    assert (alone.sweeps, alone.problems) == (0, []), "of one trial, the others need not be here"


def test_a_race_is_read_from_the_plan(planned):
    sweep = planned([], **OLD, race=RACE)
    for folder in (sweep, sweep.parent, find_records(sweep)[0]):
        assert [plan["race"] for plan in load_trials([folder]).plans.values()] == [{**RACE, "metric": "accuracy"}]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", *(json.dumps({"trials": {}, "race": race}) for race in (
        {**RACE, "margin": "x"}, {**RACE, "seed": None}, {"margin": 1.0}, "x",
    ))],
)  # fmt: skip
def test_a_plan_that_was_edited_is_named(planned, text):
    sweep = planned([])
    (sweep / PLAN).write_text(text)
    loaded = load_trials([sweep])
    assert len(loaded.trials) == 2
    assert loaded.plans == {}
    (line,) = loaded.problems
    assert line.startswith(f"{sweep / PLAN} cannot be read")


@pytest.fixture
def sweep(tmp_path):
    cells = [{"lora__rank": 1}, {"lora__rank": 2}, {"lora__rank": 4}]
    return make_sweep(tmp_path, cells, np.array([[0.80, 0.81], [0.90, 0.91], [0.85, 0.86]]))


def edit(folder, key, value):
    """Set a value by dotted key in one of the records; returns its path."""
    path = folder / make_record(lora__rank=2, seed=0).trial_id / RECORD
    values = json.loads(path.read_text())
    *sections, name = key.split(".")
    functools.reduce(dict.__getitem__, sections, values)[name] = value
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        pytest.param("config.lora.rank", 10**400, "was edited", id="huge rank"),
        ("config.lora.rank", 2.5, "was edited: its config is"),
        ("config.lora.dropout", 0.3, "was edited: its config is"),
        ("config.optimizer.betas", [0.9, None], "was edited"),
        ("config.seed", 1, "was edited: its config is"),
        ("trial_id", "x", "was edited: its config is"),
        ("cell_id", "0123456789", "was edited: its config is"),
        ("started", "today", "'started'"),
        ("schema", 99, "has schema 99"),
        ("status", "done", "status 'done'"),
    ],
)
def test_a_record_that_was_edited_or_cannot_be_is_named_and_left_out(sweep, key, value, said):
    """Its figure is not that of the settings that it shows."""
    path = edit(sweep, key, value)
    summary = summarize(sweep)
    assert [line for line in summary.problems if str(path) in line and said in line]
    assert path.parent.name not in list(summary.trials["trial"])
    assert len(summary.trials) == 5


@pytest.mark.parametrize("value", [[], {}, "x", float("nan"), -1, None])
def test_odd_figures_beside_the_metric_break_nothing(sweep, value):
    for key in ("cost.seconds", "metrics.epoch"):
        edit(sweep, key, value)
    summary = summarize(sweep)
    assert len(summary.cells) == 3
    assert export.table_md(summary)
    assert export.html_report(summary, {}, "command")
