"""How a single run ends: completed, failed or asked to stop, as its record, its files and its exception say."""

from __future__ import annotations

import math
import signal
import sys

import pytest
import torch
from plain_trials import plain_trial
from stage import raised

from lora_vit import run as single
from lora_vit.errors import ConfigError, Interrupted, TrialFailed
from lora_vit.records import read_record
from lora_vit.training import pack
from lora_vit.training.pack import Pack
from lora_vit.training.trial import load_checkpoint

CONFIG = plain_trial({"trainer.log_every": 3})


def run(folder):
    return single.train(CONFIG, folder, {})


@pytest.fixture
def at_step(monkeypatch):
    """Have something happen before the third step of the first epoch."""
    whole = Pack.step

    def install(action):
        def stepped(pack, *args):
            if (pack.trials[0].state.epoch, pack.step_in_epoch) == (0, 2):
                action(pack)
            return whole(pack, *args)

        monkeypatch.setattr(Pack, "step", stepped)

    return install


def stopping_at(folder):
    """Where a trial that was asked to stop has got to."""
    record = read_record(folder)
    assert (record.status, record.error) == ("interrupted", None)
    return load_checkpoint(folder, record.trial_id).step_in_epoch


def test_a_completed_run_is_not_trained_again_but_to_restart(tmp_path, at_step):
    record = run(tmp_path / "a")
    assert record == read_record(tmp_path / "a")
    assert record.status == "completed"
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}
    steps: list[int] = []
    at_step(lambda pack: steps.append(2))
    assert run(tmp_path / "a") == record
    assert steps == []
    with pytest.raises(ConfigError, match="holds trial"):
        single.train(plain_trial({"seed": 1}), tmp_path / "a", {})
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()} == before
    again = single.train(plain_trial({"trainer.log_every": 3, "trainer.resume": "restart"}), tmp_path / "a", {})
    assert (steps, again.metrics) == ([2], record.metrics)
    assert (rows := tmp_path / "a/metrics.jsonl").read_bytes() == before[rows][1]


def test_a_folder_that_is_refused_does_not_stay_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(single, "build_setup", raised(ConfigError("no data")))
    with pytest.raises(ConfigError, match="no data"):
        run(tmp_path / "new/a")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b").mkdir()
    (tmp_path / "b/notes").touch()
    with pytest.raises(ConfigError, match="no data"):
        run(tmp_path / "b")
    assert (tmp_path / "b/notes").exists()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_what_a_foreign_handler_raises_is_no_failure(error, tmp_path, at_step):
    at_step(raised(error))
    with pytest.raises(error):
        run(tmp_path / "a")
    assert stopping_at(tmp_path / "a") == 2


@pytest.mark.parametrize("theirs", [None, lambda number, frame: sys.exit(7)])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_asked_to_stop_by_a_signal(signum, theirs, tmp_path, at_step):
    """A launcher's handler, as batch systems' Python libraries set one, is called when the work is saved."""
    at_step(lambda pack: signal.raise_signal(signum))
    before = signal.signal(signum, theirs or signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit if theirs else Interrupted, match="7" if theirs else signum.name):
            run(tmp_path / "a")
    finally:
        signal.signal(signum, before)
    assert stopping_at(tmp_path / "a") == 3


def test_an_error_is_recorded_with_its_traceback(tmp_path, at_step):
    at_step(raised(RuntimeError("broken\nin two lines")))
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path / "a")
    error = read_record(tmp_path / "a").error
    assert error is not None
    assert (error["message"], error["step"]) == ("RuntimeError: broken", None)
    assert "in throw" in error["traceback"]


def test_out_of_memory_is_one_line_with_what_to_do(tmp_path, at_step):
    def fill(pack):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    at_step(fill)
    with pytest.raises(TrialFailed, match=r"OutOfMemoryError: CUDA .*2 GiB.*trainer\.checkpoint.*precision=bf16"):
        run(tmp_path / "a")
    assert read_record(tmp_path / "a").status == "failed"


def test_what_was_trained_is_saved_before_validation(tmp_path, monkeypatch):
    def fill(pack, split):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as first:
        first.setattr(Pack, "predict", fill)
        with pytest.raises(TrialFailed):
            run(tmp_path / "a")
    steps: list[int] = []
    whole = Pack.step
    monkeypatch.setattr(Pack, "step", lambda pack, *args: steps.append(pack.step_in_epoch) or whole(pack, *args))
    assert run(tmp_path / "a").metrics == run(tmp_path / "b").metrics
    assert steps == [*range(7), *range(7), *range(7)], "one epoch to resume, two afresh"
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab")
    assert a == b


def test_a_run_that_failed_at_a_step_is_restarted_by_the_same_command(tmp_path, monkeypatch):
    """To the end of one that never failed, though checkpoints from before the bad step were there."""
    whole = run(tmp_path / "whole")
    losses, count = pack.sample_losses, iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(pack, "sample_losses", lambda *args: losses(*args) * (math.inf if next(count) == 9 else 1.0))
        with pytest.raises(TrialFailed, match="not finite at step 10"):
            run(tmp_path / "a")
    assert load_checkpoint(tmp_path / "a", whole.trial_id).updates == 7
    assert run(tmp_path / "a").metrics == whole.metrics
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
