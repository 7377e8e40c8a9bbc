"""What may share a pack, and how trials and sweeps are named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from plain_trials import BASELINE, PLAIN, plain_trial
from sweeps import trial_of

from lora_vit.config import cell_id, trial_id
from lora_vit.sweep.plan import default_name, label, short_key
from lora_vit.sweep.trial import Trial, digest, group_key, make_groups, setup_key, without_idle

INSIDE = {
    "model.head_dropout": 0.4,
    "optimizer.lr": 1.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": [0.5, 0.6],
    "optimizer.eps": 1e-6,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.1,
    "optimizer.clip_norm": 1.0,
    "optimizer.label_smoothing": 0.1,
    "lora.rank": 8,
    "lora.alpha": 3.0,
    "lora.dropout": 0.5,
    "lora.scaling": "rslora",
    "seed": 7,
}
"""Another value of each setting that may differ inside a pack."""
BETWEEN = {
    "lora.method": "none",
    "lora.targets": ["q", "v"],
    "lora.blocks": [0],
    "lora.bias": "all",
    "trainer.epochs": 3,
    "trainer.devices": "2",
    "trainer.resume": "restart",
    "trainer.checkpoint_every": 1.0,
    "trainer.log_every": 2,
    "trainer.validate_every": 2,
}
"""Of each that makes another pack on the same data and backbone."""
BELOW = {
    "model.name": "vit_b_16",
    "model.weights": "IMAGENET1K_V1",
    "model.image_size": 8,
    "model.patch_size": 4,
    "model.num_layers": 3,
    "model.num_heads": 4,
    "model.hidden_dim": 64,
    "model.mlp_dim": 64,
    "model.library": "timm",
    "model.mean": [0.1, 0.2, 0.3],
    "model.std": [0.1, 0.2, 0.3],
    "model.interpolation": "bicubic",
    "model.weights_sha256": "0" * 64,
    "data.name": "cifar100",
    "data.content": "60 images",
    "data.root": "elsewhere",
    "data.batch_size": 4,
    "data.augment": "crop_flip",
    "data.split_seed": 1,
    "data.val_fraction": 0.3,
    "data.test_fraction": 0.3,
    "data.train_per_class": 10,
    "data.official_val": True,
    "data.cache_size": 8,
    "data.cache_dir": "elsewhere",
    "trainer.precision": "fp32",
    "trainer.accelerator": "gpu",
    "trainer.compile": True,
}
"""Of each that needs other data or another backbone."""


def test_every_setting_is_inside_or_between_packs():
    settings = {f"{group}.{key}" for group, keys in PLAIN.items() if isinstance(keys, dict) for key in keys}
    assert settings | {"seed"} == INSIDE.keys() | BETWEEN.keys() | BELOW.keys()


@pytest.mark.parametrize("setting", [*INSIDE, *BETWEEN, *BELOW])
def test_what_shares_a_pack_and_what_a_backbone(setting):
    plain, other = plain_trial(), plain_trial({setting: {**INSIDE, **BETWEEN, **BELOW}[setting]})
    assert (group_key(other) == group_key(plain)) == (setting in INSIDE)
    assert (setup_key(other) == setup_key(plain)) == (setting not in BELOW)


def test_the_same_places_written_otherwise_share_a_pack():
    key = group_key(plain_trial({"lora.targets": ["q", "v"], "lora.blocks": [0, 1]}))
    assert key == group_key(plain_trial({"lora.targets": ["v", "q"], "lora.blocks": [1, 0]}))
    assert key == group_key(plain_trial({"lora.targets": ["q", "v"]})), "there are two blocks"


def test_groups_and_their_trials_in_the_order_in_which_they_are_met():
    full = {**BASELINE, "lora.method": "full"}
    grid = [
        {"seed": 1, "lora.rank": 1},
        full,
        {"seed": 0, "lora.rank": 2},
        {"seed": 1, "lora.rank": 2},
        {"seed": 0, "lora.rank": 1},
    ]
    trials = [trial_of(changes) for changes in grid]
    first, second = make_groups(trials)
    assert first.trials == [trials[0], trials[2], trials[3], trials[4]]
    assert second.trials == [trials[1]]
    assert (first.key, second.key) == (group_key(trials[0].config), group_key(trials[1].config))
    assert (first.alone, second.alone) == (False, True)
    assert make_groups([]) == []


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({}, False),
        ({"lora.bias": "all"}, True),
        ({"lora.bias": "lora_only"}, True),
        ({**BASELINE, "lora.method": "none"}, False),
        ({**BASELINE, "lora.method": "full"}, True),
    ],
)
def test_who_trains_parameters_of_the_trunk_trains_alone(changes, alone):
    assert plain_trial(changes).lora.trains_trunk is alone


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, "LoRA on q k v o fc1 fc2"),
        ({"lora.targets": ["q", "v"], "lora.blocks": [0, 1]}, "LoRA on q v in blocks 0,1"),
        ({"lora.bias": "all", "lora.blocks": [1]}, "LoRA on q k v o fc1 fc2 in blocks 1, bias all"),
        ({**BASELINE, "lora.method": "none"}, "linear probe"),
        ({**BASELINE, "lora.method": "full"}, "full fine-tuning"),
    ],
)
def test_how_a_group_is_called(changes, what):
    (group,) = make_groups([trial_of(changes)])
    assert group.title == f"vit_tiny 16 px, fake, batch 8, {what}"


def test_a_trial_knows_its_ids_and_how_to_repeat_its_cell():
    trial = Trial(plain_trial({"lora.rank": 2}), ["lora.rank=2", "seed=0"], "rank=2 seed=0")
    assert (trial.trial_id, trial.cell_id) == (trial_id(trial.config), cell_id(trial.config))
    other = trial.with_seed(3)
    assert other.cell_id == trial.cell_id
    assert other.trial_id == trial_id(plain_trial({"lora.rank": 2, "seed": 3}))
    assert (other.overrides, other.label) == (["lora.rank=2", "seed=3"], "rank=2 seed=3")


@pytest.mark.parametrize(
    ("label", "board"),
    [("rank=2 lr=0.1", "rank=2_lr=0.1_"), ("root=a/b", "root=a_b_"), ("", ""), ("x" * 300, "x" * 100 + "_")],
)
def test_folders_of_event_files_have_bounded_names(label, board, tmp_path):
    trial = trial_of(label=label)
    assert trial.board == f"{board}{trial.trial_id}"
    (tmp_path / trial.board).mkdir()


def test_settings_of_adapters_have_no_effect_on_a_baseline():
    lines = ["lora=none", "lora.rank=4", "optimizer.lr=1"]
    assert without_idle(plain_trial(), lines) == lines
    assert without_idle(plain_trial({**BASELINE, "lora.method": "none"}), lines) == ["lora=none", "optimizer.lr=1"]


# --- names


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": [2, 3], "a": 1}, '{"a": 1, "b": [2, 3]}'),
        ([Path("some") / "where", None], '["some/where", null]'),
        ("x", '"x"'),
    ],
)
def test_a_digest_is_of_the_text_that_a_value_is_as_json(value, text):
    whole = hashlib.sha256(text.encode()).hexdigest()
    assert digest(value) == whole[:10]
    assert digest(value, 6) == whole[:6]


@pytest.mark.parametrize(
    ("key", "short"),
    [
        ("seed", "seed"),
        ("optimizer.lr", "lr"),
        ("a.b.c", "c"),
        ("hydra/launcher", "launcher"),
        ("a/b/c", "c"),
        ("+seed", "seed"),
        ("++lora.rank", "rank"),
        ("~seed", "seed"),
    ],
)
def test_short_keys(key, short):
    assert short_key(key) == short


def test_label():
    """A value may have any signs."""
    assert label(["lora.rank=4", "seed=0", "model.weights=a/b=c.pt"]) == "rank=4 seed=0 weights=a/b=c.pt"


def test_a_name_changes_with_what_is_fixed_and_has_the_words_of_what_is_swept():
    assert default_name(["lora.rank"], None, ["a"]) != default_name(["lora.rank"], None, ["b"])

    def words(swept=("lora.rank", "seed"), preset=None) -> str:
        name, _, digits = default_name(swept, preset, []).rpartition("-")
        assert len(bytes.fromhex(digits)) == 3
        return name

    assert words() == "rank_seed"
    assert words(swept=("seed", "lora.rank")) == "seed_rank"
    assert words(swept=("lora.rank", "model.rank", "seed")) == "rank_seed"
    assert words(swept=()) == "sweep"
    assert words(preset="rank_lr") == "rank_lr"
    long = [f"optimizer.long_name_{i}" for i in range(20)]
    assert words(swept=long) == "_".join(f"long_name_{i}" for i in range(20))[:60]
