"""How a single run ends: completed, failed or asked to stop, as its record, its files and its exception say."""

from __future__ import annotations

import math
import signal
import sys

import pytest
from plain_trials import plain_trial

from lora_vit import run as single
from lora_vit.errors import Interrupted, TrialFailed
from lora_vit.records import read_record
from lora_vit.training import step
from lora_vit.training.checkpoint import load_checkpoint
from lora_vit.training.pack import Pack

CONFIG = plain_trial({"trainer.log_every": 3})


def run(folder):
    return single.run(CONFIG, folder, {})


@pytest.fixture
def at_step(monkeypatch):
    """Have something happen before the third step of the first epoch."""
    whole = Pack.step

    def install(action):
        def stepped(pack, *args):
            if (pack.trials[0].state.epoch, pack.step_in_epoch) == (0, 2):
                action()
            return whole(pack, *args)

        monkeypatch.setattr(Pack, "step", stepped)

    return install


def raising(error):
    def throw():
        raise error

    return throw


def test_a_completed_run_is_not_trained_again(tmp_path, at_step):
    record = run(tmp_path / "a")
    assert record == read_record(tmp_path / "a")
    assert record.status == "completed"
    at_step(raising(AssertionError))
    assert run(tmp_path / "a") == record


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt()])
def test_what_a_foreign_handler_raises_is_no_failure(raised, tmp_path, at_step):
    at_step(raising(raised))
    with pytest.raises(type(raised)):
        run(tmp_path / "a")
    record = read_record(tmp_path / "a")
    assert (record.status, record.error) == ("interrupted", None)
    assert load_checkpoint(tmp_path / "a", record.trial_id).step_in_epoch == 2


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_launchers_handler_ends_the_process_when_the_work_is_saved(signum, tmp_path, at_step):
    """As batch systems' Python libraries set one."""
    at_step(lambda: signal.raise_signal(signum))
    before = signal.signal(signum, lambda number, frame: sys.exit(7))
    try:
        with pytest.raises(SystemExit, match="7"):
            run(tmp_path / "a")
    finally:
        signal.signal(signum, before)
    record = read_record(tmp_path / "a")
    assert (record.status, record.error) == ("interrupted", None)
    assert load_checkpoint(tmp_path / "a", record.trial_id).step_in_epoch == 3


def test_asked_to_stop_by_a_signal(tmp_path, at_step):
    at_step(lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM"):
        run(tmp_path / "a")
    assert read_record(tmp_path / "a").status == "interrupted"


def test_an_error_is_recorded_with_its_traceback(tmp_path, at_step):
    at_step(raising(RuntimeError("broken\nin two lines")))
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path / "a")
    error = read_record(tmp_path / "a").error
    assert error is not None
    assert (error["message"], error["step"]) == ("RuntimeError: broken", None)
    assert "in throw" in error["traceback"]


def test_a_run_that_failed_at_a_step_is_trained_anew_by_the_same_command(tmp_path, monkeypatch):
    """To the end of one that never failed, though checkpoints from before the bad step were there."""
    whole = run(tmp_path / "whole")
    losses, count = step.sample_losses, iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(step, "sample_losses", lambda *args: losses(*args) * (math.inf if next(count) == 9 else 1.0))
        with pytest.raises(TrialFailed, match="not finite at step 10"):
            run(tmp_path / "a")
    assert load_checkpoint(tmp_path / "a", whole.trial_id).epoch == 1
    assert run(tmp_path / "a").metrics == whole.metrics
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
