"""What can be wrong with a sweep ends in a clear line, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import run_command
from safetensors.torch import save_file

from lora_vit.records import read_record


@pytest.mark.slow
def test_a_command_prints_it_as_an_error(tmp_path):
    done = run_command("-m", "hydra.sweep.dir=/proc/sweep", cwd=tmp_path, code=1)
    assert done.stderr.startswith("error: /proc/sweep cannot be written")
    assert "another sweep.name or hydra.sweep.dir" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_weights_that_do_not_fit_are_reported_for_each_trial(tmp_path):
    """What only loading shows is a worker's trouble: nothing is written for these trials, the others are trained."""
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    arguments = ("-m", "model.weights=null,other.safetensors", "seed=0,1", "sweep.name=s", "sweep.workers=2")
    done = run_command(*arguments, cwd=tmp_path, code=1)
    assert done.stderr.startswith("error: 3 times workers were started and ended no trial")
    assert done.stdout.count("2 trials cannot be trained here") >= 3
    assert "does not fit vit_tiny" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    records = [read_record(p.parent) for p in (tmp_path / "outputs/sweeps/s").glob("*/record.json")]
    assert [(r.status, r.config["model"]["weights"]) for r in records] == [("completed", None)] * 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_command("-m", "lora.rank=1,2", "sweep.name=s", "sweep.pack_size=2", cwd=folder)
    return folder


@pytest.mark.slow
def test_a_damaged_sweep_loses_nothing(finished):
    """One folder with all of it: a foreign file, a record cut in half, a missing one, another version."""
    sweep = finished / "outputs/sweeps/s"
    one, two = (p.parent for p in sorted(sweep.glob("*/record.json")))
    (sweep / "notes.txt").write_text("mine")
    (sweep / "own").mkdir()
    whole = (one / "record.json").read_bytes()
    (one / "record.json").write_bytes(whole[:100])
    before = read_record(two).finished
    arguments = ("-m", "lora.rank=1,2,4", "sweep.name=s", "sweep.pack_size=2")

    done = run_command(*arguments, cwd=finished, code=1)
    assert "1 of 3 trials did not complete" in done.stderr
    assert one.name in done.stdout
    assert "refused" in done.stdout
    assert "record.json" in done.stdout
    assert (one / "record.json").read_bytes() == whole[:100]
    assert read_record(two).finished == before

    (one / "record.json").write_bytes(whole)  # put right: nothing is left to do
    done = run_command(*arguments, cwd=finished)
    assert "3 trials (3 completed)" in done.stdout
    assert (sweep / "notes.txt").read_text() == "mine"
    assert list((sweep / "own").iterdir()) == []

    plan = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(json.dumps({**plan, "schema": 99}))
    done = run_command(*arguments, cwd=finished, code=1)
    assert "has version 99" in done.stderr
    assert json.loads((sweep / "sweep.json").read_text())["schema"] == 99
