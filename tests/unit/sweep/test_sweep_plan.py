"""The plan of a sweep: what it holds, how commands and sources change it, and what is said if it cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from sweeps import leave_record, options, seed_trials, sweep_of, trial_of

from lora_vit.config import to_dict
from lora_vit.errors import ConfigError
from lora_vit.files import locked
from lora_vit.records import CHECKPOINT, PLAN
from lora_vit.sweep import plan as plan_module
from lora_vit.sweep.plan import Request, Sweep, trial_folders
from lora_vit.sweep.trial import Trial


def ask(sweep: Sweep, trials: list[Trial], command: str = "train", is_open=None, **changes) -> None:
    names = {trial.trial_id for trial in trials} if is_open is None else is_open
    sweep.ask(Request(sweep.folder, options(**changes), trials, command=command), trials, names)


def ids(batches) -> list[list[str]]:
    return [[trial.trial_id for trial in batch] for batch in batches]


def test_a_plan_holds_every_trial_ever_asked_for_with_the_newest_settings(tmp_path):
    """A command's own trials train first; how a trial runs comes from the command that runs it."""
    sweep = Sweep(tmp_path / "deep/sweep")
    assert not sweep.folder.exists(), "reading makes nothing"
    first, other = trial_of({"lora.rank": 8}, "rank=8"), trial_of({"lora.rank": 2}, "rank=2")
    ask(sweep, [first, other], "first command")
    again = trial_of({"lora.rank": 8, "trainer.log_every": 7, "data.root": "moved"}, "rank=8 seed=0")
    assert again.trial_id == first.trial_id
    ask(sweep, [again], "second command", is_open={first.trial_id, other.trial_id})
    assert sweep.trials[first.trial_id].config == again.config
    plan = json.loads((tmp_path / "deep/sweep/sweep.json").read_text())
    assert plan["command"] == "second command"
    assert plan["trials"][first.trial_id] == {
        "cell": first.cell_id, "label": "rank=8 seed=0", "overrides": again.overrides,
        "board": f"rank=8_{first.trial_id}", "config": json.loads(json.dumps(to_dict(again.config))),
    }  # fmt: skip
    assert plan["batches"] == [[first.trial_id], [other.trial_id]]
    assert Sweep.existing(sweep.folder).trials[first.trial_id].config == again.config


def test_batches_hold_what_is_open_in_the_order_of_training(tmp_path):
    """What was started was promised before; then whole seeds."""
    trials = [trial_of({"seed": seed, "lora.rank": rank}) for rank in (1, 2) for seed in (1, 0, 10)]
    for trial in (trials[4], trials[2]):
        (tmp_path / trial.trial_id).mkdir()
        (tmp_path / trial.trial_id / CHECKPOINT).touch()
    sweep = Sweep(tmp_path)
    is_open = {trial.trial_id for trial in trials[1:]}
    ask(sweep, trials, is_open=is_open)
    assert ids(sweep.batches) == [[trials[i].trial_id for i in (4, 2, 1, 3, 5)]]
    with sweep.changing():
        sweep.extend(more := seed_trials(2))
    assert ids(Sweep(tmp_path).batches)[1:] == ids([more])
    ask(sweep, [], is_open={trials[1].trial_id})  # the others have ended
    assert ids(sweep.batches) == [[trials[1].trial_id]]


def test_a_change_by_another_process_is_seen_and_only_changes_are_written(tmp_path):
    ours, theirs = sweep_of(tmp_path, seed_trials(1)), Sweep(tmp_path)
    os.link(tmp_path / PLAN, tmp_path / "before")
    with theirs.changing():
        pass
    assert (tmp_path / PLAN).samefile(tmp_path / "before")
    before = ours.plan
    ours.refresh()
    assert ours.plan is before
    with theirs.changing() as plan:
        plan["pack_sizes"]["x"] = {"size": 2}
    ours.refresh()
    assert ours.plan["pack_sizes"] == {"x": {"size": 2}}
    assert ours.batches[0][0] is ours.trials[ours.batches[0][0].trial_id]


