"""The documented Python API: its examples run, in a script without a guard and from standard input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import trial_config
from plain_trials import SMALL

import lora_vit
from lora_vit import ConfigError, api
from lora_vit.config import trial_id

WHAT_STAYS = """
import logging, os, random, signal, sys
import numpy, torch
import lora_vit.api
logging.getLogger().addHandler(logging.NullHandler())
print("RUNS", flush=True)
def state():
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    main = vars(sys.modules["__main__"])
    return dict(
        cwd=os.getcwd(), argv=list(sys.argv), environ=dict(os.environ), hook=sys.excepthook, main=main.get("__file__"),
        spec=main.get("__spec__"), handlers={s: signal.getsignal(s) for s in range(1, 30)},
        blocked=signal.pthread_sigmask(signal.SIG_BLOCK, []), generators=(random.getstate(),
        torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()), threads=torch.get_num_threads(),
        logging=(logging.getLogger().handlers[:], logging.getLogger().level, logging.root.manager.disable),
        hydra=(GlobalHydra.instance().hydra, id(ConfigStore.instance().repo["hydra"]["config.yaml"])))
before = state()
"""
AND_STAYED = """
for name, value in state().items():
    if name == "environ":  # what packages add for themselves when they are first used does not count
        assert "HYDRA_FULL_ERROR" not in value
        value = {key: value.get(key) for key in before[name]}
    assert value == before[name], (name, before[name], value)
print("AS IT WAS")
"""


def examples(project_root: Path) -> str:
    found = re.findall(r"```python\n(.*?)```", (project_root / "docs/python.md").read_text(), flags=re.DOTALL)
    assert len(found) == 4
    return "\n".join(found).replace("trainer.epochs=2", "trainer.epochs=1").replace("seed=0,1,2", "seed=0,1")


def run(line: list[str], cwd: Path, text: str | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=cwd, input=text, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_examples_in_a_script_leave_the_process_as_it_was(project_root, tmp_path):
    (tmp_path / "script.py").write_text(WHAT_STAYS + examples(project_root) + AND_STAYED)
    out = run([sys.executable, "script.py"], tmp_path)
    assert out.count("RUNS") == 1, "workers do not run the script again"
    assert out.count("'completed', ") == 3
    assert "model.load_state_dict(safetensors.torch.load_file('merged.safetensors'))" in out
    assert "lora.rank=0 is impossible" in out
    assert "AS IT WAS" in out


@pytest.mark.slow
def test_from_standard_input_twice_in_one_process_and_in_two_processes(tmp_path):
    script = f"""
from lora_vit import api
print("RUNS", flush=True)
small = {list(SMALL)!r} + ["trainer.epochs=1"]
configs = [api.compose([*small, f"lora.rank={{rank}}"]) for rank in (2, 1)]
configs[1].optimizer.lr = 0.5
for place, trials in (("a=1", [*small, "lora.rank=1,2"]), ("b (2)", configs)):
    sweep = api.sweep(trials, folder=place, workers=2, pack_size=1)
    print("FOUND", sweep.folder, [(r.config["lora"]["rank"], r.config["optimizer"]["lr"]) for r in sweep.records])
record = api.train(api.compose([*small, "trainer.devices=2"]), "two")
print("TOGETHER", record.environment["world_size"])
assert api.train(api.compose(small), "two").finished == record.finished
"""
    out = run([sys.executable, "-"], tmp_path, script)
    assert out.count("RUNS") == 1
    assert "FOUND a=1 [(1, 0.001), (2, 0.001)]\n" in out
    assert "FOUND b (2) [(2, 0.001), (1, 0.5)]\n" in out
    assert "TOGETHER 2" in out


SWEEP = [*SMALL, "seed=0,1"]


@pytest.mark.parametrize(
    ("function", "given", "options", "words"),
    [
        (api.compose, [*SMALL, "data.root=2024_11"], {}, "data.root=2024_11 is read as 202411"),
        (api.compose, [*SMALL, "lora.rank=[1"], {}, "cannot read the override"),
        (api.compose, [*SMALL, "lora.rank=1\r"], {}, "lora.rank=1): end lines without \\r"),
        (api.sweep, SWEEP, {"dry_run": True}, "sweep.dry_run=true and sweep.wait=false are for the command"),
        (api.sweep, SWEEP, {"pack_sise": 4}, "did you mean 'sweep.pack_size'"),
        (api.sweep, [*SWEEP, "-m"], {}, "-m"),
        (api.sweep, [api.compose(SMALL)], {}, "sweep() needs a folder for trials that are given as configs"),
    ],
)
def test_what_is_wrong_is_raised(function, given, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(words)):
        function(given, **options)
    assert list(tmp_path.iterdir()) == []


def test_groups_of_ones_own_are_found_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "my conf, (1)" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\nlora:\n  rank: 3\n")
    given = [*SMALL, "experiment=mine"]
    assert api.compose(given, config_dir=own.parent).lora.rank == 3
    assert api.compose([*given, "lora.alpha=5"], "my conf, (1)").lora.alpha == 5
    with pytest.raises(ConfigError, match=r"dry_run=true"):  # all is composed by then
        api.sweep([*given, "seed=0,1"], config_dir=own.parent, dry_run=True)
    for call in (api.compose, api.sweep):
        with pytest.raises(ConfigError, match=r"'experiment/mine' does not exist"):
            call(given)
        with pytest.warns(UserWarning, match="path=.*none is not available"), pytest.raises(ConfigError, match="'exp"):
            call(given, config_dir="none")


def test_under_torchrun_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = api.compose(SMALL)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for call in (lambda: api.train(config, "run"), lambda: api.sweep([*SMALL, "seed=0,1"])):
        with pytest.raises(ConfigError, match="without torchrun"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lora.dropout", 1.5, "lora.dropout=1.5 is impossible"),
        ("lora.rnk", 8, "lora.rnk"),
        ("lora.rank", "four", "lora.rank=four is impossible: give a whole number"),
    ],
)
def test_a_field_that_was_changed_is_checked_before_anything_is_trained(key, value, words, tmp_path):
    config = api.compose(SMALL)
    section, _, name = key.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)
    with pytest.raises(ConfigError, match=re.escape(words)):
        api.train(config, tmp_path / "trial")
    assert list(tmp_path.iterdir()) == []


def test_it_is_found_lazily_and_composes_what_the_command_does():
    assert lora_vit.api is api
    assert "api" in dir(lora_vit)
    ranks = [*SMALL, "lora.rank=3"]
    assert trial_id(api.compose(ranks)) == trial_id(trial_config("lora.rank=3"))
    assert api.compose([*ranks, "data.root='2024_11'"]).data.root == str(Path("2024_11").absolute())
    for given, is_kept in {"cache": str(Path("cache").absolute()), "~/cache": "~/cache", "/cache": "/cache"}.items():
        assert api.compose([*ranks, f"data.cache_dir='{given}'"]).data.cache_dir == is_kept
