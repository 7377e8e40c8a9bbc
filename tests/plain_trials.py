"""The small trial, composed once from ``conf/``, as plain values and as a typed config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import hydra
from omegaconf import OmegaConf

from lora_vit.compose import initialized
from lora_vit.config import SECTIONS, TrialConfig, from_dict, to_dict

SMALL = (
    "model=vit_tiny", "model.weights=null", "model.image_size=16", "model.num_layers=2", "model.hidden_dim=32",
    "model.num_heads=2", "model.mlp_dim=48", "data=fake", "data.cache_size=16", "trainer.epochs=2",
    "trainer.precision=fp64", "trainer.accelerator=cpu", "trainer.log_every=1",
)  # fmt: skip
"""A trial of a second: two blocks of width 32, 60 training images of 4 classes, batch 8."""


def composed(*overrides: str) -> dict[str, Any]:
    """A trial's settings as a command composes them, as plain values; no file is looked at."""
    with initialized():
        values = OmegaConf.to_container(hydra.compose("config", list(overrides)), resolve=True, throw_on_missing=True)
    return to_dict(from_dict({key: values[key] for key in (*SECTIONS, "seed")}))  # type: ignore[call-overload,index]


PLAIN = composed(*SMALL, "data.cache_dir=cache")
BASELINE: dict[str, Any] = dict.fromkeys(f"lora.{key}" for key in PLAIN["lora"] if key != "method")
"""Changes that take the adapters' settings away, as ``lora=none`` and ``lora=full`` do."""


def with_changes(values: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy with some settings changed: ``{"lora.rank": 8}``."""
    changed = copy.deepcopy(dict(values))
    for key, value in (changes or {}).items():
        section, _, name = key.rpartition(".")
        (changed[section] if section else changed)[name] = value
    return changed


def plain_values(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The small trial's values, with some changed."""
    return with_changes(PLAIN, changes)


def plain_trial(changes: Mapping[str, Any] | None = None) -> TrialConfig:
    """The small trial, with some settings changed."""
    return from_dict(plain_values(changes))
