"""Small trials on made-up images, trained in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_trials import SMALL

from lora_vit import api
from lora_vit.build import build_setup
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.records import PREDICTIONS
from lora_vit.stopping import StopRequest
from lora_vit.training.loop import Reporter, train_trials
from lora_vit.training.pack import Pack
from lora_vit.training.trial import Setup, TrialRun


def trial_config(*overrides: str) -> TrialConfig:
    """The small trial with overrides."""
    return api.compose([*SMALL, *overrides])


@dataclasses.dataclass
class Outcome:
    """What a trial came to: its tensors in full precision, and what it predicted on the validation images."""

    trial: TrialRun
    losses: list[float]
    tensors: dict[str, torch.Tensor]
    predicted: np.ndarray


class Recorder(Reporter):
    """Collects the losses of logging steps."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}

    def step(self, pack: Pack, losses: list[float], rates: list[float], images_per_second: float) -> None:
        for trial, loss in zip(pack.trials, losses, strict=True):
            self.losses.setdefault(trial.name, []).append(loss)


def train_together(configs: list[TrialConfig], folder: Path, setup: Setup | None = None) -> list[Outcome]:
    """Train the trials as one pack, each in its folder below ``folder``."""
    setup = setup or build_setup(configs[0], Process())
    trials = []
    for i, config in enumerate(configs):
        place = folder / str(i)
        place.mkdir(parents=True)
        trials.append(TrialRun.open(config, place, setup, {}))
    recorder = Recorder()
    with StopRequest() as stop:
        train_trials(trials, setup, recorder, stop)
    outcomes = []
    for i, trial in enumerate(trials):
        completed = trial.record.status == "completed"
        predicted = np.load(folder / str(i) / PREDICTIONS)["val.predicted"] if completed else np.empty(0)
        outcomes.append(Outcome(trial, recorder.losses.get(trial.name, []), trial.state.values, predicted))
    return outcomes


def largest_difference(a: Outcome, b: Outcome) -> float:
    """Largest relative difference of the losses and of the trained tensors (by their norms)."""
    worst = max(abs(x - y) / abs(y) for x, y in zip(a.losses, b.losses, strict=True))
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        worst = max(worst, float((tensor - other).norm() / other.norm().clamp(min=1e-12)))
    return worst


def command(*overrides: str, module: str = "lora_vit.train") -> list[str]:
    """The small trial as a command; flags go before the overrides, as Hydra wants them."""
    flags = [o for o in overrides if o.startswith("-")]
    return [sys.executable, "-m", module, *flags, *SMALL, *(o for o in overrides if o not in flags)]


def run_command(
    *overrides: str, cwd: Path, code: int = 0, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run the small trial as a command in ``cwd`` and check its exit code."""
    done = run(command(*overrides), cwd, env, timeout)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def run(
    line: list[str], cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE ...`` in a process of its own.

    Without an environment of its own the process is forked from one that has imported torch: that takes most of the
    time of a small command.
    """
    if env is not None or line[:2] != [sys.executable, "-m"]:
        own = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=own)
    with tempfile.TemporaryDirectory() as place:
        said = [os.path.join(place, name) for name in ("stdout", "stderr")]
        process = _forks().Process(target=_run_module, args=(line[2:], str(cwd), said, dict(os.environ)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(line, timeout)
        texts = [Path(path).read_text(errors="replace") for path in said]
        return subprocess.CompletedProcess(line, process.exitcode, *texts)


@functools.cache
def _forks() -> Any:
    """Makes processes that have imported what a command does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hydra", "lora_vit.api", "lora_vit.sweep.run", "torch.utils.tensorboard"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return context


def _run_module(arguments: list[str], cwd: str, said: list[str], env: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env, OMP_NUM_THREADS="1")
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.argv, sys.path[0] = arguments, cwd
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def start(line: list[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    """A command that goes on while the test does; what it prints is one stream."""
    return subprocess.Popen(line, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})  # fmt: skip


def wait_until(
    reached: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120, every: float = 0.05
) -> None:
    """Until something is so that a running command brings about; fails where the command has ended, or time is up."""
    until = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(every)


def free_ports(count: int) -> list[int]:
    """Ports that are free now, not of those that the system gives to other processes' connections."""
    ports: list[int] = []
    while len(ports) < count:
        with contextlib.suppress(OSError), socket.create_server(("", random.randrange(10_000, 32_000))) as free:
            ports.append(free.getsockname()[1])
    return ports


def rows_of(*files: Path) -> int:
    """Rows in all that these ``metrics.jsonl`` have by now."""
    return sum(path.read_bytes().count(b"\n") for path in files if path.exists())


def is_running(pid: int) -> bool:
    """Whether a process lives; a zombie does not. Skips where there is no ``/proc``."""
    if not Path("/proc/self").exists():
        pytest.skip("needs Linux's /proc")
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a trial that must not depend on how often it was stopped."""
    return {n: (folder / n).read_bytes() for n in ("metrics.jsonl", "adapter.safetensors", "predictions.npz")}
