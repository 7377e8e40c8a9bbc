"""A bench for workers and an engine for commands: records and claims are real, nothing trains."""

from __future__ import annotations

import pytest
from made_up_engine import Engine
from worker_bench import Bench

from lora_vit.sweep import run as run_module
from lora_vit.sweep import worker as worker_module
from lora_vit.sweep.pack_size import PackSizes


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    made = Bench(tmp_path)
    monkeypatch.setattr(worker_module, "train_trials", made.train)
    monkeypatch.setattr(worker_module, "free_memory", lambda: None)  # takes long, and there is nothing to free
    monkeypatch.setattr(worker_module, "POLL_EVERY", 0.001)
    monkeypatch.setattr(PackSizes, "setup_of", lambda sizes, trial: made.built(trial))
    return made


@pytest.fixture
def engine(tmp_path, monkeypatch) -> Engine:
    made = Engine(tmp_path)
    monkeypatch.setattr(run_module, "start_engine", lambda asked, folder: made)
    monkeypatch.setattr(run_module, "prepare", lambda configs: None)
    monkeypatch.chdir(tmp_path.parent)
    return made
