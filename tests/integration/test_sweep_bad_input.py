"""What can be wrong with a sweep ends in a clear line, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import run_command
from plain_trials import SMALL
from safetensors.torch import save_file

from lora_vit import api
from lora_vit.errors import ConfigError
from lora_vit.records import read_record

# overrides, words that the message must hold
CASES = [
    (["seed=range(0,0)"], ["the sweep is empty"]),
    (["sweep=rank_lrr"], ["rank_lrr", "did you mean 'rank_lr'"]),
    (["sweep.pack_size=0"], ["sweep.pack_size=0", "from 1 up, or auto"]),
    (["sweep.pack_size=two"], ["sweep.pack_size=two"]),
    (["sweep.workers=-1"], ["sweep.workers=-1"]),
    (["sweep.name=a/b"], ["sweep.name=a/b", "'/'"]),
    (["sweep.pack_sise=2"], ["sweep.pack_sise", "did you mean 'sweep.pack_size'"]),
    (["seed=0,1", "sweep.pack_size=1,2"], ["sweep.pack_size", "cannot be swept"]),
    (["seed=0,1", "trainer.devices=2"], ["trainer.devices=2", "sweep.workers=2"]),
    (["lora.rank=0,4,33"], ["2 of 3 trials cannot run, so none is started", "lora.rank=0", "[rank=0]", "lora.rank=33"]),
    (["lora.rnk=1,2"], ["lora.rnk", "did you mean 'lora.rank'"]),
    (["lora.rank=1,two"], ["1 of 2 trials", "two"]),
    (["seed=0,1", "data=imagefolder", "data.root=nowhere"], ["nowhere", "not a folder"]),
    (["seed=0,1", "model.weights=missing.pth"], ["missing.pth", "check the path"]),
    (["seed=0,1", "hydra/launcher=basic"], ["hydra/launcher=basic has no effect", "engine=local"]),
    (["seed=0,1", "engine=slrm"], ["'engine/slrm' does not exist", "'slurm'"]),
    (["engine=local,slurm"], ["engine", "cannot be swept"]),
    (["seed=0,1", "sweep.wait=false"], ["sweep.wait=false needs engine=slurm"]),
    (["lora.rank=interval(1,4)"], ["lora.rank is a range without steps", "sweep.trials=30"]),
    (["sweep.trials=3"], ["nothing is searched", "interval"]),
    (["sweep.trials=3", "seed=0,1"], ["seed cannot be searched"]),
    (["sweep.trials=3", "lora.rank=1,64"], ["lora.rank=64 is impossible"]),
    (["sweep.trials=3", "lora.rank=1,2", "sweep.margin=1"], ["sweep.trials=3 makes a search", "sweep.margin a race"]),
    (["seed=0,1", "data.root=2024_11"], ["data.root=2024_11 is read as 202411", "\"data.root='2024_11'\""]),
    (["lora.rank=1,2", "sweep.trials=0"], ["sweep.trials=0"]),
    (["lora.rank=1,2", "sweep.trials=3", "sweep.dry_run=true"], ["sweep.dry_run=true cannot say what a search"]),
    (["lora.rank=1,2", "sweep.margin=0"], ["sweep.margin=0"]),
    (["lora.rank=1,2", "sweep.margin=1", "sweep.first_seeds=1"], ["sweep.first_seeds=1 is impossible"]),
    (["lora.rank=1,2", "sweep.margin=1", "sweep.most_seeds=4"], ["sweep.most_seeds=4", "sweep.first_seeds=5"]),
    (["lora.rank=1,2", "sweep.first_seeds=4"], ["sweep.first_seeds=4 has no effect without sweep.margin"]),
    (["lora.rank=1,2", "seed=0,1", "sweep.margin=1"], ["seed cannot be swept in a race (sweep.margin)", "seed=0"]),
    (["lora.rank=1,2", "sweep.margin=1", "data.split_seed=${seed}"], ["data depends on the seed"]),
    (["seed=0,1", "hydra.job.chdir=true"], ["hydra.job.chdir=True has no effect", "hydra/sweeper=basic"]),
    (["seed=0,1", "hydra.sweep.subdir=x"], ["hydra.sweep.subdir=x has no effect", "hydra/sweeper=basic"]),
    (["seed=0,1", "hydra.run.dir=x"], ["hydra.run.dir=x has no effect on a sweep", "sweep.name"]),
    (["lora.rank=1,2", "lora.alpha=${rank_times:2}", "hydra.run.dir=x"], ["hydra.run.dir=x has no effect on a sweep"]),
    (["lora.rank=1,2", "optimizer.lr=${oc.env:NO_RATE}"], ["2 of 2 trials cannot run", "'NO_RATE' not found"]),
    (["+hydra.sweeper.params={seed:'0,1'}", "sweep.name=${oc.env:NO_NAME}"], ["'NO_NAME' not found"]),
    (["hydra.sweeper.params={seed:'0,1'}"], ["+hydra.sweeper.params=", "lora.rank=1,2"]),
    (["hydra.sweeper.params=3"], ["hydra.sweeper.params"]),
    (["+hydra.sweeper.params={seed:[0,1]}"], ["seed: Value '[0, 1]'"]),
    (["seed=0,1.5,x"], ["2 of 3 trials cannot run", "seed: Value '1.5'", "seed: Value 'x'"]),
    (["hydra.swep.dir=x", "seed=0,1"], ["hydra.swep", "--cfg hydra"]),
    (["engine=slurm", "engine.partiton=x", "seed=0,1"], ["engine.partiton"]),
    (["engine=slurm", "engine.timeout_min=long", "seed=0,1"], ["engine.timeout_min", "long"]),
    (["data=imagefolder", "data.root=/a,b"], ["data.root=/a is not a folder", "a comma separates values", "'a,b'"]),
]


@pytest.mark.parametrize(("overrides", "words"), CASES, ids=[" ".join(o) for o, _ in CASES])
def test_one_clear_message_and_nothing_written(overrides, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        api.sweep([*(line for line in SMALL if line.partition("=")[0] not in overrides), *overrides])
    for word in words:
        assert word in str(refused.value)
    assert list(tmp_path.iterdir()) == []


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
