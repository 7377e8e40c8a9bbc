"""What the user sees of a sweep, from its plan, claims and records alone."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from sweeps import leave_record, seed_trials, sweep_of

from lora_vit.records import RECORD
from lora_vit.sweep import view as view_module
from lora_vit.sweep.claims import ENDED, FREE, Claims
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Trial
from lora_vit.sweep.view import View


class Watched:
    """A sweep of four trials, a process that trains them, and the view of the command."""

    def __init__(self, folder, monkeypatch, terminal: bool = False, ended: int = 0):
        self.trials = seed_trials(4)
        self.sweep = sweep_of(folder, self.trials)
        self.owner, self.out = Claims(folder), io.StringIO()
        console = Console(file=self.out, force_terminal=terminal, width=160, highlight=False)
        monkeypatch.setattr(view_module, "make_console", lambda: console)
        self.view = View(Sweep(folder), [(t, self.sweep.state_of(t)) for t in self.trials[:ended]])

    def take(self, *trials: Trial) -> None:
        self.owner.look()
        assert all(self.owner.take(trial.trial_id) for trial in trials)

    def end(self, trial: Trial, status: str = "completed", **fields: Any) -> None:
        fields = {"metrics": {"val_accuracy": 0.75, "epoch": 2}} | fields
        leave_record(self.sweep, trial, status, **fields)
        self.owner.release(trial.trial_id, ENDED)

    def look(self) -> list[tuple[str, str]]:
        return [(trial.trial_id, state.status) for trial, state in self.view.look()]

    def statuses(self) -> list[str]:
        return [self.view.rows[trial.trial_id].status for trial in self.trials]


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_trials_wait_run_and_end(watched):
    first, second, third, _ = watched.trials
    assert watched.look() == []
    assert (watched.statuses(), watched.view.free()) == (["waiting"] * 4, 4)
    watched.take(first, second, third)
    assert watched.look() == []
    assert (watched.statuses(), watched.view.free()) == (["running"] * 3 + ["waiting"], 1)
    watched.end(first)
    watched.end(second, "failed", metrics={}, error={"message": "the loss is not finite", "step": 3})
    assert watched.look() == [(first.trial_id, "completed"), (second.trial_id, "failed")]
    assert watched.look() == [], "once"
    assert watched.view.open() == watched.trials[2:]
    lines = watched.out.getvalue().splitlines()
    assert lines[0].startswith(f"[2/4] {first.trial_id}")
    assert lines[0].endswith("completed  val accuracy 75.00%")
    assert lines[1].endswith("failed  the loss is not finite")


def test_what_a_process_gave_back_or_died_with_is_free_again(watched):
    """So that the command starts another worker for it."""
    watched.take(*watched.trials[:2])
    watched.look()
    watched.owner.release(watched.trials[0].trial_id, FREE)
    watched.look()
    assert (watched.statuses(), watched.view.free()) == (["waiting", "running", "waiting", "waiting"], 3)


def test_a_trial_whose_record_was_removed_is_open_again(watched):
    trial = watched.trials[0]
    watched.take(trial)
    watched.end(trial)
    (watched.sweep.folder_of(trial) / RECORD).unlink()
    assert watched.look() == []
    watched.look()
    watched.owner.look()
    assert watched.owner.state(trial.trial_id) == FREE
    assert watched.view.free() == 4


def test_trials_that_a_source_adds_are_watched_too(watched):
    with watched.sweep.changing():
        watched.sweep.extend(more := seed_trials(5)[4:])
    watched.look()
    assert watched.view.open() == [*watched.trials, *more]


def test_a_follower_opens_one_file_for_each_owner(watched, monkeypatch):
    """S9: not one for each trial in training; records are read when trials have ended."""
    watched.take(*watched.trials)
    watched.owner.beat()
    watched.look()
    opened = []
    monkeypatch.setattr(view_module.Claims, "_look_at", lambda *args: opened.append(args) or (False, {}))
    monkeypatch.setattr(Sweep, "state_of", lambda *args: pytest.fail("a record is read"))
    watched.look()
    assert len(opened) == 1


def test_progress_counts_epochs_of_all_and_estimates_by_its_own_speed(watched, monkeypatch):
    """Half of what was there when the command began took no time of it."""
    now = [100.0]
    monkeypatch.setattr(view_module.time, "monotonic", lambda: now[0])
    view = watched.view = View(Sweep(watched.sweep.folder), [])
    watched.take(*watched.trials[:2])
    watched.owner.progress = {watched.trials[0].trial_id: 1.0}
    watched.owner.beat()
    watched.look()
    assert view._progress_line() == "1/8 epochs, 0/4 trials ended"
    now[0] += 30
    watched.owner.progress = {watched.trials[0].trial_id: 1.5, watched.trials[1].trial_id: 1.5}
    watched.owner.beat()
    watched.look()
    assert view._progress_line() == "3/8 epochs, 0/4 trials ended, about 0:01:15 left"
    watched.end(watched.trials[0])
    watched.look()
    assert view._progress_line().startswith("4/8 epochs, 1/4 trials ended")


def test_what_needed_no_training_is_counted(tmp_path, monkeypatch):
    leave_record(sweep_of(tmp_path, seed_trials(4)), seed_trials(1)[0], "completed", metrics={"val_accuracy": 0.5})
    watched = Watched(tmp_path, monkeypatch, ended=1)
    assert watched.look() == []
    assert watched.view.free() == 3
    assert watched.view._progress_line().startswith("2/8 epochs, 1/4 trials ended")


def test_on_a_terminal_a_table_shows_what_runs_and_the_best(tmp_path, monkeypatch):
    watched = Watched(tmp_path, monkeypatch, terminal=True)
    watched.take(*watched.trials[:3])
    watched.end(watched.trials[0])
    watched.end(watched.trials[1], metrics={"val_accuracy": 0.9, "epoch": 2})
    watched.look()
    table, bar = watched.view._picture().renderables
    shown = Console(file=io.StringIO(), width=160, record=True)
    shown.print(table)
    lines = shown.export_text().splitlines()[1:]
    assert [line.split()[0] for line in lines] == [watched.trials[i].trial_id for i in (2, 1, 0)]
    assert "running" in lines[0]
    assert "90.00%" in lines[1]
    assert bar.tasks[0].completed == 4
    watched.view.say("a line [with] brackets")
    watched.view.close()
    watched.view.close()
    assert "a line [with] brackets" in watched.out.getvalue()
