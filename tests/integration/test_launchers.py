"""Hydra's other launchers: what they start in a fresh Python finds everything, and leaves the same trials."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import command, rows_of, run_command, start, wait_until

from lora_vit.records import read_record

PICKLE = """
import sys
from pathlib import Path
import cloudpickle
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from lora_vit import train
from lora_vit.compose import register_schema
register_schema()
Plugins.instance()  # finds the packed launcher
Path(sys.argv[1]).write_bytes(cloudpickle.dumps((Singleton.get_state(), train.one_line_task)))
"""
UNPICKLE = "import pickle, sys; state, task = pickle.load(open(sys.argv[1], 'rb')); print(task.__name__, len(state))"


def test_hydras_state_and_our_task_load_in_a_fresh_interpreter(tmp_path):
    pytest.importorskip("cloudpickle")
    state = tmp_path / "state"
    subprocess.run([sys.executable, "-c", PICKLE, str(state)], check=True, cwd=tmp_path)
    done = subprocess.run([sys.executable, "-c", UNPICKLE, str(state)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("task ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package"),
    [("basic", "hydra"), ("joblib", "joblib"), ("submitit_local", "submitit"), ("ray", "ray")],
)
def test_another_launcher_leaves_the_same_trials(launcher, package, tmp_path):
    pytest.importorskip(package)
    pytest.importorskip(f"hydra_plugins.hydra_{package}_launcher" if package != "hydra" else package)
    settings = ("lora.rank=1,2", "seed=3", "trainer.epochs=1", "sweep.name=s")
    run_command("-m", *settings, cwd=tmp_path)
    (tmp_path / "other").mkdir()
    environment = {
        "RAY_ADDRESS": "local",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    run_command("-m", f"hydra/launcher={launcher}", *settings, cwd=tmp_path / "other", env=environment)
    one, other = (trials(folder / "outputs/sweeps/s") for folder in (tmp_path, tmp_path / "other"))
    assert list(one) == list(other)
    assert len(one) == 2
    for name in one:
        a, b = read_record(one[name]), read_record(other[name])
        assert (a.status, a.cell_id, a.metrics["step"]) == (b.status, b.cell_id, b.metrics["step"])
        assert a.metrics["val_loss"] == pytest.approx(b.metrics["val_loss"], rel=1e-9)  # fp64, other packs
    plans = [json.loads((f / "outputs/sweeps/s/sweep.json").read_text()) for f in (tmp_path, tmp_path / "other")]
    assert plans[0]["trials"] == plans[1]["trials"]
    assert sorted(trial["label"] for trial in plans[1]["trials"].values()) == ["rank=1", "rank=2"]
    assert f"hydra/launcher={launcher}" in plans[1]["command"]


@pytest.mark.slow
def test_another_launcher_tries_a_failed_trial_again_where_it_is_asked_to(tmp_path):
    arguments = ("-m", "optimizer.lr=1e300", "hydra/launcher=basic", "hydra/sweeper=basic", "sweep.name=s")
    run_command(*arguments, cwd=tmp_path, code=1)
    (folder,) = trials(tmp_path / "outputs/sweeps/s").values()
    first = read_record(folder)
    assert first.status == "failed"
    again = run_command(*arguments, cwd=tmp_path, code=1)
    assert "recorded earlier); sweep.retry_failed=true tries it again" in again.stderr
    assert read_record(folder).finished == first.finished
    run_command(*arguments, "sweep.retry_failed=true", cwd=tmp_path, code=1)
    assert read_record(folder).finished > first.finished
    plan = json.loads((tmp_path / "outputs/sweeps/s/sweep.json").read_text())
    assert list(plan["trials"]) == [folder.name], "another sweeper's trials are noted as they begin"


@pytest.mark.slow
@pytest.mark.parametrize(("on_failure", "ended"), [("continue", 2), ("stop", 1)])
def test_a_failure_ends_the_batches_only_where_it_is_to(on_failure, ended, tmp_path):
    arguments = ("-m", "optimizer.lr=1e300,1e-3", "hydra.sweeper.max_batch_size=1", "sweep.name=s")
    done = run_command(*arguments, f"sweep.on_failure={on_failure}", cwd=tmp_path, code=1)
    assert "error: 1 of 1 trials did not complete" in done.stderr
    assert len(trials(tmp_path / "outputs/sweeps/s")) == ended


@pytest.mark.slow
@pytest.mark.parametrize("sweeper", ["grid", "basic"])
def test_who_is_asked_to_stop_between_trials_begins_no_other(sweeper, tmp_path):
    choices = ("hydra/launcher=basic", f"hydra/sweeper={sweeper}", "sweep.name=s")
    process = start(command("-m", "seed=0,1", "trainer.epochs=5000", *choices), tmp_path)
    sweep = tmp_path / "outputs/sweeps/s"
    wait_until(lambda: rows_of(*sweep.glob("*/metrics.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert out.endswith("interrupted by SIGTERM: saved; the same command goes on\n")
    assert [read_record(folder).status for folder in trials(sweep).values()] == ["interrupted"]


def trials(sweep: Path) -> dict[str, Path]:
    return {p.parent.name: p.parent for p in sorted(sweep.glob("*/record.json"))}
