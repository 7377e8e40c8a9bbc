"""A race from Python and as a command: killed and resumed, grown, and run by two commands at once."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from helpers import command, rows_of, run_command, start, wait_until

from lora_vit import api
from lora_vit.records import read_record

pytestmark = pytest.mark.slow
RACE = ("-m", "sweep.name=r", "seed=3", "sweep.margin=40", "sweep.first_seeds=3", "sweep.most_seeds=6",
        "sweep.pack_size=2", "sweep.workers=1")  # fmt: skip
RATES = "optimizer.lr=1e-2,1e-9"


def records(folder: Path) -> dict[tuple[float, int], tuple[str, float]]:
    """Trial id and accuracy by learning rate and seed."""
    found = [read_record(path.parent) for path in (folder / "outputs/sweeps/r").glob("*/record.json")]
    return {(r.config["optimizer"]["lr"], r.config["seed"]): (r.trial_id, r.metrics["val_accuracy"]) for r in found}


def ending(output: str) -> str:
    """The verdict."""
    return output[: output.index("outputs/sweeps/r\n")].splitlines()[-1]


def test_a_race_that_is_killed_comes_to_the_same_end(tmp_path, monkeypatch, call, capsys):
    """As one that is run from Python and never stopped."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    monkeypatch.chdir(whole)
    race = api.sweep(command(*RACE[1:], RATES)[3:])
    end = ending(capsys.readouterr().out)
    assert "selected: with 95 % no other of 2 cells is better by more than 40.00 points." in end
    assert sorted((r.trial_id, r.metrics["val_accuracy"]) for r in race.records) == sorted(records(whole).values())
    assert {seed for _, seed in records(whole)} >= {3, 4, 5}
    summary = api.summarize(race.folder)
    best = next(r.cell_id for r in race.records if r.config["optimizer"]["lr"] == 1e-2)
    assert summary.race.cells[summary.race.selected] == best
    process = start(command(*RACE, RATES), cut)
    wait_until(lambda: rows_of(*cut.glob("outputs/sweeps/r/*/metrics.jsonl")) > 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    again = run_command(*RACE, RATES, cwd=cut)
    assert records(cut) == records(whole)
    assert ending(again.stdout) == end
    monkeypatch.chdir(cut)
    assert end == call("sweep", "r")[1].splitlines()[-1]
    grown = run_command(*RACE, "optimizer.lr=3e-3", cwd=cut)
    assert "of 3 cells" in grown.stdout
    assert {lr for lr, _ in records(cut)} == {1e-2, 1e-9, 3e-3}
    plan = json.loads((cut / "outputs/sweeps/r/sweep.json").read_text())
    assert (plan["race"]["margin"], plan["race"]["seed"], len(plan["race"]["cells"])) == (40.0, 3, 3)


def test_two_commands_at_once_run_one_race(tmp_path):
    """As from two machines that share the folder: each trial is trained once, and both come to the same end."""
    both = [start(command(*RACE, RATES, "lora.rank=1,2"), tmp_path) for _ in range(2)]
    outs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    ends = [ending(out) for out in outs]
    assert ends[0] == ends[1]
    assert "selected: with 95 % no other of 4 cells" in ends[0] or "Not resolved: " in ends[0]
    for path in tmp_path.glob("outputs/sweeps/r/*/metrics.jsonl"):
        assert path.read_text().count("val_accuracy") == 2, "two epochs, each once"
