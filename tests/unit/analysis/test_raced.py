"""The summary of a race: its marks, what counts, what is said, and that only its first seeds are compared otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_records import FIRST, make_race, make_record, make_sweep, make_trial

from lora_vit.analysis import export
from lora_vit.analysis.core import summarize
from lora_vit.errors import RecordError

RANKS = (1, 2, 4, 8)


def accuracies(means: dict[int, float], sd: float = 0.003) -> dict[int, np.ndarray]:
    """By rank, over six seeds."""
    rng = np.random.default_rng(1)
    seeds = rng.normal(0, 0.004, 6)
    return {rank: mean + seeds + rng.normal(0, sd, 6) for rank, mean in means.items()}


GAP = accuracies({1: 0.90, 2: 0.94, 4: 0.932, 8: 0.85})
TIES = accuracies({1: 0.9, 2: 0.9, 4: 0.9, 8: 0.9}, sd=0.02)


def cell(rank: int) -> str:
    return make_record(lora__rank=rank).cell_id


def leave(folder: Path, rank: int, seed: int, accuracy: float | None, status: str = "completed") -> None:
    make_trial(folder, accuracy, status, curve=False, lora__rank=rank, seed=seed)


def marks(folder: Path, **options: Any) -> dict[int, str]:
    return summarize(folder, **options).cells.set_index("lora.rank")["mark"].to_dict()


def test_a_race_that_has_ended(tmp_path):
    """Its later trials, whatever they say, decide nothing and are not in the cells."""
    make_race(tmp_path, GAP)
    leave(tmp_path, 8, FIRST + 5, 0.99)
    got = summarize(tmp_path)
    cells = got.cells.set_index("lora.rank")
    assert cells["mark"].to_dict() == {2: "selected", 4: "out", 1: "out", 8: "out"}
    assert got.cells["lora.rank"][0] == 2
    assert (set(cells["n"]), set(cells["seeds_raced"])) == ({3}, {3})
    assert not {"worse", "candidate"} & set(got.cells.columns)
    assert cells[["difference_low", "difference_high"]].isna().all(axis=None)
    assert cells["difference"][8] == pytest.approx(np.mean(GAP[8][:3] - GAP[2][:3]))
    assert got.race is not None
    for words in ("rank 2 selected: with 95 % no other of 4 cells is better by more than 1.00 points.",
                  "12 trials of 24 decided it."):  # fmt: skip
        assert words in got.verdict
    assert np.isfinite(got.test.mean), "of the selected cell"
    assert got.margin == pytest.approx(0.01)
    assert "No smaller cell is shown to be within 1.00 points of the best" in got.verdict
    assert cells["within"].to_dict() == {1: False, 2: True, 4: False, 8: False}, "the selected one, as the race says"
    assert "By the first seeds, each at its best cell: rank 2 is" in got.verdict
    assert "p_best" not in got.cells
    assert got.unfinished.empty, "a cell that has left misses no seed"
    assert got.legend.startswith("A race: *selected*")
    text = " ".join(export.html_report(got, {}, "command").split())
    for words in ("Jennison", "the same 3 seeds", "up to 6", "1.00 points"):
        assert words in text
    assert "Tukey" not in text
    assert (text.count('class="fact"'), got.power_text()) == (3, ""), "nothing of a fixed sweep's power"


def test_cells_leave_one_after_the_other(tmp_path):
    """After 3, 4 and 6 seeds, of which the first two were ahead of others."""
    rng = np.random.default_rng(261)
    values = {rank: mean + rng.normal(0, 0.002, 6) for rank, mean in {1: 0.932, 4: 0.94, 2: 0.938, 8: 0.85}.items()}
    got = summarize(make_race(tmp_path, values))
    assert got.race is not None
    seeds = {rank: got.race.seeds_of(got.race.cells.index(cell(rank))) for rank in RANKS}
    assert sorted(seeds.values()) == [3, 4, 6, 6]
    cells = got.cells.set_index("lora.rank")
    assert cells["seeds_raced"].to_dict() == cells["n"].to_dict() == seeds
    assert cells.index[0] == 4
    assert list(got.cells["seeds_raced"]) == sorted(got.cells["seeds_raced"], reverse=True)
    assert "19 trials of 24 decided it" in got.verdict
    means = {rank: np.mean(values[rank][:n]) for rank, n in seeds.items()}
    assert cells["mean"].to_dict() == pytest.approx(means)
    for rank in (1, 2, 8):
        shared = np.mean((values[rank] - values[4])[: seeds[rank]])
        assert cells["difference"][rank] == pytest.approx(shared)
    assert got.comparison.df == 3 * 2, "of the first seeds"


@pytest.mark.parametrize(
    ("values", "plan", "seeds", "words"),
    [
        (TIES, {}, 6, ["Not resolved: 4 of 4 cells are left after 6 seeds (",
                         "takes more than sweep.most_seeds=6, or a wider margin", "leave it out"]),
        ({rank: TIES[1] + np.array([0.03, -0.03, 0.0, 0, 0, 0]) * (-1) ** rank for rank in range(1, 8)},
         {"most_seeds": 3}, 3, [" ...). To say which"]),
        (TIES, {"most_seeds": 30}, 6, ["The race has not ended: 4 of 4 cells are in it after 6 seeds, 24 trials so far",
                                       "the sweep's command resumes it: the command."]),
        (GAP, {}, 2, ["The race has not ended: 4 of 4 cells are in it before all have their first seeds, 8 trials"]),
    ],
)  # fmt: skip
def test_a_race_that_selects_nothing(tmp_path, values, plan, seeds, words):
    got = summarize(make_race(tmp_path, values, seeds, **plan))
    assert [line for line in words if line not in got.verdict] == []
    assert set(got.cells["mark"]) == {"unresolved" if words[0].startswith("Not") or " ..." in words[0] else "in"}
    assert got.cells["mean"].is_monotonic_decreasing
    assert not np.isfinite(got.test.mean)


def test_failed_trials_put_their_cells_out(tmp_path):
    """The accuracy that a failed trial had reached is no trial's."""
    make_race(tmp_path, GAP)
    for rank, seed in ((2, FIRST), (8, FIRST + 1)):
        leave(tmp_path, rank, seed, 0.5, "failed")
    got = summarize(tmp_path)
    cells = got.cells.set_index("lora.rank")
    assert cells["mark"].to_dict() == {4: "selected", 1: "out", 2: "failed", 8: "failed"}
    assert (cells["n"][2], cells["n"][8]) == (2, 2)
    assert cells["mean"][8] == pytest.approx((GAP[8][0] + GAP[8][2]) / 2)
    assert "2 of the cells are out because a trial failed." in got.verdict
    assert "no other of 2 cells is better" in got.verdict, "of those that were compared"
    assert got.cells.set_index("lora.rank")["failed"].to_dict() == {1: "", 2: "1 of 3", 4: "", 8: "1 of 3"}
    for rank in RANKS:
        leave(tmp_path, rank, FIRST, None, "failed")
    got = summarize(tmp_path)
    assert got.verdict.startswith("Nothing is selected: a trial of each cell failed. 4 of the cells are out")


