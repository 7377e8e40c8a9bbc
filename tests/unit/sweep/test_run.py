"""A sweep's command from request to outcomes: what it asks for, starts and says. Workers only leave records."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pty
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plain_trials import BASELINE, SMALL
from sweeps import another, claimed, leave_record, options, seed_trials, sweep_of, trial_of

from lora_vit.compose import expand, initialized
from lora_vit.errors import ConfigError, Interrupted, TrialFailed
from lora_vit.records import CHECKPOINT, RECORD, read_record
from lora_vit.sweep import run as run_module
from lora_vit.sweep.claims import ENDED, FREE, HELD, Claims
from lora_vit.sweep.packs import Packs
from lora_vit.sweep.plan import Request, Sweep
from lora_vit.sweep.run import run_sweep
from lora_vit.sweep.trial import Trial


class Engine:
    """Its workers train all that is free when they are looked at: each trial comes to what ``outcome`` says."""

    outlives_us, poll_every = False, 0.0

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[int] = []
        self.stops: list[bool] = []
        self.alive = self.withdrawn = 0
        self.works, self.ends = True, True
        self.news: list[str] = []
        self.looked: Callable[[], None] = lambda: None
        self.outcome: Callable[[Trial], dict[str, Any]] = lambda trial: {"metrics": {"val_accuracy": 0.75}}

    def number_of_workers(self, asked: str, trials: list[Any]) -> int:
        return min(2 if asked == "auto" else int(asked), len(trials))

    def start(self, count: int) -> str:
        self.started.append(count)
        self.alive += count
        return f"{count} workers"

    def look(self) -> tuple[int, list[str]]:
        self.looked()
        if self.alive and self.works:
            self.work()
        self.alive = 0 if self.ends else self.alive
        return self.alive, [self.news.pop()] if self.news else []

    def work(self, most: int = 99) -> None:
        sweep, claims = Sweep.existing(self.folder), Claims(self.folder)
        packs = Packs(sweep, claims)
        packs.look()
        for _, (trial,) in itertools.islice(packs.take(lambda group: 1), most):
            fields = {"status": "completed"} | self.outcome(trial)
            leave_record(sweep, trial, **fields)
            claims.release(trial.trial_id, ENDED)

    def stop(self, now: bool = False) -> None:
        self.stops.append(now)
        self.alive = 0

    def withdraw(self) -> None:
        self.withdrawn += 1


@pytest.fixture
def engine(tmp_path, monkeypatch) -> Engine:
    made = Engine(tmp_path)
    monkeypatch.setattr(run_module, "start_engine", lambda asked, folder: made)
    monkeypatch.setattr(run_module, "prepare", lambda configs: None)
    monkeypatch.chdir(tmp_path.parent)
    return made


def run(folder: Path, trials: list[Trial], **changes: Any) -> Any:
    more = {key: changes.pop(key) for key in ("search", "ended") if key in changes}
    return run_sweep(Request(folder, options(**changes), trials, command="the command", **more))


def fails(trial: Trial) -> dict[str, Any]:
    if trial.config.seed != 1:
        return {"metrics": {"val_accuracy": 0.5}}
    return {"status": "failed", "error": {"message": "the loss is not finite", "step": 3}}


# --- outcomes


def test_trials_are_trained_once_and_reported(engine, tmp_path, capsys):
    trials = seed_trials(3)
    called: list[tuple[str, str]] = []
    outcomes = run(tmp_path, trials, ended=lambda trial, state: called.append((trial.trial_id, state.status)))
    assert outcomes == {trial.trial_id: 0.75 for trial in trials}
    assert sorted(called) == sorted((trial.trial_id, "completed") for trial in trials)
    assert (engine.started, engine.withdrawn) == ([2], 1)
    out = capsys.readouterr().out
    for words in ("3 trials\n", "1 cell, best first", "val accuracy %", "75.00", f"summarize {tmp_path.name}"):
        assert words in out
    assert run(tmp_path, trials) == outcomes
    assert engine.started == [2], "nothing is left to train"
    assert "3 trials (3 completed)" in capsys.readouterr().out
    assert Sweep(tmp_path).plan["command"] == "the command"


def test_what_failed_is_reported_with_the_reason_and_the_way_back(engine, tmp_path, capsys):
    trials = seed_trials(3)
    engine.outcome = fails
    for _ in range(2):
        with pytest.raises(TrialFailed, match=r"1 of 3 trials did not complete; sweep\.retry_failed=true"):
            run(tmp_path, trials)
        out = capsys.readouterr().out
        assert "the loss is not finite" in out[out.index("Not completed") :]
        assert out.count(trials[1].trial_id) == out.count(trials[0].trial_id) + 1
    assert len(engine.started) == 1, "a failed trial has ended"
    engine.outcome = lambda trial: {"metrics": {"val_accuracy": 0.25}}
    again = run(tmp_path, trials, retry_failed=True)
    assert again == {trials[0].trial_id: 0.5, trials[1].trial_id: 0.25, trials[2].trial_id: 0.5}


def test_records_that_say_nothing_of_their_trials_are_reported(engine, tmp_path, capsys):
    """One without accuracy, and another trial's."""
    first, second = seed_trials(2)
    sweep = sweep_of(tmp_path, [first])
    leave_record(sweep, first, "completed", metrics={"val_accuracy": 0.5})
    sweep.folder_of(first).rename(sweep.folder_of(second))
    engine.outcome = lambda trial: {"metrics": {}}
    with pytest.raises(TrialFailed, match=r"2 of 2 trials did not complete$"):
        run(tmp_path, [first, second])
    out = capsys.readouterr().out
    assert "has no val_accuracy: remove it" in out
    assert f"holds trial {first.trial_id}" in out


