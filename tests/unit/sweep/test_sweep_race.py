"""A sweep's race: which trials it wants, what it makes of their records, and that the summary sees the same race."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_vit.sweep.ledger import Ledger
from lora_vit.sweep.race import SweepRace
from made_up_records import make_config, make_trial
from rich.console import Console
from sweeps import LAUNCHED, options

from lora_vit.analysis import summarize
from lora_vit.analysis.race import one_stage
from lora_vit.config import from_dict
from lora_vit.errors import ConfigError, RecordError
from lora_vit.sweep import runner
from lora_vit.sweep.plan import Job, SweepRun, refuse_seed_dependent

RANKS = (1, 2, 4, 8)
FIRST = 7  # the race's first seed


def job(rank: int, seed: int = FIRST, **more: Any) -> Job:
    config = from_dict(make_config({"lora.rank": rank, "seed": seed, **more}))
    return Job(config, ["trainer.epochs=5", f"lora.rank={rank}", f"seed={seed}"], f"rank={rank}")


def race_of(folder: Path, ranks: tuple[int, ...] = RANKS, joined: list[Job] | None = None, **changes: Any) -> SweepRace:
    how = options(**{"margin": 1.0, "first_seeds": 3, "most_seeds": 6, **changes})
    return SweepRace(SweepRun(tuple(map(job, ranks)), folder, how, LAUNCHED + 100), joined or [])


def accuracies(means: dict[int, float], sd: float = 0.003) -> dict[tuple[int, int], float]:
    rng = np.random.default_rng(1)
    seeds = rng.normal(0, 0.004, 6)
    return {(rank, FIRST + s): mean + seeds[s] + rng.normal(0, sd) for rank, mean in means.items() for s in range(6)}


def leave(folder: Path, wanted: Job, accuracy: float | None, status: str = "completed", **more: Any) -> None:
    settings = {"lora__rank": wanted.config.lora.rank, "seed": wanted.config.seed}
    assert make_trial(folder, accuracy, status, curve=False, **settings, **more).trial_id == wanted.trial_id


def run_to_its_end(race: SweepRace, folder: Path, values: dict[tuple[int, int], float], workers: int = 1) -> None:
    Ledger(folder).add(race.cells, "the command", race.plan)
    while jobs := race.look(workers):
        Ledger(folder).add(jobs, "the command")
        for wanted in jobs:
            leave(folder, wanted, values[wanted.config.lora.rank or 0, wanted.config.seed])


GAP = accuracies({1: 0.90, 2: 0.94, 4: 0.932, 8: 0.85})
TIES = accuracies({1: 0.9, 2: 0.9, 4: 0.9, 8: 0.9}, sd=0.02)


def test_it_begins_with_the_first_seeds_of_every_cell(tmp_path):
    """Seed by seed, from the seed that was given; each trial is what the command would have asked for."""
    wanted = race_of(tmp_path).look(1)
    assert [w.config.seed for w in wanted] == [7] * 4 + [8] * 4 + [9] * 4
    assert {w.config.lora.rank for w in wanted[:4]} == set(RANKS)
    assert len({w.trial_id for w in wanted}) == 12
    one = next(w for w in wanted if w.config.seed == 8 and w.config.lora.rank == 2)
    assert (one.overrides, one.label) == (["trainer.epochs=5", "lora.rank=2", "seed=8"], "rank=2 seed=8")
    assert one.trial_id == job(2, 8).trial_id


@pytest.mark.parametrize("workers", [1, 9])
@pytest.mark.parametrize("values", [GAP, TIES], ids=["gap", "ties"])
def test_the_summary_sees_the_race_that_was_run(values, workers, tmp_path):
    race = race_of(tmp_path)
    run_to_its_end(race, tmp_path, values, workers)
    got = summarize(tmp_path)
    assert got.race is not None
    assert got.race.cells == [cell.cell_id for cell in race.cells]
    assert (got.race.race.exits, got.race.race.selected) == (race.race.exits, race.race.selected)
    assert (got.race.race.seeds, got.race.race.ended) == (race.race.seeds, True)
    np.testing.assert_array_equal(got.race.race.means, race.race.means)
    if values is GAP:
        assert race.race.selected is not None
        assert race.cells[race.race.selected].config.lora.rank == 2
        assert f"is selected after {race.race.seeds} seeds" in race.standing()
        assert got.race.trials == 4 * 3 + sum(e.seeds - 3 for e in race.race.exits.values()) + race.race.seeds - 3
    else:
        assert (race.race.selected, race.race.seeds) == (None, 6)
        assert got.verdict.startswith(f"Not resolved: {len(race.race.survivors)} of 4 cells are left after 6 seeds (")


def test_a_race_that_was_cut_goes_on_from_the_records(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    race = race_of(whole)
    run_to_its_end(race, whole, GAP)
    first = race_of(cut)
    for wanted in first.look(1)[:5]:
        leave(cut, wanted, GAP[wanted.config.lora.rank or 0, wanted.config.seed])
    second = race_of(cut)
    assert len(second.look(1)) == 12 - 5
    run_to_its_end(second, cut, GAP)
    assert second.race.exits == race.race.exits
    assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_a_trial_that_failed_puts_its_cell_out_until_it_is_tried_again(tmp_path):
    race = race_of(tmp_path)
    for wanted in race.look(1):
        bad = wanted.config.lora.rank == 2 and wanted.config.seed == 8
        value = GAP[wanted.config.lora.rank or 0, wanted.config.seed]
        leave(tmp_path, wanted, None if bad else value, "failed" if bad else "completed")
    Ledger(tmp_path).add(race.cells, "the command", race.plan)
    wanted = race.look(1)
    cell = [c.config.lora.rank for c in race.cells].index(2)
    assert (race.race.exits[cell].seeds, race.race.exits[cell].behind) == (2, None)
    assert not [w for w in wanted if w.config.lora.rank == 2]
    assert race.failed() == [job(2, 8).trial_id, job(2, 7).trial_id]
    console = Console(record=True, width=160)
    race.show(console, 30)
    assert "out: failed at seed 8" in console.export_text()
    assert "1 of the cells is out because a trial failed." in summarize(tmp_path).verdict
    again = race_of(tmp_path, retry_failed=True)
    assert [w.trial_id for w in again.look(1)] == [job(2, 8).trial_id]


def test_values_that_are_added_race_against_those_that_are_left(tmp_path):
    """Also where the second command names the new ones alone: the sweep is its folder."""
    race = race_of(tmp_path, (1, 2, 8))
    run_to_its_end(race, tmp_path, GAP)
    plan = Ledger(tmp_path).read()
    old = Ledger(tmp_path).jobs(plan, plan["trials"])
    later = race_of(tmp_path, (4,), old)
    assert [w.config.lora.rank for w in later.look(1)] == [4, 4, 4]
    assert sorted(c.config.lora.rank or 0 for c in later.cells) == [1, 2, 4, 8]
    run_to_its_end(later, tmp_path, GAP)
    assert later.race.selected is not None
    assert later.cells[later.race.selected].config.lora.rank == 2
    other_images = job(16, **{"data.content": "0" * 16})
    changed_weights = job(4, **{"optimizer.eps": 1e-7})  # asked for in the same words
    kept = race_of(tmp_path, (4,), [*old, other_images, changed_weights])
    assert sorted(c.config.lora.rank or 0 for c in kept.cells) == [1, 2, 4, 8]


def test_a_changed_margin_goes_on_from_the_records(tmp_path):
    run_to_its_end(race_of(tmp_path), tmp_path, GAP)
    wide = race_of(tmp_path, margin=5.0)
    assert wide.look(1) == []
    assert wide.race.seeds == 3
    narrow = race_of(tmp_path, margin=0.01)
    assert narrow.look(1)


def test_accuracies_that_count_images_have_a_rounding_error(tmp_path):
    """Of 720 images: no spread over seeds does not mean that half a thousandth is real."""
    race = race_of(tmp_path, (1, 2), margin=0.01)
    for wanted in race.look(1):
        leave(tmp_path, wanted, 0.9005 if wanted.config.lora.rank == 2 else 0.9)
    race.look(1)
    assert (race.race.seeds, race.race.exits) == (3, {})


def test_what_one_sees_of_it(tmp_path):
    race = race_of(tmp_path)
    race.look(1)
    assert race.standing() == "race: 4 cells, 0 trials so far, at least 12"
    assert "takes at least 12 trials, at most 24, typically about " in race.sizes()
    assert "by 0.60 points, as they may have); 0 have ended" in race.sizes()
    run_to_its_end(race, tmp_path, GAP)
    console = Console(record=True, width=160)
    race.show(console, 30)
    lines = console.export_text().splitlines()
    assert lines[0] == race.standing()
    assert lines[2].split()[0] == "rank=2"
    assert lines[0].startswith("race: rank=2 is selected after ")
    assert lines[2].rstrip().endswith("selected")
    assert f"  {100 * race.race.room[race.race.selected or 0]:.2f}  " in lines[2]
    assert lines[-1].split()[:3] == ["rank=8", f"{100 * np.mean([GAP[8, 7 + s] for s in range(3)]):.2f}", "3"]
    assert lines[-1].rstrip().endswith("out after 3 seeds: behind rank=2")
    of_cells = [np.var([GAP[rank, 7 + s] for s in range(race.race.seeds)], ddof=1) for rank in RANKS]
    assert race.spread == pytest.approx(np.sqrt(np.mean(of_cells)))
    said = f"typically about {len(race.states)} (where trials of a cell spread by {race.spread * 100:.2f} points"
    assert f"{said}, as they have here); {len(race.states)} have ended" in race.sizes()


def test_a_dry_run_of_a_race_that_has_ended(tmp_path, capsys):
    race = race_of(tmp_path)
    run_to_its_end(race, tmp_path, GAP)
    dry = dataclasses.replace(race.run.options, dry_run=True)
    assert runner.run_sweep(dataclasses.replace(race.run, options=dry)) is None
    assert f"typically about {len(race.states)} (where" in capsys.readouterr().out


def test_the_verdict_is_that_of_the_command_that_ends(tmp_path, capsys):
    """Another one began a race of other rules in the folder meanwhile."""
    race = race_of(tmp_path)
    run_to_its_end(race, tmp_path, GAP)
    Ledger(tmp_path).add([], "the other command", {**race.plan, "margin": 9.0, "cells": race.plan["cells"][:2]})
    runner._run_race(dataclasses.replace(race.run, jobs=()), race, 1, None)
    assert "no other of 4 cells is better by more than 1.00 points." in " ".join(capsys.readouterr().out.split())


def test_a_setting_that_follows_the_seed_is_refused():
    one, other = job(4, 0), job(4, 1)
    refuse_seed_dependent([one], [other])
    other.config = dataclasses.replace(other.config, data=dataclasses.replace(other.config.data, split_seed=1))
    with pytest.raises(ConfigError, match=r"^data depends on the seed: a race compares cells over its seeds"):
        refuse_seed_dependent([one], [other])


def test_the_summary_of_a_race(tmp_path):
    race = race_of(tmp_path)
    run_to_its_end(race, tmp_path, GAP)
    for seed in (10, 11):  # of a cell that has left: trained ahead, or under another margin
        leave(tmp_path, job(8, seed), 0.99)
    got = summarize(tmp_path)
    cells = got.cells.set_index("lora.rank")
    assert got.cells["mark"][0] == "selected"
    assert cells["mark"].to_dict() == {1: "out", 2: "selected", 4: "out", 8: "out"}
    assert cells["n"][8] == 3, "later seeds of a cell that has left do not count"
    assert list(got.cells["seeds_raced"]) == sorted(got.cells["seeds_raced"], reverse=True)
    assert not {"worse", "candidate"} & set(got.cells.columns)
    assert cells["difference_low"].isna().all()
    shared = [GAP[8, 7 + s] - GAP[2, 7 + s] for s in range(3)]
    assert cells["difference"][8] == pytest.approx(np.mean(shared))
    says = (
        "is better by more than 1.00 points. 12 trials of 14 decided it; one stage with the same guarantee would take "
    )
    assert got.verdict.startswith(f"rank 2 selected: with 95 % no other of 4 cells {says}")
    assert np.isfinite(got.chosen.test), "of the selected cell"
    assert got.within is not None
    assert got.within.margin == pytest.approx(0.01)
    assert got.verdict.endswith("No smaller one is shown to be at most 1.00 points below the best.")
    assert cells["within"].to_dict() == {1: False, 2: True, 4: False, 8: False}, "the selected one, as the race says"
    wide = summarize(tmp_path, margin=8.0)
    assert wide.within is not None
    assert wide.within.smallest == "rank 1"
    assert "By the first seeds alone, rank 1 (28,938 parameters) is at most 8.00 points below the best" in wide.verdict


def test_a_race_says_nothing_about_less_than_its_margin(tmp_path):
    run_to_its_end(race_of(tmp_path, margin=2.0), tmp_path, accuracies({1: 0.90, 2: 0.94, 4: 0.9385, 8: 0.85}))
    assert summarize(tmp_path).cells["within"][0], "the selected one"
    narrow = summarize(tmp_path, margin=0.05)
    assert narrow.race is not None
    assert narrow.race.selected is not None
    assert not narrow.cells["within"].any()
    assert "No cell is shown to be at most 0.05 points below the best" in narrow.verdict


def test_the_cells_of_a_race_that_left_one_after_the_other(tmp_path):
    """After 3, 4 and 5 seeds; each was ahead of others when it left. More trials are there than decided anything."""
    values = accuracies({1: 0.93, 4: 0.94, 2: 0.928, 8: 0.85}, sd=0.006)
    race = race_of(tmp_path)
    run_to_its_end(race, tmp_path, values)
    seeds = {race.cells[i].config.lora.rank: race.race.seeds_of(i) for i in range(4)}
    assert sorted(seeds.values()) == [3, 4, 5, 5]
    assert race.race.trials == 3 + 4 + 5 + 5
    for rank in RANKS:
        leave(tmp_path, job(rank, 12), 0.5)
    got = summarize(tmp_path)
    assert got.race is not None
    assert got.cells["lora.rank"][0] == 4
    assert "rank=4 is selected" in race.standing()
    cells = got.cells.set_index("lora.rank")
    assert cells["seeds_raced"].to_dict() == cells["n"].to_dict() == seeds
    assert got.race.trials == 17
    means = {rank: np.mean([values[rank, 7 + s] for s in range(n)]) for rank, n in seeds.items()}
    assert cells["adjusted"].to_dict() == cells["mean"].to_dict() == pytest.approx(means)
    for rank in (1, 2, 8):
        shared = [values[rank, 7 + s] - values[4, 7 + s] for s in range(seeds[rank])]
        assert cells["difference"][rank] == pytest.approx(np.mean(shared))
    assert got.race.one_stage == 4 * one_stage(got.comparison.sd, 4, race.rules)


def test_cells_that_are_left_stand_by_their_means(tmp_path):
    run_to_its_end(race_of(tmp_path), tmp_path, TIES)
    left = summarize(tmp_path).cells.query("mark == 'left'")
    assert len(left) > 2
    assert left["mean"].is_monotonic_decreasing


def test_seeds_that_are_there_are_not_asked_for(tmp_path):
    """The smaller cell is far behind: no number of seeds shows it to be good enough, least of all one that it has."""
    run_to_its_end(race_of(tmp_path, margin=3.0), tmp_path, accuracies({1: 0.85, 2: 0.94, 4: 0.85, 8: 0.8}, sd=0.001))
    got = summarize(tmp_path)
    assert got.within is not None
    assert got.within.seeds == 2
    assert got.verdict.endswith(" No smaller one is shown to be at most 3.00 points below the best.")


def test_a_race_that_has_not_ended_selects_nothing(tmp_path):
    race = race_of(tmp_path)
    Ledger(tmp_path).add(race.look(1), "the command", race.plan)
    for wanted in race.look(1)[:9]:
        leave(tmp_path, wanted, GAP[wanted.config.lora.rank or 0, wanted.config.seed])
    got = summarize(tmp_path)
    assert got.verdict.startswith("The race has not ended: 4 of 4 cells are in it before all have their first seeds, 9")
    assert "the sweep's command goes on with it: the command." in got.verdict
    Ledger(tmp_path).add([job(1, 30)], "a fixed sweep's command")
    assert "the sweep's command goes on with it: the command." in summarize(tmp_path).verdict
    assert not np.isfinite(got.chosen.test)
    assert set(got.cells["mark"]) == {"left"}
    assert got.race is not None
    assert not got.race.shows(got.race.rules.margin)
    assert "3 of 12 trials asked for have no record" in got.problems[0]


def test_parts_of_a_race_are_compared_by_the_first_seeds_alone(tmp_path):
    run_to_its_end(race_of(tmp_path, margin=0.01), tmp_path, GAP)
    assert summarize(tmp_path).cells["n"].max() > 3
    for how in ({"where": "rank > 1"}, {"metric": "val_loss"}):
        got = summarize(tmp_path, **how)
        assert got.race is None
        assert set(got.cells["n"]) == {3}
        (said,) = got.problems
        assert said.startswith("a race: only the first 3 seeds, from 7 on, are compared here (")
        assert "best" in set(got.cells["mark"])


def test_trials_of_a_race_given_one_by_one_are_still_those_of_a_race(tmp_path):
    run_to_its_end(race_of(tmp_path, margin=0.01), tmp_path, GAP)
    (tmp_path / "sweep.json").rename(tmp_path / "kept")
    assert summarize(tmp_path).problems == []
    (tmp_path / "kept").rename(tmp_path / "sweep.json")
    trials = [path.parent for path in tmp_path.glob("*/record.json")]
    got = summarize(trials)
    assert set(got.cells["n"]) == {3}
    assert [line[:38] for line in got.problems] == ["a race: only the first 3 seeds, from 7"]
    alone = summarize(tmp_path / job(2, 12).trial_id)
    assert (alone.problems, len(alone.cells), alone.race) == ([], 1, None)


def test_a_cell_that_was_not_raced_is_told_and_nothing_is_claimed_about_it(tmp_path):
    """Of a fixed sweep in the same folder, and better than the selected one."""
    run_to_its_end(race_of(tmp_path), tmp_path, GAP)
    for seed in (7, 8, 9):
        leave(tmp_path, job(16, seed), GAP[2, seed] + 0.05)
    got = summarize(tmp_path)
    assert "no other of 4 cells is better by more than 1.00 points." in got.verdict
    assert "1 more cell took no part in the race." in got.verdict
    assert got.cells.set_index("mark")["within"].to_dict() == {"selected": False, "out": False, "not raced": True}
    assert "By the first seeds alone, rank 16 (443,658 parameters) is at most 1.00 points below the best" in got.verdict


def test_a_margin_that_cannot_be_is_refused(tmp_path):
    run_to_its_end(race_of(tmp_path), tmp_path, GAP)
    with pytest.raises(RecordError, match=r"^--margin 0 is impossible"):
        summarize(tmp_path, margin=0.0)


def test_a_cell_that_failed_at_its_first_seed_stands_with_the_others(tmp_path):
    """The accuracy that a failed trial had reached is no trial's."""
    race = race_of(tmp_path)
    bad = {(2, 7), (8, 8)}
    Ledger(tmp_path).add(race.cells, "the command", race.plan)
    while jobs := race.look(1):
        for wanted in jobs:
            key = (wanted.config.lora.rank or 0, wanted.config.seed)
            leave(tmp_path, wanted, GAP[key], "failed" if key in bad else "completed")
    got = summarize(tmp_path)
    cells = got.cells.set_index("lora.rank")
    assert cells["mark"].to_dict() == {4: "selected", 1: "out", 2: "failed", 8: "failed"}
    assert (cells["n"][2], cells["n"][8]) == (2, 2)
    assert cells["mean"][8] == pytest.approx((GAP[8, 7] + GAP[8, 9]) / 2)
    assert got.race is not None
    assert got.race.trials == got.cells["n"].sum()
    for rank in RANKS:  # all others that count fail too
        for seed in (8, 9):
            leave(tmp_path, job(rank, seed), None, "failed")
        leave(tmp_path, job(rank, 7), None, "failed")
        leave(tmp_path, job(rank, 12), 0.9)
    with pytest.raises(RecordError, match=r"^no completed trial with a val_accuracy"):
        summarize(tmp_path)


