"""A trial's folder: who starts from scratch, who resumes, who is refused; how trials end; locks and fences."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packs import new_trials
from plain_trials import plain_trial
from stage import raised

from lora_vit import files, records
from lora_vit.config import ids, to_dict, trial_id
from lora_vit.errors import ConfigError
from lora_vit.files import read_rows
from lora_vit.records import TrialRecord, read_record
from lora_vit.training.trial import OWN_FILES, ClaimLost, TrialRun, TrialState, lock_folder

CARD = {"fingerprint": "data", "classes": 4}
ENVIRONMENT = {"host": "here", "precision": "fp32"}


def setup_with(fingerprint: str = "data", precision: str = "fp32") -> SimpleNamespace:
    """What opening a trial asks of a setup."""
    data = SimpleNamespace(fingerprint=fingerprint, card=lambda: {**CARD, "fingerprint": fingerprint})
    return SimpleNamespace(data=data, environment={**ENVIRONMENT, "precision": precision})


def opened(folder: Path, changes=None, hydra_files=None, setup=None, **how) -> TrialRun:
    folder.mkdir(exist_ok=True)
    return TrialRun.open(plain_trial(changes), folder, setup or setup_with(), hydra_files or {}, **how)


def stopped(folder: Path) -> TrialState:
    """Leave a trial that was stopped in its second epoch, one row after its checkpoint."""
    trial = opened(folder)
    trial.log_step(1, 0, 2.0, 0.1, 5.0)
    s = trial.state
    s.epoch, s.step_in_epoch, s.updates, s.loss_sum, s.seconds = 1, 3, 10, 2.5, 7.0
    s.last, s.best = {"epoch": 1, "step": 7, "val_accuracy": 0.25}, {"epoch": 1, "val_accuracy": 0.25}
    s.values, s.exp_avg, s.exp_avg_sq = ({"w": torch.full((2,), x)} for x in (1.0, 2.0, 3.0))
    trial.save()
    trial.log_step(2, 0, 1.0, 0.1, 5.0)
    trial.interrupt()
    return s


def edit(folder: Path, **fields) -> None:
    """Change fields of the folder's record."""
    records.write_record(folder, dataclasses.replace(read_record(folder), **fields))


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_trial(tmp_path):
    before = time.time()
    trial = opened(tmp_path / "a", hydra_files={"config.yaml": "a: ä\n"})
    config = trial.config
    assert before <= trial.record.started <= time.time()
    assert trial.record == TrialRecord(
        *ids(config), "running", to_dict(config), environment=ENVIRONMENT, data=CARD, started=trial.record.started
    )
    assert trial.name == trial_id(config) != ids(config)[1]
    assert trial.state == TrialState()
    assert (tmp_path / "a/.hydra/config.yaml").read_bytes() == "a: ä\n".encode()
    trial.beat()
    assert not (tmp_path / "a/record.json").exists(), "written when the first pack is there"
    trial.close()


def test_an_interrupted_trial_resumes(tmp_path):
    """State, figures and rows are those of the checkpoint; what the record says of its end is taken back."""
    old = stopped(tmp_path / "a")
    config = to_dict(plain_trial({"trainer.checkpoint_every": 1.0}))
    error, data = {"message": "x", "step": None}, {"fingerprint": "data", "old": 1}
    edit(tmp_path / "a", metrics={"epoch": 9}, best={"epoch": 9}, error=error, finished=5.0, config=config, data=data,
         environment={"host": "elsewhere"}, parameters={"total": 5}, cost={"adapter_bytes": 6})  # fmt: skip
    started = read_record(tmp_path / "a").started
    trial = opened(tmp_path / "a", hydra_files={"config.yaml": "new"})
    r, s = trial.record, trial.state
    assert (s.epoch, s.step_in_epoch, s.updates, s.loss_sum, s.seconds) == (1, 3, 10, 2.5, 7.0)
    assert [getattr(s, n)["w"].tolist() for n in ("values", "exp_avg", "exp_avg_sq")] == [[1, 1], [2, 2], [3, 3]]
    assert (s.last, s.best) == (old.last, old.best) == (r.metrics, r.best)
    assert r.metrics is not s.last
    assert r.best is not s.best
    assert (r.status, r.error, r.finished, r.started) == ("running", None, None, started)
    assert (r.config, r.environment, r.data) == (to_dict(trial.config), ENVIRONMENT, CARD)
    assert (r.parameters, r.cost) == ({"total": 5}, {"adapter_bytes": 6})
    assert (tmp_path / "a/.hydra/config.yaml").read_text() == "new"
    trial.close()
    assert [row["loss"] for row in read_rows(tmp_path / "a/metrics.jsonl")] == [2.0], "as the checkpoint counts"
    assert [row["step"] for row in read_rows(tmp_path / "a/timing.jsonl")] == [1, 2], "the clock's stay"
    (tmp_path / "a/checkpoint.pt").unlink()
    trial = opened(tmp_path / "a")
    trial.close()
    assert (trial.state, trial.record.metrics) == (TrialState(), {})
    assert read_rows(tmp_path / "a/metrics.jsonl") == []


