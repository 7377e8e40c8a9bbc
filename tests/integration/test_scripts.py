"""Scripts are not imported by anything: each is started once, so that a name that has moved is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import paint

SCRIPTS = Path(__file__).parents[2] / "scripts"
pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, cwd: Path) -> str:
    line = [sys.executable, str(SCRIPTS / script), *arguments]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.py")), ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_a_script_starts(path, tmp_path):
    needs = {"mutation.py": "mutmut", "peft_pitfalls.py": "peft"}
    if path.name in needs:
        pytest.importorskip(needs[path.name])
    run(str(path.relative_to(SCRIPTS)), "--help", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_data_is_prepared_for_training(tmp_path):
    for name in ("cat", "dog"):
        for i in range(10):
            paint(tmp_path / "pets" / name / f"{i}.png", i)
    arguments = ("imagefolder", "--root", "pets", "--cache-dir", "cache")
    told = run("prepare_data.py", *arguments, "--cache-size", "16", cwd=tmp_path)
    assert "imagefolder: 20 images of 16x16 pixels in 2 classes\n  val                  2\n" in told
    assert "imagefolder: 20 images of 256x256 pixels" in run("prepare_data.py", *arguments, cwd=tmp_path)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_the_data_path_is_measured(tmp_path):
    folder = tmp_path / "data" / "tiny-imagenet-200"
    for wnid in ("n1", "n2"):
        for i in range(80):
            paint(folder / "train" / wnid / "images" / f"{i}.JPEG", i, (64, 64))
    (folder / "wnids.txt").write_text("n1\nn2\n")
    run("bench/data.py", "data", "--rounds", "1", "--batches", "1", "--json", "out.json", cwd=tmp_path)
    measured = json.loads((tmp_path / "out.json").read_text())
    assert measured["facts"]["images"] == 160
    assert len(measured["rows"]) == 8
    assert all(row["max images/s"] > 0 for row in measured["rows"])