def test_restart_trains_what_is_completed_once_more(engine, tmp_path):
    trials = seed_trials(2)
    run(tmp_path, trials)
    engine.outcome = lambda trial: {"metrics": {"val_accuracy": 0.25}}
    again = seed_trials(2, trainer__resume="restart")
    assert run(tmp_path, again) == {trial.trial_id: 0.25 for trial in trials}
    assert run(tmp_path, trials) == {trial.trial_id: 0.25 for trial in trials}


@pytest.mark.parametrize("change", [{"retry_failed": True}, {}])
def test_a_trial_in_training_is_neither_restarted_nor_retried(change, tmp_path):
    """By another command at the same time."""
    trial = trial_of({} if change else {"trainer.resume": "restart"})
    sweep = sweep_of(tmp_path, [trial])
    leave_record(sweep, trial, "failed")
    (sweep.folder_of(trial) / CHECKPOINT).touch()
    other = another(tmp_path, trial)
    for status in ("failed", "interrupted" if change else "new"):
        run_module._reopen(sweep, [trial], not change, bool(change))
        assert sweep.state_of(trial).status == status
        other.release(trial.trial_id)


# --- what else is in the folder


def test_what_earlier_commands_left_open_trains_after_what_is_asked_for(engine, tmp_path, capsys):
    """S11: the sweep is its folder."""
    earlier, new = seed_trials(2), seed_trials(4)[2:]
    engine.works = False
    with pytest.raises(TrialFailed):
        run(tmp_path, earlier)
    engine.works = True
    order: list[int] = []
    outcomes = run(tmp_path, new, ended=lambda trial, state: order.append(trial.config.seed))
    assert order == [2, 3, 0, 1]
    assert outcomes.keys() == {trial.trial_id for trial in [*earlier, *new]}
    assert "note: 2 trials of earlier commands are open too" in capsys.readouterr().out


def test_an_earlier_commands_ended_trials_are_not_asked_for(engine, tmp_path):
    engine.outcome = fails
    with pytest.raises(TrialFailed):
        run(tmp_path, seed_trials(2))
    assert run(tmp_path, new := seed_trials(3)[2:]).keys() == {new[0].trial_id}


def test_notes_about_settings_that_name_one_trial_or_have_no_effect(engine, tmp_path, capsys):
    baseline = {**BASELINE, "lora.method": "none"}
    trials = [trial_of(), trial_of(), trial_of(baseline), trial_of(baseline)]
    for trial in trials[2:]:
        trial.dropped = {"lora.rank": "lora=none", "optimizer.head_lr": "lora=none"}
    engine.outcome = lambda trial: {"metrics": {"val_accuracy": 0.75 if trial.config.lora.method == "none" else 0.5}}
    assert len(run(tmp_path, trials)) == 2
    out = capsys.readouterr().out
    table = out[out.index("2 cells, best first") :]
    assert table.index("75.00") < table.index("50.00"), "the best first"
    assert "values: lora.rank with lora=none, optimizer.lr beside head_lr with lora=none\n" in out, "said once"
    assert "note: 2 of 4 combinations are duplicates" in out