@pytest.mark.parametrize(
    ("record", "restart", "epoch"),
    [
        ({"status": "interrupted"}, False, 1),
        ({"status": "running"}, False, 1),
        ({"status": "stopped"}, False, 1),
        ({"data": {}}, False, 1),  # refused before its data were known
        ({"environment": {}}, False, 1),
        ({"status": "failed", "error": {"message": "x", "step": None}}, False, 1),
        ({"status": "failed", "error": {"message": "x"}}, False, 1),
        ({"status": "failed", "error": {"message": "x", "step": 0}}, False, 0),
        ({"status": "failed", "error": {"message": "x", "step": 5}}, False, 0),
        ({"status": "interrupted"}, True, 0),
        ({"status": "completed"}, True, 0),
        ({"data": {"fingerprint": "others"}}, True, 0),
    ],
)
def test_who_resumes_and_who_starts_from_scratch(record, restart, epoch, tmp_path):
    stopped(tmp_path / "a")
    edit(tmp_path / "a", **record, started=5.0)
    trial = opened(tmp_path / "a", restart=restart)
    assert trial.state.epoch == epoch
    assert (trial.record.started == 5.0) is (epoch == 1)
    assert (trial.record.status, trial.record.error) == ("running", None)
    assert (tmp_path / "a/checkpoint.pt").exists() is (epoch == 1)
    assert len(read_rows(tmp_path / "a/metrics.jsonl")) == epoch
    trial.close()


def damaged(folder: Path) -> None:
    (folder / "checkpoint.pt").write_bytes(b"cut")


def of_another(folder: Path) -> None:
    config = plain_trial({"seed": 1})
    edit(folder, trial_id=trial_id(config), cell_id=ids(config)[1], config=to_dict(config))


@pytest.mark.parametrize(
    ("change", "how", "said"),
    [
        (None, {"changes": {"seed": 1}}, r"holds trial .* \(seed is 0 there, 1 here\)"),
        (None, {"setup": setup_with("others")}, r"other splits .* data there, others here\).*resume=restart"),
        (None, {"setup": setup_with(precision="bf16")}, r"another precision .* fp32 there, bf16 here\)"),
        (damaged, {}, r"checkpoint\.pt is damaged .*resume=restart"),
        (of_another, {"changes": {"seed": 1}}, rf"checkpoint\.pt belongs to trial {trial_id(plain_trial())}, not to"),
        (lambda folder: (folder / "record.json").write_text("{"), {}, r"record\.json is not complete JSON .*remove"),
        (lambda folder: (folder / "record.json").write_text("{"), {"restart": True}, r"is not complete JSON"),
        (None, {"changes": {"seed": 1}, "restart": True}, "holds trial"),
        (lambda folder: edit(folder, status="completed"), {}, "the trial is completed"),
    ],
)
def test_who_is_refused_leaves_the_folder_as_it_is(change, how, said, tmp_path):
    stopped(tmp_path / "a")
    if change is not None:
        change(tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match=said):
        opened(tmp_path / "a", **how)
    assert contents(tmp_path / "a") == before


def test_a_restart_removes_what_a_trial_writes_and_nothing_else(tmp_path):
    """What Hydra's own callbacks put into ``.hydra`` is not ours."""
    assert set(OWN_FILES) == {
        *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")),
        *("adapter.json", "adapter.safetensors", "checkpoint.pt", "metrics.jsonl", "predictions.npz", "record.json"),
        *("timing.jsonl", "train.log"),
    }
    stopped(tmp_path / "a")
    board, mine = tmp_path / "board", {"mine/file", "notes.txt", ".hydra/config.pickle"}
    for path in (board / "event", *(tmp_path / "a" / name for name in (*OWN_FILES, *mine))):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(path.read_bytes() if path.exists() else b"x")
    trial = opened(tmp_path / "a", restart=True, tensorboard=board)
    trial.close()
    assert set(contents(tmp_path / "a")) == {tmp_path / "a" / n for n in (*mine, "metrics.jsonl", "timing.jsonl")}
    assert not board.exists()
    assert not (tmp_path / "a/tensorboard").exists()


