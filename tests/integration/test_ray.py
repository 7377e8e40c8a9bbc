"""Workers as tasks of a real Ray cluster of two nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import command, run_command, start, wait_until

from lora_vit.records import read_record

pytest.importorskip("ray", reason="Ray is not installed: pip install 'lora_vit[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ON_RAY = ("-m", "engine=ray", "sweep.name=s", "sweep.pack_size=2")


CLUSTER = """
import signal
import sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script, behind &; Ray's workers inherit it
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of two nodes with a core each, in a process of its own: Ray changes the one that it runs in."""
    env = {**os.environ, "RAY_worker_niceness": "0"}  # Ray's 15 starves them beside other tests
    line = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(line, text=True, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield next(text.split()[1] for text in process.stdout if text.startswith("address "))
        process.communicate(timeout=60)


def statuses(folder: Path) -> list[str]:
    return [read_record(path.parent).status for path in (folder / "outputs/sweeps/s").glob("*/record.json")]


def workers_of(place: Path) -> list[int]:
    """The processes that train the sweep, as their logs name them."""
    return [int(re.findall(r"(\d+)\.log", path.name)[0]) for path in place.glob(".ray/*.log")]


def test_a_sweep_on_two_nodes_whose_worker_is_killed(address, tmp_path):
    """A worker a node; what the killed one had is resumed, and all is reported as by a local sweep."""
    settings = (f"engine.address={address}", "trainer.epochs=20", "trainer.checkpoint_every=0.001")
    process, place = start(command(*ON_RAY, *settings, "seed=range(8)"), tmp_path), tmp_path / "outputs/sweeps/s"
    wait_until(lambda: len(workers_of(place)) >= 2 and list(place.glob("*/checkpoint.pt")), process, 240, 0.1)
    os.kill(workers_of(place)[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    assert f"2 workers: Ray tasks, logs in {place}/.ray" in out
    assert "a worker was lost: " in out
    assert f"1 workers: Ray tasks, logs in {place}/.ray" in out
    assert "[8/8]" in out
    assert statuses(tmp_path) == ["completed"] * 8
    for path in place.glob("*/metrics.jsonl"):
        epochs = [line for line in path.read_text().splitlines() if "val_accuracy" in line]
        assert len(epochs) == 20, "resumed, nothing twice"


def test_a_command_that_is_asked_to_end_saves_what_its_tasks_train(address, tmp_path):
    """They are the command's own; the same command resumes."""
    settings = (*ON_RAY, f"engine.address={address}", "seed=0,1", "trainer.epochs=400")
    process = start(command(*settings, "trainer.checkpoint_every=0.001"), tmp_path)
    place = tmp_path / "outputs/sweeps/s"
    wait_until(lambda: list(place.glob("*/checkpoint.pt")), process, 240, 0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "asking the workers to save and to end" in out
    assert statuses(tmp_path) == ["interrupted"] * 2
    done = run_command(*settings, cwd=tmp_path, timeout=400)
    assert "[2/2]" in done.stdout
    assert statuses(tmp_path) == ["completed"] * 2


@pytest.mark.parametrize("environment", [False, True])
def test_what_ray_refuses_is_reported_in_one_line(environment, tmp_path):
    where = [] if environment else ["engine.address=127.0.0.1:1"]
    env = {"RAY_ADDRESS": "127.0.0.1:1" if environment else "local"}
    done = run_command(*ON_RAY, "seed=0,1", *where, cwd=tmp_path, code=1, env=env)
    assert re.fullmatch(r"error: engine.address=127.0.0.1:1: no Ray cluster \(.*\): start one with `ray start "
                        r"--head`, or leave the address out\n", done.stderr)  # fmt: skip
    assert statuses(tmp_path) == []
