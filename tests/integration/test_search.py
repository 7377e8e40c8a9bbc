"""Searches as commands: without Optuna, and one that is killed, resumed and raced."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from helpers import command, run_command, start, wait_until

from lora_vit import api
from lora_vit.records import read_record

pytest.importorskip("optuna", minversion="4", reason="needs pip install 'lora_vit[search]'")
SPACE = ("lora.rank=choice(1,2,4)", "optimizer.lr=tag(log,interval(1e-4,1e-2))")


@pytest.mark.slow
@pytest.mark.parametrize("version", [None, "3.6.1"])
def test_without_the_extra_one_line_says_what_to_install(version, tmp_path):
    module = "raise ModuleNotFoundError(\"No module named 'optuna'\", name='optuna')"
    (tmp_path / "optuna.py").write_text(module if version is None else f"__version__ = {version!r}")
    (place := tmp_path / "place").mkdir()
    done = run_command("-m", *SPACE, "sweep.trials=3", cwd=place, code=1, env={"PYTHONPATH": str(tmp_path)})
    assert done.stderr.startswith("error: sweep.trials=3 needs ")
    assert done.stderr.endswith("pip install 'lora_vit[search]'\n")
    assert done.stderr.count("\n") == 1
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_real_search_that_was_killed_resumes_and_its_commands_race_the_best(tmp_path):
    line = command("-m", "lora.alpha=8", *SPACE, "sweep.trials=8", "sweep.pack_size=2", "sweep.workers=1",
                   "sweep.name=s", "trainer.epochs=3")  # fmt: skip
    folder = tmp_path / "outputs/sweeps/s"

    def finished() -> dict[str, Any]:
        records = [read_record(path.parent) for path in folder.glob("*/record.json")]
        return {record.trial_id: record.finished for record in records if record.status == "completed"}

    first = start(line, tmp_path)
    wait_until(lambda: len(finished()) >= 3, first, 240, 0.02)
    first.kill()
    first.communicate()
    before = finished()
    assert len(before) < 8
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    after = finished()
    assert len(after) == 8
    assert after.items() >= before.items(), "none is trained twice"
    shell = done.stdout.partition("(each command joins it):\n")[2].partition("\noutputs/")[0]
    shell = shell.replace("python -m", f"{sys.executable} -m").replace("margin=0.5", "margin=50")  # quicker
    raced = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert raced.returncode == 0, raced.stdout + raced.stderr
    race = api.summarize(f"{folder}-best").race
    assert race is not None
    assert (len(race.cells), race.first, race.ended) == (3, 1, True)
