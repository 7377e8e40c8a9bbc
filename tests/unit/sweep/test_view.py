"""What the user sees of a sweep, from its plan, claims and records alone."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from sweeps import claimed, leave_record, seed_trials, sweep_of

from lora_vit import terminal as terminal_module
from lora_vit.records import RECORD, State
from lora_vit.sweep import claims as claims_module
from lora_vit.sweep.claims import ENDED, FREE, Claims
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Trial
from lora_vit.sweep.view import View, trial_row


class Watched:
    """A sweep of four trials, a process that trains them, and the view of the command."""

    def __init__(self, folder, monkeypatch, terminal: bool = False):
        self.trials = seed_trials(4)
        self.sweep = sweep_of(folder, self.trials)
        self.owner, self.out = Claims(folder), io.StringIO()
        console = Console(file=self.out, force_terminal=terminal, width=160, highlight=False)
        monkeypatch.setattr(terminal_module, "make_console", lambda quiet: console)
        self.view = self.new_view()

    def new_view(self) -> View:
        return View(Sweep(self.sweep.folder), [(trial, self.sweep.state_of(trial)) for trial in self.trials])

    def take(self, *trials: Trial) -> None:
        self.owner.look()
        assert all(self.owner.take(trial.trial_id) for trial in trials)

    def end(self, trial: Trial, status: str = "completed", **fields: Any) -> None:
        fields = {"metrics": {"val_accuracy": 0.75, "epoch": 2}} | fields
        leave_record(self.sweep, trial, status, **fields)
        self.owner.release(trial.trial_id, ENDED)

    def look(self) -> list[tuple[str, str]]:
        return [(trial.trial_id, state.status) for trial, state in self.view.look()]

    def running(self) -> list[bool]:
        return [trial.trial_id in self.view.running() for trial in self.trials]


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_trials_wait_run_and_end(watched):
    first, second, third, _ = watched.trials
    assert watched.look() == []
    assert (watched.running(), watched.view.missing(0)) == ([False] * 4, 4)
    watched.take(first, second, third)
    assert watched.look() == []
    assert watched.running() == [True] * 3 + [False]
    assert [watched.view.missing(alive) for alive in (0, 1, 2)] == [1, 1, 0], "who is alive and has no trial takes one"
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
    assert (watched.running(), watched.view.missing(0)) == ([False, True, False, False], 3)


def test_a_trial_whose_record_was_removed_is_open_again(watched):
    trial = watched.trials[0]
    watched.take(trial)
    watched.end(trial)
    (watched.sweep.folder_of(trial) / RECORD).unlink()
    assert watched.look() == []
    watched.look()
    assert claimed(watched.sweep.folder, [trial]) == [FREE]
    assert watched.view.missing(0) == 4


def test_trials_that_a_source_adds_are_watched_too(watched):
    with watched.sweep.changing():
        watched.sweep.extend(more := seed_trials(5)[4:])
    watched.look()
    assert watched.view.open() == [*watched.trials, *more]


def test_what_another_command_no_longer_plans_is_seen_to_end(watched):
    """The same command given again plans what is open by then: a trial that ended since our last look is not."""
    first = watched.trials[0]
    watched.take(first)
    watched.end(first)
    with watched.sweep.changing() as plan:
        plan["batches"] = [[trial.trial_id for trial in watched.trials[1:]]]
    assert watched.look() == [(first.trial_id, "completed")]
    assert "[1/4]" in watched.out.getvalue()


def test_a_follower_opens_one_file_for_each_owner(watched, monkeypatch):
    """S9: not one for each trial in training; records are read when trials have ended."""
    watched.take(*watched.trials)
    watched.owner.beat()
    watched.look()
    opened = []
    monkeypatch.setattr(claims_module, "_sign_of_life", lambda *args: opened.append(args) or (1, {}))
    monkeypatch.setattr(Sweep, "state_of", lambda *args: pytest.fail("a record is read"))
    watched.look()
    assert len(opened) == 1


def test_progress_counts_epochs_of_all_and_estimates_by_its_own_speed(watched, monkeypatch):
    """What was there when the command began took no time of it."""
    now = [100.0]
    monkeypatch.setattr(terminal_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(terminal_module.Every, "due", lambda self: True)
    first, second, *_ = watched.trials
    leave_record(watched.sweep, first, "interrupted", metrics={"epoch": 1})
    view = watched.view = watched.new_view()
    watched.take(first, second)
    for done in ({}, {first.trial_id: 1.5, second.trial_id: 1.5}):
        now[0] += 15
        watched.owner.progress = done
        watched.owner.beat()
        watched.look()
    now[0] += 25
    watched.end(first)
    watched.end(second)
    watched.look()
    lines = [line for line in watched.out.getvalue().splitlines() if line.startswith("sweep: ")]
    assert lines == ["sweep: 3/8 epochs  0/4 trials ended, 2 running",
                     "sweep: 4/8 epochs  2/4 trials ended, 0 running, best 75.00%  about 100 s left"]  # fmt: skip
    assert view.missing(0) == 2


def test_on_a_terminal_a_bar_shows_it(tmp_path, monkeypatch):
    watched = Watched(tmp_path, monkeypatch, terminal=True)
    watched.take(*watched.trials[:2])
    watched.end(watched.trials[0])
    with watched.sweep.changing():
        watched.sweep.extend(seed_trials(6)[4:])
    watched.look()
    watched.view.say("a line [with] brackets")
    (task,) = watched.view.progress._bar.tasks
    watched.view.progress.close()
    assert (task.completed, task.total, task.fields["figures"]) == (2, 12, "1/6 trials ended, 1 running, best 75.00%")
    assert "a line [with] brackets" in watched.out.getvalue()


def test_a_row_says_how_a_trial_stands(watched):
    """The one row of all tables: the status command's, and those of what did not complete."""
    trial = watched.trials[0]
    ended = {"error": {"message": "the loss is not finite"}, "metrics": {"epoch": 1, "val_accuracy": 0.5}}
    for status, fields, row in (
        ("completed", {"metrics": {"epoch": 2, "val_accuracy": 0.75}}, ("completed", "2/2", "75.00%", "")),
        ("completed", {}, ("completed", "0/2", "", "record.json has no val_accuracy: remove it, then the same command "
                                                   "trains it again")),
        ("failed", ended, ("failed", "1/2", "50.00%", "the loss is not finite")),
        ("interrupted", {}, ("interrupted", "0/2", "", "")),
    ):  # fmt: skip
        leave_record(watched.sweep, trial, status, **fields)
        assert trial_row("a", "b", watched.sweep.state_of(trial), "accuracy") == ("a", "b", *row)
    assert trial_row("a", "b", State("new"), "accuracy") == ("a", "b", "waiting", "", "", "")
    assert trial_row("a", "b", State("refused", problem="why"), "accuracy")[2:] == ("refused", "", "", "why")