def test_one_cell_that_is_left_of_several_is_no_single_cell(tmp_path):
    """Nor does one stage take 0 trials where the spread is not known."""
    race = race_of(tmp_path, (1, 2))
    Ledger(tmp_path).add(race.cells, "the command", race.plan)
    leave(tmp_path, job(1, 7), 0.9)
    assert summarize(tmp_path).verdict.startswith("The race has not ended: 2 of 2 cells are in it before all have")
    for seed in (7, 8, 9):
        leave(tmp_path, job(1, seed), GAP[1, seed])
        leave(tmp_path, job(2, seed), None, "failed")
    assert summarize(tmp_path).verdict == (
        "rank 1 selected: with 95 % no other of 2 cells is better by more than 1.00 points. 3 trials. "
        "1 of the cells is out because a trial failed."
    )
    assert summarize(tmp_path).cells["within"].tolist() == [True], "as the race says: no cells could be compared"
    alone = race_of(tmp_path / "alone", (1,))
    run_to_its_end(alone, tmp_path / "alone", GAP)
    assert summarize(tmp_path / "alone").verdict.startswith("One cell, nothing to compare: ")
    for seed in (7, 8, 9):
        leave(tmp_path / "alone", job(2, seed), GAP[2, seed])
    assert "3 trials. 1 more cell took no part in the race." in summarize(tmp_path / "alone").verdict


