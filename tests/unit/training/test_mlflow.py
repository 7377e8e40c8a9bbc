"""What MLflow itself has of trials: while they train, when they resume, and afterwards from their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from plain_trials import plain_trial
from sweeps import leave_record, sweep_of, trial_of

from lora_vit.config.names import flat
from lora_vit.records import METRICS, read_record
from lora_vit.training import trackers
from lora_vit.training.trial import TrialRun, TrialState

mlflow = pytest.importorskip("mlflow", reason="needs pip install 'lora_vit[mlflow]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    """A database, which takes seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'runs.db'}"


def runs_of(uri: str, experiment: str) -> list:
    client = mlflow.MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], order_by=["start_time"])
    return [(run, {tag: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, tag)]
                   for tag in run.data.metrics}) for run in found]  # fmt: skip


def test_a_run_continues_when_its_trial_resumes_and_another_begins_when_it_restarts(uri, tmp_path):
    config = plain_trial({"tracker": {"mlflow": {"_target_": "lora_vit.training.trackers.MLflow", "uri": uri,
                                                 "experiment": None}}})  # fmt: skip
    folder = tmp_path / "some/a"
    folder.mkdir(parents=True)
    first = TrialRun(config, folder=folder)
    for step in (1, 2, 3):
        first.log_step(step, 0, 1.0 / step, 0.5, 64.0)
    first.interrupt()
    ((run, _),) = runs_of(uri, "some")
    assert run.info.status == "KILLED"
    second = TrialRun(config, first.record, TrialState(step_in_epoch=1), folder)
    for step in (2, 3, 4):  # two of them once more
        second.log_step(step, 0, 1.0 / step, 0.5, 64.0)
    second.log_epoch(4, 1, {"train_loss": 0.5, "val_loss": 0.25, "val_accuracy": 0.75})
    second.record.metrics = {"val_accuracy": 0.75}
    assert runs_of(uri, "some")[0][0].info.status == "RUNNING"
    second.complete()
    ((run, curves),) = runs_of(uri, "some")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a")
    assert curves["train/loss"] == [(step, 1.0 / step) for step in (1, 2, 3, 4)]
    assert (curves["val/accuracy"], len(curves)) == ([(4, 0.75)], 5)
    record = read_record(folder)
    settings = {**flat(record.config), "seed": 0}
    assert run.data.params == {key: str(value) for key, value in settings.items() if value is not None}
    assert {run.data.tags[key] for key in ("trial", "cell")} == {record.trial_id, record.cell_id}
    again = TrialRun(config, dataclasses.replace(record, started=record.started + 60, status="running"), None, folder)
    for step in range(1, 32):
        again.log_step(step, 0, 1.0, 0.5, 64.0)
    assert len(runs_of(uri, "some")[1][1]["train/loss"]) == 31, "seen while it trains"
    again.fail("no good")
    assert [run.info.status for run, _ in runs_of(uri, "some")] == ["FINISHED", "FAILED"]


def test_a_sweep_that_was_trained_without_is_sent_once_however_often_it_is_asked_for(uri, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trials = [trial_of({"lora.rank": rank}, f"rank={rank}") for rank in (1, 2, 4)]
    sweep = sweep_of(Path("outputs/sweeps/late"), trials)
    for trial, status in zip(trials, ("completed", "failed", "interrupted"), strict=True):
        leave_record(sweep, trial, status, started=1000.0, finished=2000.0, metrics={"val_accuracy": 0.5})
        rows = [{"kind": "step", "step": step, "epoch": 0, "loss": 1.0 / step, "lr": 0.5} for step in range(1, 600)]
        rows.append({"kind": "epoch", "step": 599, "epoch": 1, "val_loss": None, "val_accuracy": 0.5})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (sweep.folder_of(trial) / METRICS).write_text(text)
    for _ in range(2):
        code, out, _ = call("track", "late", "--to", "mlflow", f"tracker.mlflow.uri={uri}")
        assert (code, out) == (0, "3 of 3 trials are in mlflow\n")
        found = runs_of(uri, "late")
        assert {(run.info.run_name, run.info.status) for run, _ in found} == {
            ("rank=1", "FINISHED"), ("rank=2", "FAILED"), ("rank=4", "KILLED")}  # fmt: skip
        for run, curves in found:
            assert (run.info.start_time, run.info.end_time) == (1_000_000, 2_000_000)
            assert {tag: len(curve) for tag, curve in curves.items()} == {
                "train/loss": 599, "train/learning_rate": 599, "val/accuracy": 1}  # fmt: skip
    monkeypatch.setattr(trackers, "OFF", {})
    code, out, _ = call("track", "late", "--to", "mlflow", "tracker.mlflow.uri=nonsense://x")
    assert (code, out.splitlines()[-1]) == (1, "0 of 3 trials are in mlflow")
