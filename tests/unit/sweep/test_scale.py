"""What a sweep costs beside the training does not grow with its size (scripts/bench/scale.py has it at full size)."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts/bench/scale.py"


@pytest.mark.slow
def test_operations_a_trial(tmp_path):
    """Four times the trials on four times the workers: at most 30 operations a trial, and hardly more for each.

    S9: the command that follows lists the claims, and opens the plan and a file of each worker. How often workers meet
    at one claim depends on the machine, and only ever adds operations: the fewest of three runs count.
    """
    found: dict[int, float] = {}
    for trials, workers in ((100, 2), (400, 8)) * 3:
        if len(found) == 2 and found[400] < min(30, 1.5 * found[100]):
            break
        command = [sys.executable, str(SCRIPT), "--trials", str(trials), "--workers", str(workers)]
        done = subprocess.run([*command, "--pack", "5", "--seconds", "0.02", "--milliseconds", "0"], cwd=tmp_path,
                              capture_output=True, text=True, check=True)  # fmt: skip
        figures = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
        found[trials] = min(found.get(trials, math.inf), float(figures["operations a trial"]))
        assert float(figures["operations a look"]) < workers + 3 * trials / 100 + 5
        assert float(figures["names a trial"]) < 3.5, "a claim, its end, the trial"
    assert 5 < found[400] < 30
    assert found[400] < 1.5 * found[100]