def test_a_plan_is_changed_by_one_process_at_a_time(tmp_path):
    sweep = sweep_of(tmp_path, seed_trials(1))
    with sweep.changing(), pytest.raises(BlockingIOError), locked(tmp_path / ".sweep.lock", wait=False):
        pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", ["sweep.json is no plan", "JSONDecodeError", "remove it"]),
        ("[]", ["sweep.json is no plan", "remove it", "command again"]),
        ('{"schema": 3}', ["version 3", "remove it", "the records stay"]),
        ('{"schema": 4}', ["'trials'", "the sweep's command again"]),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(text, said, tmp_path):
    (tmp_path / PLAN).write_text(text)
    with pytest.raises(ConfigError) as refused:
        Sweep(tmp_path)
    assert all(part in str(refused.value) for part in said)


def test_an_edited_trial_is_refused(tmp_path):
    sweep = sweep_of(tmp_path, seed_trials(1))
    text = (tmp_path / PLAN).read_text()
    (tmp_path / PLAN).write_text(text.replace('"rank": 4', '"rank": 5'))
    with pytest.raises(ConfigError, match=f"no plan of this version.*{sweep.batches[0][0].trial_id}"):
        Sweep(tmp_path)


@pytest.mark.parametrize(
    ("errno", "remedy"), [(30, "another sweep.name or hydra.sweep.dir"), (38, "flock"), (37, "flock"), (95, "flock")]
)
def test_a_folder_that_cannot_be_written_is_reported_with_its_remedy(errno, remedy, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno, os.strerror(errno))

    monkeypatch.setattr(plan_module, "locked", refuse)
    with pytest.raises(ConfigError, match=remedy):
        sweep_of(tmp_path, seed_trials(1))


def test_what_no_worker_can_use_is_reported(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"is not a sweep folder.*sweep\.json"):
        Sweep.existing(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"Not a directory.*sweep\.name"):
        Sweep(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"/proc/s cannot be written.*another sweep\.name or hydra\.sweep\.dir"):
        sweep_of(Path("/proc/s"), seed_trials(1))
    sweep_of(tmp_path, seed_trials(1))
    monkeypatch.setattr(plan_module, "__version__", "0.0.9")
    with pytest.raises(ConfigError, match=r"0\.0\.9: install the same"):
        Sweep.existing(tmp_path)


def test_folders_of_trials_are_those_with_a_record(tmp_path):
    trials = seed_trials(3)
    sweep = sweep_of(tmp_path, trials)
    for trial in trials[:2]:
        leave_record(sweep, trial, "completed")
    (tmp_path / "other").mkdir()
    assert trial_folders(tmp_path) == sorted(tmp_path / trial.trial_id for trial in trials[:2])
    assert trial_folders(tmp_path / "missing") == []


def test_the_plan_knows_when_cells_got_more_seeds_after_results_were_there(tmp_path):
    """Other cells alone are no look, nor are seeds that join before anything new has ended."""
    cells = {(rank, seed): trial_of({"lora.rank": rank, "seed": seed}) for rank in (1, 2, 4) for seed in range(5)}
    sweep, asked, ended = Sweep(tmp_path), set(), set()
    steps = [  # who is asked for, who has ended by then, the looks
        ([(1, 0), (1, 1), (2, 0)], [], None),
        ([(1, 2)], [], None),
        ([(4, 0), (1, 0)], [(1, 0), (1, 1), (2, 0)], None),
        ([(2, 1)], [], [[3, 0, 1]]),
        ([(2, 2)], [], [[3, 0, 1]]),
        ([(1, 4)], [(1, 2)], [[3, 0, 1], [4, 0, 2]]),
    ]
    for names, done, looks in steps:
        asked |= {cells[name].trial_id for name in names}
        ended |= {cells[name].trial_id for name in done}
        ask(sweep, [cells[name] for name in names], is_open=asked - ended)
        assert sweep.plan.get("looks") == looks
    assert Sweep(tmp_path).plan["looks"] == looks


def test_the_plan_keeps_the_margins_with_which_a_race_was_looked_at(tmp_path):
    trial, sweep = trial_of({}), Sweep(tmp_path)
    for margin, is_open, margins in ((1, True, None), (2, True, None), (2, False, None), (3, False, [2, 3]),
                                     (2, False, [2, 3])):  # fmt: skip
        race = {"margin": margin, "cells": [trial.cell_id]}
        sweep.ask(Request(tmp_path, options(), [trial], race=race), [trial], {trial.trial_id} if is_open else set())
        assert sweep.race.get("margins") == margins
