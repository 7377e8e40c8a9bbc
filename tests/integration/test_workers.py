"""Workers that are started by hand, from the sweep's folder alone: they share it, and replace one that is killed."""

from __future__ import annotations

import collections
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import start, trial_config, wait_until
from lora_vit.sweep.engine import run_on
from lora_vit.sweep.ledger import Ledger
from lora_vit.sweep.progress import View
from lora_vit.sweep.runner import begin
from sweeps import options

from lora_vit.errors import Interrupted, TrialFailed
from lora_vit.records import read_record
from lora_vit.stopping import StopRequest
from lora_vit.sweep import engine as engine_module
from lora_vit.sweep.plan import Job, SweepRun

pytestmark = pytest.mark.slow


def begun(folder: Path, seeds: int, *settings: str, workers: int = 2, **changes: object) -> SweepRun:
    """The run of a command that has written down what it wants, and trained nothing."""
    jobs = [Job(trial_config(f"seed={seed}", *settings), [f"seed={seed}"], f"seed={seed}") for seed in range(seeds)]
    Ledger(folder).add(jobs, "a command")
    return begin(SweepRun(tuple(jobs), folder, options(pack_size="2", **changes), time.time(), workers))


def start_worker(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """In a folder of its own, as on another machine."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "lora_vit.sweep", "work", str(folder.resolve()), *arguments]
    return start(command, elsewhere)


def completed_by(outputs: list[str]) -> collections.Counter[str]:
    return collections.Counter(trial for out in outputs for trial in re.findall(r"^(\w{10}) .*completed", out, re.M))


def statuses(run: SweepRun) -> list[str]:
    return [read_record(run.folder_of(job)).status for job in run.jobs]


def test_two_workers_share_a_folder(tmp_path):
    """Each trial is trained once; when nothing is left they end."""
    run = begun(tmp_path / "s", 8)
    workers = [start_worker(run.folder) for _ in range(2)]
    outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert completed_by(outputs) == {job.trial_id: 1 for job in run.jobs}
    assert all("nothing is open that nobody has" in out for out in outputs)
    assert statuses(run) == ["completed"] * 8
    assert (run.folder_of(run.jobs[3]) / ".hydra/overrides.yaml").read_text() == "- seed=3\n"
    late = start_worker(run.folder)
    out = late.communicate(timeout=120)[0]
    assert late.returncode == 0
    assert not completed_by([out])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_worker_leaves_another_goes_on_with(how, tmp_path):
    """Killed, its claims are void; asked to end, it saves and gives them back."""
    run = begun(tmp_path / "s", 2, "trainer.epochs=40", "trainer.checkpoint_every=0.001")
    first = start_worker(run.folder)
    wait_until(lambda: list(run.folder.glob("*/checkpoint.pt")), first)
    first.send_signal(how)
    out = first.communicate(timeout=120)[0]
    assert first.returncode == (-9 if how == signal.SIGKILL else 128 + how), out
    if how == signal.SIGTERM:
        assert "interrupted by SIGTERM: saved; any other worker goes on" in out
        assert statuses(run) == ["interrupted"] * 2
    second = start_worker(run.folder, "--run", run.name)
    out = second.communicate(timeout=240)[0]
    assert second.returncode == 0, out
    assert statuses(run) == ["completed"] * 2
    epochs = [
        line for line in (run.folder_of(run.jobs[0]) / "metrics.jsonl").read_text().splitlines() if "val_acc" in line
    ]
    assert len(epochs) == 40, "gone on with, not begun anew"


def test_what_cannot_be_worked_on_is_told_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    worker = start_worker(tmp_path / "empty")
    out = worker.communicate(timeout=120)[0]
    assert worker.returncode == 1
    said = "has no run to work on: give the folder of a packed sweep, as seen from here"
    assert out == f"error: {tmp_path}/empty {said}\n"


# --- workers that are watched


class Processes:
    """An engine whose workers are processes of this machine."""

    def __init__(self, outlives_us: bool = False, arguments: tuple[str, ...] = ()):
        self.outlives_us, self.arguments = outlives_us, arguments
        self.workers: list[subprocess.Popen[str]] = []
        self.started: list[int] = []
        self.withdrawn = False

    def number_of_workers(self, asked: str) -> int:
        return int(asked)

    def start(self, run: SweepRun, count: int) -> str:
        self.started.append(count)
        self.workers += [start_worker(run.folder, *self.arguments) for _ in range(count)]
        return f"{count} workers"

    def look(self) -> tuple[int, list[str]]:
        return sum(worker.poll() is None for worker in self.workers), []

    def stop(self) -> None:
        for worker in self.workers:
            worker.terminate()

    def withdraw(self) -> None:
        self.withdrawn = True


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(engine_module, "LOOK_EVERY", 0.2)


@pytest.mark.usefixtures("quick")
def test_a_worker_that_is_killed_is_replaced(tmp_path):
    run = begun(tmp_path / "s", 4, "trainer.epochs=30", "trainer.checkpoint_every=0.001")
    engine, view = Processes(), View(run.jobs)

    class Killer(View):
        killed = False

        def emit(self, kind: str, **fields: Any) -> None:
            super().emit(kind, **fields)
            if kind == "epoch" and not self.killed:
                self.killed = True
                engine.workers[0].kill()

    view = Killer(run.jobs)
    with StopRequest() as stop:
        assert run_on(engine, run, view, stop)
    assert statuses(run) == ["completed"] * 4
    assert engine.withdrawn
    assert engine.started[0] == 2
    assert sum(engine.started) <= 4
    assert view.ended() == 4
    assert all(row.status == "completed" and row.val_accuracy is not None for row in view.rows.values())
    assert view.done == pytest.approx(4 * 30)
    for worker in engine.workers:
        worker.communicate(timeout=60)


@pytest.mark.usefixtures("quick")
def test_workers_that_end_no_trial_are_not_started_for_ever(tmp_path):
    run = begun(tmp_path / "s", 2)
    engine = Processes(arguments=("--run", "of another folder"))
    with StopRequest() as stop, pytest.raises(TrialFailed, match="3 times workers were started and ended no trial"):
        run_on(engine, run, View(run.jobs), stop)
    assert len(engine.started) == 3
    for worker in engine.workers:
        assert "has no run to work on" in worker.communicate(timeout=60)[0]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("outlives_us", "answer"), [(False, ""), (True, ""), (True, "n"), (True, "y")])
def test_a_command_that_is_asked_to_end(outlives_us, answer, tmp_path, monkeypatch):
    """Its own workers save and end with it; those of a batch system go on unless the user says otherwise, who is asked
    on a terminal.
    """
    if answer:
        ours, terminal = pty.openpty()
        os.write(ours, f"{answer}\n".encode())
        monkeypatch.setattr(sys, "stdin", os.fdopen(terminal, "r", closefd=False))
        monkeypatch.setattr(sys, "stderr", os.fdopen(terminal, "w", closefd=False))
    run = begun(tmp_path / "s", 2, "trainer.epochs=60", "trainer.checkpoint_every=0.001", workers=1)
    engine = Processes(outlives_us)
    with StopRequest() as stop:

        class Stopper(View):
            def emit(self, kind: str, **fields: Any) -> None:
                super().emit(kind, **fields)
                if kind == "epoch":
                    stop.signum = signal.SIGTERM

        with pytest.raises(Interrupted):
            run_on(engine, run, Stopper(run.jobs), stop)
        stop.signum = 0
    (worker,) = engine.workers
    if outlives_us and answer != "y":
        assert worker.poll() is None
        worker.terminate()
    assert "saved" in worker.communicate(timeout=60)[0]
    assert statuses(run) == ["interrupted"] * 2


@pytest.mark.usefixtures("quick")
def test_who_does_not_wait_returns_at_once(tmp_path):
    run = begun(tmp_path / "s", 2, wait=False)
    engine = Processes(outlives_us=True)
    with StopRequest() as stop:
        assert not run_on(engine, run, View(run.jobs), stop)
    assert engine.started == [1] if len(run.jobs) == 1 else [2]
    for worker in engine.workers:
        assert worker.communicate(timeout=120)[0].count("completed") <= 2
    assert statuses(run) == ["completed"] * 2
