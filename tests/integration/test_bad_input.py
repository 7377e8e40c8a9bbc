"""Every wrong setting ends in one line that names the key and the remedy, with exit code 1 and nothing written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# overrides, words that the one line must hold
CASES = [
    ("lora.rnk=8", ["lora.rnk", "did you mean 'lora.rank'"]),
    ("+foo=1", ["foo"]),
    ("+lora.rnk=1", ["lora.rnk", "lora.rank"]),
    ("lora.rank=0", ["lora.rank=0", "from 1 up"]),
    ("lora.rank=eight", ["lora.rank=eight is impossible", "whole number from 1 up, or lora=none"]),
    ("lora.rank=2.5", ["lora.rank=2.5 is impossible", "whole number from 1 up"]),
    ("lora.rank=[1]", ["lora.rank=[1] is impossible", "whole number from 1 up"]),
    ("seed=1.5", ["seed=1.5 is impossible", "whole number in [0, "]),
    ("optimizer.lr=null", ["optimizer.lr=null is impossible", "a learning rate above 0"]),
    ("optimizer.schedule=[linear]", ["optimizer.schedule=[...] is impossible: give one of linear, cosine, constant"]),
    ("optimizer.betas=[a,b]", ["optimizer.betas[0]=a is impossible: give two numbers in [0, 1)"]),
    ("trainer.compile=maybe", ["trainer.compile=maybe is impossible: give true or false"]),
    ("trainer.checkpoint_activations=2", ["trainer.checkpoint_activations=2 is impossible: give true or false"]),
    ("data.augment=[[mixup]]", ["data.augment=", "mixup"]),
    ("lora.rank=2,4", ["lora.rank=2,4", "add -m"]),
    ("sweep.dry_run=true", ["sweep.dry_run=true", "no effect", "add -m"]),
    ("hydra.sweep.dir=x", ["hydra.sweep.dir=x", "no effect", "add -m"]),
    ("hydra/launcher=basic", ["hydra/launcher=basic", "no effect", "add -m"]),
    ("hydra.rum.dir=x", ["hydra.rum.dir", "--cfg hydra"]),
    ("lora=none lora.rank=8", ["lora.rank=8", "no effect"]),
    ("lora=qkv", ["qkv", "attention"]),
    ("model=vit_b_61", ["vit_b_61", "did you mean 'vit_b_16'"]),
    ("model.weights=IMAGENET_V9", ["IMAGENET_V9", "IMAGENET1K_V1"]),
    ("model.weights=missing.pth", ["missing.pth", "check the path"]),
    ("data=imagefolder", ["data.root"]),
    ("data=imagefolder data.root=nowhere", ["nowhere", "not a folder"]),
    ("data=imagefolder data.root=null", ["data.root has no value", "data=imagefolder"]),
    ("data=imagefolder data.root=", ["data.root has no value"]),
    ("hydra.run.dir=", ["hydra.run.dir has no value", "leave it out"]),  # not the current folder
    ("data=imagefolder data.root=~nobody9/x", ["data.root", "in quotes"]),
    (r"data.group=^(\d+)_", ["data.group", r"'^(\d+)_'"]),
    ("data=imagefolder data.root='~nobody9/x'", ["~nobody9/x is not a folder"]),
    ("data=digits model.weights='~nobody9/x.pth'", ["~nobody9/x.pth cannot be read"]),
    ("tracker=[tensorboard,mlfow]", ["tracker/mlfow", "does not exist", "did you mean 'mlflow'?"]),
    ("tracker.mlflow.uri=x", ["tracker.mlflow.uri", "tracker=[tensorboard,mlflow]"]),
    ("tracker=[tensorboard,mlflow] tracker.mlflow.url=x", ["tracker.mlflow.url"]),
    ("+tracker.mine._target_=nowhere.Mine", ["tracker.mine._target_=nowhere.Mine", "'nowhere'", "module.Class"]),
    ("+tracker.mine=5", ["tracker.mine._target_=null", "module.Class"]),
    ("+tracker.tensorboard.speed=5", ["tracker.tensorboard={'speed': 5}", "TensorBoard", "tracker.tensorboard.KEY"]),
    ("optimizer.lr=fast", ["optimizer.lr=fast is impossible", "a learning rate above 0"]),
    ("lora.rank=[1", ["lora.rank=[1"]),
    ("data=null", ["'null'", "leave it out", "--help"]),
    ("~lora.rank", ["lora.rank", "cannot be removed"]),
    ("lora.targets=on", ["lora.targets", "[a,b]"]),
    ("lora.rank=8\r", [r"'lora.rank=8\r'"]),
    ("--lora.rank=8", ["--lora.rank=8", "without dashes"]),
    ("--config-name=experiment/quickstart", ["leave --config-name out"]),
    ("--cfg job lora.rank=1,2 -m", ["leave -m out"]),
    ("data=fake model=vit_tiny data.batch_size=8 trainer.accelerator=cpu trainer.devices=3", ["batch_size=8"]),
]


@pytest.mark.parametrize(("overrides", "words"), CASES, ids=[c[0] for c in CASES])
def test_wrong_setting(overrides, words, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("train", *overrides.split(" "), "hydra.run.dir=run")
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert [word for word in words if word not in line] == [], line
    assert list(tmp_path.iterdir()) == []


HEAD = "# @package _global_\n"
FILES = [  # of one's own: its group, its content, words that the one line must hold
    ("experiment", "\ufeff" + HEAD + "lora: {rank: 8}", ["experiment/mine.yaml", "# @package _global_", "byte order"]),
    ("experiment", "lora: {rank: 8}", ["experiment/mine.yaml", "first line", "# @package _global_"]),
    ("experiment", HEAD + "lora: {rnk: 8}", ["experiment/mine.yaml", "lora.rnk", "lora.rank"]),
    ("experiment", HEAD + "lora: {rank: 1e3}", ["experiment/mine.yaml", "lora.rank", "1000.0"]),
    ("experiment", HEAD + "lora: {targets: on}", ["experiment/mine.yaml", "lora.targets", "[a,b]"]),
    ("experiment", HEAD + "lora:\n\trank: 8", ["experiment/mine.yaml, line 3", "'\\t'"]),
    ("experiment", HEAD + "lora: [8", ["experiment/mine.yaml, line 2"]),
    ("experiment", (HEAD + "lora: {rank: 8}").encode("utf-16"), ["experiment/mine.yaml", "UTF-8"]),
    ("experiment", (HEAD + "# \xe9").encode("latin-1"), ["experiment/mine.yaml", "UTF-8"]),
    ("lora", "rank: 8\nalpha: 16", ["lora.method", "`defaults: [NAME]`"]),
]


@pytest.mark.parametrize(("group", "content", "words"), FILES)
def test_a_file_of_ones_own(group, content, words, tmp_path, monkeypatch, call):
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    code, out, err = call("train", "--config-dir=.", "model=vit_tiny", "data=fake", f"{group}=mine")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert [word for word in words if word not in err] == [], err


@pytest.mark.parametrize("overrides", ["lora.rank=0", "lora.rnk=8"])
def test_the_command_itself_prints_one_line_and_needs_no_torch_for_it(overrides, tmp_path):
    """With a traceback on demand."""
    (tmp_path / "no").mkdir()
    (tmp_path / "no/torch.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "here").mkdir()
    for on_demand in ("0", "1"):
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "no"), "HYDRA_FULL_ERROR": on_demand}
        done = subprocess.run([sys.executable, "-m", "lora_vit.train", overrides], cwd=tmp_path / "here", env=env,
                              capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: " if on_demand == "0" else "Traceback")
        assert (len(done.stderr.splitlines()) > 1) == (on_demand == "1")
    assert list((tmp_path / "here").iterdir()) == []
