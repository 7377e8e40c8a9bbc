"""What W&B (offline) and Trackio themselves have of trials: side by side, when they resume, and afterwards."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from plain_trials import plain_trial
from sweeps import leave_record, sweep_of, trial_of

from lora_vit import api
from lora_vit.config.names import flat
from lora_vit.records import METRICS
from lora_vit.training.trial import TrialRun, TrialState

pytestmark = pytest.mark.slow


@dataclass
class Found:
    """A run as its library wrote it; of W&B each beginning is one."""

    run_id: str = ""
    name: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    exit_code: int | None = None

    def add(self, step: int, values: dict[str, Any]) -> None:
        for tag, value in values.items():
            self.curves.setdefault(tag, []).append((step, value))


def entries(file: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: a head of 7 bytes, then a log of LevelDB's in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, entry = file.read_bytes(), 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:  # no room for a head
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)  # after a checksum
        entry += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(entry)
            yield record
            entry = b""


def wandb_runs(folder: Path) -> list[Found]:
    runs = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_ctime_ns):
        runs.append(run := Found())
        for record in entries(file):
            which = record.WhichOneof("record_type")
            if which == "run":
                run.name, run.group = record.run.display_name, record.run.run_group
                run.config |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
                run.run_id = record.run.run_id
            elif which == "history":
                values = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.history.item}
                step = values.pop("_step")
                run.add(step, {tag: value for tag, value in values.items() if tag[0] != "_"})
            elif which == "exit":
                run.exit_code = record.exit.exit_code
        run.config.pop("_wandb", None)
    return runs


def trackio_runs(folder: Path) -> list[Found]:
    runs: dict[str, Found] = {}
    with sqlite3.connect(folder / "lora_vit.db") as database:
        for run_id, name, config in database.execute("SELECT run_id, run_name, config FROM configs ORDER BY id"):
            runs[run_id] = Found(run_id, name.split()[0])
            runs[run_id].config = own = json.loads(config)
            runs[run_id].group = own["_Group"]
            for key in [key for key in own if key[0] == "_"]:
                del own[key]
        for run_id, step, metrics in database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id"):
            runs[run_id].add(step, json.loads(metrics))
    return list(runs.values())


@pytest.fixture(params=["wandb", "trackio"])
def library(request) -> str:
    if find_spec(request.param) is None:
        pytest.skip(f"needs pip install 'lora_vit[{request.param}]'")
    return request.param


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """Where both write; Trackio looks once, when it is imported."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        for key in ("TRACKIO_DIR", "WANDB_DIR"):
            patch.setenv(key, str(folder))
        patch.setenv("WANDB_SILENT", "true")
        yield folder


def found(library: str, folder: Path, group: str) -> list[Found]:
    runs = wandb_runs(folder) if library == "wandb" else trackio_runs(folder)
    return [run for run in runs if run.group == group]


def chosen(library: str) -> list[str]:
    return ["wandb", "tracker.wandb.mode=offline"] if library == "wandb" else [library]


def test_trials_of_a_pack_have_runs_side_by_side_and_each_continues_when_it_resumes(library, place, tmp_path, capsys):
    trials = []
    name, *own = chosen(library)
    trackers = api.compose(["experiment=quickstart", f"tracker=[{name}]", *own]).tracker
    for rank in (1, 2):
        config = plain_trial({"tracker": trackers, "lora.rank": rank})
        folder = tmp_path / f"some/{rank}"
        folder.mkdir(parents=True)
        trials.append(TrialRun(config, folder=folder))
    for step in (1, 2, 3):
        for trial in trials:
            trial.log_step(step, 0, trial.config.lora.rank / step, 0.5, 64.0)
    assert "finished" not in capsys.readouterr().out, "Trackio has ended the run of the first"
    trials[0].interrupt()
    trials[1].fail("no good")
    again = TrialRun(trials[0].config, trials[0].record, TrialState(step_in_epoch=1), tmp_path / "some/1")
    for step in (2, 3, 4):
        again.log_step(step, 0, 1 / step, 0.5, 64.0)
    again.log_epoch(4, 1, {"train_loss": 0.5, "val_loss": 0.25, "val_accuracy": 0.75})
    again.complete()
    runs = found(library, place, "some")
    first, *continued = [run for run in runs if run.name == "1"]
    (failed,) = [run for run in runs if run.name == "2"]
    assert failed.curves["train/loss"] == [(step, 2 / step) for step in (1, 2, 3)]
    for run in runs:
        expected = {**flat(trials[int(run.name) - 1].record.config), "seed": 0}
        assert run.config == {key: value for key, value in expected.items() if value is not None}
    if library == "wandb":  # offline it cannot see what there was
        (last,) = continued
        assert (first.exit_code, failed.exit_code, last.exit_code) == (255, 1, 0)
        assert [step for step, _ in first.curves["train/loss"]] == [1, 2, 3]
        assert [step for step, _ in last.curves["train/loss"]] == [2, 3, 4]
    else:
        (last,) = first, *continued
        assert last.curves["train/loss"] == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert last.curves["val/accuracy"] == [(4, 0.75)]
    train = {f"train/{name}" for name in ("loss", "learning_rate", "images_per_second")}
    assert last.curves.keys() == {*train, "val/loss", "val/accuracy"}
    assert len({run.run_id for run in runs}) == 2
    record = dataclasses.replace(again.record, started=again.record.started + 60, status="running")
    afresh = TrialRun(again.config, record, None, tmp_path / "some/1")
    afresh.log_step(1, 0, 1.0, 0.5, 64.0)
    afresh.interrupt()
    assert len({run.run_id for run in found(library, place, "some")}) == 3


def test_a_sweep_that_was_trained_without_is_sent_whole(library, place, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trials = [trial_of({"lora.rank": rank}, f"rank={rank}") for rank in (1, 2)]
    sweep = sweep_of(Path("outputs/sweeps/late"), trials)
    for trial in trials:
        leave_record(sweep, trial, "completed", started=1000.0, finished=2000.0, metrics={"val_accuracy": 0.5})
        rows = [{"kind": "step", "step": step, "epoch": 0, "loss": 1.0 / step, "lr": 0.5} for step in range(1, 600)]
        rows.append({"kind": "epoch", "step": 599, "epoch": 1, "val_loss": None, "val_accuracy": 0.5})
        (sweep.folder_of(trial) / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(1 if library == "wandb" else 2):  # offline W&B names a folder by the second, and keeps each
        code, out, _ = call("track", "late", "--to", *chosen(library))
        assert (code, out.splitlines()[-1]) == (0, f"2 of 2 trials are in {library}")
        runs = found(library, place, "late")
        assert sorted(run.name for run in runs) == ["rank=1", "rank=2"]
        for run in runs:
            assert {tag: len(curve) for tag, curve in run.curves.items()} == {
                "train/loss": 599, "train/learning_rate": 599, "val/accuracy": 1}  # fmt: skip
            assert run.curves["train/loss"][-1] == (599, 1 / 599)
