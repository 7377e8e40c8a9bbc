"""A sweep's command from request to outcomes: what it asks for, and what it says of what it finds and leaves."""

from __future__ import annotations

import dataclasses

import pytest
from made_up_engine import fails, run
from plain_trials import BASELINE
from sweeps import another, leave_record, seed_trials, sweep_of, trial_of

from lora_vit.errors import TrialFailed
from lora_vit.records import CHECKPOINT, RECORD, read_record
from lora_vit.sweep import run as run_module
from lora_vit.sweep.plan import Sweep

# --- outcomes


def test_trials_are_trained_once_and_reported(engine, tmp_path, capsys):
    trials = seed_trials(3)
    outcomes = run(tmp_path, trials)
    assert outcomes == {trial.trial_id: 0.75 for trial in trials}
    assert [trial.trial_id for trial in engine.trained] == [trial.trial_id for trial in trials]
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


# --- what else is in the folder


def test_what_earlier_commands_left_open_trains_after_what_is_asked_for(engine, tmp_path, capsys):
    """S11: the sweep is its folder."""
    earlier, new = seed_trials(2), seed_trials(4)[2:]
    engine.works = False
    with pytest.raises(TrialFailed):
        run(tmp_path, earlier)
    engine.works = True
    outcomes = run(tmp_path, new)
    assert [trial.config.seed for trial in engine.trained] == [2, 3, 0, 1]
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
