"""Hand-edited, copied and broken records: each is named, and what can be summarized still is."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from made_up_records import make_sweep, make_trial

from lora_vit.analysis import export, summarize
from lora_vit.errors import RecordError


@pytest.fixture
def sweep(tmp_path):
    cells = [{"lora__rank": 1}, {"lora__rank": 2}, {"lora__rank": 4}]
    return make_sweep(tmp_path, cells, np.array([[0.80, 0.81], [0.90, 0.91], [0.85, 0.86]]))


def edit(folder, key, value, rank=2, seeds=(0,)):
    """Set a value by dotted key in the records of that rank and seeds; returns their trial ids."""
    changed = []
    for path in sorted(folder.glob("*/record.json")):
        values = json.loads(path.read_text())
        if values["config"]["lora"]["rank"] == rank and values["config"]["seed"] in seeds:
            *sections, name = key.split(".")
            place = values
            for section in sections:
                place = place[section]
            place[name] = value
            path.write_text(json.dumps(values))
            changed.append(values["trial_id"])
    return changed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("config.lora.rank", 10**400, id="huge rank"),
        ("config.lora.rank", 2.5),
        ("config.optimizer.betas", [0.9, None]),
        ("started", float("nan")),
        pytest.param("heartbeat", 10**400, id="huge heartbeat"),
        ("schema", 99),
        ("status", "done"),
    ],
)
def test_a_record_with_an_impossible_value_is_named_and_left_out(sweep, key, value):
    (trial,) = edit(sweep, key, value)
    summary = summarize(sweep)
    assert any(trial in line for line in summary.problems)
    assert trial not in list(summary.trials["trial"])
    assert len(summary.trials) == 5


@pytest.mark.parametrize("value", [pytest.param(10**400, id="huge"), [], {}, "x", float("nan"), -1, None])
def test_odd_facts_beside_the_metric_break_nothing(sweep, value):
    for key in ("cost.seconds", "environment.device", "environment.versions", "metrics.epoch"):
        edit(sweep, key, value)
    summary = summarize(sweep)
    assert len(summary.cells) == 3
    assert export.table_md(summary)
    assert export.html_report(summary, {}, "command")


@pytest.mark.parametrize(
    ("key", "value"), [("config.lora.dropout", 0.3), ("config.seed", 1), ("cell_id", "0123456789"), ("trial_id", "x")]
)
def test_an_edited_record_is_left_out(sweep, key, value):
    """Its figure is not that of the settings that it shows."""
    (path,) = [p for p in sweep.glob("*/record.json") if p.parent.name == edit(sweep, "cost.seconds", 1.0)[0]]
    edit(sweep, key, value)
    summary = summarize(sweep)
    assert len(summary.trials) == 5
    assert [line for line in summary.problems if str(path) in line and "was edited: its config is" in line]


def test_a_folder_copied_as_it_is_counts_once(sweep):
    clean = summarize(sweep)
    first = sorted(sweep.glob("*/record.json"))[0].parent
    shutil.copytree(first, sweep / "copy")
    summary = summarize(sweep)
    assert list(summary.cells["mean"]) == list(clean.cells["mean"])
    assert list(summary.cells["n"]) == list(clean.cells["n"])


def test_if_nothing_completed_the_reason_is_told(tmp_path):
    error = {"message": "loss is not finite", "traceback": ""}
    for seed in range(2):
        make_trial(tmp_path, None, status="failed", seed=seed, edit=lambda record: setattr(record, "error", error))
    with pytest.raises(RecordError, match=r"2 failed.*loss is not finite"):
        summarize(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.classes": 11}, r"data\.classes == 10"),
        ({"data.fingerprint": "beef", "data.test": 700}, "files changed between the runs"),
    ],
)
def test_other_data_are_refused(sweep, changes, said):
    for key, value in changes.items():
        edit(sweep, key, value)
    with pytest.raises(RecordError, match=said):
        summarize(sweep)
