"""Workers that a real Slurm runs (scripts/one_node_slurm.sh brings one up)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import SMALL, command, run_command, start, wait_until

from lora_vit import api
from lora_vit.errors import ConfigError
from lora_vit.records import read_record

pytest.importorskip("submitit")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ON_SLURM = ("-m", "engine=slurm", "sweep.name=s", "sweep.pack_size=2", "engine.cpus_per_task=1")


@pytest.fixture(autouse=True, scope="module")
def slurm() -> None:
    if shutil.which("sinfo") is None:
        pytest.skip("no Slurm: scripts/one_node_slurm.sh brings one up")
    done = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True)
    if not {"idle", "mixed", "allocated"} & set(done.stdout.split()):
        pytest.skip(f"Slurm has no node to give: {done.stdout.strip()}{done.stderr.strip()}")


def trials(folder: Path) -> dict[str, str]:
    """Status of each trial of the sweep."""
    return {p.parent.name: read_record(p.parent).status for p in (folder / "outputs/sweeps/s").glob("*/record.json")}


def queue(folder: Path) -> list[str]:
    """State and script of each job that was asked for below this folder, as Slurm has them."""
    done = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%T %o"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if f" {folder}/" in line]


def none_is_left(folder: Path) -> None:
    """Those that run see that nothing is open, and end."""
    until = time.monotonic() + 120
    while left := queue(folder):
        assert time.monotonic() < until, left
        time.sleep(1)


def test_a_sweep_on_slurm_whose_worker_is_killed(tmp_path):
    """Its claims pass on, a worker is asked for in its place, and every trial is trained to its end."""
    settings = ("sweep.workers=2", "seed=0,1,2,3,4,5", "trainer.epochs=60", "trainer.checkpoint_every=0.001")
    process, place = start(command(*ON_SLURM, *settings), tmp_path), tmp_path / "outputs/sweeps/s"
    wait_until(lambda: list(place.glob("*/checkpoint.pt")), process, 240, 0.1)
    found = subprocess.run(
        ["pgrep", "-f", f"python.* -m submitit.core._submit {place}"], capture_output=True, text=True
    )
    workers = [int(pid) for pid in found.stdout.split() if "python" in os.readlink(f"/proc/{pid}/exe")]
    pid = max(workers)
    os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    assert list(trials(tmp_path).values()) == ["completed"] * 6
    assert "it was killed, or its node died" in out
    assert f"logs in {place}/.slurm" in out
    assert "[6/6]" in out
    none_is_left(tmp_path)


def test_a_sweep_that_is_not_waited_for_is_followed_by_the_same_command(tmp_path):
    """The workers of the first command are not asked for again."""
    arguments = (*ON_SLURM, "sweep.workers=1", "seed=0,1", "trainer.epochs=200")
    done = run_command(*arguments, "sweep.wait=false", cwd=tmp_path)
    assert "1 workers: Slurm job" in done.stdout
    assert len(queue(tmp_path)) == 1
    done = run_command(*arguments, cwd=tmp_path, timeout=400)
    assert "Slurm job" not in done.stdout
    assert "[2/2]" in done.stdout
    assert list(trials(tmp_path).values()) == ["completed"] * 2


def test_at_the_end_a_worker_whose_turn_has_not_come_is_withdrawn(tmp_path):
    later = ("sweep.workers=1", "sweep.wait=false", "+engine.additional_parameters.begin=now+1hour")
    run_command(*ON_SLURM, "seed=0,1", *later, cwd=tmp_path)
    assert [line.split()[0] for line in queue(tmp_path)] == ["PENDING"]
    run_command(*ON_SLURM, "seed=0,1", "sweep.workers=2", cwd=tmp_path, timeout=400)
    assert list(trials(tmp_path).values()) == ["completed"] * 2
    none_is_left(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("sweep.workers=1", "engine.partition=none"), "Slurm refuses the workers (sbatch: error:"),
        ((), "sweep.workers=auto: say how many jobs Slurm is to run side by side"),
    ],
)
def test_what_slurm_refuses_is_reported_in_one_line(settings, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}.*$"):
        api.sweep([*SMALL, *ON_SLURM[1:], "seed=0,1", *settings])
    assert trials(tmp_path) == {}


def test_where_there_is_no_slurm_it_is_reported_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(ConfigError, match=r"^engine=slurm: no Slurm here .*: start the command on a login node$"):
        api.sweep([*SMALL, *ON_SLURM[1:], "seed=0,1", "sweep.workers=1"], tmp_path)
