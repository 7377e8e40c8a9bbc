"""Where a trial stands: begun, gone on with, stopped and failed, alone and in a pack."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from helpers import Recorder, train_together, trial_config

from lora_vit import records
from lora_vit.build import build_setup
from lora_vit.config import trial_id
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError, Interrupted
from lora_vit.files import locked, read_rows
from lora_vit.records import RECORD, TrialRecord, read_record, state_of
from lora_vit.stopping import StopRequest
from lora_vit.training import loop, step, trackers
from lora_vit.training.checkpoint import TrialState, load_checkpoint
from lora_vit.training.loop import train_trials
from lora_vit.training.pack import Pack
from lora_vit.training.trial import TrialRun, ended_record, locked_folder

QUIET = ("trainer.log_every=1000", "trainer.checkpoint_every=0.0001")  # logs at the ends of epochs, saves at each step


def begin(folder: Path, *overrides: str, launched: float | None = None) -> TrialRun:
    config = trial_config(*overrides)
    folder.mkdir(exist_ok=True)
    return TrialRun.open(config, folder, build_setup(config, Process()), launched or time.time(), {})


def train(*trials: TrialRun, stop: StopRequest | None = None) -> None:
    setup = build_setup(trials[0].config, Process())
    train_trials(list(trials), setup, Recorder(), stop or StopRequest())


def spoil(monkeypatch, at: int, trial: int = 0) -> None:
    """The loss of one trial of the pack is infinite at one step, counted from 0; the others' and the next are fine."""
    whole, count = step.sample_losses, iter(range(10**6))

    def losses(logits_KBC, labels_KB, smoothing_K1):
        out = whole(logits_KBC, labels_KB, smoothing_K1)
        if next(count) == at:
            out = out.clone()
            out[trial] = out[trial] * math.inf
        return out

    monkeypatch.setattr(step, "sample_losses", losses)


# --- open or ended


