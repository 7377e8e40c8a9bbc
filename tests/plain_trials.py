"""The small trial as literal values: what a test of configurations needs, without Hydra and torch."""

from __future__ import annotations

import copy
from typing import Any

from lora_vit.config import TrialConfig, from_dict

PLAIN: dict[str, Any] = {
    "model": {
        "name": "vit_tiny",
        "library": "torchvision",
        "weights": None,
        "image_size": 16,
        "patch_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 32,
        "mlp_dim": 48,
        "mean": None,
        "std": None,
        "interpolation": None,
        "head_dropout": 0.1,
        "weights_sha256": None,
    },
    "data": {
        "name": "fake",
        "root": None,
        "batch_size": 8,
        "augment": "none",
        "split_seed": 0,
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "train_per_class": None,
        "official_val": False,
        "cache_size": 16,
        "cache_dir": "cache",
        "content": None,
    },
    "optimizer": {
        "lr": 1e-3,
        "weight_decay": 0.03,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "decay_bias_and_norm": True,
        "schedule": "linear",
        "warmup": 0.0,
        "clip_norm": None,
        "label_smoothing": 0.0,
    },
    "lora": {
        "method": "lora",
        "rank": 4,
        "alpha": 32.0,
        "dropout": 0.0,
        "targets": ["q", "k", "v", "o", "fc1", "fc2"],
        "blocks": None,
        "scaling": "standard",
        "init": "kaiming_uniform",
        "bias": "none",
    },
    "trainer": {
        "epochs": 2,
        "precision": "fp64",
        "accelerator": "cpu",
        "devices": "auto",
        "compile": False,
        "resume": "auto",
        "checkpoint_every": 300.0,
        "log_every": 1,
        "validate_every": 1,
    },
    "seed": 0,
}
BASELINE: dict[str, Any] = dict.fromkeys(f"lora.{key}" for key in PLAIN["lora"] if key != "method")
"""Changes that take the adapters' settings away, as ``lora=none`` and ``lora=full`` do."""


def plain_values(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The literal values, with some changed: ``{"lora.rank": 8}``."""
    values = copy.deepcopy(PLAIN)
    for key, value in (changes or {}).items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return values


def plain_trial(changes: dict[str, Any] | None = None) -> TrialConfig:
    """The small trial, with some settings changed."""
    return from_dict(plain_values(changes))
