"""The recipes of docs/extending.md, followed in a copy of the package: what they add can be trained with."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import run

from lora_vit.records import read_record

BLOCK = re.compile(r"```(?:python|yaml)\n# (\S+?)(?:: in (\w+))?\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def extended(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, its ``conf`` in it as when installed, and what the recipes add."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(project_root / "lora_vit", folder / "lora_vit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(project_root / "conf", folder / "lora_vit" / "conf")
    blocks = BLOCK.findall((project_root / "docs/extending.md").read_text())
    assert len(blocks) == 9
    for name, inside, text in blocks:
        path = folder / re.sub("^conf/", "lora_vit/conf/", name)
        if inside:
            before, table, after = path.read_text().partition(f"\n{inside} = {{\n")
            path.write_text(before + table + text + after)
        else:
            assert not path.exists()
            path.write_text(text)
    return folder


@pytest.mark.slow
def test_a_preset_sweeps_what_the_recipes_add_and_the_tracker_hears_of_each_trial(extended):
    environment = {"PYTHONPATH": str(extended)}
    own = ("sweep=depth", "tracker=[lines]", "model=vit_small", "data=stripes", "trainer.epochs=2")
    more = ("trainer.metric=low_recall", "sweep.name=depth", "sweep.pack_size=2")
    line = [sys.executable, "-m", "lora_vit.train", *own, *more]
    done = run(line, extended, environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (extended / "lines/depth.jsonl").read_text().splitlines()]
    names = [f"blocks={blocks}_seed={seed}" for blocks in ("[1]", "null") for seed in (0, 1)]
    assert sorted(line["trial"] for line in lines if line.get("status") == "completed") == names
    assert sum("val/accuracy" in line for line in lines) == 8
    assert "tensorboard" not in done.stdout
    records = [read_record(path.parent) for path in (extended / "outputs/sweeps/depth").glob("*/record.json")]
    assert [(record.status, sum(record.data[part] for part in ("train", "val", "test"))) for record in records] == (
        [("completed", 60)] * 4
    )
    tracked = {line["val/low_recall"] for line in lines if "val/low_recall" in line}
    assert {record.metrics["val_low_recall"] for record in records} <= tracked
    line = [sys.executable, "-m", "lora_vit.summarize", "depth", "--no-plots"]
    assert "has the highest val low recall" in run(line, extended, environment).stdout