def test_a_folder_of_another_trial_is_refused_with_the_first_difference(tmp_path):
    trial = begin(tmp_path / "a")
    train(trial)
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    other = trial_config("optimizer.lr=0.5", "lora.rank=3")
    with pytest.raises(ConfigError, match=rf"holds trial {trial.name}, this is trial {trial_id(other)}") as caught:
        ended_record(tmp_path / "a", other, time.time())
    assert "(optimizer.lr is 0.001 there, 0.5 here)" in str(caught.value)
    with pytest.raises(ConfigError, match="holds trial"):
        TrialRun.open(other, tmp_path / "a", build_setup(other, Process()), time.time(), {})
    assert before == {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert state_of(tmp_path / "a").status == "completed"
    assert state_of(tmp_path / "a", trial.config, trial.name).status == "completed"
    assert state_of(tmp_path / "a", trial.config, "another").status == "refused"


def test_a_completed_trial_has_ended_and_restart_begins_it_anew(tmp_path):
    train(begin(tmp_path / "a"))
    config = trial_config()
    ended = ended_record(tmp_path / "a", config, time.time())
    assert ended is not None
    assert ended.status == "completed"
    again = trial_config("trainer.resume=restart")
    assert ended_record(tmp_path / "a", again, time.time()) is None
    (tmp_path / "a/notes.txt").write_text("mine")
    trial = begin(tmp_path / "a", "trainer.resume=restart")
    assert trial.state == TrialState()
    assert not (tmp_path / "a/adapter.safetensors").exists()
    assert (tmp_path / "a/notes.txt").read_text() == "mine"
    begun = trial.record.started
    trial.close()
    # the same command meets it once more (its pack was split): it goes on
    train_a_bit = begin(tmp_path / "a", "trainer.resume=restart", launched=begun)
    train(train_a_bit)
    goes_on = begin(tmp_path / "a", "trainer.resume=restart", launched=begun)
    assert goes_on.state.epoch == 2
    goes_on.close()


@pytest.mark.parametrize(
    ("section", "key", "told"),
    [
        ("data", "fingerprint", r"begun with other splits \(fingerprint another there, \w{16} here\)"),
        (
            "environment",
            "precision",
            r"begun with another precision \(trainer\.precision=auto is another there, fp64 here",
        ),
    ],
)
def test_a_trial_goes_on_only_with_what_it_was_begun_with(section, key, told, tmp_path):
    trial = begin(tmp_path / "a")
    trial.save()
    trial.interrupt()
    record = read_record(tmp_path / "a")
    getattr(record, section)[key] = "another"
    records.write_record(tmp_path / "a", record)
    with pytest.raises(ConfigError, match=told):
        begin(tmp_path / "a")


def test_a_damaged_checkpoint_is_told_and_kept(tmp_path):
    trial = begin(tmp_path / "a")
    trial.save()
    trial.interrupt()
    (tmp_path / "a/checkpoint.pt").write_bytes(b"cut")
    with pytest.raises(ConfigError, match=r"checkpoint\.pt is damaged"):
        begin(tmp_path / "a")
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == b"cut"


# --- bad steps


def test_a_failed_trial_begins_anew(tmp_path, monkeypatch):
    """One bad step, then none: going on from a checkpoint would complete a trial that lacks an update."""
    whole = train_together([trial_config(*QUIET)], tmp_path / "whole")[0]
    trial = begin(tmp_path / "a", *QUIET)
    with monkeypatch.context() as patch:
        spoil(patch, at=9)
        train(trial)
    record = read_record(tmp_path / "a")
    assert record.status == "failed"
    assert record.error is not None
    assert record.error["step"] == 10
    assert "not finite at step 10 (optimizer.lr=0.001)" in record.error["message"]
    assert record.finished is not None
    again = begin(tmp_path / "a", *QUIET)
    assert again.state == TrialState()
    assert again.record.error is None
    train(again)
    assert read_record(tmp_path / "a").status == "completed"
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(again.state.values[name], tensor, rtol=0, atol=0)


def test_no_checkpoint_hides_a_bad_step(tmp_path, monkeypatch):
    """The checkpoint of the step before stays until the failure is told."""
    saved: list[int] = []
    monkeypatch.setattr(trackers, "save_checkpoint", lambda folder, name, state: saved.append(state.step_in_epoch))
    spoil(monkeypatch, at=3)
    train(begin(tmp_path / "a", *QUIET))
    assert saved == [1, 2, 3]
    assert read_record(tmp_path / "a").status == "failed"


def test_asked_to_stop_after_a_bad_step(tmp_path, monkeypatch):
    """The bad trial has failed and the other one is interrupted, though no logging step came in between."""
    spoil(monkeypatch, at=2, trial=1)
    stop, whole = StopRequest(), Pack.step

    def stepped(pack, *args):
        if pack.step_in_epoch == 4:
            stop.signum = signal.SIGTERM
        return whole(pack, *args)

    monkeypatch.setattr(Pack, "step", stepped)
    slow = ("trainer.log_every=1000", "trainer.checkpoint_every=300")
    with pytest.raises(Interrupted):
        train(begin(tmp_path / "a", *slow, "seed=1"), begin(tmp_path / "b", *slow, "seed=2"), stop=stop)
    assert [read_record(tmp_path / n).status for n in "ab"] == ["interrupted", "failed"]
    assert load_checkpoint(tmp_path / "a", read_record(tmp_path / "a").trial_id).step_in_epoch == 5
    assert not (tmp_path / "b/checkpoint.pt").exists()


def test_a_last_update_that_overflows_fails_its_trial_alone(tmp_path, monkeypatch):
    whole = Pack.step

    def overflow(pack, *args):
        losses = whole(pack, *args)
        if pack.trials[0].state.epoch == 1 and pack.step_in_epoch == pack.steps_per_epoch and pack.K == 2:
            pack.flat.values_KP[1, 5] = math.inf
        return losses

    monkeypatch.setattr(Pack, "step", overflow)
    train(begin(tmp_path / "a", "lora.rank=2"), begin(tmp_path / "b", "lora.rank=4"))
    assert [read_record(tmp_path / n).status for n in "ab"] == ["completed", "failed"]
    error = read_record(tmp_path / "b").error
    assert error is not None
    assert error["step"] == 14
    assert "a parameter is not finite at step 14" in error["message"]


def test_the_rows_of_a_trial_do_not_depend_on_its_pack_mates_failure(tmp_path, monkeypatch):
    settings = ("trainer.log_every=3", "trainer.checkpoint_every=300")
    alone = begin(tmp_path / "alone", *settings, "seed=1")
    train(alone)
    spoil(monkeypatch, at=4, trial=0)
    train(begin(tmp_path / "bad", *settings, "seed=2"), begin(tmp_path / "good", *settings, "seed=1"))
    assert read_record(tmp_path / "bad").status == "failed"
    rows = [read_rows(tmp_path / n / "metrics.jsonl") for n in ("alone", "good")]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == [3, 6, 7, 7, 10, 13, 14, 14]
    for a, b in zip(*rows, strict=True):  # fp64: other pack sizes add in another order
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=1e-9)
    assert [r["step"] for r in read_rows(tmp_path / "bad/metrics.jsonl")] == [3]


