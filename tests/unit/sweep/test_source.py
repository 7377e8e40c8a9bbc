"""What a sweep wants next: a race's seeds and a search's suggestions, decided from the records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_records import make_config, make_record
from sweeps import leave_record, options, seed_trials, sweep_of

from lora_vit.compose import expand, initialized
from lora_vit.config import from_dict
from lora_vit.errors import ConfigError
from lora_vit.records import SEARCH
from lora_vit.sweep import source as source_module
from lora_vit.sweep.plan import Request, Sweep
from lora_vit.sweep.source import RaceSource, SearchSource, Source, source_of, suggested
from lora_vit.sweep.trial import Trial

RANKS = (1, 2, 4, 8)
FIRST = 7  # the race's first seed


# --- a race


def cell(rank: int, seed: int = FIRST) -> Trial:
    config = from_dict(make_config({"lora.rank": rank, "seed": seed}))
    return Trial(config, ["trainer.epochs=5", f"lora.rank={rank}", f"seed={seed}"], f"rank={rank}")


def race_of(folder: Path, ranks: tuple[int, ...] = RANKS, workers: int = 1, **rules: Any) -> RaceSource:
    """As a command asks for it."""
    cells = {trial.cell_id: trial for trial in map(cell, ranks)}
    plan = {"margin": 1.0, "first_seeds": 3, "most_seeds": 6, "seed": FIRST, "cells": sorted(cells), "command": "c"}
    sweep = Sweep(folder)
    sweep.ask(Request(folder, options(), list(cells.values()), workers=workers, race=plan | rules), [], set())
    return RaceSource(sweep)


def accuracies(means: dict[int, float], sd: float = 0.003) -> dict[tuple[int, int], float]:
    rng = np.random.default_rng(1)
    seeds = rng.normal(0, 0.004, 6)
    return {(rank, FIRST + s): mean + seeds[s] + rng.normal(0, sd) for rank, mean in means.items() for s in range(6)}


GAP = accuracies({1: 0.90, 2: 0.94, 4: 0.932, 8: 0.85})
TIES = accuracies({1: 0.9, 2: 0.9, 4: 0.9, 8: 0.9}, sd=0.02)


def leave(sweep: Sweep, trial: Trial, accuracy: float | None) -> None:
    """A trial that has ended; without an accuracy it failed."""
    record = make_record(accuracy, lora__rank=trial.config.lora.rank, seed=trial.config.seed)
    assert record.trial_id == trial.trial_id
    leave_record(sweep, trial, "failed" if accuracy is None else "completed", metrics=record.metrics, data=record.data)


def ranks_and_seeds(trials: list[Trial]) -> list[tuple[int, int]]:
    return [(trial.config.lora.rank or 0, trial.config.seed) for trial in trials]


def run_to_its_end(race: RaceSource, values: dict[tuple[int, int], float]) -> int:
    """Batches that it took."""
    sweep, batches = race.sweep, 0
    while race.extend():
        batches += 1
        for trial in sweep.batches[-1]:
            leave(sweep, trial, values[trial.config.lora.rank or 0, trial.config.seed])
    return batches


def test_a_race_begins_with_the_first_seeds_of_every_cell(tmp_path):
    """Seed by seed, from the seed that was given; each trial is what the command would have asked for."""
    race = race_of(tmp_path)
    assert race.extend()
    (wanted,) = race.sweep.batches
    assert [trial.config.seed for trial in wanted] == [7] * 4 + [8] * 4 + [9] * 4
    assert {trial.config.lora.rank for trial in wanted[:4]} == set(RANKS)
    one = next(trial for trial in wanted if ranks_and_seeds([trial]) == [(2, 8)])
    assert (one.overrides, one.label) == (["trainer.epochs=5", "lora.rank=2", "seed=8"], "rank=2 seed=8")
    assert one.trial_id == cell(2, 8).trial_id
    assert not race.extend(), "asked for once"
    assert not RaceSource(Sweep.existing(tmp_path)).extend(), "by whichever process"


@pytest.mark.parametrize("workers", [1, 9])
@pytest.mark.parametrize("values", [GAP, TIES], ids=["gap", "ties"])
def test_a_race_runs_to_its_end(values, workers, tmp_path):
    race = race_of(tmp_path, workers=workers)
    run_to_its_end(race, values)
    if values is TIES:
        assert (race.race.ended, race.race.selected, race.race.seeds) == (True, None, 6)
        return
    assert race.race.selected is not None
    assert race.cells[race.race.selected].config.lora.rank == 2
    assert race.race.exits[[trial.config.lora.rank for trial in race.cells].index(8)].seeds == 3
    if workers == 1:
        assert len(race.ended) == sum(map(race.race.seeds_of, range(len(race.cells))))


def test_a_race_that_was_cut_resumes_from_the_records(tmp_path):
    whole, cut = race_of(tmp_path / "whole"), race_of(tmp_path / "cut")
    run_to_its_end(whole, GAP)
    assert cut.extend()
    for trial in cut.sweep.batches[0][:5]:
        leave(cut.sweep, trial, GAP[trial.config.lora.rank or 0, trial.config.seed])
    second = race_of(tmp_path / "cut")
    assert second.extend()
    assert len(second.sweep.batches[-1]) == 12 - 5
    for trial in second.sweep.batches[-1]:
        leave(second.sweep, trial, GAP[trial.config.lora.rank or 0, trial.config.seed])
    run_to_its_end(second, GAP)
    assert second.race.exits == whole.race.exits
    assert set(second.sweep.trials) == set(whole.sweep.trials)


def test_a_trial_that_failed_puts_its_cell_out(tmp_path):
    race = race_of(tmp_path)
    race.extend()
    for trial in race.sweep.batches[0]:
        key = trial.config.lora.rank or 0, trial.config.seed
        leave(race.sweep, trial, None if key == (2, 8) else TIES[key])
    assert race.extend()
    assert 2 not in {rank for rank, _ in ranks_and_seeds(race.sweep.batches[-1])}
    out = race.race.exits[[trial.config.lora.rank for trial in race.cells].index(2)]
    assert (out.seeds, out.behind) == (2, None)


def test_another_commands_rules_and_cells_are_taken_over(tmp_path):
    """By a process that works already. A wide margin ends the race, a narrow one continues it; cells may join."""
    race = race_of(tmp_path, (1, 2, 8))
    run_to_its_end(race, GAP)
    race_of(tmp_path, (1, 2, 8), margin=9.0)
    assert not race.extend()
    assert (race.race.seeds, race.race.rules.margin) == (3, 0.09)
    race_of(tmp_path)
    assert race.extend()
    assert {rank for rank, _ in ranks_and_seeds(race.sweep.batches[-1])} >= {4}
    assert len(race.cells) == 4
    sweep_of(tmp_path, seed_trials(1))
    assert not race.extend(), "a fixed sweep by now"


def test_accuracies_that_count_images_have_a_rounding_error(tmp_path):
    """Of 720 images: no spread over seeds does not mean that half a thousandth is real."""
    race = race_of(tmp_path, (1, 2), margin=0.01)
    race.extend()
    for trial in race.sweep.batches[0]:
        leave(race.sweep, trial, 0.9005 if trial.config.lora.rank == 2 else 0.9)
    race.look()
    assert (race.race.seeds, race.race.exits) == (3, {})


# --- a search

FIXED = ("experiment=quickstart", "lora.alpha=8", "lora.dropout=0.0")
SPACE = ("lora.rank=choice(1,2,4,8,16)", "optimizer.lr=tag(log,interval(1e-4,1e-2))")


def accuracy(trial: Trial) -> float:
    rank, lr = trial.config.lora.rank or 1, trial.config.optimizer.lr
    return 0.9 - 0.05 * abs(np.log2(rank / 4)) - 0.2 * abs(np.log10(lr / 2.2e-3))


@pytest.fixture
def search_of(tmp_path, monkeypatch):
    """A search as a command asks for it, by the name of its folder."""
    pytest.importorskip("optuna", reason="needs pip install lora_vit[search]")
    monkeypatch.chdir(tmp_path)
    with initialized():  # composing needs Hydra

        def ask(name: str = "s", trials: int = 30, *more: str, pack_size: str = "6") -> SearchSource:
            lines = [*FIXED, *SPACE, f"sweep.trials={trials}", f"sweep.pack_size={pack_size}", *more]
            request = expand(lines, tmp_path / name)
            request.metric = request.trials[0].config.trainer.metric
            sweep = Sweep(request.folder)
            earlier = list(sweep.trials.values())
            is_open = {trial.trial_id for trial in earlier if not sweep.state_of(trial).ended}
            sweep.ask(request, earlier, is_open)
            return SearchSource(sweep)

        yield ask


def test_a_search_learns_from_trainer_metric(search_of):
    source = search_of("s", 6, "trainer.metric=macro_f1")
    assert source.extend()
    for n, trial in enumerate(source.sweep.batches[-1]):
        metrics = {"val_accuracy": accuracy(trial), "val_macro_f1": n / 10}
        leave_record(source.sweep, trial, "completed", metrics=metrics)
    source.extend()
    study = source._open_study(source.sweep.search)
    assert sorted(theirs.value for theirs in study.trials) == [n / 10 for n in range(6)]


def train(source: SearchSource, batches: int = 99, failing: int | None = None) -> list[str]:
    """Train what a search wants; the trials in the order in which they were wanted."""
    order = []
    while batches and source.extend():
        batches -= 1
        for trial in source.sweep.batches[-1]:
            order.append(trial.trial_id)
            failed = trial.config.lora.rank == failing
            metrics = {} if failed else {"val_accuracy": accuracy(trial)}
            leave_record(source.sweep, trial, "failed" if failed else "completed", metrics=metrics)
    return order


def best(source: SearchSource) -> float:
    return max(accuracy(trial) for trial in source.sweep.trials.values())


def test_a_search_learns_and_each_trial_counts_once(search_of):
    """It finds at least what the best of a grid of its size has, and ends after so many different trials."""
    source = search_of()
    order = train(source)
    assert len(order) == len(set(order)) == len(source.sweep.trials) == 30
    assert [len(batch) for batch in source.sweep.batches] == [6] * 5
    grid = max(0.9 - 0.2 * abs(np.log10(lr / 2.2e-3)) for lr in np.geomspace(1e-4, 1e-2, 6))
    assert best(source) >= grid
    trial = next(iter(source.sweep.trials.values()))
    assert trial.overrides[:3] == list(FIXED)
    assert trial.overrides[3:] == [f"lora.rank={trial.config.lora.rank}", f"optimizer.lr={trial.config.optimizer.lr}"]
    assert trial.label == f"rank={trial.config.lora.rank} lr={trial.config.optimizer.lr}"
    assert len(f"{trial.config.optimizer.lr:.10g}".lstrip("0.").replace(".", "")) <= 4, "four digits"


def test_a_stopped_search_resumes_as_if_never_stopped(search_of):
    whole = train(search_of("whole"))
    cut = search_of("cut")
    first = train(cut, batches=2)
    assert cut.extend(), "and then it is stopped: a batch is asked for and not trained"
    waiting = [trial.trial_id for trial in cut.sweep.batches[-1]]
    again = search_of("cut")
    assert sorted(trial.trial_id for trial in again.sweep.batches[0]) == sorted(waiting)
    for trial in again.sweep.batches[0]:
        leave_record(again.sweep, trial, "completed", metrics={"val_accuracy": accuracy(trial)})
    assert [*first, *waiting, *train(again)] == whole
    assert not search_of("cut").extend()


def test_more_trials_may_be_asked_for_later(search_of):
    assert len(train(search_of("s", 6))) == 6
    assert len(train(search_of("s", 10))) == 4


def test_a_batch_is_a_part_of_the_search_for_each_worker(search_of):
    source = search_of(trials=40, pack_size="auto")
    assert source.extend()
    assert len(source.sweep.batches[0]) == 40 // source_module.BATCHES


def test_settings_that_were_suggested_before_do_not_count(search_of):
    """Of six settings a search finds six, and ends; a baseline has no rank, so its trials are one."""
    source = search_of("s", 30, "optimizer.lr=1e-3", "lora=choice(default,none)", "lora.rank=choice(1,2)")
    order = train(source)
    assert len(order) == 3
    labels = {trial.label for trial in source.sweep.trials.values()}
    assert labels == {"lora=default rank=1", "lora=default rank=2", "lora=none"}
    study = source._open_study(source.sweep.search or {})
    again = [theirs for theirs in study.trials if "trial_id" not in theirs.user_attrs]
    assert any(theirs.values for theirs in again), "they were suggested again, and have the result that there is"


@pytest.mark.parametrize("line", ["garbage", '{"op_code": 99, "worker_id": "x"}'])
def test_a_study_that_cannot_be_read_is_named(line, search_of):
    source = search_of("s", 2, "lora.rank=choice(1,2)")
    (source.sweep.folder / "search.db").write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=r"search\.db cannot be read \(Optuna .*: move it away"):
        source.extend()


def test_failed_trials_end_nothing_and_count_once_they_have_a_value(search_of):
    source = search_of(trials=12)
    order = train(source, failing=4)
    assert len(order) == 12
    failed = [t for t in source.sweep.trials.values() if source.sweep.state_of(t).status == "failed"]
    assert failed
    leave_record(source.sweep, failed[0], "completed", metrics={"val_accuracy": 0.5})
    assert not source.extend()
    study = source._open_study(source.sweep.search or {})
    values = [t.value for t in study.trials if t.user_attrs.get("trial_id") == failed[0].trial_id]
    assert values == [None, 0.5]
    source.extend()
    assert len(source._open_study(source.sweep.search or {}).trials) == len(study.trials), "told once"


def test_a_lost_plan_is_made_again_from_the_study(search_of):
    """``sweep.json`` was removed, or a process was killed before it wrote what it had suggested."""
    source = search_of(trials=12)
    order = train(source)
    (source.sweep.folder / "sweep.json").unlink()
    again = search_of(trials=12)
    assert again.sweep.trials == {}
    assert again.extend()
    assert sorted(again.sweep.trials) == sorted(order)
    assert not again.extend()


def test_impossible_suggestions_are_passed_over(search_of, monkeypatch):
    def refuse(search: Any, params: Any) -> Trial:
        if params["lora.rank"] == "4":
            raise ConfigError("lora.rank=4 is impossible")
        return suggested(search, params)

    source = search_of(trials=10)
    monkeypatch.setattr(source_module, "suggested", refuse)
    train(source)
    assert len(source.sweep.trials) == 10
    assert 4 not in {trial.config.lora.rank for trial in source.sweep.trials.values()}


def test_another_space_is_another_study_in_the_same_file(search_of):
    import optuna

    train(search_of(trials=4))
    other = search_of("s", 4, "trainer.epochs=3")
    assert len(train(other)) == 4
    storage = other._open_study(other.sweep.search or {})._storage
    assert len(optuna.get_all_study_summaries(storage)) == 2
    assert (other.sweep.folder / SEARCH).is_file()


# --- which one


def test_the_source_is_the_plans(tmp_path):
    grid = sweep_of(tmp_path / "grid", seed_trials(1))
    assert type(source_of(grid)) is Source
    assert not source_of(grid).extend()
    assert isinstance(source_of(race_of(tmp_path / "race").sweep), RaceSource)
    search = {"trials": 1, "space": {}, "bases": [], "fixed": []}
    assert isinstance(source_of(sweep_of(tmp_path / "search", [], search=search)), SearchSource)