def test_settings_whose_images_have_changed_are_reported(engine, tmp_path, capsys):
    before, now = (trial_of({"data.content": content}) for content in ("0" * 16, "1" * 16))
    before.overrides = now.overrides = ["lora.rank=4"]
    run(tmp_path, [before])
    run(tmp_path, [now])
    assert f"note: 1 of these trials were run here with other images, weights or defaults ({before.trial_id})" in (
        capsys.readouterr().out
    )


# --- races and searches


def race_trials(*ranks: int) -> list[Trial]:
    return [trial_of({"lora.rank": rank, "seed": 0}, f"rank={rank}") for rank in ranks]


def test_a_race_selects_and_says_so(engine, tmp_path, capsys):
    engine.outcome = lambda trial: {
        "metrics": {"val_accuracy": 0.5 + 0.01 * (trial.config.lora.rank or 0) + 0.001 * (trial.config.seed % 3)},
        "data": {"val": 720},
    }
    race = {"margin": 1.0, "first_seeds": 3, "most_seeds": 4}
    outcomes = run(tmp_path, race_trials(2, 8), **race)
    assert len(outcomes) == 6
    out = capsys.readouterr().out
    assert "a race of 2 cells" in out
    assert "rank 8 selected: " in out
    assert len(run(tmp_path, race_trials(4), **race)) == 9, "cells that are added race against those that are left"
    out = capsys.readouterr().out
    assert "a race of 3 cells (6 completed)" in out
    assert run(tmp_path, race_trials(4), dry_run=True, **race) is None
    assert "a race of 3 cells takes at least 9 trials, at most 12" in capsys.readouterr().out


def test_a_restarted_race_trains_all_of_its_trials_again(engine, tmp_path):
    engine.outcome = lambda trial: {"metrics": {"val_accuracy": 0.5 + 0.1 * ((trial.config.lora.rank or 0) > 4)}}
    race = {"margin": 1.0, "first_seeds": 2, "most_seeds": 2}
    run(tmp_path, race_trials(4))  # no race, and no part of it
    assert len(run(tmp_path, race_trials(2, 8), **race)) == 4
    trained: list[str] = []
    again = race_trials(2, 8)
    for trial in again:
        trial.config.trainer.resume = "restart"
    run(tmp_path, again, ended=lambda trial, state: trained.append(trial.trial_id), **race)
    assert len(trained) == 4


def test_a_search_proposes_to_race_what_it_found(engine, tmp_path, capsys):
    """Over other seeds; the commands ask for what it says."""
    pytest.importorskip("optuna", reason="needs pip install lora_vit[search]")
    lines = [*SMALL, "lora.rank=choice(1,2,4,8)", "optimizer.lr=tag(log,interval(1e-4,1e-2))"]
    engine.outcome = lambda trial: {"metrics": {"val_accuracy": 0.5 + 0.01 * trial.config.lora.rank}}
    with initialized():
        request = expand([*lines, "sweep.trials=8", "sweep.pack_size=4", "sweep.workers=1"], tmp_path)
        found = sorted(run_sweep(request).values(), reverse=True)
        assert (len(found), engine.started) == (8, [1, 1])
        said = capsys.readouterr().out
        assert "8 cells, best first" in said
        proposed = [line for line in said.splitlines() if "lora_vit.train" in line]
        assert len(proposed) == 3
        for value, line in zip(found, proposed, strict=False):
            assert f" {100 * value:.2f} " in said
            flag, *overrides = shlex.split(line.removesuffix(" && \\"))[3:]
            race = expand(overrides)
            (trial,) = race.trials
            assert (flag, race.options.margin, trial.config.seed) == ("-m", 0.5, 1)
            assert str(race.folder) == f"{tmp_path}-best"
            assert 0.5 + 0.01 * (trial.config.lora.rank or 0) == value
        engine.outcome = lambda trial: {"status": "failed", "error": {"message": "no", "step": 1}}
        engine.folder = request.folder = tmp_path / "t"
        with pytest.raises(TrialFailed, match="8 of 8 trials did not complete"):
            run_sweep(request)
        assert "A race over other seeds" not in (out := capsys.readouterr().out)
        assert "another search" not in out
        with pytest.raises(TrialFailed):
            run_sweep(expand([*lines[:-1], "sweep.trials=2", "sweep.workers=1"], request.folder))
        assert f"note: {request.folder} has trials of another search too" in capsys.readouterr().out


