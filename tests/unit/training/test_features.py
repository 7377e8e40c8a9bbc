"""Probes that read features train as those whose images go through the trunk in every epoch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import contents, largest_difference, train_together, trial_config

from lora_vit import build
from lora_vit.build import build_setup, with_features
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.errors import Interrupted
from lora_vit.stopping import StopRequest
from lora_vit.training.loop import Reporter, train_trials
from lora_vit.training.trial import Setup, TrialRun


def probe(folder: Path, *overrides: str) -> TrialConfig:
    return trial_config("lora=none", "optimizer.lr=0.1", "data.augment=flip", f"data.cache_dir={folder}/c", *overrides)


def of_images(config: TrialConfig) -> tuple[Setup, list[int]]:
    """What reads images, and how many of them its trunk sees from now on, pass by pass."""
    setup, seen = build_setup(config, Process()), []
    setup.build_model.frozen_trunk.register_forward_hook(lambda *call: seen.append(len(call[1][0])))
    return setup, seen


def go_on() -> None:
    """Nobody asks to stop."""


@pytest.mark.parametrize(
    ("each", "tolerance"),
    [
        ([["model.head_dropout=0.3", "optimizer.label_smoothing=0.1"]], 1e-10),
        ([["seed=1", "optimizer.class_weights=[1,2,3,4]"], ["seed=2", "model.head_dropout=0.5"], ["seed=1"]], 1e-10),
        ([["data.augment=none", "optimizer=sgd", "trainer.micro_batch=3"]], 1e-10),
        ([["trainer.precision=fp32"]], 1e-4),
        ([["trainer.precision=fp16"]], 1e-2),
        ([["trainer.precision=bf16"]], 1e-1),
    ],
    ids=["alone", "pack", "plain", "fp32", "fp16", "bf16"],
)
def test_a_probe_trains_as_through_its_trunk(each, tolerance, tmp_path):
    """A product may be rounded otherwise in a batch of another size, by a unit of the precision, and training adds."""
    configs = [probe(tmp_path, *overrides) for overrides in each]
    setup, seen = of_images(configs[0])
    through = train_together(configs, tmp_path / "through", setup)
    seen.clear()
    own = with_features(setup, configs[0], go_on)
    vectors = 2 if configs[0].data.augment == "flip" else 1
    assert sum(seen) == sum(len(ids) * (vectors if name == "train" else 1) for name, ids in setup.data.splits.items())
    seen.clear()
    found = train_together(configs, tmp_path / "found", own)
    assert seen == []
    for ours, theirs in zip(found, through, strict=True):
        assert largest_difference(ours, theirs) < tolerance
        assert tolerance > 1e-9 or ours.predicted.tolist() == theirs.predicted.tolist()
        assert ours.trial.record.parameters == theirs.trial.record.parameters
        assert ours.trial.record.cost.keys() - theirs.trial.record.cost.keys() == {"features_seconds"}


def test_resumed_it_reads_the_same_features(tmp_path):
    config, stop = probe(tmp_path, "model.head_dropout=0.3"), StopRequest()
    train_together([config], tmp_path / "whole", with_features(of_images(config)[0], config, go_on))
    (tmp_path / "stopped").mkdir()
    for stop.signum in (15, 0):  # after a step, never
        setup, seen = of_images(config)
        trial = TrialRun.open(config, tmp_path / "stopped", own := with_features(setup, config, go_on), {})
        with pytest.raises(Interrupted) if stop.signum else contextlib.nullcontext():
            train_trials([trial], own, Reporter(), stop)
        assert seen == []
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole/0")


def test_what_is_there_is_not_computed_again(tmp_path):
    """However that ended. What other splits need is added, what is damaged replaced, and the rest stays as it is."""
    every, few = probe(tmp_path), probe(tmp_path, "data.split_seed=1", "data.train_per_class=5")
    setup, seen = of_images(few)
    setup.most_evaluated = 8
    with pytest.raises(StopIteration):
        with_features(setup, few, iter([None, None]).__next__)
    assert seen == [2] * 4, "two parts of train, each as it is and mirrored"
    with_features(setup, few, go_on)
    assert sum(seen) == 20 + 20 + 2 * 20
    (file,) = (tmp_path / "c").glob("features-*.npy")
    kept = np.load(file)
    there = (kept != 0).any(2)[:, 0]  # [N, V]
    assert there.sum() == 80
    whole, _ = of_images(every)
    ids = whole.data.splits["train"]
    found = with_features(whole, every, go_on).samples.gather(ids)[0]
    later = np.load(file)
    assert all((later[n, 0, :, v] == kept[n, 0, :, v]).all() for n, v in np.argwhere(there))
    held = file.read_bytes()
    for damaged, computed in (
        *((held[:-400] + b"oops" + held[-396:], [60]), (held[:-8], [60])),  # a vector
        (b"oops", [60, 60, 20, 20]),
    ):
        file.write_bytes(damaged)
        again, seen = of_images(every)
        assert with_features(again, every, go_on).samples.gather(ids)[0].allclose(found, rtol=1e-9)
        assert seen == computed


@pytest.mark.parametrize("overrides", [
    ["model.mean=[0.5,0.5,0.5]"], ["model.image_size=24"], ["trainer.precision=fp32"], ["data.augment=none"],
    ["model.num_heads=4"], ["data.cache_size=20"],
], ids=" ".join)  # fmt: skip
def test_other_features_have_another_file(overrides, tmp_path):
    for count, config in enumerate([probe(tmp_path), probe(tmp_path, *overrides)], 1):
        with_features(of_images(config)[0], config, go_on)
        assert len([*(tmp_path / "c").glob("features-*.npy")]) == count


def test_images_are_read_where_there_are_no_features(tmp_path, monkeypatch, capsys):
    for overrides in (["lora=default"], ["lora=full"], ["data.augment=crop_flip"], ["data.augment=[flip,mixup]"]):
        config = probe(tmp_path, *overrides)
        assert with_features(setup := of_images(config)[0], config, go_on) is setup
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(build.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    config = probe(tmp_path)
    assert with_features(setup := of_images(config)[0], config, go_on) is setup
    (tmp_path / "c").rename(tmp_path / "d")
    (tmp_path / "c").touch()
    assert with_features(setup := of_images(config)[0], config, go_on) is setup
    lines = capsys.readouterr().out.splitlines()
    assert ["bytes" in line for line in lines] == [True, False]
    assert all(line.startswith("note: no features") and "data.cache_dir" in line for line in lines)
