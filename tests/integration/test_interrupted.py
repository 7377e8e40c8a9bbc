"""Ctrl-C before there is anything to save, and workers that lose the process that forks them: one line each."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import command, rows_of, wait_until
from made_up_records import make_trial

STUCK = "import time; print('there', flush=True); time.sleep(60)"
FIRST = {"train": "hydra", "summarize": "pandas", "evaluate": "numpy", "sweep": "numpy"}
"""The first large package that each command imports."""
COMMANDS = {
    "train": (["model=vit_tiny", "data=fake", "hydra.run.dir=trial"], "trial/record.json"),
    "train -m": (["-m", "model=vit_tiny", "data=fake", "seed=0,1", "hydra.sweep.dir=trial"], "trial/sweep.json"),
    "summarize": (["trial"], "trial/sweep.json"),
    "evaluate": (["trial"], "trial/record.json"),
    "predict": (["trial", "image.png"], "trial/record.json"),
    "merge": (["trial", "--out", "merged.safetensors"], "trial/record.json"),
}


def start(arguments: list[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_interrupted(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


def writable(pipe: Path, reader: subprocess.Popen[str]) -> int:
    """The pipe's end for writing, once somebody reads the other."""
    until = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError):
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        assert reader.poll() is None, reader.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("name", FIRST)
def test_while_it_imports(name, tmp_path):
    """A package that never gets done stands where the real one would be found."""
    (tmp_path / f"{FIRST[name]}.py").write_text(STUCK)
    process = start([f"lora_vit.{name}", "x"], tmp_path, PYTHONPATH=str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    assert_interrupted(process)


@pytest.mark.slow
def test_a_sweep_whose_folder_is_moved_away_says_so(tmp_path):
    line = command("-m", "seed=0,1", "trainer.epochs=5000", "trainer.checkpoint_every=1", "sweep.workers=1",
                   "sweep.pack_size=1", "sweep.name=s")  # fmt: skip
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    sweep = tmp_path / "outputs/sweeps/s"
    wait_until(lambda: rows_of(*sweep.glob("*/metrics.jsonl")), process)
    sweep.rename(tmp_path / "elsewhere")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r"error: outputs/sweeps/s\S* is gone: was a folder moved .*", err.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_while_the_process_that_forks_the_workers_imports(tmp_path):
    """A terminal's Ctrl-C reaches both; the command alone answers."""
    (tmp_path / "torch.py").write_text("import time; print('there', flush=True); time.sleep(8)")
    process = subprocess.Popen(
        command("-m", "seed=0,1", "sweep.workers=2"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["there\n"] * 2
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_while_it_looks_at_what_is_there(name, tmp_path):
    """The first file that it reads is a pipe that nobody writes into."""
    arguments, file = COMMANDS[name]
    (tmp_path / "trial").mkdir()
    if name == "summarize":
        make_trial(tmp_path / "trial")
    (tmp_path / "image.png").touch()
    os.mkfifo(tmp_path / file)
    process = start([f"lora_vit.{name.split()[0]}", *arguments], tmp_path)
    end = writable(tmp_path / file, process)
    assert_interrupted(process)
    os.close(end)
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.slow
def test_the_process_that_forks_the_workers_is_killed(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("workers are forked on Linux alone")
    line = command("-m", "seed=0,1,2,3", "trainer.epochs=5000", "sweep.workers=2", "sweep.pack_size=1", "sweep.name=s")
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list((tmp_path / "outputs/sweeps/s").glob("*/record.json"))) >= 2, process)
    servers = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "forkserver"], capture_output=True, text=True)
    os.kill(int(servers.stdout), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    (said,) = [line for line in err.splitlines() if "compos" not in line]
    assert said.startswith("error: worker processes ended with codes [255, 255]")
    assert said.endswith("the same command goes on")


def test_a_clone_that_is_not_installed_says_what_to_do(project_root, tmp_path):
    (tmp_path / "lora_vit").symlink_to(project_root / "lora_vit")
    line = [sys.executable, "-S", "-m", "lora_vit.train", "lora.rank=8"]  # -S: nothing is installed
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: lora_vit is not installed in this Python: run `")
    assert f"pip install -e {project_root}`" in done.stderr
    assert len(done.stderr.splitlines()) == 1