# --- another metric


def by_rank(trial: Trial) -> dict[str, Any]:
    """The higher the rank, the lower the accuracy and the higher the macro-F1."""
    rank = trial.config.lora.rank or 0
    return {"metrics": {"val_accuracy": 0.9 - rank / 100, "val_macro_f1": 0.5 + rank / 100}, "data": {"val": 720}}


def by_f1(trials: list[Trial]) -> list[Trial]:
    for trial in trials:
        trial.config.trainer.metric = "macro_f1"
    return trials


def test_a_sweep_compares_by_trainer_metric(engine, tmp_path, capsys):
    engine.outcome = by_rank
    trials = by_f1(race_trials(2, 8))
    assert list(run(tmp_path, trials).values()) == pytest.approx([0.52, 0.58])
    out = capsys.readouterr().out
    assert "completed  val macro-F1 52.00%" in out
    table = out[out.index("val macro-F1 %") :]
    assert table.index("58.00") < table.index("52.00")
    assert list(run(tmp_path, race_trials(2, 8)).values()) == pytest.approx([0.88, 0.82])
    assert "val accuracy %" in capsys.readouterr().out, "the newest command's counts"
    assert engine.started == [2], "and nothing is trained again"
    with pytest.raises(ConfigError, match=r"trainer\.metric=macro_f1,accuracy: one metric"):
        run(tmp_path, [*by_f1(race_trials(2)), *race_trials(4)])


def test_what_lacks_the_metric_is_reported(engine, tmp_path, capsys):
    with pytest.raises(TrialFailed, match="1 of 1 trials did not complete"):
        run(tmp_path, by_f1(race_trials(2)))
    assert "record.json has no val_macro_f1: remove it" in capsys.readouterr().out


def test_a_race_is_decided_by_trainer_metric(engine, tmp_path, capsys):
    """Cells of an earlier command, which was about accuracy, race by it too."""
    engine.outcome = by_rank
    race = {"margin": 1.0, "first_seeds": 2, "most_seeds": 3}
    run(tmp_path, race_trials(2, 4), **race)
    assert "rank 2 selected: " in capsys.readouterr().out
    assert run(tmp_path, by_f1(race_trials(8)), dry_run=True, **race) is None
    assert "4 have ended" in capsys.readouterr().out
    assert max(run(tmp_path, by_f1(race_trials(8)), **race).values()) == pytest.approx(0.58)
    out = capsys.readouterr().out
    assert "val macro-F1 %" in out
    assert "rank 8 selected: with 95 % no other of 3 cells" in out


# --- a dry run


def test_a_dry_run_says_what_it_would_train_and_writes_nothing(engine, tmp_path, capsys):
    folder = tmp_path / "s"
    trials = [*seed_trials(3), trial_of({**BASELINE, "lora.method": "full"})]
    assert run(folder, trials, dry_run=True, workers="2", pack_size="auto") is None
    out = capsys.readouterr().out
    assert f"plan of {folder}: 4 trials, 0 of them finished; 2 workers" in out
    rows = [line.split() for line in out.splitlines() if "vit_tiny" in line]
    assert rows[0][-5:] == ["3", "measured", "at", "the", "start"]
    assert rows[1][-2:] == ["1", "1"]
    assert (folder.exists(), engine.started) == (False, [])


# --- following


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


def test_nothing_is_reopened_that_is_not_asked_for(engine, tmp_path):
    trials = seed_trials(2)
    engine.outcome = fails
    with pytest.raises(TrialFailed):
        run(tmp_path, trials)
    record = (tmp_path / trials[1].trial_id / RECORD).stat().st_mtime_ns
    run(tmp_path, trials[:1], retry_failed=True)
    assert (tmp_path / trials[1].trial_id / RECORD).stat().st_mtime_ns == record
    assert read_record(tmp_path / trials[1].trial_id).status == "failed"
    assert dataclasses.asdict(Sweep(tmp_path).options)["retry_failed"]
