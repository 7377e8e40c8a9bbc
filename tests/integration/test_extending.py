"""The recipes of docs/extending.md, followed in a copy of the package: what they add can be trained with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = re.compile(r"```(?:python|yaml)\n# (\S+?)(: in DATASETS)?\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def extended(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, its ``conf`` in it as when installed, and what the recipes add."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(project_root / "lora_vit", folder / "lora_vit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(project_root / "conf", folder / "lora_vit" / "conf")
    blocks = BLOCK.findall((project_root / "docs/extending.md").read_text())
    assert len(blocks) == 7
    for name, inside, text in blocks:
        path = folder / re.sub("^conf/", "lora_vit/conf/", name)
        if inside:
            before, row, after = path.read_text().partition('    "fake": DataSet')
            path.write_text(before + text + row + after)
        else:
            assert not path.exists()
            path.write_text(text)
    return folder


def train(folder: Path, *overrides: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "lora_vit.train", "model=vit_small", "data=stripes", "trainer.epochs=2", *overrides]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_data_set_a_backbone_and_a_tracker_are_used(extended):
    out = train(extended, "experiment=tracked", "seed=3", "hydra.run.dir=run")
    assert "data: 60 images of 2 classes" in out
    assert re.search(r"TRACKED stripes 3 [01]\.\d+", out)


@pytest.mark.slow
def test_a_preset_sweeps_and_the_tracker_hears_of_each_trial(extended):
    out = train(extended, "sweep=depth", "experiment=tracked", "sweep.name=depth", "sweep.pack_size=2")
    assert out.count("TRACKED stripes") == 4
    assert len(list((extended / "outputs/sweeps/depth").glob("*/record.json"))) == 4
