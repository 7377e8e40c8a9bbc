"""Plain values to typed configurations and back, and what is told of a key that is not known."""

from __future__ import annotations

import dataclasses

import pytest
from plain_trials import PLAIN, plain_trial, plain_values

from lora_vit.config import SECTIONS, LoraConfig, from_dict, nearest, to_dict, unknown_key
from lora_vit.errors import ConfigError


def test_values_go_in_and_come_out():
    trial = from_dict(plain_values())
    assert to_dict(trial) == PLAIN
    assert (trial.lora.rank, trial.data.name, trial.optimizer.betas, trial.seed) == (4, "fake", [0.9, 0.999], 0)
    assert isinstance(trial.lora, LoraConfig)
    to_dict(trial)["lora"]["targets"].append("x")
    assert trial.lora.targets == ["q", "k", "v", "o", "fc1", "fc2"], "the values are a copy"


@pytest.mark.parametrize(
    ("key", "given", "kept"),
    [
        ("optimizer.lr", 1, 1.0), ("optimizer.clip_norm", 1, 1.0), ("optimizer.clip_norm", None, None),
        ("optimizer.betas", [0, 1], [0.0, 1.0]), ("optimizer.betas", (0, 1), [0.0, 1.0]), ("lora.alpha", 32, 32.0),
        ("lora.rank", 8, 8), ("lora.targets", ("q", "v"), ["q", "v"]), ("lora.blocks", [1, 0], [1, 0]),
        ("data.official_val", True, True), ("data.root", "5", "5"), ("trainer.checkpoint_every", 5, 5.0),
    ],
)  # fmt: skip
def test_numbers_take_the_type_of_their_field(key, given, kept):
    section, _, name = key.partition(".")
    value = getattr(getattr(plain_trial({key: given}), section), name)
    assert (value, type(value)) == (kept, type(kept))
    if isinstance(kept, list):
        assert [type(v) for v in value] == [type(v) for v in kept]
        assert value is not given


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trainer": None}, "config section 'trainer' is missing"),
        ({"lora": "none"}, "config section 'lora' is missing"),
        ({"lora": {k: v for k, v in PLAIN["lora"].items() if k not in ("rank", "dropout")}},
         "the key 'lora.dropout' is missing"),
        ({"lora.rnk": 8}, "unknown key 'lora.rnk', did you mean 'lora.rank'?"),
        ({"lora.zank": 8, "lora.aank": 8}, "unknown key 'lora.aank'"),  # the first by name, whichever came first
        ({"lora.xxxxxxxxxxxxxxxxx": 8}, "unknown key 'lora.xxxxxxxxxxxxxxxxx' (see --help)"),
        *(({"seed": seed}, f"seed={seed} is not a whole number: give one") for seed in (None, True, 1.0, "7")),
    ],
)  # fmt: skip
def test_a_section_or_key_too_few_or_too_many_and_a_seed_that_is_no_number(changes, says):
    with pytest.raises(ConfigError) as refused:
        plain_trial(changes)
    assert str(refused.value).startswith(says)


def test_a_key_that_no_config_has():
    assert tuple(SECTIONS) == ("model", "data", "optimizer", "lora", "trainer")
    for word, near in {"sweep.pack_sise": "sweep.pack_size", "sead": "seed", "lora.rnk": "lora.rank"}.items():
        assert unknown_key(word) == f"unknown key '{word}', did you mean '{near}'?"


@pytest.mark.parametrize(
    ("word", "choices", "hint"),
    [
        ("rnk", ["alpha", "rank"], ", did you mean 'rank'?"),
        ("abxx", ["abyy"], ", did you mean 'abyy'?"),  # half of the letters: 2 * 2 / 8
        ("axxx", ["ayyy"], ""),  # a quarter
    ],
)
def test_the_nearest_word(word, choices, hint):
    assert nearest(word, choices) == hint


def test_the_factor_of_an_adapter():
    lora = plain_trial({"lora.rank": 16, "lora.alpha": 8}).lora
    assert lora.effective_scaling() == 0.5
    assert dataclasses.replace(lora, scaling="rslora").effective_scaling() == 2.0
    assert dataclasses.replace(lora, scaling="rslora", rank=1).effective_scaling() == 8.0
