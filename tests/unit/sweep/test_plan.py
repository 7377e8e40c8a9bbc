"""What may share a pack, how a sweep is called, and where its trials stand."""

from __future__ import annotations

import json

import pytest
from helpers import trial_config

from lora_vit.records import TrialRecord, state_of, write_record
from lora_vit.sweep.ledger import trial_folders
from lora_vit.sweep.plan import Job, default_name, group_key, label, make_groups, setup_key, without_duplicates

INSIDE = [
    "lora.rank=8",
    "lora.alpha=3",
    "lora.dropout=0.5",
    "lora.scaling=rslora",
    "lora.init=gaussian",
    "optimizer.lr=1",
    "optimizer.weight_decay=0",
    "optimizer.betas=[0.5,0.6]",
    "optimizer.clip_norm=1",
    "optimizer.schedule=cosine",
    "optimizer.warmup=0.1",
    "optimizer.label_smoothing=0.1",
    "model.head_dropout=0.4",
    "seed=7",
]
BETWEEN = [
    "lora.targets=[q,v]",
    "lora.blocks=[0]",
    "lora.bias=all",
    "lora=none",
    "lora=full",
    "data.batch_size=4",
    "data.augment=crop_flip",
    "data.split_seed=1",
    "model.image_size=8",
    "trainer.epochs=3",
    "trainer.precision=fp32",
]


@pytest.mark.parametrize("override", INSIDE)
def test_what_may_differ_inside_a_pack(override):
    assert group_key(trial_config(override)) == group_key(trial_config())
    assert setup_key(trial_config(override)) == setup_key(trial_config())


@pytest.mark.parametrize("override", BETWEEN)
def test_what_makes_another_pack(override):
    assert group_key(trial_config(override)) != group_key(trial_config())


def test_groups_keep_seeds_together_and_trunk_training_alone():
    grid = [("lora.rank=1", "seed=0"), ("lora.rank=1", "seed=1"), ("lora.rank=2", "seed=0"), ("lora=full",)]
    jobs = [Job(trial_config(*overrides), list(overrides)) for overrides in grid]
    first, second = make_groups(jobs)
    assert [job.overrides for job in first.jobs] == [list(grid[0]), list(grid[2]), list(grid[1])]
    assert (first.alone, second.alone) == (False, True)
    assert "LoRA on q k v o fc1 fc2" in first.title
    assert "full fine-tuning" in second.title


def test_duplicates():
    jobs = [Job(trial_config(o), [o]) for o in ("lora.rank=1", "lora.alpha=32", "lora.alpha=32.0")]
    once, twice = without_duplicates(jobs)
    assert [job.overrides for job in once] == [["lora.rank=1"], ["lora.alpha=32"]]
    assert twice == 1


def test_label():
    assert label(["lora.rank=4", "seed=0", "sweep.name=x", "data=fake"], {"data=fake"}) == "rank=4 seed=0"


def test_a_name_stays_when_values_grow_and_changes_with_what_is_fixed():
    base = {"seed": 0, "lora": {"rank": 4, "alpha": 32.0}, "trainer": {"devices": "auto", "epochs": 2}, "sweep": {}}
    name = default_name(base, ["lora.rank", "seed"], {})
    assert name.rpartition("-")[0] == "rank_seed"
    assert default_name({**base, "seed": 3, "lora": {"rank": 8, "alpha": 32.0}}, ["lora.rank", "seed"], {}) == name
    assert default_name({**base, "trainer": {"devices": "2", "epochs": 2}}, ["lora.rank", "seed"], {}) == name
    assert default_name({**base, "lora": {"rank": 4, "alpha": 16.0}}, ["lora.rank", "seed"], {}) != name
    assert default_name({**base, "trainer": {"devices": "2", "epochs": 3}}, ["lora.rank", "seed"], {}) != name
    assert default_name(base, ["lora.rank", "seed"], {"sweep": "rank_lr"}).startswith("rank_lr-")
    long = default_name(base, [f"optimizer.a_setting_with_a_long_name_{i}" for i in range(20)], {})
    assert len(long) < 80


def test_states(tmp_path):
    config = trial_config()
    record = TrialRecord("x", "y", "running", {}, heartbeat=1.0)
    for name, status in (("dead", "running"), ("done", "completed")):
        (tmp_path / name).mkdir()
        record.status = status
        write_record(tmp_path / name, record)
    assert state_of(tmp_path / "absent").status == "new"
    assert state_of(tmp_path / "done").status == "completed"
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/record.json").write_text(json.dumps({"schema": 1})[:-3])
    cut = state_of(tmp_path / "cut")
    assert cut.status == "refused"
    assert "record.json" in cut.problem
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "own").mkdir()
    assert [p.name for p in trial_folders(tmp_path)] == ["cut", "dead", "done"]
    assert config.seed == 0