# --- epochs and figures


def test_each_trial_of_a_pack_gets_its_own_figures(tmp_path):
    """Val and test figures, losses and the best epoch of three unlike trials, against each alone."""
    settings = [("seed=1", "optimizer.lr=0.05"), ("seed=2", "optimizer.lr=0.0001"), ("seed=3", "optimizer.lr=0.01")]
    together = train_together([trial_config(*s, "trainer.epochs=3") for s in settings], tmp_path / "pack")
    seen = set()
    for i, s in enumerate(settings):
        (alone,) = train_together([trial_config(*s, "trainer.epochs=3")], tmp_path / f"alone{i}")
        a, b = alone.trial.record, together[i].trial.record
        for name in ("val_loss", "test_loss", "train_loss"):
            assert a.metrics[name] == pytest.approx(b.metrics[name], rel=1e-9)
        for name in ("val_accuracy", "test_accuracy", "epoch", "step"):
            assert a.metrics[name] == b.metrics[name]
        assert a.best == b.best
        seen.add(round(a.metrics["test_loss"], 6))
    assert len(seen) == 3


def test_costs_are_shared_and_add_up(tmp_path, monkeypatch):
    """The seconds of a pack's steps are divided among its trials."""
    clock = iter(range(10**6))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    outcomes = train_together([trial_config(f"seed={s}", "trainer.epochs=1") for s in (1, 2)], tmp_path)
    a, b = (o.trial.record.cost for o in outcomes)
    assert a["seconds"] == b["seconds"] > 0
    assert a["pack_size"] == 2
    assert a["images_per_second"] == pytest.approx(56 / a["seconds"])
    (alone,) = train_together([trial_config("seed=1", "trainer.epochs=1")], tmp_path / "alone")
    assert alone.trial.record.cost["seconds"] == pytest.approx(2 * a["seconds"])


# --- memory, signs of life, locks


def test_a_pack_is_freed_when_trials_leave_it(tmp_path, monkeypatch):
    made: list[weakref.ref[Pack]] = []
    alive: list[int] = []
    init = Pack.__init__

    def remember(pack, trials, setup):
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        init(pack, trials, setup)
        made.append(weakref.ref(pack))

    monkeypatch.setattr(Pack, "__init__", remember)
    spoil(monkeypatch, at=2)
    train(begin(tmp_path / "a", "seed=1"), begin(tmp_path / "b", "seed=2"))
    assert alive == [0, 0], "no earlier pack lives when the next one is made"


def test_a_slow_step_is_no_dead_trial(tmp_path, monkeypatch):
    """Signs of life come while one step lasts, and end with the trial."""
    monkeypatch.setattr(loop, "HEARTBEAT_EVERY", 0.02)
    monkeypatch.setattr(trackers, "HEARTBEAT_EVERY", 0.02)
    seen: list[float] = []
    whole = Pack.step

    def slow(pack, *args):
        if pack.step_in_epoch == 0 and pack.trials[0].state.epoch == 0:
            for _ in range(6):
                seen.append(json.loads((tmp_path / "a" / RECORD).read_text())["heartbeat"])
                time.sleep(0.05)
        return whole(pack, *args)

    monkeypatch.setattr(Pack, "step", slow)
    train(begin(tmp_path / "a"))
    assert len(set(seen)) >= 3
    last = read_record(tmp_path / "a")
    assert last.status == "completed"
    time.sleep(0.1)
    assert read_record(tmp_path / "a") == last
    assert not [t for t in threading.enumerate() if t.name == "signs of life"]


