"""A trial's folder from its first file to its end: what is made, kept, renewed, refused and removed."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from types import SimpleNamespace

import pytest
import torch
from packs import new_trials
from plain_trials import plain_trial

from lora_vit import files, records
from lora_vit.config import cell_id, to_dict, trial_id
from lora_vit.errors import ConfigError
from lora_vit.files import read_rows
from lora_vit.records import TrialRecord, read_record
from lora_vit.training.checkpoint import TrialState
from lora_vit.training.trial import OWN_FILES, TrialRun, ended_record, locked_folder, write_hydra_files

CARD = {"fingerprint": "data", "classes": 4}
ENVIRONMENT = {"host": "here"}
SETUP = SimpleNamespace(data=SimpleNamespace(fingerprint="data", card=lambda: dict(CARD)), environment=ENVIRONMENT)
ROWS = [
    {"kind": "step", "step": 1, "epoch": 0, "loss": 2.0, "lr": 0.1},
    {"kind": "step", "step": 2, "epoch": 0, "loss": 1.0, "lr": 0.1},
]


def begin(folder, changes=None, launched=None, files=None, tensorboard=None, setup=SETUP) -> TrialRun:
    """Open the small trial on a setup that has no model."""
    folder.mkdir(exist_ok=True)
    launched = time.time() if launched is None else launched
    return TrialRun.open(plain_trial(changes), folder, setup, launched, files or {}, tensorboard)


def stopped(folder) -> TrialState:
    """Leave a trial that was stopped in its second epoch, one row after its checkpoint."""
    trial = begin(folder)
    trial.files.log_step(1, 0, 2.0, 0.1, 5.0)
    s = trial.state
    s.epoch, s.step_in_epoch, s.updates, s.loss_sum, s.seconds = 1, 3, 10, 2.5, 7.0
    s.last, s.best = {"epoch": 1, "step": 7, "val_accuracy": 0.25}, {"epoch": 1, "val_accuracy": 0.25}
    s.values, s.exp_avg, s.exp_avg_sq = ({"w": torch.full((2,), x)} for x in (1.0, 2.0, 3.0))
    trial.save()
    trial.files.log_step(2, 0, 1.0, 0.1, 5.0)
    trial.interrupt()
    return s


def test_a_new_trial(tmp_path):
    before = time.time()
    trial = begin(tmp_path / "a", files={"config.yaml": "a: ä\n"})
    assert trial.record == TrialRecord(
        trial_id=trial_id(trial.config),
        cell_id=cell_id(trial.config),
        status="running",
        config=to_dict(trial.config),
        environment=ENVIRONMENT,
        data=CARD,
        started=trial.record.started,
    )
    assert trial.name == trial_id(trial.config) != cell_id(trial.config)
    assert before <= trial.record.started <= time.time()
    assert trial.state == TrialState()
    assert trial.files.record is trial.record
    assert trial.files.state is trial.state
    assert (tmp_path / "a/.hydra/config.yaml").read_bytes() == "a: ä\n".encode()
    assert not (tmp_path / "a/record.json").exists(), "written when the first pack is there"
    trial.close()


def test_an_interrupted_trial_goes_on(tmp_path):
    """State, figures and rows are those of the checkpoint; what the record says of its end is taken back."""
    old = stopped(tmp_path / "a")
    there = read_record(tmp_path / "a")
    there.metrics, there.best, there.error = {"epoch": 9}, {"epoch": 9}, {"message": "x", "step": None}
    there.finished, there.environment, there.data = 5.0, {"host": "elsewhere"}, {"fingerprint": "data", "old": 1}
    there.config["trainer"]["checkpoint_every"] = 1.0
    there.parameters, there.cost = {"total": 5}, {"adapter_bytes": 6}
    records.write_record(tmp_path / "a", there)
    trial = begin(tmp_path / "a", files={"config.yaml": "new"})
    r, s = trial.record, trial.state
    assert (s.epoch, s.step_in_epoch, s.updates, s.loss_sum, s.seconds) == (1, 3, 10, 2.5, 7.0)
    assert {n: getattr(s, n)["w"].tolist() for n in ("values", "exp_avg", "exp_avg_sq")} == {
        "values": [1.0, 1.0],
        "exp_avg": [2.0, 2.0],
        "exp_avg_sq": [3.0, 3.0],
    }
    assert (s.last, s.best) == (old.last, old.best)
    assert (r.status, r.error, r.finished) == ("running", None, None)
    assert (r.metrics, r.best) == (old.last, old.best)
    assert r.metrics is not s.last
    assert r.best is not s.best
    assert r.config == to_dict(trial.config)
    assert (r.environment, r.data, r.started) == (ENVIRONMENT, CARD, there.started)
    assert (r.parameters, r.cost) == ({"total": 5}, {"adapter_bytes": 6})
    assert (tmp_path / "a/.hydra/config.yaml").read_text() == "new"
    trial.close()
    assert read_rows(tmp_path / "a/metrics.jsonl") == ROWS[:1]


def test_an_interrupted_trial_without_a_checkpoint_begins(tmp_path):
    begin(tmp_path / "a").interrupt()
    trial = begin(tmp_path / "a")
    assert trial.state == TrialState()
    assert trial.record.metrics == {}
    trial.close()


@pytest.mark.parametrize(
    ("restart", "age", "anew"), [(False, 10, False), (True, 10, True), (True, 0, False), (True, -10, False)]
)
def test_restart_begins_anew_what_is_older_than_the_command(restart, age, anew, tmp_path):
    stopped(tmp_path / "a")
    started = read_record(tmp_path / "a").started
    trial = begin(tmp_path / "a", {"trainer.resume": "restart"} if restart else {}, launched=started + age)
    assert (trial.state.epoch == 0) is anew
    assert (trial.record.started == started) is not anew
    trial.close()


@pytest.mark.parametrize(("step", "anew"), [(None, False), (0, True), (5, True)])
def test_what_failed_at_a_step_begins_anew(step, anew, tmp_path):
    stopped(tmp_path / "a")
    record = read_record(tmp_path / "a")
    record.status, record.error = "failed", {"message": "x", "step": step, "traceback": None}
    records.write_record(tmp_path / "a", record)
    trial = begin(tmp_path / "a")
    assert (trial.state.epoch == 0) is anew
    assert trial.record.error is None
    assert (tmp_path / "a/checkpoint.pt").exists() is not anew
    trial.close()


def goes_on_with(tmp_path, **fields) -> None:
    """A stopped trial whose record says this goes on."""
    stopped(tmp_path / "a")
    records.write_record(tmp_path / "a", dataclasses.replace(read_record(tmp_path / "a"), **fields))
    trial = begin(tmp_path / "a")
    assert trial.state.epoch == 1
    trial.close()


def test_an_error_that_names_no_step_goes_on(tmp_path):
    goes_on_with(tmp_path, status="failed", error={"message": "x"})


def test_beginning_anew_removes_what_a_trial_writes_and_nothing_else(tmp_path):
    stopped(tmp_path / "a")
    board = tmp_path / "board"
    for folder in (board, tmp_path / "other", tmp_path / "a/mine", tmp_path / "a/tensorboard", tmp_path / "a/.hydra"):
        folder.mkdir(exist_ok=True)
        (folder / "file").write_text("x")
    for name in ("predictions.npz", "adapter.safetensors", "adapter.json", "notes.txt", "train.log"):
        (tmp_path / "a" / name).write_text("x")
    trial = begin(tmp_path / "a", {"trainer.resume": "restart"}, time.time() + 1, tensorboard=board)
    left = {p.name for p in (tmp_path / "a").iterdir()}
    assert left == {"mine", "notes.txt", "metrics.jsonl", "timing.jsonl"}
    assert all((tmp_path / "a" / name).stat().st_size == 0 for name in ("metrics.jsonl", "timing.jsonl"))
    assert not board.exists()
    assert (tmp_path / "other/file").exists()
    assert (tmp_path / "a/mine/file").exists()
    trial.close()


def test_a_trials_own_files_are_those_of_the_contract():
    assert sorted(OWN_FILES) == [
        ".hydra",
        "adapter.json",
        "adapter.safetensors",
        "checkpoint.pt",
        "metrics.jsonl",
        "predictions.npz",
        "record.json",
        "tensorboard",
        "timing.jsonl",
        "train.log",
    ]


def test_other_data_are_refused_and_the_folder_stays(tmp_path):
    stopped(tmp_path / "a")
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    other = SimpleNamespace(data=SimpleNamespace(fingerprint="others", card=dict), environment={})
    with pytest.raises(ConfigError) as caught:
        begin(tmp_path / "a", setup=other)
    assert str(caught.value).startswith(
        f"{tmp_path / 'a'} was begun with other splits (fingerprint data there, others here): "
    )
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before
    begin(tmp_path / "a", {"trainer.resume": "restart"}, time.time() + 1, setup=other).close()


def test_a_record_that_names_no_data_goes_on(tmp_path):
    """As one that was refused before its data were known."""
    goes_on_with(tmp_path, data={})


def test_another_trials_folder_and_checkpoint_are_refused(tmp_path):
    stopped(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"holds trial .* \(seed is 0 there, 1 here\)"):
        begin(tmp_path / "a", {"seed": 1})
    record = read_record(tmp_path / "a")
    record.trial_id = trial_id(plain_trial({"seed": 1}))
    record.config["seed"] = 1
    records.write_record(tmp_path / "a", record)
    with pytest.raises(ConfigError, match=rf"checkpoint\.pt belongs to trial {trial_id(plain_trial())}, not to"):
        begin(tmp_path / "a", {"seed": 1})


def test_event_files_go_where_they_are_asked_for(tmp_path):
    for board in (None, tmp_path / "board"):
        trial = begin(tmp_path / "a", tensorboard=board)
        trial.files.log_step(1, 0, 1.0, 0.1, 1.0)
        trial.close()
        assert [p.name.split(".")[0] for p in (board or tmp_path / "a/tensorboard").iterdir()] == ["events"]


# --- ends


def test_completed(tmp_path):
    trial = begin(tmp_path / "a")
    before = time.time()
    trial.complete()
    record = read_record(tmp_path / "a")
    assert record.status == "completed"
    assert before <= record.finished <= time.time()
    assert (tmp_path / "a/train.log").read_text().endswith("  completed\n")
    assert closed(trial)


def test_interrupted(tmp_path):
    trial = begin(tmp_path / "a")
    trial.interrupt()
    record = read_record(tmp_path / "a")
    assert (record.status, record.finished, record.error) == ("interrupted", None, None)
    assert (tmp_path / "a/train.log").read_text().endswith("  interrupted\n")
    assert closed(trial)


@pytest.mark.parametrize("step", [None, 0, 3])
def test_failed(step, tmp_path):
    trial = begin(tmp_path / "a")
    before = time.time()
    trial.fail("no good", step)
    record = read_record(tmp_path / "a")
    assert record.status == "failed"
    assert record.error == {"message": "no good", "step": step, "traceback": None}
    assert before <= record.finished <= time.time()
    assert (tmp_path / "a/train.log").read_text().endswith("  no good\n")
    assert closed(trial)


def test_failed_by_an_error(tmp_path):
    trial = begin(tmp_path / "a")
    try:
        raise ValueError("the reason")
    except ValueError as error:
        trial.fail("in one line", error=error)
    trace = read_record(tmp_path / "a").error["traceback"]
    assert trace.startswith("Traceback")
    assert trace.endswith("ValueError: the reason\n")
    assert "in test_failed_by_an_error" in trace
    assert trace in (tmp_path / "a/train.log").read_text()


def closed(trial: TrialRun) -> bool:
    """Whether the logs take no more rows."""
    with pytest.raises(ValueError, match="closed file"):
        trial.files.log_step(1, 0, 1.0, 1.0, 1.0)
    return True


@pytest.mark.parametrize("end", [TrialRun.interrupt, lambda trial: trial.fail("x")])
def test_a_full_disk_does_not_hide_the_end(end, tmp_path, monkeypatch):
    """The status is told by the exit code then; the files are closed all the same."""
    trial = begin(tmp_path / "a")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_record", full)
        end(trial)
    assert closed(trial)
    assert trial.record.status in ("interrupted", "failed")


def test_a_rank_that_writes_nothing_ends_alike():
    for end, status in (
        (TrialRun.complete, "completed"),
        (TrialRun.interrupt, "interrupted"),
        (lambda trial: trial.fail("x", 3), "failed"),
    ):
        (trial,) = new_trials([plain_trial()])
        trial.save()
        trial.close()
        end(trial)
        assert trial.record.status == status


@pytest.mark.parametrize(("epoch", "done"), [(0, False), (1, False), (2, True), (3, True)])
def test_a_trial_is_done_after_its_last_epoch(epoch, done):
    (trial,) = new_trials([plain_trial()])
    trial.state.epoch = epoch
    assert trial.done() is done


@pytest.mark.parametrize(
    ("status", "finished", "restart", "ended"),
    [
        ("completed", 950.0, False, True),
        ("completed", 950.0, True, False),
        ("failed", 950.0, False, False),
        ("failed", 1000.0, False, True),
        ("interrupted", None, False, False),
    ],
)
def test_the_record_of_a_trial_that_has_ended(status, finished, restart, ended, tmp_path):
    """For a run of this trial alone, what failed before the command is open again."""
    config = plain_trial({"trainer.resume": "restart"} if restart else {})
    assert ended_record(tmp_path, config, 1000.0) is None
    record = TrialRecord(trial_id(config), cell_id(config), status, to_dict(config), started=900.0, finished=finished)
    records.write_record(tmp_path, record)
    assert ended_record(tmp_path, config, 1000.0) == (record if ended else None)
    with pytest.raises(ConfigError, match="holds trial"):
        ended_record(tmp_path, plain_trial({"seed": 1}), 1000.0)


# --- files of the folder


def test_hydras_files_are_replaced_one_by_one(tmp_path):
    write_hydra_files(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        write_hydra_files(tmp_path, {"config.yaml": text, "overrides.yaml": "[]"})
    assert {p.name: p.read_text() for p in (tmp_path / ".hydra").iterdir()} == {
        "config.yaml": "two",
        "overrides.yaml": "[]",
    }


def test_a_locked_folder_is_made_and_refused_to_a_second(tmp_path):
    place = tmp_path / "runs/a"
    with locked_folder(place):
        for _ in range(2):  # who was refused must leave the lock: a third would make another
            with pytest.raises(ConfigError) as caught, locked_folder(place):
                pytest.fail("two owners")
            assert str(caught.value) == f"{place}: another process is training there, wait for it or stop it"
            assert (place / ".lock").exists()
        (place / "record.json").write_text("x")
    with locked_folder(place):
        pass


def test_who_waits_for_a_locked_folder_gets_it(tmp_path, monkeypatch):
    asked = []
    lock = files.locked
    monkeypatch.setattr(records, "locked", lambda path, wait: asked.append((path, wait)) or lock(path, wait))
    for wait in (True, False):
        with locked_folder(tmp_path / "a", wait):
            pass
    with locked_folder(tmp_path / "a"):
        pass
    assert asked == [(tmp_path / "a/.lock", wait) for wait in (True, False, False)]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError) as caught, locked_folder(tmp_path / "file/a"):
        pytest.fail("a file is no folder")
    text = f"{tmp_path / 'file/a'} cannot be written ({os.strerror(errno.ENOTDIR)}): give another folder"
    assert str(caught.value) == text


def test_an_error_inside_a_locked_folder_is_left_as_it_is(tmp_path):
    with pytest.raises(OSError, match="disk full"), locked_folder(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "disk full")
