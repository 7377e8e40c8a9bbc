"""What could not work is refused before any model is built: in one line, the key, the value and the remedy."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from lora_vit.config.datasets import DATASETS
from lora_vit.config.identity import is_weights_file
from lora_vit.config.schema import (
    TARGETS,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    SweepConfig,
    TrainerConfig,
    TrialConfig,
    nearest,
)
from lora_vit.errors import ConfigError

MODELS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14", "vit_tiny")
SIZES = ("patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim")


def validate(trial: TrialConfig) -> None:
    """Check one trial, across fields too.

    Raises:
        ConfigError: in one line, the key, the value and what to do.
    """
    _validate_model(trial.model)
    _validate_data(trial.data)
    _validate_optimizer(trial.optimizer)
    _validate_lora(trial.lora, trial.model)
    _validate_trainer(trial.trainer)
    _range("seed", trial.seed, 0 <= trial.seed < 2**63, "give a whole number from 0 up")


def validate_sweep(sweep: SweepConfig) -> None:
    """Check how a sweep is to run.

    Raises:
        ConfigError: in one line, the key, the value and what to do.
    """
    for key in ("pack_size", "workers"):
        value = getattr(sweep, key)
        if value != "auto" and not (value.isdecimal() and int(value) >= 1):
            raise ConfigError(f"sweep.{key}={value} is impossible: give a number from 1 up, or auto")
    _range(
        "sweep.margin",
        sweep.margin,
        sweep.margin is None or 0 < sweep.margin < 100,
        "give points above 0, or null: no race",
    )
    _range("sweep.first_seeds", sweep.first_seeds, sweep.first_seeds >= 2, "a race needs 2 seeds to begin with")
    most = f"give at least sweep.first_seeds={sweep.first_seeds}"
    _range("sweep.most_seeds", sweep.most_seeds, sweep.most_seeds >= sweep.first_seeds, most)
    if sweep.name is not None and (not sweep.name or "/" in sweep.name or sweep.name.startswith(".")):
        raise ConfigError(f"sweep.name={sweep.name} cannot be a folder's name: give a word without '/'")


def _choice(key: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value} is unknown{nearest(str(value), choices)} (one of: {', '.join(choices)})")


def _range(key: str, value: float | None, good: bool, remedy: str) -> None:
    if value is not None and not (math.isfinite(value) and good):
        raise ConfigError(f"{key}={value} is impossible: {remedy}")


def _validate_model(m: ModelConfig) -> None:
    _choice("model.library", m.library, ("torchvision", "timm"))
    for key in ("image_size", *SIZES):
        value = getattr(m, key)
        _range(f"model.{key}", value, value is None or value >= 1, "give a whole number from 1 up")
    (_validate_sizes if m.library == "torchvision" else _validate_timm)(m)
    for key in ("mean", "std"):
        value = getattr(m, key)
        if value is not None and len(value) != 3:
            raise ConfigError(f"model.{key}={value} is impossible: give one number for each of red, green and blue")
        for number in value or ():
            _range(f"model.{key}", number, key == "mean" or number > 0, "give numbers as of colours in [0, 1]")
    if m.interpolation is not None:
        _choice("model.interpolation", m.interpolation, ("bilinear", "bicubic"))
    _range("model.head_dropout", m.head_dropout, 0 <= m.head_dropout < 1, "give a probability in [0, 1)")


def _validate_sizes(m: ModelConfig) -> None:
    """Of torchvision's models, which are made from their sizes."""
    _choice("model.name", m.name, MODELS)
    for key in ("image_size", *SIZES):
        if getattr(m, key) is None:
            raise ConfigError(f"model.{key}=null: {m.name} is made from its sizes, give a whole number from 1 up")
    assert m.image_size is not None
    assert m.patch_size is not None
    assert m.hidden_dim is not None
    assert m.num_heads is not None
    if m.image_size % m.patch_size:
        below = max(m.patch_size, m.image_size // m.patch_size * m.patch_size)
        raise ConfigError(
            f"model.image_size={m.image_size} is not a multiple of the patch size {m.patch_size}: "
            f"give for example {below} or {below + m.patch_size}"
        )
    if m.hidden_dim % m.num_heads:
        raise ConfigError(f"model.hidden_dim={m.hidden_dim} is not a multiple of model.num_heads={m.num_heads}")


def _validate_timm(m: ModelConfig) -> None:
    """What can be said of timm's models without timm."""
    for key in SIZES:
        value = getattr(m, key)
        if value is not None:
            raise ConfigError(f"model.{key}={value} has no effect with model=timm: its name says it, leave it null")
    if not re.fullmatch(r"[\w.]+", m.name):
        raise ConfigError(f"model.name={m.name} is no name of timm's: give one as vit_small_patch14_dinov2.lvd142m")
    if m.weights not in (None, "DEFAULT") and not is_weights_file(m.weights):
        raise ConfigError(
            f"model.weights={m.weights} is unknown for {m.name}: give DEFAULT (those of the name's tag), a file, or "
            "null for random weights"
        )


def _validate_data(d: DataConfig) -> None:
    _choice("data.name", d.name, tuple(DATASETS))
    _choice("data.augment", d.augment, ("none", "flip", "crop_flip"))
    _range("data.batch_size", d.batch_size, d.batch_size >= 1, "give a whole number from 1 up")
    _range("data.split_seed", d.split_seed, d.split_seed >= 0, "give a whole number from 0 up")
    for key in ("val_fraction", "test_fraction"):
        value = getattr(d, key)
        if value is not None:
            _range(f"data.{key}", value, 0 < value < 1, "give a fraction in (0, 1)")
    _validate_parts(d)
    if (d.val_fraction or 0) + (d.test_fraction or 0) >= 1:
        raise ConfigError(
            f"data.val_fraction={d.val_fraction} and data.test_fraction={d.test_fraction} leave nothing to "
            "train on: their sum must be below 1"
        )
    if d.train_per_class is not None:
        _range("data.train_per_class", d.train_per_class, d.train_per_class >= 1, "give 1 or more, or null for all")
    if d.cache_size is not None:
        _range("data.cache_size", d.cache_size, d.cache_size >= 8, "give a number of pixels from 8 up")
    if d.official_val and not DATASETS[d.name].official_val:
        having = ", ".join(name for name, known in DATASETS.items() if known.official_val)
        raise ConfigError(f"data.official_val=true has no effect with data={d.name}: only {having} has one")


def _validate_parts(d: DataConfig) -> None:
    """Settings that a data set needs, or that have no effect on it."""
    known = DATASETS[d.name]
    for part in ("val", "test"):
        fraction = getattr(d, f"{part}_fraction")
        if part in known.always and fraction is not None:
            raise ConfigError(
                f"data.{part}_fraction={fraction} has no effect with data={d.name}, which has {part} images of its "
                "own: leave it null"
            )
        if part not in (*known.always, *known.perhaps) and fraction is None:
            raise ConfigError(
                f"data.{part}_fraction=null, but data={d.name} has no {part} images of its own: give a fraction"
            )
    if d.cache_size is not None and known.one_size:
        raise ConfigError(
            f"data.cache_size={d.cache_size} has no effect with data={d.name}, whose images have one size: leave it "
            "null"
        )


def _validate_optimizer(o: OptimizerConfig) -> None:
    _choice("optimizer.schedule", o.schedule, ("linear", "cosine", "constant"))
    _range("optimizer.lr", o.lr, o.lr > 0, "give a learning rate above 0")
    _range("optimizer.weight_decay", o.weight_decay, o.weight_decay >= 0, "give 0 or more")
    _range("optimizer.eps", o.eps, o.eps > 0, "give a small number above 0, for example 1e-8")
    if len(o.betas) != 2 or not all(0 <= b < 1 for b in o.betas):
        raise ConfigError(f"optimizer.betas={o.betas} is impossible: give two numbers in [0, 1), as [0.9,0.999]")
    _range("optimizer.warmup", o.warmup, 0 <= o.warmup < 1, "give the fraction of all steps, in [0, 1)")
    if o.clip_norm is not None:
        _range("optimizer.clip_norm", o.clip_norm, o.clip_norm > 0, "give a norm above 0, or null for no clipping")
    s = o.label_smoothing
    _range("optimizer.label_smoothing", s, 0 <= s < 1, "give a number in [0, 1)")


def _validate_lora(lora: LoraConfig, model: ModelConfig) -> None:
    _choice("lora.method", lora.method, ("lora", "none", "full"))
    given = {f.name: getattr(lora, f.name) for f in dataclasses.fields(lora) if f.name != "method"}
    if lora.method != "lora":
        without = [k for k, v in given.items() if v is not None]
        if without:
            raise ConfigError(
                f"lora.{without[0]}={given[without[0]]} has no effect with lora={lora.method}: drop it, or choose "
                "adapters with lora=default"
            )
        return
    for key, value in given.items():
        if value is None and key != "blocks":
            raise ConfigError(f"lora.{key} has no value: give one, or lora=none for a linear probe")
    assert lora.rank is not None
    assert lora.alpha is not None
    assert lora.dropout is not None
    assert lora.targets is not None
    _range("lora.rank", lora.rank, lora.rank >= 1, "give 1 or more (lora=none trains the head alone)")
    if model.hidden_dim is not None and model.mlp_dim is not None:
        width = min(model.hidden_dim, model.mlp_dim)
        remedy = f"the layers of {model.name} are {width} wide, give at most that"
        _range("lora.rank", lora.rank, lora.rank <= width, remedy)
    _range("lora.alpha", lora.alpha, lora.alpha > 0, "give a number above 0")
    _range("lora.dropout", lora.dropout, 0 <= lora.dropout < 1, "give a probability in [0, 1)")
    if not lora.targets:
        raise ConfigError(f"lora.targets=[] adapts nothing: give some of {', '.join(TARGETS)}, or lora=none")
    for target in lora.targets:
        _choice("lora.targets", target, TARGETS)
    if len(set(lora.targets)) != len(lora.targets):
        raise ConfigError(f"lora.targets={lora.targets} names a target twice")
    if lora.blocks is not None:
        if not lora.blocks or len(set(lora.blocks)) != len(lora.blocks):
            raise ConfigError(f"lora.blocks={lora.blocks} must name at least one block, each once (null: all)")
        for block in lora.blocks:
            if block < 0 or (model.num_layers is not None and block >= model.num_layers):
                last = "" if model.num_layers is None else model.num_layers - 1
                raise ConfigError(f"lora.blocks={lora.blocks}: block {block} is not in 0 .. {last} of {model.name}")
    _choice("lora.scaling", lora.scaling, ("standard", "rslora"))
    _choice("lora.init", lora.init, ("kaiming_uniform", "gaussian"))
    _choice("lora.bias", lora.bias, ("none", "lora_only", "all"))


def _validate_trainer(t: TrainerConfig) -> None:
    _range("trainer.epochs", t.epochs, t.epochs >= 1, "give a whole number from 1 up")
    _choice("trainer.precision", t.precision, ("auto", "fp32", "bf16", "fp64"))
    _choice("trainer.accelerator", t.accelerator, ("auto", "gpu", "cpu"))
    _choice("trainer.resume", t.resume, ("auto", "restart"))
    if t.devices != "auto" and not (t.devices.isdecimal() and int(t.devices) >= 1):
        raise ConfigError(f"trainer.devices={t.devices} is impossible: give a number from 1 up, or auto")
    _range("trainer.checkpoint_every", t.checkpoint_every, 0 < t.checkpoint_every <= 300, "seconds in (0, 300]")
    _range("trainer.log_every", t.log_every, t.log_every >= 1, "give a number of steps from 1 up")
    _range("trainer.validate_every", t.validate_every, t.validate_every >= 1, "give a number of epochs from 1 up")
