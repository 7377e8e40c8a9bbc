"""Scripts are not imported by anything: each is started once, so that a name that has moved is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.py")), ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_a_script_starts(path, tmp_path):
    needs = {"mutation.py": "mutmut", "peft_pitfalls.py": "peft"}
    if path.name in needs:
        pytest.importorskip(needs[path.name])
    done = subprocess.run(
        [sys.executable, str(path), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
