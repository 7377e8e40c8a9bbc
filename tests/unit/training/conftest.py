"""Fixtures of the tests of training."""

from __future__ import annotations

import pytest
from stage import Stage


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Stage:
    return Stage(tmp_path, monkeypatch)