def test_one_cell_alone_and_one_that_is_left_of_several(tmp_path):
    assert summarize(make_race(tmp_path / "alone", {1: GAP[1]})).verdict.startswith("One cell, nothing to compare: ")
    two = make_race(tmp_path / "two", {1: GAP[1], 2: GAP[2]}, 3)
    for seed in range(FIRST, FIRST + 3):
        leave(two, 2, seed, None, "failed")
    got = summarize(two)
    assert got.verdict == (
        "rank 1 alone has no failed trial: nothing is claimed. 3 trials. 1 of the cells is out because a trial failed."
    )
    assert got.cells["within"].tolist() == [False], "no cells could be compared"


def test_a_cell_that_was_not_raced_is_named_and_nothing_is_claimed_about_it(tmp_path):
    """Of a fixed sweep in the same folder, and better than the selected one."""
    make_race(tmp_path, GAP)
    for seed, accuracy in enumerate(GAP[2]):
        leave(tmp_path, 16, FIRST + seed, accuracy + 0.05)
    got = summarize(tmp_path)
    assert marks(tmp_path) == {1: "out", 2: "selected", 4: "out", 8: "out", 16: "not raced"}
    assert got.cells.set_index("lora.rank")["n"][16] == 3
    assert "no other of 4 cells is better by more than 1.00 points. 12 trials of 24" in got.verdict
    assert "1 more cell took no part in the race." in got.verdict
    assert got.cells.set_index("lora.rank")["within"].to_dict() == {1: False, 2: False, 4: False, 8: False, 16: True}
    assert "By the first seeds alone, rank 16 (443,658 parameters) is within 1.00 points of the best" in got.verdict


