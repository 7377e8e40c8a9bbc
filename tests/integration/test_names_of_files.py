"""Commands with names of files and folders that mean something else to Hydra."""

from __future__ import annotations

import os
import subprocess

import pytest
from helpers import command, run_command
from omegaconf import OmegaConf

from lora_vit.records import read_record

pytestmark = pytest.mark.slow


def test_a_run_goes_on_by_its_recorded_overrides(tmp_path):
    folder = "ru n=(1),ü$x"
    done = run_command(f"hydra.run.dir={folder}", "data.root=2024_11", "data.cache_dir=[c]", cwd=tmp_path)
    assert f"tensorboard --logdir '{folder}'/tensorboard\n" in done.stdout
    record = read_record(tmp_path / folder)
    assert (record.config["data"]["root"], record.config["data"]["cache_dir"]) == (
        str(tmp_path / "2024_11"),
        str(tmp_path / "[c]"),
    )
    overrides = OmegaConf.to_container(OmegaConf.load(tmp_path / folder / ".hydra/overrides.yaml"))
    again = [*command()[:3], *overrides, f"hydra.run.dir={folder}"]
    subprocess.run(again, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert read_record(tmp_path / folder).finished == record.finished


def test_what_the_terminals_encoding_lacks_is_escaped(tmp_path):
    """As of cp1252 or of Latin-1, which has no dash of the summary's tables either."""
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = run_command("-m", "sweep.name=猫", "seed=0,1", "trainer.epochs=1", cwd=tmp_path, env=ascii_only)
    assert "python -m lora_vit.summarize 'outputs/sweeps/\\u732b'\n" in done.stdout
    for module, told in (
        ("summarize", "Report: outputs/sweeps/\\u732b/"),
        ("sweep", "outputs/sweeps/\\u732b: 2 trials"),
    ):
        line = [*command(module=f"lora_vit.{module}")[:3], "outputs/sweeps/猫"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **ascii_only})
        assert (done.returncode, told in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("launcher", ["packed", "joblib"])
def test_a_sweep_under_any_launcher(launcher, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher" if launcher != "packed" else "hydra")
    own = (f"hydra/launcher={launcher}", "sweep.name=2024_11", "data.root='a,b'", "data.cache_dir=it's (1)")
    run_command("-m", *own, "lora.rank=1,2", "trainer.epochs=1", cwd=tmp_path)
    records = [read_record(p.parent) for p in (tmp_path / "outputs/sweeps/2024_11").glob("*/record.json")]
    assert [r.status for r in records] == ["completed"] * 2
    assert {(r.config["data"]["root"], r.config["data"]["cache_dir"]) for r in records} == {
        (str(tmp_path / "a,b"), str(tmp_path / "it's (1)"))
    }
