"""The typed configuration: what can be set, of which type, and what of it decides a trial's numbers.

Values live in ``conf/*.yaml`` only. Below the entry points the project passes these plain dataclasses around.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_vit.errors import ConfigError

SCHEMA_VERSION = 3
"""Version of the trial's configuration and record; part of the trial id."""

TARGETS = ("q", "k", "v", "o", "fc1", "fc2")
"""The linear projections of an encoder block that can get an adapter, in canonical order."""

_NO_IDENTITY = {"identity": False}
"""Metadata of a field that does not decide a trial's numbers: no part of the trial id."""




@dataclass
class ModelConfig:
    """The Vision Transformer (Dosovitskiy et al., 2021) that is adapted.

    Attributes:
        name: in its library.
        library: torchvision or timm; timm's names say the sizes, which are then None.
        image_size: pixels; None: timm's own for the model.
        mean: of each colour in [0, 1], subtracted; None: the model's own.
        std: of each colour, divided by; None: the model's own.
        interpolation: of images to the model's size, bilinear or bicubic; None: the model's own.
        weights_sha256: of the file that ``weights`` names, found out when the trial is composed.
    """

    name: str
    library: str
    weights: str | None
    image_size: int | None
    patch_size: int | None
    num_layers: int | None
    num_heads: int | None
    hidden_dim: int | None
    mlp_dim: int | None
    mean: list[float] | None
    std: list[float] | None
    interpolation: str | None
    head_dropout: float
    weights_sha256: str | None = None


@dataclass
class DataConfig:
    """A data set, its splits and its batches. ``batch_size`` is global: over all processes.

    ``content``: which images with which classes, found out when the trial is composed (None: those of a package).
    """

    name: str
    root: str | None = field(metadata=_NO_IDENTITY)
    batch_size: int
    augment: str
    split_seed: int
    val_fraction: float | None
    test_fraction: float | None
    train_per_class: int | None
    official_val: bool
    cache_size: int | None
    cache_dir: str = field(metadata=_NO_IDENTITY)
    content: str | None = None


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule. ``warmup`` is a fraction of all steps; ``clip_norm`` None: off."""

    lr: float
    weight_decay: float
    betas: list[float]
    eps: float
    decay_bias_and_norm: bool
    schedule: str
    warmup: float
    clip_norm: float | None
    label_smoothing: float


@dataclass
class LoraConfig:
    """Which adapters (Hu et al., 2021), or which baseline (``method`` none or full; the rest is then null)."""

    method: str
    rank: int | None
    alpha: float | None
    dropout: float | None
    targets: list[str] | None
    blocks: list[int] | None
    scaling: str | None
    init: str | None
    bias: str | None

    def effective_scaling(self) -> float:
        """Factor of the adapter's output: alpha/rank, or alpha/sqrt(rank) for rsLoRA."""
        assert self.rank is not None
        assert self.alpha is not None
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)


@dataclass
class TrainerConfig:
    """How to train. ``checkpoint_every`` is in seconds, ``log_every`` in steps, ``validate_every`` in epochs.

    The last epoch is always validated.
    """

    epochs: int
    precision: str
    accelerator: str = field(metadata=_NO_IDENTITY)
    devices: str = field(metadata=_NO_IDENTITY)
    compile: bool
    resume: str = field(metadata=_NO_IDENTITY)
    checkpoint_every: float = field(metadata=_NO_IDENTITY)
    log_every: int = field(metadata=_NO_IDENTITY)
    validate_every: int = field(metadata=_NO_IDENTITY)


@dataclass
class TrialConfig:
    """One trial: everything that decides its numbers, its seed included, and where and how it runs."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    lora: LoraConfig
    trainer: TrainerConfig
    seed: int


@dataclass
class SweepConfig:
    """How a sweep (``-m``) runs; none of it decides a trial's numbers.

    Attributes:
        name: of the folder in ``outputs/sweeps``; None: made from what is swept and what is fixed.
        pack_size: trials that train together; auto: measured, the fastest that fits.
        workers: processes that train packs side by side; auto: one for each GPU; on a CPU up to 8 that share it.
        retry_failed: train the trials again that an earlier run recorded as failed.
        on_failure: continue with the other trials, or stop (they are saved).
        dry_run: print the plan and train nothing.
        measure: in the plan, time what would be estimated.
        wait: follow workers that an engine has started until they have ended; else return at once.
        margin: percentage points of val accuracy that matter; makes the sweep a race (:mod:`lora_vit.analysis.race`).
        first_seeds: that every cell of a race gets.
        most_seeds: that a cell of a race gets.
    """

    name: str | None
    pack_size: str
    workers: str
    retry_failed: bool
    dry_run: bool
    wait: bool
    margin: float | None
    first_seeds: int
    most_seeds: int
    trials: int | None


@dataclass
class RootConfig(TrialConfig):
    """The composed configuration: a trial, how its sweep runs, and what starts the sweep's workers."""

    sweep: SweepConfig
    engine: Any


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "lora": LoraConfig,
    "trainer": TrainerConfig,
}
_SETTINGS = {f"{name}.{f.name}": f for name, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
IDENTITY = {name: str(f.type) for name, f in _SETTINGS.items() if f.metadata.get("identity", True)}
"""Every setting that decides a trial's numbers, by dotted name, with its type as written here."""
WITHOUT_IDENTITY = tuple(name for name in _SETTINGS if name not in IDENTITY)
"""The other ones."""


def to_dict(trial: TrialConfig) -> dict[str, Any]:
    """The config as nested plain values, ready for JSON."""
    return dataclasses.asdict(trial)


def from_dict(values: dict[str, Any]) -> TrialConfig:
    """Inverse of :func:`to_dict`; numbers take their field's type. Raises ConfigError on other keys."""
    sections: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        fields = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        given = values.get(name)
        if not isinstance(given, dict):
            raise ConfigError(f"config section '{name}' is missing")
        for key in sorted(set(given) - set(fields)):
            raise ConfigError(f"unknown key '{name}.{key}'{nearest(f'{name}.{key}', known_keys()) or ' (see --help)'}")
        for key in sorted(set(fields) - set(given)):
            raise ConfigError(f"the key '{name}.{key}' is missing")
        sections[name] = cls(**{k: _typed(given[k], fields[k]) for k in fields})
    seed = values.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed={seed} is no whole number: give one, or several as seed=0,1 in a sweep")
    return TrialConfig(**sections, seed=seed)


def _typed(value: Any, annotation: str) -> Any:
    if value is None:
        return None
    if annotation in ("float", "float | None"):
        return float(value)
    if annotation.startswith("list[float]"):
        return [float(v) for v in value]
    return list(value) if isinstance(value, (list, tuple)) else value


def known_keys() -> list[str]:
    """Every dotted key of a trial config, for suggestions."""
    sweep = [f"sweep.{f.name}" for f in dataclasses.fields(SweepConfig)]
    return [*_SETTINGS, *sweep, *SECTIONS, "seed"]


def nearest(word: str, choices: Sequence[str]) -> str:
    """``, did you mean 'x'?`` for the nearest of the choices, or nothing when none is near."""
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f", did you mean '{found[0]}'?" if found else ""