def test_a_refused_process_leaves_the_owners_lock(tmp_path):
    """Who is refused must not remove the lock file: a third would make another and train in the same folder."""
    with locked_folder(tmp_path / "a"):
        for _ in range(2):
            with pytest.raises(ConfigError, match="another process is training there"), locked_folder(tmp_path / "a"):
                pytest.fail("two owners")
        assert (tmp_path / "a/.lock").exists()
    assert list((tmp_path / "a").iterdir()) == [], "nothing but the lock was there"
    with locked_folder(tmp_path / "a"):
        (tmp_path / "a/file").write_text("x")
    assert (tmp_path / "a/.lock").exists()


def test_who_waits_for_a_lock_that_is_removed_takes_a_new_one(tmp_path):
    """Each of several threads holds it alone, whoever removes the file."""
    inside: list[int] = []
    most: list[int] = []

    def hold() -> None:
        for _ in range(50):
            with locked(tmp_path / ".lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 200


# --- asked to stop


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt])
def test_what_a_foreign_handler_raises_is_an_interruption(raised, tmp_path, monkeypatch):
    """It saves what is whole, and the trial then ends as if it had never been stopped."""
    (whole,) = train_together([trial_config()], tmp_path / "whole")
    train_step = Pack.step

    def stepped(pack, *args):
        if pack.trials[0].state.epoch == 1 and pack.step_in_epoch == 2:
            raise raised
        return train_step(pack, *args)

    trial = begin(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(Pack, "step", stepped)
        with pytest.raises(raised):
            train(trial)
    assert read_record(tmp_path / "a").status == "interrupted"
    again = begin(tmp_path / "a")
    assert (again.state.epoch, again.state.step_in_epoch) == (1, 2)
    train(again)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(again.state.values[name], tensor, rtol=0, atol=0)


def test_a_stop_while_the_next_pack_is_made_loses_nothing(tmp_path, monkeypatch):
    """One trial has failed, and a handler ends the process while the others' pack is built."""
    made, init = [], Pack.__init__

    def build(pack, trials, setup):
        made.append(len(trials))
        if len(made) == 2:
            raise SystemExit(3)
        init(pack, trials, setup)

    monkeypatch.setattr(Pack, "__init__", build)
    spoil(monkeypatch, at=2, trial=1)
    settings = ("trainer.log_every=1", "trainer.checkpoint_every=300")
    a, b = begin(tmp_path / "a", *settings, "seed=1"), begin(tmp_path / "b", *settings, "seed=2")
    with pytest.raises(SystemExit):
        train(a, b)
    assert made == [2, 1]
    assert [read_record(tmp_path / n).status for n in "ab"] == ["interrupted", "failed"]
    assert load_checkpoint(tmp_path / "a", a.name).step_in_epoch == 3


def test_what_is_half_changed_is_not_saved(tmp_path, monkeypatch):
    """An exception in the midst of an update: the last checkpoint counts."""
    update = step.PackedAdamW.step

    def torn(optimizer, *args):
        update(optimizer, *args)
        if int(optimizer.updates_K1[0]) == 10:
            raise SystemExit

    trial = begin(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(step.PackedAdamW, "step", torn)
        with pytest.raises(SystemExit):
            train(trial)
    state = load_checkpoint(tmp_path / "a", trial.name)
    assert (state.epoch, state.step_in_epoch, state.updates) == (1, 0, 7)
    assert read_record(tmp_path / "a").status == "interrupted"


def test_trials_are_told_apart_by_what_they_are():
    """Two trials of one config in one process are two trials."""
    record = TrialRecord("id", "cell", "running", {})
    a, b = (TrialRun(trial_config(), dataclasses.replace(record), TrialState()) for _ in range(2))
    assert a != b
    assert b not in [a]
