"""What a run leaves behind, that every setting matters, and the commands that follow."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, largest_difference, run_command, train_together, trial_config
from PIL import Image

from lora_vit import train
from lora_vit.files import read_rows
from lora_vit.records import PREDICTIONS, read_record


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run")
    own = ("trainer.precision=fp32", "optimizer.lr=3e-3", "data.augment=crop_flip", "hydra.run.dir=run")
    return folder / "run", run_command(*own, "trainer.metric=macro_f1", cwd=folder).stdout


def test_the_terminal(run):
    folder, out = run
    lines = out.splitlines()
    assert lines[-1] == f"Validation Accuracy: {read_record(folder).metrics['val_accuracy']:.2%}"
    assert lines[-2] == f"Validation Macro-F1: {read_record(folder).metrics['val_macro_f1']:.2%}"
    for start, count in {"data: 100 images": 1, "trial ": 1, "epoch ": 2, "tensorboard --logdir run/": 1}.items():
        assert sum(line.startswith(start) for line in lines) == count, start
    assert "effective scaling 8" in out


def test_the_folder(run):
    folder, _ = run
    files = "record.json metrics.jsonl timing.jsonl predictions.npz adapter.safetensors adapter.json train.log"
    assert {p.name for p in folder.iterdir()} == {*files.split(), ".hydra", ".lock", "tensorboard"}
    assert {p.name for p in (folder / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    record = read_record(folder)
    assert (record.status, record.metrics["epoch"], record.cost["pack_size"], record.data["train"]) == (
        "completed", 2, 1, 60)  # fmt: skip
    assert record.parameters["trainable"] == record.parameters["adapter"] + record.parameters["head"]
    assert record.parameters["head"] == 4 * 32 + 4
    assert record.cost["adapter_bytes"] == (folder / "adapter.safetensors").stat().st_size
    assert all(record.environment[key] for key in ("versions", "host", "device", "precision"))
    rows = read_rows(folder / "metrics.jsonl")
    assert [r["epoch"] for r in rows if r["kind"] == "epoch"] == [1, 2]
    assert sum(r["kind"] == "step" for r in rows) == 14
    found = np.load(folder / PREDICTIONS)
    for split in ("val", "test"):
        assert len(found[f"{split}.ids"]) == 20
        right = found[f"{split}.predicted"] == found[f"{split}.labels"]
        assert float(np.mean(right)) == record.metrics[f"{split}_accuracy"]


def test_the_default_folder_is_named_by_date_and_trial(tmp_path, monkeypatch):
    """Whether or not the id is known before the images have been read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which the command sets
    for name in ("a/1", "a/2", "a/3", "b/1", "b/2", "b/3"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * int(name[-1])).save(tmp_path / "images" / f"{name}.png")
    own = ("data=imagefolder", "data.root=images", "data.batch_size=1", "data.val_fraction=0.3", "data.cache_dir=cache")
    returned, own_train = [], train.train
    monkeypatch.setattr(train, "train", lambda *given: returned.append(own_train(*given)) or returned[-1])
    for overrides in ((), own, ("seed=1", *own), ("hydra.run.dir=TRIAL", "trainer.metric=worst_class_recall")):
        monkeypatch.setattr(sys, "argv", ["train", *SMALL, "trainer.epochs=1", *overrides])
        train.main()
    metrics = read_record(tmp_path / "TRIAL").metrics  # a name is left as it was given
    assert returned[-1] == metrics["val_worst_class_recall"] != metrics["val_accuracy"], "what Hydra's sweepers see"
    folders = sorted((tmp_path / "outputs/runs").iterdir())
    assert len(folders) == 3
    for folder in folders:
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d_\d\d-\d\d-\d\d_{read_record(folder).trial_id}", folder.name)


SETTINGS = """
    lora.rank=2 lora.alpha=8 lora.dropout=0.3 lora.targets=[q,v] lora.blocks=[1] lora.scaling=rslora lora.bias=all
    lora.bias=lora_only lora=none lora=full lora=dora
    optimizer.lr=2e-3 optimizer.weight_decay=0.3 optimizer.betas=[0.7,0.9] optimizer.eps=1e-3 optimizer.schedule=cosine
    optimizer.schedule=constant optimizer.warmup=0.5 optimizer.clip_norm=0.1 optimizer.label_smoothing=0.2
    model.head_dropout=0.5 model.image_size=24
    optimizer.head_lr=1e-2 optimizer.lora_b_lr_ratio=16 optimizer.class_weights=[1,2,3,4]
    optimizer.name=sgd data.augment=color_jitter
    data.augment=randaugment data.augment=random_erasing data.augment=mixup data.augment=[flip,cutmix]
    data.augment=flip data.augment=crop_flip data.batch_size=6 data.split_seed=1 data.train_per_class=5
    trainer.precision=fp32 trainer.precision=bf16 trainer.epochs=1 seed=1
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train_together([trial_config()], tmp_path_factory.mktemp("plain"))[0]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_changes_the_outcome(setting, plain, tmp_path):
    (other,) = train_together([trial_config(setting)], tmp_path)
    assert other.trial.record.status == "completed"
    assert other.trial.record.trial_id != plain.trial.record.trial_id
    assert other.losses[1:] != plain.losses[1:]


def test_settings_without_effect_on_the_numbers_keep_the_id_and_the_result(plain, tmp_path):
    (again,) = train_together([trial_config("trainer.checkpoint_every=1", f"data.cache_dir={tmp_path}")], tmp_path)
    assert again.trial.record.trial_id == plain.trial.record.trial_id
    assert largest_difference(again, plain) == 0


def test_a_diverging_run_fails_in_one_line(tmp_path, call):
    code, _, err = call("train", *SMALL, "optimizer.lr=1e200", f"hydra.run.dir={tmp_path}/run")
    assert (code, err.count("\n")) == (1, 1)
    assert "not finite at step" in err
    assert read_record(tmp_path / "run").status == "failed"
    assert "not finite" in (tmp_path / "run" / "train.log").read_text()
