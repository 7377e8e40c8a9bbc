"""What can be wrong with a sweep ends in a clear line, and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from helpers import run_command
from safetensors.torch import save_file

from lora_vit.records import read_record


@pytest.mark.slow
def test_weights_that_do_not_fit_are_reported_for_each_trial(tmp_path):
    """What only loading shows is a worker's trouble: nothing is written for these trials, the others are trained."""
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    arguments = ("-m", "model.weights=null,other.safetensors", "seed=0,1", "sweep.name=s", "sweep.workers=1")
    done = run_command(*arguments, cwd=tmp_path, code=1)
    assert done.stderr.startswith("error: 3 times workers were started and ended no trial")
    assert done.stdout.count("2 trials cannot be trained here") >= 3
    assert "does not fit vit_tiny" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    records = [read_record(p.parent) for p in (tmp_path / "outputs/sweeps/s").glob("*/record.json")]
    assert [(r.status, r.config["model"]["weights"]) for r in records] == [("completed", None)] * 2


@pytest.mark.slow
def test_a_damaged_sweep_loses_nothing(tmp_path):
    """One folder with all of it: a foreign file, a record cut in half, a missing one."""
    arguments = ("sweep.name=s", "sweep.pack_size=2")
    run_command("-m", "lora.rank=1,2", *arguments, cwd=tmp_path)
    sweep = tmp_path / "outputs/sweeps/s"
    one, two = (p.parent for p in sorted(sweep.glob("*/record.json")))
    (sweep / "notes.txt").write_text("mine")
    (sweep / "own").mkdir()
    whole = (one / "record.json").read_bytes()
    (one / "record.json").write_bytes(whole[:100])
    before = read_record(two).finished
    done = run_command("-m", "lora.rank=1,2,4", *arguments, cwd=tmp_path, code=1)
    assert "1 of 3 trials did not complete" in done.stderr
    assert [word for word in (one.name, "refused", "record.json") if word not in done.stdout] == []
    assert (one / "record.json").read_bytes() == whole[:100]
    assert read_record(two).finished == before

    (one / "record.json").write_bytes(whole)  # put right: nothing is left to do
    done = run_command("-m", "lora.rank=1,2,4", *arguments, cwd=tmp_path)
    assert "3 trials (3 completed)" in done.stdout
    assert (sweep / "notes.txt").read_text() == "mine"
    assert list((sweep / "own").iterdir()) == []
