"""Workers that are started from the sweep's folder alone: another resumes what one has left."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import start, wait_until
from sweeps import seed_trials, sweep_of

from lora_vit.sweep import claims, worker
from lora_vit.sweep.plan import Sweep

pytestmark = pytest.mark.slow


def start_worker(folder: Path) -> subprocess.Popen[str]:
    """In a folder of its own, as on another machine."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    return start([sys.executable, "-m", "lora_vit.sweep", "work", str(folder)], elsewhere)


def statuses(sweep: Sweep) -> list[str]:
    return [sweep.state_of(trial).status for trial in sweep.trials.values()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_another_worker_resumes_what_one_has_left(how, tmp_path):
    """Killed, its claims are void; asked to end, it saves and gives them back."""
    sweep = sweep_of(tmp_path / "s", seed_trials(2, trainer__epochs=12, trainer__checkpoint_every=0.001))
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
    rows = [path.read_text() for path in sweep.folder.glob("*/metrics.jsonl")]
    assert [text.count("val_acc") for text in rows] == [12, 12], "resumed, not started from scratch"


def test_a_late_worker_waits_for_what_a_dead_one_of_another_machine_holds(tmp_path, monkeypatch):
    """Whether that one is dead, only time tells; until then its trials are not left behind."""
    sweep = sweep_of(tmp_path / "s", seed_trials(2))
    with monkeypatch.context() as there:
        there.setattr(claims, "this_host", lambda: "elsewhere/boot/1")
        dead = claims.Claims(sweep.folder)
    assert all(map(dead.take, sweep.trials))
    monkeypatch.setattr(claims, "DEAD_AFTER", 1.0)
    worker.work(sweep.folder)
    assert statuses(sweep) == ["completed"] * 2
    assert not any(map(dead.mine, sweep.trials))
