"""A sweep's command while workers train: how many it starts, and when it ends them or gives up."""

from __future__ import annotations

import os
import pty
import signal
import sys

import pytest
from made_up_engine import Engine, run
from sweeps import another, claimed, leave_record, seed_trials, sweep_of

from lora_vit.errors import Interrupted, TrialFailed
from lora_vit.sweep.claims import ENDED, FREE, HELD, Claims


def test_workers_that_end_no_trial_are_started_three_times(engine, tmp_path):
    engine.works = False
    engine.news = ["a worker failed: no images"]
    with pytest.raises(TrialFailed, match=r"3 times workers were started.*the same command resumes"):
        run(tmp_path, seed_trials(9))
    assert engine.started == [2, 2, 2]


def test_every_trial_that_ends_is_worth_another_try(engine, tmp_path):
    engine.work = lambda: Engine.work(engine, most=1)  # type: ignore[method-assign]
    assert len(run(tmp_path, seed_trials(7))) == 7
    assert engine.started == [2] * 6 + [1]


def test_as_many_workers_are_started_as_trials_are_free(engine, tmp_path):
    """S10: and no more than are missing."""
    trials = seed_trials(4)
    sweep = sweep_of(tmp_path, trials)
    other = another(tmp_path, *trials[:3])
    looks = []

    def looked() -> None:
        looks.append(1)
        if len(looks) == 5:
            for trial in trials[:3]:
                leave_record(sweep, trial, "completed", metrics={"val_accuracy": 0.5})
                other.release(trial.trial_id, ENDED)

    engine.looked = looked
    assert len(run(tmp_path, trials, workers="4")) == 4
    assert engine.started == [1]


def test_a_worker_that_died_is_replaced(engine, tmp_path):
    """Its trial was seen in training before."""
    trials = seed_trials(1)
    claims: list[Claims] = []

    def looked() -> None:
        if engine.started == [1] and not claims:
            claims.append(another(tmp_path, trials[0]))
            engine.works, engine.ends = False, False
        elif claims and claimed(tmp_path, trials) == [HELD]:
            claims[0].release(trials[0].trial_id, FREE)
            engine.alive, engine.works = 0, True

    engine.looked = looked
    assert len(run(tmp_path, trials)) == 1
    assert engine.started == [1, 1]


def test_who_does_not_wait_returns_when_workers_are_asked_for(engine, tmp_path):
    assert run(tmp_path, seed_trials(3), wait=False) is None
    assert engine.started == [2]


@pytest.mark.parametrize(
    ("outlives_us", "answer", "stops"),
    [(False, "", [False]), (True, "", []), (True, "n\n", []), (True, "Y\n", [False])],
)
def test_a_request_to_stop(outlives_us, answer, stops, engine, tmp_path, monkeypatch):
    """Workers that outlive the command are asked to end only if the user says so, on a terminal."""
    ours, terminal = pty.openpty() if answer else os.pipe()[::-1]
    os.write(ours, answer.encode())
    for name, mode in (("stdin", "r"), ("stderr", "w")):
        monkeypatch.setattr(sys, name, os.fdopen(terminal, mode, closefd=False))
    engine.outlives_us, engine.works, engine.ends = outlives_us, False, False
    engine.looked = lambda: signal.raise_signal(signal.SIGTERM) if engine.started and not engine.stops else None
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path, seed_trials(3))
    assert stopped.value.signum == signal.SIGTERM
    assert engine.stops == stops


def test_a_second_ctrl_c_ends_the_workers_at_once(engine, tmp_path):
    engine.works, engine.ends = False, False

    def looked() -> None:
        if engine.started:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    engine.looked = looked
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, seed_trials(3))
    assert engine.stops == [True]
