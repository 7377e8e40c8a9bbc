"""Scripts are not imported by anything: each is started once, so that a name that has moved is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SUMMARY = SCRIPTS / "bench" / "summary.py"
OTHERS = sorted({*SCRIPTS.rglob("*.py")} - {SUMMARY})


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_a_script_starts(path, tmp_path):
    needs = {"mutation.py": "mutmut", "peft_pitfalls.py": "peft"}
    if path.name in needs:
        pytest.importorskip(needs[path.name])
    run(path, tmp_path, "--help")


@pytest.mark.slow
def test_the_time_of_a_summary_is_measured(tmp_path):
    """It makes records that are believed."""
    *_, row = run(SUMMARY, tmp_path, "--records", "7").splitlines()
    assert row.startswith("| 7 | 3 | ")


def run(path: Path, cwd: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, path, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not list(cwd.iterdir())
    return done.stdout
