"""Trials of several sweeps in one summary: whose is whose, what is compared, and what counts once."""

from __future__ import annotations

import numpy as np
import pytest
from made_up_records import FIRST, make_race, make_sweep

from lora_vit.analysis import export
from lora_vit.analysis.core import summarize

RANKS = [{"lora__rank": 1}, {"lora__rank": 4}]
Y = np.array([[0.80, 0.81, 0.805], [0.90, 0.915, 0.905]])


def sweeps(folder, first, *others):
    """Of (name, cells, accuracies)."""
    return [make_sweep(folder / name, cells, np.array(y), curve=False) for name, cells, y in (first, *others)]


def test_each_cell_says_whose_it_is(tmp_path):
    """Other settings are other cells, paired by seed; one that both have is one, with the seeds of both."""
    flipped = [{**cell, "data__augment": "flip"} for cell in RANKS]
    folders = sweeps(tmp_path, ("plain", RANKS, Y), ("flipped", flipped, Y + 0.02))
    make_sweep(folders[1], [RANKS[0]], np.array([[0.79, 0.78]]), seeds=[2, 3], curve=False)
    summary = summarize(folders)
    assert summary.cells.set_index("label")[["sweep", "n"]].to_numpy().tolist() == [
        ["flipped", 3], ["plain", 3], ["flipped", 3], ["flipped, plain", 4],
    ]  # fmt: skip
    assert summary.cells["difference"][1] == pytest.approx(-0.02)
    assert summary.comparison.blocked, "seeds are shared"
    assert summary.trials["sweep"].value_counts().to_dict() == {"flipped": 8, "plain": 5}
    assert summary.cells["mean"][3] == pytest.approx((0.80 + 0.81 + 0.79 + 0.78) / 4), "of seed 2 the newer"
    assert [": 1 (1 with another val accuracy)" in line for line in summary.problems] == [True]
    assert list(export.readable(summary)["sweep"]) == list(summary.cells["sweep"])
    assert "sweep" not in summarize(folders[0]).cells
    assert list(summarize(tmp_path, where="sweep == 'plain'").cells["n"]) == [3, 2]


def test_a_copy_counts_once_and_equal_names_are_told_apart(tmp_path):
    same = sweeps(tmp_path, ("a/digits", RANKS, Y), ("b/digits", RANKS, Y))
    summary = summarize(same)
    assert (len(summary.cells), "sweep" in summary.trials) == (2, False)
    assert [": 6 (0 with another val accuracy)" in line for line in summary.problems] == [True]
    make_sweep(same[0], RANKS[:1], Y[:1] + 0.01, curve=False)
    assert {*summarize(same).cells["sweep"]} == {"a/digits", "b/digits"}


def test_a_race_whose_trials_are_there_again_is_compared_by_its_first_seeds(tmp_path):
    make_race(tmp_path / "race", {rank: np.array([*y, *y]) for rank, y in zip((1, 4), Y, strict=True)})
    assert summarize(tmp_path).race is not None
    make_sweep(tmp_path / "again", RANKS, Y - 0.01, range(FIRST, FIRST + 3), curve=False)
    summary = summarize(tmp_path)
    assert (summary.race, len(summary.cells), len(summary.trials)) == (None, 2, 6)
