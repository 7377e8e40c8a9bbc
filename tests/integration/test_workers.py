"""Workers that are started from the sweep's folder alone: they share it, and another resumes what one has left."""

from __future__ import annotations

import collections
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import start, wait_until
from sweeps import options, seed_trials, sweep_of

from lora_vit.errors import Interrupted
from lora_vit.sweep import claims, run
from lora_vit.sweep.plan import Request, Sweep
from lora_vit.sweep.trial import Trial

pytestmark = pytest.mark.slow
LONG = {"trainer__epochs": 40, "trainer__checkpoint_every": 0.001}
LATE = """
import sys
from pathlib import Path
from lora_vit.sweep import claims
from lora_vit.sweep.worker import work
claims.DEAD_AFTER = 5.0
work(Path(sys.argv[1]))
"""


def planned(folder: Path, trials: list[Trial], workers: int = 2) -> Sweep:
    """The sweep of a command that has written down what it wants, and trained nothing."""
    return sweep_of(folder, trials, workers, pack_size="2")


def start_worker(folder: Path, script: str = "") -> subprocess.Popen[str]:
    """In a folder of its own, as on another machine."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    line = ["-c", script, str(folder)] if script else ["-m", "lora_vit.sweep", "work", str(folder)]
    return start([sys.executable, *line], elsewhere)


def completed_by(outputs: list[str]) -> collections.Counter[str]:
    return collections.Counter(trial for out in outputs for trial in re.findall(r"^(\w{10}) .*completed", out, re.M))


def statuses(sweep: Sweep) -> list[str]:
    return [sweep.state_of(trial).status for trial in sweep.trials.values()]


def epochs(sweep: Sweep) -> list[int]:
    """Of each trial, as its log has them."""
    return [(sweep.folder_of(trial) / "metrics.jsonl").read_text().count("val_acc") for trial in sweep.trials.values()]


def test_two_workers_share_a_folder(tmp_path):
    """Each trial is trained once; when nothing is left they end."""
    sweep = planned(tmp_path / "s", seed_trials(8))
    workers = [start_worker(sweep.folder) for _ in range(2)]
    outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert completed_by(outputs) == dict.fromkeys(sweep.trials, 1)
    assert all("no trial is left" in out for out in outputs)
    assert statuses(sweep) == ["completed"] * 8
    fourth = next(trial for trial in sweep.trials.values() if trial.config.seed == 3)
    assert (sweep.folder_of(fourth) / ".hydra/overrides.yaml").read_text() == "- seed=3\n"
    late = start_worker(sweep.folder)
    out = late.communicate(timeout=120)[0]
    assert late.returncode == 0
    assert not completed_by([out])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_another_worker_resumes_what_one_has_left(how, tmp_path):
    """Killed, its claims are void; asked to end, it saves and gives them back."""
    sweep = planned(tmp_path / "s", seed_trials(2, **LONG))
    first = start_worker(sweep.folder)
    wait_until(lambda: list(sweep.folder.glob("*/checkpoint.pt")), first)
    first.send_signal(how)
    out = first.communicate(timeout=120)[0]
    assert first.returncode == (-9 if how == signal.SIGKILL else 128 + how), out
    if how == signal.SIGTERM:
        assert "interrupted by SIGTERM: saved" in out
        assert statuses(sweep) == ["interrupted"] * 2
    second = start_worker(sweep.folder)
    out = second.communicate(timeout=240)[0]
    assert second.returncode == 0, out
    assert statuses(sweep) == ["completed"] * 2
    assert epochs(sweep) == [40, 40], "resumed, not started from scratch"


def test_a_late_worker_waits_for_what_a_dead_one_of_another_machine_holds(tmp_path, monkeypatch):
    """Whether that one is dead, only time tells; until then its trials are not left behind."""
    sweep = planned(tmp_path / "s", seed_trials(2))
    monkeypatch.setattr(claims, "this_host", lambda: "elsewhere/boot/1")
    dead = claims.Claims(sweep.folder)
    assert all(map(dead.take, sweep.trials))
    worker = start_worker(sweep.folder, LATE)
    out = worker.communicate(timeout=120)[0]
    assert worker.returncode == 0, out
    assert completed_by([out]) == dict.fromkeys(sweep.trials, 1)
    assert not any(map(dead.mine, sweep.trials))


# --- a command and its workers


class Processes:
    """An engine whose workers are processes of this machine. ``meanwhile`` is called at every look of the command."""

    poll_every = 0.2

    def __init__(self, folder: Path, outlives_us: bool = False):
        self.folder, self.outlives_us = folder, outlives_us
        self.workers: list[subprocess.Popen[str]] = []
        self.started: list[int] = []
        self.meanwhile: Callable[[], Any] = lambda: None
        self.is_withdrawn = False

    def number_of_workers(self, asked: str, trials: list[Any]) -> int:
        return int(asked)

    def start(self, count: int) -> str:
        self.started.append(count)
        self.workers += [start_worker(self.folder) for _ in range(count)]
        return f"{count} workers"

    def look(self) -> tuple[int, list[str]]:
        self.meanwhile()
        return sum(worker.poll() is None for worker in self.workers), []

    def stop(self, now: bool = False) -> None:
        for worker in self.workers:
            worker.terminate()

    def withdraw(self) -> None:
        self.is_withdrawn = True

    def outputs(self) -> list[str]:
        return [worker.communicate(timeout=120)[0] for worker in self.workers]

    def is_training(self) -> bool:
        return bool(list(self.folder.glob("*/checkpoint.pt")))


def command(engine: Processes, trials: list[Trial], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """What a command's sweep comes to whose workers this engine starts."""
    monkeypatch.setattr(run, "start_engine", lambda options, folder: engine)
    return run.run_sweep(Request(engine.folder, options(**{"pack_size": "2", "workers": "2", **changes}), trials))