def test_what_is_within_another_margin(tmp_path):
    small = summarize(make_race(tmp_path / "small", accuracies({1: 0.94, 2: 0.85, 4: 0.85}, sd=0.001), margin=3.0))
    assert small.verdict.startswith("rank 1 selected")
    assert "within" not in small.verdict.split("trials")[1], "the smallest cell needs no other"
    tmp_path = tmp_path / "large"
    make_race(tmp_path, accuracies({1: 0.90, 2: 0.94, 4: 0.9385, 8: 0.85}), margin=2.0)
    assert summarize(tmp_path).cells["within"][0], "the selected one"
    wide = summarize(tmp_path, margin=8.0)
    assert wide.cells.set_index("lora.rank")["within"].to_dict() == {1: True, 2: True, 4: True, 8: False}
    assert "By the first seeds alone, rank 1 (28,938 parameters) is within 8.00 points of the best" in wide.verdict
    narrow = summarize(tmp_path, margin=0.05)
    assert not narrow.cells["within"].any(), "the race says nothing about less than its margin"
    assert "No cell is shown to be within 0.05 points of the best" in narrow.verdict


def test_parts_of_a_race_are_compared_by_the_first_seeds_alone(tmp_path):
    make_race(tmp_path, TIES)
    assert set(summarize(tmp_path).cells["n"]) == {6}
    trials = [path.parent for path in tmp_path.glob("*/record.json")]
    for got in (summarize(tmp_path, where="rank > 1"), summarize(trials)):
        assert got.race is None
        assert set(got.cells["n"]) == {3}
        (said,) = got.problems
        assert said.startswith("a race: only the first 3 seeds, from 7 on, are compared here (")
        assert "best" in set(got.cells["mark"])
    alone = summarize(trials[0])
    assert (alone.problems, len(alone.cells), alone.race) == ([], 1, None)
    other = make_race(tmp_path.parent / f"{tmp_path.name}-other", TIES, first_seeds=2)
    with pytest.raises(RecordError, match="different seeds: summarize one folder at a time"):
        summarize([tmp_path, other])


def test_a_fixed_sweep_beside_a_race_makes_it_no_part_of_it(tmp_path):
    make_race(tmp_path / "a", GAP)
    assert summarize(tmp_path).race is not None, "the folder above a race alone"
    make_sweep(tmp_path / "b", [{"lora__rank": 4}], np.full((1, 6), 0.99), range(FIRST, FIRST + 6), curve=False)
    (tmp_path / "b" / "sweep.json").write_text(json.dumps({"trials": {}}))
    assert summarize(tmp_path).race is None
    assert summarize([tmp_path / "a", tmp_path / "b"]).race is None


def test_the_seeds_of_another_race_in_the_folder_do_not_count(tmp_path):
    """A race's later seeds were trained because results asked for them, whichever race comes after it."""
    make_race(tmp_path, TIES)
    for rank in RANKS:
        make_sweep(tmp_path, [{"lora__rank": rank}], GAP[rank][None], range(107, 113), curve=False)
    make_race(tmp_path, {}, seed=107, cells=sorted(map(cell, RANKS)))
    got = summarize(tmp_path)
    assert marks(tmp_path)[2] == "selected"
    assert set(got.cells["n"]) == {3}
    assert got.comparison.df == 3 * 2


def test_an_accuracy_counts_images(tmp_path):
    """Of 720 images: no spread over seeds does not mean that half a thousandth is real."""
    make_race(tmp_path, {1: np.full(3, 0.9), 2: np.full(3, 0.9005)}, 3, margin=0.01)
    assert set(marks(tmp_path).values()) == {"in"}
