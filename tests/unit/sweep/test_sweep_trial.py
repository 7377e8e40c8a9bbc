"""What may share a pack, and how trials and sweeps are named."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from plain_trials import BASELINE, PLAIN, plain_trial
from sweeps import trial_of

from lora_vit.config import SECTIONS, ids, trial_id
from lora_vit.sweep.plan import label
from lora_vit.sweep.trial import Trial, digest, group_key, make_groups, setup_key, without_idle

INSIDE = {"model.head_dropout", "lora.rank", "lora.alpha", "lora.dropout", "lora.scaling", "lora.cut", "seed"}
"""What may differ inside a pack, beside the optimizer's settings."""
BELOW = {"trainer.precision", "trainer.accelerator", "trainer.compile"}
"""What needs other data or another backbone, beside the settings of both; all else makes another pack on the same."""
OF_NONE: dict[str, Any] = {"lora.blocks": [0], "optimizer.clip_norm": 1.0, "optimizer.head_lr": 0.5,
                           "data.value_range": [0.0, 1.0], "model.mean": [0.1, 0.2, 0.3], "model.std": [0.1, 0.2, 0.3]}
SETTINGS = ["seed", *(f"{section}.{key}" for section in SECTIONS for key in PLAIN[section])]


def another_value(setting: str) -> Any:
    """Not the small trial's."""
    group, _, key = setting.rpartition(".")
    value = (PLAIN[group] if group else PLAIN)[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return value[:1]
    return OF_NONE.get(setting, "0" * 64 if key == "weights_sha256" else f"other {value}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_shares_a_pack_and_what_a_backbone(setting):
    plain, other = plain_trial(), plain_trial({setting: another_value(setting)})
    inside = setting in INSIDE or (setting.startswith("optimizer.") and setting != "optimizer.name")
    below = setting in BELOW or (setting.startswith(("model.", "data.")) and not inside)
    assert (group_key(other) == group_key(plain)) == inside
    assert (setup_key(other) == setup_key(plain)) == (not below)


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
    assert make_groups([]) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, "LoRA on q k v o fc1 fc2"),
        ({"lora.method": "dora"}, "DoRA on q k v o fc1 fc2"),
        ({"lora.targets": ["q", "v"], "lora.blocks": [0, 1]}, "LoRA on q v in blocks 0,1"),
        ({"lora.bias": "all", "lora.blocks": [1]}, "LoRA on q k v o fc1 fc2 in blocks 1, bias all"),
        ({"lora.bias": "lora_only"}, "LoRA on q k v o fc1 fc2, bias lora_only"),
        ({**BASELINE, "lora.method": "none"}, "linear probe"),
        ({**BASELINE, "lora.method": "full"}, "full fine-tuning"),
    ],
)
def test_how_a_group_is_called(changes, what):
    (group,) = make_groups([trial_of(changes)])
    assert group.title == f"vit_tiny 16 px, fake, batch 8, {what}"


def test_a_trial_knows_its_ids_and_how_to_repeat_its_cell():
    trial = Trial(plain_trial({"lora.rank": 2}), ["lora.rank=2", "seed=0"], "rank=2 seed=0")
    assert (trial.trial_id, trial.cell_id) == ids(trial.config)
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


def test_a_digest_is_of_the_text_that_a_value_is_as_json():
    whole = hashlib.sha256(b'{"a": ["some/where", null], "b": 3}').hexdigest()
    assert digest({"b": 3, "a": [Path("some") / "where", None]}) == whole[:10]
    assert digest("x", 6) == hashlib.sha256(b'"x"').hexdigest()[:6]


def test_labels_have_the_last_words_of_keys():
    """A value may have any signs."""
    lines = ["lora.rank=4", "+seed=0", "hydra/launcher=x", "~a.b.c=1", "model.weights=a/b=c.pt"]
    assert label(lines) == "rank=4 seed=0 launcher=x c=1 weights=a/b=c.pt"
