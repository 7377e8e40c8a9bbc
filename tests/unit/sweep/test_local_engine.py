"""Workers of this machine: how many there are, what they are asked, and how they end; the processes are real."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import is_running, trial_config
from sweeps import seed_trials, sweep_of

from lora_vit.build import build_setup
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError
from lora_vit.records import read_record
from lora_vit.stopping import StopRequest
from lora_vit.sweep import pack_size
from lora_vit.sweep.engines import LocalEngine, SlurmEngine, local, start_engine
from lora_vit.sweep.engines.local import Local, expected_bytes
from lora_vit.sweep.trial import Trial


@pytest.fixture
def engine(tmp_path) -> Iterator[Local]:
    made = Local({}, tmp_path)
    (early,) = local._waiting
    yield made
    made.stop(now=True)
    made.withdraw()
    early.wait()


def until_ended(engine: Local, seconds: float = 120) -> list[str]:
    news, until = [], time.monotonic() + seconds
    while True:
        alive, said = engine.look()
        news += said
        if not alive:
            return news
        assert time.monotonic() < until
        time.sleep(0.1)


def long_trials(count: int) -> list[Trial]:
    return [Trial(trial_config(f"seed={seed}", "trainer.epochs=5000")) for seed in range(count)]


# --- how many


@pytest.fixture
def idle(tmp_path, monkeypatch) -> Local:
    """An engine that has started no process."""
    monkeypatch.setattr(local, "start_early", lambda: None)
    return Local({}, tmp_path)


@pytest.mark.parametrize(
    ("asked", "trials", "threads", "memory", "count"),
    [
        ("auto", 20, 4, 100, 4),
        ("auto", 3, 4, 100, 3),
        ("auto", 20, 64, 100, 8),
        ("auto", 20, 64, 3, 2),
        ("auto", 20, 64, 0, 1),
        ("3", 20, 1, 100, 3),
        ("100000", 2, 4, 100, 2),
    ],
)
def test_workers_share_threads_and_memory_and_are_no_more_than_trials(
    asked, trials, threads, memory, count, idle, monkeypatch
):
    """C12: however many are asked for."""
    of = seed_trials(trials)
    held = expected_bytes(of[0].config)
    monkeypatch.setattr(pack_size, "attainable_memory", lambda device: memory * held)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert idle.number_of_workers(asked, of) == count
    assert idle._threads == max(1, threads // count)


def test_threads_that_a_variable_takes_away_are_told(idle, monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for asked in ("1", "auto"):
        assert idle.number_of_workers(asked, seed_trials(3)) == 1
    assert capsys.readouterr().out.count("OMP_NUM_THREADS=1 leaves 1 of 8 cores") == 1


def test_each_worker_has_a_gpu(idle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    trials = seed_trials(3, trainer__accelerator="auto")
    assert idle.number_of_workers("auto", trials) == 2
    assert idle.number_of_workers("1", trials) == 1
    with pytest.raises(ConfigError, match=r"sweep\.workers=3: only 2 GPUs.*at most that"):
        idle.number_of_workers("3", trials)


def wide_config(batch: int) -> TrialConfig:
    common = ["trainer.precision=fp32", "data.cache_size=64", "model.image_size=64", "model.patch_size=4"]
    common += ["model.num_layers=4", "model.hidden_dim=128", "model.num_heads=4", "model.mlp_dim=512"]
    return trial_config(*common, f"data.batch_size={batch}")


def held_by_a_process(batch: int) -> int:
    config = wide_config(batch)
    return pack_size.measure([config], build_setup(config, Process()), StopRequest())[1]


@pytest.mark.slow
def test_what_a_process_holds_is_about_what_is_measured():
    """The activations of a larger batch, within a factor of two; in new processes, which have nothing to use again."""
    held = []
    for batch in (4, 60):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            held.append(process.submit(held_by_a_process, batch).result())
    expected = expected_bytes(wide_config(60)) - expected_bytes(wide_config(4))
    assert expected / 2 < held[1] - held[0] < 2 * expected


# --- processes


def test_workers_train_say_into_files_and_end(engine, tmp_path):
    trials = [Trial(trial_config(f"seed={seed}")) for seed in range(2)]
    sweep_of(tmp_path, trials, pack_size="1")
    engine.start(2)
    assert engine.look() == (2, [])
    assert until_ended(engine) == []
    assert [read_record(tmp_path / trial.trial_id).status for trial in trials] == ["completed"] * 2
    logs = list((tmp_path / ".local").glob("*.log"))
    assert len(logs) == 2
    assert all("no trial is left to train" in log.read_text() for log in logs)


def test_why_workers_failed_is_reported_once(engine, tmp_path):
    engine.start(1)  # there is no sweep
    (news,) = until_ended(engine)
    assert "workers have failed" in news
    assert f"error: {tmp_path} is not a sweep folder" in news
    assert engine.look() == (0, [])


def pids(folder: Path) -> list[int]:
    return [int(path.stem.rpartition("-")[2]) for path in (folder / ".local").glob("*.log")]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["asked", "now", "left alone"])
def test_workers_end_with_the_command(how, engine, tmp_path):
    """Asked they save; at once they do not; and they are asked too if the command is killed."""
    trials = long_trials(2)
    sweep_of(tmp_path, trials, pack_size="1")
    engine.start(2)
    until = time.monotonic() + 120
    while not all((tmp_path / trial.trial_id / "checkpoint.pt").exists() for trial in trials):
        assert time.monotonic() < until
        assert engine.look()[0] == 2
        time.sleep(0.1)
    workers = pids(tmp_path)
    process, *_ = engine._crews
    if how == "left alone":
        os.kill(process.pid, signal.SIGKILL)
    else:
        engine.stop(now=how == "now")
    assert (until_ended(engine) == []) == (how != "left alone") or how == "now"
    while any(map(is_running, workers)):
        assert time.monotonic() < until
        time.sleep(0.1)
    expected = "running" if how == "now" else "interrupted"
    assert [read_record(tmp_path / trial.trial_id).status for trial in trials] == [expected] * 2


def test_a_process_that_was_started_early_ends_with_an_unneeded_engine(tmp_path, monkeypatch):
    waiting: list[object] = []
    monkeypatch.setattr(local, "_waiting", waiting)
    engine = Local({}, tmp_path)
    (process,) = waiting
    local.start_early()
    assert waiting == [process], "one is enough"
    engine.withdraw()
    assert process.returncode is not None, "it has ended, and is waited for"  # type: ignore[attr-defined]


# --- engines by name


def test_an_engine_is_what_its_options_say(idle, tmp_path, monkeypatch):
    assert isinstance(start_engine(LocalEngine(), tmp_path), Local)
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    monkeypatch.delitem(__import__("sys").modules, "lora_vit.sweep.engines.slurm", raising=False)
    with pytest.raises(ConfigError, match=r"engine=slurm needs submitit: pip install 'lora_vit\[slurm\]'"):
        start_engine(SlurmEngine(), tmp_path)
