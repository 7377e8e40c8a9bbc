"""Plain values to typed configurations and back, and what is told of a key that is not known."""

from __future__ import annotations

import dataclasses

import pytest
from plain_trials import PLAIN, plain_trial, plain_values

from lora_vit.config import (
    IDENTITY,
    SCHEMA_VERSION,
    TARGETS,
    WITHOUT_IDENTITY,
    LoraConfig,
    from_dict,
    known_keys,
    nearest,
    to_dict,
)
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
        ("optimizer.lr", 1, 1.0),
        ("optimizer.clip_norm", 1, 1.0),
        ("optimizer.clip_norm", None, None),
        ("optimizer.betas", [0, 1], [0.0, 1.0]),
        ("optimizer.betas", (0, 1), [0.0, 1.0]),
        ("lora.alpha", 32, 32.0),
        ("lora.rank", 8, 8),
        ("lora.targets", ("q", "v"), ["q", "v"]),
        ("lora.blocks", (1, 0), [1, 0]),
        ("lora.blocks", [1, 0], [1, 0]),
        ("data.official_val", True, True),
        ("data.root", "5", "5"),
        ("trainer.checkpoint_every", 5, 5.0),
        ("trainer.log_every", 5, 5),
    ],
)
def test_numbers_take_the_type_of_their_field(key, given, kept):
    section, _, name = key.rpartition(".")
    trial = plain_trial({key: given})
    value = getattr(getattr(trial, section) if section else trial, name)
    assert value == kept
    assert type(value) is type(kept)
    if isinstance(kept, list):
        assert [type(v) for v in value] == [type(v) for v in kept]
        assert value is not given


def test_a_section_a_key_too_few_or_too_many():
    values = plain_values()
    del values["trainer"]
    with pytest.raises(ConfigError, match=r"^config section 'trainer' is missing$"):
        from_dict(values)
    with pytest.raises(ConfigError, match=r"^config section 'lora' is missing$"):
        from_dict({**plain_values(), "lora": "none"})
    values = plain_values()
    del values["lora"]["rank"], values["lora"]["dropout"]
    with pytest.raises(ConfigError, match=r"^the key 'lora.dropout' is missing$"):
        from_dict(values)
    with pytest.raises(ConfigError, match=r"^unknown key 'lora.rnk', did you mean 'lora.rank'\?$"):
        plain_trial({"lora.rnk": 8})
    with pytest.raises(ConfigError, match=r"^unknown key 'lora.aank'"):  # the first by name, whichever came first
        plain_trial({"lora.zank": 8, "lora.aank": 8})
    with pytest.raises(ConfigError, match=r"^unknown key 'lora.xxxxxxxxxxxxxxxxx' \(see --help\)$"):
        plain_trial({"lora.xxxxxxxxxxxxxxxxx": 8})


@pytest.mark.parametrize("seed", [None, True, 1.0, "7"])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ConfigError, match=rf"^seed={seed} is no whole number: give one"):
        from_dict({**PLAIN, "seed": seed})


def test_known_keys():
    keys = known_keys()
    sections = ("model", "data", "optimizer", "lora", "trainer")
    sweep = ("name", "pack_size", "workers", "retry_failed", "on_failure", "dry_run", "measure", "wait",
             "margin", "first_seeds", "most_seeds")  # fmt: skip
    expected = {f"{section}.{key}" for section in sections for key in PLAIN[section]}
    assert set(keys) == {*expected, *(f"sweep.{key}" for key in sweep), *sections, "seed"}
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("word", "choices", "hint"),
    [
        ("rnk", ["alpha", "rank"], ", did you mean 'rank'?"),
        ("abxx", ["abyy"], ", did you mean 'abyy'?"),  # half of the letters: 2 * 2 / 8
        ("axxx", ["ayyy"], ""),  # a quarter
        ("rank", [], ""),
    ],
)
def test_the_nearest_word(word, choices, hint):
    assert nearest(word, choices) == hint


def test_what_decides_the_numbers_is_fixed():
    """Written out once more: a setting that moves from one list to the other changes the ids of trials on disk."""
    without = {
        "data.root", "data.cache_dir", "trainer.accelerator", "trainer.devices", "trainer.resume",
        "trainer.checkpoint_every", "trainer.log_every", "trainer.validate_every",
    }  # fmt: skip
    assert set(WITHOUT_IDENTITY) == without
    assert len(WITHOUT_IDENTITY) == len(without)
    everything = {f"{section}.{key}" for section, keys in PLAIN.items() if section != "seed" for key in keys}
    assert set(IDENTITY) == everything - without
    assert IDENTITY["lora.rank"] == "int | None"
    assert IDENTITY["optimizer.betas"] == "list[float]"
    assert (SCHEMA_VERSION, TARGETS) == (3, ("q", "k", "v", "o", "fc1", "fc2"))


def test_the_factor_of_an_adapter():
    lora = plain_trial({"lora.rank": 16, "lora.alpha": 8}).lora
    assert lora.effective_scaling() == 0.5
    assert dataclasses.replace(lora, scaling="rslora").effective_scaling() == 2.0
    assert dataclasses.replace(lora, scaling="rslora", rank=1).effective_scaling() == 8.0
