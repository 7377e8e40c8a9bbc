"""Trials composed the quick way are Hydra's, and the presets are what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SMALL
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode

from lora_vit.compose import from_omegaconf, register_schema
from lora_vit.config import trial_id

register_schema()
from hydra.core.plugins import Plugins  # noqa: E402  (after the plugin's folder is on the path)

GRID = [
    ["lora.rank=2", "optimizer.lr=1e-3", "seed=3"],
    ["lora.rank=8", "lora.alpha=${rank_times:2}"],
    ["lora.targets=[q,v]", "lora.blocks=[0]", "optimizer.betas=[0.8,0.9]"],
    ["lora=none", "lora.rank=4"],
    ["lora=full", "optimizer.lr=1e-4"],
    ["lora=mlp", "lora.dropout=0.1", "optimizer.clip_norm=1"],
    ["experiment=quickstart", "trainer.epochs=3"],
    [
        "model.head_dropout=0.2",
        "data=digits",
        "data.cache_size=null",
        "data.train_per_class=5",
        "optimizer.clip_norm=null",
    ],
]
PRESETS = {"quickstart": 24, "rank_alpha_dropout": 81, "rank_lr": 45, "targets": 45, "baselines": 45}


@pytest.fixture
def loader():
    Plugins.instance()._initialize()
    from lora_vit.compose import Composer

    found = ConfigLoaderImpl(create_config_search_path("pkg://lora_vit.conf"))
    master = found.load_configuration("config", list(SMALL), RunMode.MULTIRUN)
    return Composer(found, master)


def test_the_quick_way_gives_hydras_config(loader):
    for overrides in GRID:
        line = [*SMALL, *overrides]
        quick, exact = loader(line), loader.exactly(line)
        assert quick == exact, overrides
        assert trial_id(from_omegaconf(quick, in_sweep=True)) == trial_id(from_omegaconf(exact, in_sweep=True))
    assert len({trial_id(from_omegaconf(loader([*SMALL, *o]), in_sweep=True)) for o in GRID}) == len(GRID)


def test_alpha_follows_the_rank(loader):
    trial = from_omegaconf(loader([*SMALL, "lora.rank=8", "lora.alpha=${rank_times:2}"]))
    assert trial.lora.alpha == 16.0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "trials"), PRESETS.items())
def test_presets(name, trials, tmp_path, project_root):
    text = (project_root / "conf" / "sweep" / f"{name}.yaml").read_text().splitlines()
    assert text[:2] == ["# @package _global_", f"# python -m lora_vit.train sweep={name}"]
    assert "?" in text[2]
    line = [sys.executable, "-m", "lora_vit.train", f"sweep={name}", "sweep.dry_run=true", "sweep.pack_size=1"]
    small = ["experiment=quickstart", "trainer.accelerator=cpu"]
    done = subprocess.run([*line, *small], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"plan of outputs/sweeps/{name}-[0-9a-f]{{6}}: {trials} trials", done.stdout), done.stdout
    assert list(Path(tmp_path).iterdir()) == []