def test_what_a_killed_writer_left_is_removed(tmp_path):
    stopped(tmp_path / "a")
    (tmp_path / "a/.hydra").mkdir()
    ours = [".checkpoint.pt.0123abcd", ".record.json.x_y", ".hydra/.config.yaml.1"]
    theirs = [".lock", ".notes.txt.1", ".checkpoint.pt", "checkpoint.pt.1"]
    for name in (*ours, *theirs):
        (tmp_path / "a" / name).write_text("x")
    opened(tmp_path / "a").close()
    assert [name for name in ours + theirs if (tmp_path / "a" / name).exists()] == theirs


def closed(trial: TrialRun) -> bool:
    """Whether the logs take no more rows."""
    for rows in (trial._metrics, trial._timing):
        with pytest.raises(ValueError, match="closed file"):
            rows.write(b"")
    return True


ENDS = {
    "completed": TrialRun.complete,
    "interrupted": TrialRun.interrupt,
    "failed": lambda trial: trial.fail("no good", 3),
}


@pytest.mark.parametrize("status", ENDS)
def test_ends_are_recorded(status, tmp_path):
    trial, before = opened(tmp_path / "a"), time.time()
    trial.save()
    ENDS[status](trial)
    record = read_record(tmp_path / "a")
    failed = status == "failed"
    assert record.status == status
    assert record.error == ({"message": "no good", "step": 3, "traceback": None} if failed else None)
    assert record.finished is None if status == "interrupted" else before <= record.finished <= time.time()
    assert (tmp_path / "a/train.log").read_text().endswith(f"  {'no good' if failed else status}\n")
    assert (tmp_path / "a/checkpoint.pt").exists() is (status != "completed"), "nothing reads it again"
    assert closed(trial)


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_full_disk_does_not_hide_the_end(status, tmp_path, monkeypatch):
    """The exit code says it then; the files are closed all the same."""
    trial = opened(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_record", raised(OSError(errno.ENOSPC, "No space left on device")))
        ENDS[status](trial)
    assert trial.record.status == status
    assert closed(trial)


def test_a_rank_that_writes_nothing_ends_alike():
    for status, end in ENDS.items():
        (trial,) = new_trials([plain_trial()])
        for act in (trial.save, trial.beat, trial.write_record, trial.close):
            act()
        assert trial.record.status == "running"
        end(trial)
        assert trial.record.status == status


@pytest.mark.parametrize(
    "write",
    [
        TrialRun.save,
        *ENDS.values(),
        lambda trial: trial.write_record(),
        lambda trial: trial.log_epoch(1, 1, {"train_loss": 1.0}),
        lambda trial: trial.log_step(1, 0, 1.0, 1.0, 1.0),
        lambda trial: trial.write_results({}, {}, {}),
    ],
)
def test_nothing_is_written_once_another_process_has_the_trial(write, tmp_path):
    held = [True]
    trial = opened(tmp_path / "a", mine=lambda: held[0])
    trial.write_record()
    trial._asked = 0.0  # long ago
    before, held[0] = contents(tmp_path / "a"), False
    with pytest.raises(ClaimLost, match=trial.name):
        write(trial)
    assert contents(tmp_path / "a") == before
    trial.close()
    with pytest.raises(ClaimLost, match=trial.name):
        opened(tmp_path / "a", mine=lambda: held[0], restart=True)
    assert contents(tmp_path / "a") == before


def test_rows_of_steps_ask_now_and_then(tmp_path, monkeypatch):
    """A process that was suspended asks before its first row; one that trains does not ask for every row."""
    now, asked = [0.0], []
    monkeypatch.setattr("lora_vit.training.trial.time.monotonic", lambda: now[0])
    trial = opened(tmp_path / "a", mine=lambda: asked.append(now[0]) or True)
    asked.clear()
    for at in (1.0, 5.0, 10.9, 11.0, 20.9, 500.0):
        now[0] = at
        trial.log_step(1, 0, 1.0, 1.0, 1.0)
    assert asked == [1.0, 11.0, 500.0]
    trial.close()


def test_a_locked_folder_is_made_and_refused_to_a_second(tmp_path):
    """Who is refused must not remove the lock file: a third would make another and train in the same folder."""
    place = tmp_path / "runs/a"
    with ExitStack() as held:
        lock_folder(place, held)
        for _ in range(2):
            with pytest.raises(ConfigError, match="another process is training there, wait"):
                lock_folder(place, held)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EACCES, "cannot be written"), (errno.ENOSYS, "-o flock"), (errno.ENOLCK, "mount its file system")],
)
def test_a_folder_that_cannot_be_held_names_the_cause(number, said, tmp_path, monkeypatch):
    monkeypatch.setattr(files.fcntl, "flock", raised(OSError(number, os.strerror(number))))
    with pytest.raises(ConfigError, match=said) as caught:
        lock_folder(tmp_path / "a", ExitStack())
    assert f"{tmp_path / 'a'} cannot be" in str(caught.value)
    assert os.strerror(number) in str(caught.value)