def test_a_worker_that_is_killed_is_replaced_by_one(tmp_path, monkeypatch, capsys):
    engine, killed = Processes(tmp_path / "s"), []

    def kill() -> None:
        if not killed and engine.is_training():
            killed.append(engine.workers[0].kill())

    engine.meanwhile = kill
    trials = seed_trials(4, **LONG)
    outcomes = command(engine, trials, monkeypatch)
    engine.outputs()
    assert killed
    assert outcomes.keys() == {trial.trial_id for trial in trials}
    assert engine.is_withdrawn
    assert engine.started[:2] == [2, 1]
    assert sum(engine.started) <= 4
    assert capsys.readouterr().out.count("  completed  val accuracy ") == 4
    sweep = Sweep(engine.folder)
    assert (statuses(sweep), epochs(sweep)) == (["completed"] * 4, [40] * 4)


@pytest.mark.parametrize("answer", ["n", "y"])
def test_workers_that_outlive_the_command_end_with_it_if_the_terminal_says_so(answer, tmp_path, monkeypatch):
    ours, terminal = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    monkeypatch.setattr(sys, "stdin", os.fdopen(terminal, "r", closefd=False))
    monkeypatch.setattr(sys, "stderr", os.fdopen(terminal, "w", closefd=False))
    engine, asked = Processes(tmp_path / "s", outlives_us=True), []

    def stop() -> None:
        if not asked and engine.is_training():
            asked.append(os.kill(os.getpid(), signal.SIGTERM))

    engine.meanwhile = stop
    with pytest.raises(Interrupted):
        command(engine, seed_trials(2, **LONG | {"trainer__epochs": 400}), monkeypatch)
    if answer == "n":
        assert all(worker.poll() is None for worker in engine.workers)
        engine.stop()
    assert any("saved" in out for out in engine.outputs())
    assert statuses(Sweep(engine.folder)) == ["interrupted"] * 2