def test_what_another_first_seed_has_asked_for_does_not_count(tmp_path):
    """A race's later seeds were trained where results asked for them, whichever race comes after it."""
    run_to_its_end(race_of(tmp_path, margin=0.01), tmp_path, GAP)
    values = {(rank, FIRST + 100 + s): GAP[rank, FIRST + s] for rank in RANKS for s in range(6)}
    how = options(margin=1.0, first_seeds=3, most_seeds=6)
    run = SweepRun(tuple(job(rank, FIRST + 100) for rank in RANKS), tmp_path, how, LAUNCHED + 100)
    run_to_its_end(SweepRace(run, []), tmp_path, values)
    got = summarize(tmp_path)
    assert got.race is not None
    assert set(got.cells["n"]) == {3}
    assert got.race.trials == got.cells["n"].sum()
    assert got.comparison.df == 3 * 2
    part = summarize(tmp_path, where="rank < 8")
    assert set(part.cells["n"]) == {3}
    assert part.problems[0].startswith("a race: only the first 3 seeds, from 107 on, are compared here (")


def test_what_no_record_says_decides_neither_here_nor_there(tmp_path):
    """Accuracies that cannot be are failures; a record that cannot be read is waited for, and the race stands still."""
    race = race_of(tmp_path)
    for wanted in race.look(1):
        leave(tmp_path, wanted, GAP[wanted.config.lora.rank or 0, wanted.config.seed])
    Ledger(tmp_path).add(race.cells, "the command", race.plan)
    edit = tmp_path / job(2, 8).trial_id / "record.json"
    whole = edit.read_text()
    for broken in ("NaN", "1.5", '"high"'):
        edit.write_text(whole.replace(f'"val_accuracy": {GAP[2, 8]}', f'"val_accuracy": {broken}'))
        again, got = race_of(tmp_path), summarize(tmp_path).race
        again.look(1)
        assert got is not None
        assert [again.cells[i].config.lora.rank for i, out in again.race.exits.items() if out.behind is None] == [2]
        assert (again.race.exits, again.race.seeds) == (got.race.exits, got.race.seeds)
    edit.write_text(whole.replace('"val": 720', '"val": null'))
    race_of(tmp_path).look(1)
    edit.write_text("{")
    again, got = race_of(tmp_path), summarize(tmp_path).race
    assert got is not None
    assert [w.trial_id for w in again.look(1)] == [job(2, 8).trial_id]
    assert again.race.exits == got.race.exits == {}


def test_a_fixed_sweep_beside_a_race_makes_it_no_part_of_it(tmp_path):
    run_to_its_end(race_of(tmp_path / "a"), tmp_path / "a", GAP)
    assert summarize(tmp_path).race is not None, "the folder above a race alone"
    Ledger(tmp_path / "b").add([job(4, seed) for seed in range(7, 13)], "the other command")
    for seed in range(7, 13):
        leave(tmp_path / "b", job(4, seed), 0.99)
    assert summarize(tmp_path).race is None
    assert summarize([tmp_path / "a", tmp_path / "b"]).race is None
