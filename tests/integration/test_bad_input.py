"""Every wrong setting ends in one line that names the key and the remedy, with exit code 1 and nothing written."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
from made_up_records import make_trial

# overrides, words that the one line must hold
CASES = [
    ("lora.rnk=8", ["lora.rnk", "did you mean 'lora.rank'"]),
    ("optimiser.lr=1", ["optimiser.lr", "optimizer.lr"]),
    ("seeds=1", ["seeds", "did you mean 'seed'"]),
    ("+foo=1", ["foo"]),
    ("+lora.rnk=1", ["lora.rnk", "lora.rank"]),
    ("lora.rank=0", ["lora.rank=0", "from 1 up"]),
    ("lora.rank=-3", ["lora.rank=-3"]),
    ("lora.rank=769", ["lora.rank=769", "768"]),
    ("lora.rank=eight", ["lora.rank", "eight"]),
    ("lora.rank=2.5", ["lora.rank", "2.5"]),
    ("lora.rank=2,4", ["lora.rank=2,4", "add -m"]),
    ("lora.rank=range(1,4)", ["lora.rank=range(1,4)", "add -m"]),
    ("sweep.dry_run=true", ["sweep.dry_run=true", "no effect", "add -m"]),
    ("hydra.sweep.dir=x", ["hydra.sweep.dir=x", "no effect", "add -m"]),
    ("hydra/launcher=basic", ["hydra/launcher=basic", "no effect", "add -m"]),
    ("hydra.rum.dir=x", ["hydra.rum.dir", "--cfg hydra"]),
    ("hydra.sweper.x=1", ["hydra.sweper.x", "hydra."]),
    ("lora.rank=null", ["lora.rank", "lora=none"]),
    ("lora.alpha=0", ["lora.alpha=0", "above 0"]),
    ("lora.alpha=-1", ["lora.alpha=-1"]),
    ("lora.alpha=nan", ["lora.alpha=nan"]),
    ("lora.dropout=1", ["lora.dropout=1", "[0, 1)"]),
    ("lora.dropout=-0.1", ["lora.dropout=-0.1"]),
    ("lora.targets=[q,w]", ["lora.targets=w", "q, k, v, o, fc1, fc2"]),
    ("lora.targets=[]", ["lora.targets=[]", "lora=none"]),
    ("lora.targets=[q,q]", ["each once"]),
    ("lora.blocks=[12]", ["lora.blocks=[12]", "0 .. 11"]),
    ("lora.blocks=[]", ["lora.blocks=[]", "null"]),
    ("lora.scaling=rank", ["lora.scaling=rank", "rslora"]),
    ("lora.bias=some", ["lora.bias=some", "lora_only"]),
    ("lora=none lora.rank=8", ["lora.rank=8", "no effect"]),
    ("lora=full lora.dropout=0.1", ["lora.dropout=0.1", "no effect"]),
    ("lora=qkv", ["qkv", "attention"]),
    ("model=vit_b_61", ["vit_b_61", "did you mean 'vit_b_16'"]),
    ("model.image_size=225", ["model.image_size=225", "224", "240"]),
    ("model.head_dropout=1.0", ["model.head_dropout=1.0"]),
    ("model.weights=IMAGENET_V9", ["IMAGENET_V9", "IMAGENET1K_V1"]),
    ("model.weights=missing.pth", ["missing.pth", "check the path"]),
    ("data=imagenett", ["imagenett", "imagenet"]),
    ("data=imagefolder", ["data.root"]),
    ("data=imagefolder data.root=nowhere", ["nowhere", "not a folder"]),
    ("data.batch_size=0", ["data.batch_size=0"]),
    ("data=imagefolder data.root=null", ["data.root has no value", "data=imagefolder"]),
    ("data=imagefolder data.root=", ["data.root has no value", "data=imagefolder"]),
    ("data=imagefolder data.root=~nobody9/x", ["data.root", "in quotes"]),
    ("data=imagefolder data.root='~nobody9/x'", ["~nobody9/x is not a folder"]),
    ("data=digits model.weights='~nobody9/x.pth'", ["~nobody9/x.pth cannot be read"]),
    ("data.augment=mixup", ["data.augment=mixup", "crop_flip"]),
    ("data.val_fraction=0.6 data.test_fraction=0.5", ["leave nothing", "below 1"]),
    ("data.val_fraction=0", ["data.val_fraction=0"]),
    ("data.train_per_class=0", ["data.train_per_class=0", "null"]),
    ("data=digits data.official_val=true", ["data.official_val", "no effect"]),
    ("optimizer.lr=0", ["optimizer.lr=0"]),
    ("optimizer.lr=inf", ["optimizer.lr=inf"]),
    ("optimizer.lr=fast", ["optimizer.lr", "fast"]),
    ("optimizer.weight_decay=-1", ["optimizer.weight_decay=-1"]),
    ("optimizer.betas=[0.9]", ["optimizer.betas=[0.9]", "two numbers"]),
    ("optimizer.betas=[0.9,1.0]", ["optimizer.betas"]),
    ("optimizer.schedule=step", ["optimizer.schedule=step", "cosine"]),
    ("optimizer.warmup=5", ["optimizer.warmup=5", "fraction"]),
    ("optimizer.clip_norm=0", ["optimizer.clip_norm=0", "null"]),
    ("optimizer.label_smoothing=1", ["optimizer.label_smoothing=1"]),
    ("trainer.epochs=0", ["trainer.epochs=0"]),
    ("trainer.precision=fp16", ["trainer.precision=fp16", "bf16"]),
    ("trainer.devices=two", ["trainer.devices=two", "auto"]),
    ("trainer.accelerator=tpu", ["trainer.accelerator=tpu", "cpu"]),
    ("trainer.resume=never", ["trainer.resume=never", "restart"]),
    ("seed=-1", ["seed=-1"]),
    ("lora.rank=[1", ["lora.rank=[1"]),
]


@pytest.mark.parametrize(("overrides", "words"), CASES, ids=[c[0] for c in CASES])
def test_wrong_setting(overrides, words, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which the command sets
    code, out, err = call("train", *overrides.split(" "), "hydra.run.dir=run")
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert [word for word in words if word not in line] == [], line
    assert list(tmp_path.iterdir()) == []


def ended(line: list[str], cwd, **env: str) -> subprocess.CompletedProcess[str]:
    """A command that has ended, whatever it came to."""
    env = {**os.environ, **env}
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


PYTHON = [sys.executable, "-m"]


@pytest.mark.parametrize("overrides", ["lora.rank=0", "lora.rnk=8", "model=vit_b_61"])
def test_the_command_itself_prints_one_line_and_needs_no_torch_for_it(overrides, tmp_path):
    (tmp_path / "no").mkdir()
    (tmp_path / "no/torch.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "here").mkdir()
    done = ended([*PYTHON, "lora_vit.train", overrides], tmp_path / "here", PYTHONPATH=str(tmp_path / "no"))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("error: ")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("overrides", ["lora.rank=0", "lora.rnk=8"])
def test_full_error_shows_the_traceback(overrides, tmp_path):
    done = ended([*PYTHON, "lora_vit.train", overrides], tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_command_without_open_streams_or_a_terminal_for_its_signs(tmp_path):
    make_trial(tmp_path / "s")
    done = ended([*PYTHON, "lora_vit.summarize", "s", "--no-plots"], tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2013" in done.stdout
    closed = f"exec {shlex.quote(sys.executable)} -m lora_vit.sweep s <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", closed], cwd=tmp_path, timeout=120, check=False).returncode == 0


def test_a_command_whose_reader_or_folder_is_gone(tmp_path):
    line = shlex.join([*PYTHON, "lora_vit.train", "--cfg", "job"])
    done = ended(["bash", "-c", f"{line} | true"], tmp_path, PYTHONUNBUFFERED="1")
    assert (done.returncode, done.stderr) == (0, "")
    done = ended(["sh", "-c", f"mkdir gone; cd gone; rmdir ../gone; exec {line}"], tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the folder that this is started in is gone")
