"""Fixtures of the tests of training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from paper import Paper, Stage

from lora_vit.training import loop


@pytest.fixture
def stage(monkeypatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(loop, "Pack", lambda trials, setup: Paper(trials, setup, stage))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: stage.now))
    return stage
