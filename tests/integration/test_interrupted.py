"""Ctrl-C before there is anything to save, and other sudden ends: one line each."""

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

FIRST = {"train": "hydra", "train x": "torch", "summarize": "pandas"}
"""A large package that each command imports."""
COMMANDS = {
    "train": (["model=vit_tiny", "data=fake", "hydra.run.dir=trial"], "trial/record.json"),
    "train -m": (["-m", "model=vit_tiny", "data=fake", "seed=0,1", "hydra.sweep.dir=trial"], "trial/sweep.json"),
    "summarize": (["trial"], "trial/sweep.json"),
    "merge": (["trial", "--out", "merged.safetensors"], "trial/record.json"),
}
"""Arguments of each command, and the first file that it reads."""


def start(line: list[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    """A command whose output and errors are apart."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(line, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_interrupted(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


@pytest.mark.parametrize("name", FIRST)
def test_while_it_imports(name, tmp_path):
    """A package that never gets done stands where the real one would be found."""
    (tmp_path / f"{FIRST[name]}.py").write_text("import time; print('there', flush=True); time.sleep(60)")
    (tmp_path / "x").mkdir()
    arguments = ["x"] if name != "train x" else ["model=vit_tiny", "data=fake"]
    line = [sys.executable, "-m", f"lora_vit.{name.split()[0]}", *arguments]
    process = start(line, tmp_path, PYTHONPATH=str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    assert_interrupted(process)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_while_it_looks_at_what_is_there(name, tmp_path):
    """The first file that it reads is a pipe that nobody writes into."""
    arguments, file = COMMANDS[name]
    (tmp_path / "trial").mkdir()
    if name == "summarize":
        make_trial(tmp_path / "trial")
    os.mkfifo(tmp_path / file)
    process = start([sys.executable, "-m", f"lora_vit.{name.split()[0]}", *arguments], tmp_path)
    ends: list[int] = []

    def is_read() -> bool:
        with contextlib.suppress(OSError):  # until somebody reads the other end
            ends.append(os.open(tmp_path / file, os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    wait_until(is_read, process)
    time.sleep(0.5)  # it is open: until it is being read, a signal waits for what is read
    assert_interrupted(process)
    os.close(ends[0])
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.slow
def test_a_sweep_whose_folder_is_moved_away_says_so(tmp_path):
    line = command("-m", "seed=0,1", "trainer.epochs=5000", "trainer.checkpoint_every=1", "sweep.workers=1",
                   "sweep.pack_size=1", "sweep.name=s")  # fmt: skip
    process = start(line, tmp_path)
    sweep = tmp_path / "outputs/sweeps/s"
    wait_until(lambda: rows_of(*sweep.glob("*/metrics.jsonl")), process)
    sweep.rename(tmp_path / "elsewhere")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r"error: outputs/sweeps/s\S* is gone: was a folder moved .*", err.splitlines()[-1])
