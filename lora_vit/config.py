"""Typed configuration of one trial: schemas, validation and the trial id.

Values live in ``conf/*.yaml`` only; the dataclasses here give types, and :func:`validate` refuses what could
not work before any model is built. Below the entry points the project passes these plain dataclasses around.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
"""Version of the trial's configuration and record; part of the trial id."""

TARGETS = ("q", "k", "v", "o", "fc1", "fc2")
"""The linear projections of an encoder block that can get an adapter, in canonical order."""

MODELS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14", "vit_tiny")
DATASETS = ("tiny_imagenet", "digits", "cifar10", "cifar100", "imagefolder", "fake")


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, the value and the remedy, in one line."""


@dataclass
class ModelConfig:
    """The Vision Transformer (Dosovitskiy et al., 2021) that is adapted."""

    name: str
    weights: str | None
    image_size: int
    patch_size: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    mlp_dim: int
    head_dropout: float


@dataclass
class DataConfig:
    """A data set, its splits and its batches. ``batch_size`` is global: over all processes."""

    name: str
    root: str | None
    batch_size: int
    augment: str
    split_seed: int
    val_fraction: float | None
    test_fraction: float | None
    train_per_class: int | None
    official_val: bool
    cache_size: int | None
    cache_dir: str


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
    accelerator: str
    devices: str
    compile: bool
    resume: str
    checkpoint_every: float
    log_every: int
    validate_every: int


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
    """

    name: str | None
    pack_size: str
    workers: str
    retry_failed: bool
    on_failure: str
    dry_run: bool


@dataclass
class RootConfig(TrialConfig):
    """The composed configuration: a trial, and how its sweep runs."""

    sweep: SweepConfig


_SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "lora": LoraConfig,
    "trainer": TrainerConfig,
}

_NOT_IN_ID = {
    "data": ("root", "cache_dir"),
    "trainer": ("accelerator", "devices", "resume", "checkpoint_every", "log_every", "validate_every"),
}


def register_schema() -> None:
    """Put the schema and the resolvers where Hydra finds them (call before ``hydra.main`` runs)."""
    import sys

    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=RootConfig)
    OmegaConf.register_new_resolver("trial_id", lambda _root_: trial_id(from_omegaconf(_root_, True)), replace=True)
    OmegaConf.register_new_resolver("rank_times", _rank_times, replace=True)
    plugins = str(Path(__file__).parent / "plugins")
    if plugins not in sys.path:  # Hydra finds the packed launcher there
        sys.path.append(plugins)


def _rank_times(scaling: float, _parent_: Any) -> float | str | None:
    """``lora.alpha=${rank_times:2}``: alpha tied to the rank, so that alpha / rank is the same for all ranks."""
    if "rank" not in _parent_:  # in a preset's hydra.sweeper.params, which Hydra resolves before there are trials
        return f"${{rank_times:{scaling}}}"
    return None if _parent_.rank is None else scaling * _parent_.rank


def refuse_impossible(config: Any) -> None:
    """End the program in one line if the composed trial is impossible (before Hydra makes its folder)."""
    try:
        from_omegaconf(config)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


def from_omegaconf(cfg: Any, in_sweep: bool = False) -> TrialConfig:
    """The plain, validated dataclass of a composed Hydra config (keys that are not the trial's are left out).

    ``in_sweep``: settings without effect, such as ``lora.rank`` under ``lora=none``, are dropped rather than refused.
    """
    from omegaconf import MissingMandatoryValue, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    wanted = [f.name for f in dataclasses.fields(TrialConfig)]
    plain = {}
    for key in cfg:
        if key not in (*wanted, "hydra", "sweep"):
            raise ConfigError(f"unknown key '{key}'{nearest(str(key), known_keys()) or ' (see --help)'}")
    for key in wanted:
        try:
            node = cfg[key]
            plain[key] = (
                OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
            )
        except MissingMandatoryValue as error:
            missing = error.full_key or key
            raise ConfigError(f"{missing} has no value: give one, for example {missing}=...") from None
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).splitlines()[0]) from None
    if in_sweep:
        drop_idle(plain)
    trial = from_dict(plain)
    validate(trial)
    return trial


def drop_idle(values: dict[str, Any]) -> list[str]:
    """Set to None what has no effect in a nested config (adapter settings of a baseline); returns their keys."""
    lora = values.get("lora")
    if not isinstance(lora, dict) or lora.get("method") not in ("none", "full"):
        return []
    idle = [key for key, value in lora.items() if key != "method" and value is not None]
    lora.update(dict.fromkeys(idle))
    return [f"lora.{key}" for key in idle]


def sweep_from_omegaconf(node: Any) -> SweepConfig:
    """The plain, validated sweep settings of a composed config. Raises ConfigError."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    sweep = SweepConfig(**{str(k): v for k, v in values.items()})
    for key in ("pack_size", "workers"):
        value = getattr(sweep, key)
        if value != "auto" and not (value.isdigit() and int(value) >= 1):
            raise ConfigError(f"sweep.{key}={value} is impossible: give a number from 1 up, or auto")
    _choice("sweep.on_failure", sweep.on_failure, ("continue", "stop"))
    if sweep.name is not None and (not sweep.name or "/" in sweep.name or sweep.name.startswith(".")):
        raise ConfigError(f"sweep.name={sweep.name} cannot be a folder's name: give a word without '/'")
    return sweep


def to_dict(trial: TrialConfig) -> dict[str, Any]:
    """The config as nested plain values, ready for JSON."""
    return dataclasses.asdict(trial)


def from_dict(values: dict[str, Any]) -> TrialConfig:
    """Inverse of :func:`to_dict`; numbers take their field's type. Raises ConfigError on other keys."""
    sections: dict[str, Any] = {}
    for name, cls in _SECTIONS.items():
        fields = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        given = values.get(name)
        if not isinstance(given, dict):
            raise ConfigError(f"config section '{name}' is missing")
        for key in sorted(set(given) - set(fields)):
            raise ConfigError(f"unknown key '{name}.{key}'{nearest(f'{name}.{key}', known_keys()) or ' (see --help)'}")
        for key in sorted(set(fields) - set(given)):
            raise ConfigError(f"the key '{name}.{key}' is missing")
        sections[name] = cls(**{k: _typed(given[k], fields[k]) for k in fields})
    return TrialConfig(**sections, seed=int(values["seed"]))


def _typed(value: Any, annotation: str) -> Any:
    if value is None:
        return None
    if annotation in ("float", "float | None"):
        return float(value)
    if annotation == "list[float]":
        return [float(v) for v in value]
    return list(value) if isinstance(value, (list, tuple)) else value


def known_keys() -> list[str]:
    """Every dotted key of a trial config, for suggestions."""
    sections = {**_SECTIONS, "sweep": SweepConfig}
    keys = [f"{name}.{f.name}" for name, cls in sections.items() for f in dataclasses.fields(cls)]
    return [*keys, *_SECTIONS, "seed"]


def nearest(word: str, choices: Sequence[str]) -> str:
    """``, did you mean 'x'?`` for the nearest of the choices, or nothing when none is near."""
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f", did you mean '{found[0]}'?" if found else ""


def _choice(key: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value} is unknown{nearest(str(value), choices)} (one of: {', '.join(choices)})")


def _range(key: str, value: float | None, good: bool, remedy: str) -> None:
    if value is not None and not (math.isfinite(value) and good):
        raise ConfigError(f"{key}={value} is impossible: {remedy}")


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


def _validate_model(m: ModelConfig) -> None:
    _choice("model.name", m.name, MODELS)
    for key in ("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim"):
        value = getattr(m, key)
        _range(f"model.{key}", value, value >= 1, "give a whole number from 1 up")
    if m.image_size % m.patch_size:
        below = max(m.patch_size, m.image_size // m.patch_size * m.patch_size)
        raise ConfigError(
            f"model.image_size={m.image_size} is not a multiple of the patch size {m.patch_size}: "
            f"give for example {below} or {below + m.patch_size}"
        )
    if m.hidden_dim % m.num_heads:
        raise ConfigError(f"model.hidden_dim={m.hidden_dim} is not a multiple of model.num_heads={m.num_heads}")
    _range("model.head_dropout", m.head_dropout, 0 <= m.head_dropout < 1, "give a probability in [0, 1)")


def _validate_data(d: DataConfig) -> None:
    _choice("data.name", d.name, DATASETS)
    _choice("data.augment", d.augment, ("none", "flip", "crop_flip"))
    _range("data.batch_size", d.batch_size, d.batch_size >= 1, "give a whole number from 1 up")
    _range("data.split_seed", d.split_seed, d.split_seed >= 0, "give a whole number from 0 up")
    for key in ("val_fraction", "test_fraction"):
        value = getattr(d, key)
        if value is not None:
            _range(f"data.{key}", value, 0 < value < 1, "give a fraction in (0, 1)")
    if (d.val_fraction or 0) + (d.test_fraction or 0) >= 1:
        raise ConfigError(
            f"data.val_fraction={d.val_fraction} and data.test_fraction={d.test_fraction} leave nothing to "
            "train on: their sum must be below 1"
        )
    if d.train_per_class is not None:
        _range("data.train_per_class", d.train_per_class, d.train_per_class >= 1, "give 1 or more, or null for all")
    if d.cache_size is not None:
        _range("data.cache_size", d.cache_size, d.cache_size >= 8, "give a number of pixels from 8 up")
    if d.official_val and d.name != "tiny_imagenet":
        raise ConfigError(f"data.official_val=true has no effect with data={d.name}: only tiny_imagenet has one")


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
    width = min(model.hidden_dim, model.mlp_dim)
    _range(
        "lora.rank", lora.rank, lora.rank <= width, f"the layers of {model.name} are {width} wide, give at most that"
    )
    _range("lora.alpha", lora.alpha, lora.alpha > 0, "give a number above 0")
    _range("lora.dropout", lora.dropout, 0 <= lora.dropout < 1, "give a probability in [0, 1)")
    if not lora.targets:
        raise ConfigError(f"lora.targets=[] adapts nothing: give some of {', '.join(TARGETS)}, or lora=none")
    for target in lora.targets:
        _choice("lora.targets", target, TARGETS)
    if len(set(lora.targets)) != len(lora.targets):
        raise ConfigError(f"lora.targets={lora.targets} names a target twice")
    if lora.blocks is not None:
        last = model.num_layers - 1
        if not lora.blocks or len(set(lora.blocks)) != len(lora.blocks):
            raise ConfigError(f"lora.blocks={lora.blocks} must name at least one block, each once (null: all)")
        for block in lora.blocks:
            if not 0 <= block <= last:
                raise ConfigError(f"lora.blocks={lora.blocks}: block {block} is not in 0 .. {last} of {model.name}")
    _choice("lora.scaling", lora.scaling, ("standard", "rslora"))
    _choice("lora.init", lora.init, ("kaiming_uniform", "gaussian"))
    _choice("lora.bias", lora.bias, ("none", "lora_only", "all"))


def _validate_trainer(t: TrainerConfig) -> None:
    _range("trainer.epochs", t.epochs, t.epochs >= 1, "give a whole number from 1 up")
    _choice("trainer.precision", t.precision, ("auto", "fp32", "bf16", "fp64"))
    _choice("trainer.accelerator", t.accelerator, ("auto", "gpu", "cpu"))
    _choice("trainer.resume", t.resume, ("auto", "restart"))
    if t.devices != "auto" and not (t.devices.isdigit() and int(t.devices) >= 1):
        raise ConfigError(f"trainer.devices={t.devices} is impossible: give a number from 1 up, or auto")
    _range("trainer.checkpoint_every", t.checkpoint_every, 0 < t.checkpoint_every <= 300, "seconds in (0, 300]")
    _range("trainer.log_every", t.log_every, t.log_every >= 1, "give a number of steps from 1 up")
    _range("trainer.validate_every", t.validate_every, t.validate_every >= 1, "give a number of epochs from 1 up")


def canonical(trial: TrialConfig) -> dict[str, Any]:
    """What decides a trial's numbers, in one fixed form: no paths, files by content, targets in fixed order."""
    values = to_dict(trial)
    for section, keys in _NOT_IN_ID.items():
        for key in keys:
            del values[section][key]
    if trial.lora.targets is not None:
        values["lora"]["targets"] = [t for t in TARGETS if t in trial.lora.targets]
    if trial.lora.blocks is not None:
        blocks = sorted(trial.lora.blocks)
        values["lora"]["blocks"] = None if blocks == list(range(trial.model.num_layers)) else blocks
    weights = trial.model.weights
    if is_weights_file(weights):
        assert weights is not None
        values["model"]["weights"] = "sha256:" + file_sha256(Path(weights).expanduser())
    if trial.data.name == "imagefolder" and trial.data.root is not None:
        values["data"]["files"] = listing_sha256(Path(trial.data.root).expanduser())
    values["schema"] = SCHEMA_VERSION
    return values


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def trial_id(trial: TrialConfig) -> str:
    """First 10 hex digits of the sha256 over the canonical config."""
    return _digest(canonical(trial))


def cell_id(trial: TrialConfig) -> str:
    """The trial id without the seed: trials of one cell are repeats of each other."""
    values = canonical(trial)
    del values["seed"]
    return _digest(values)


def is_weights_file(weights: str | None) -> bool:
    """Whether ``model.weights`` is a path rather than the name of published weights."""
    return weights is not None and (weights.endswith((".pth", ".pt", ".safetensors")) or "/" in weights)


def file_sha256(path: Path) -> str:
    """Sha256 of a file's bytes. Raises ConfigError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha(file)
    except OSError as error:
        raise ConfigError(f"model.weights={path} cannot be read ({error.strerror}): check the path") from None


def _sha(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def listing_sha256(root: Path) -> str:
    """Sha256 over the relative names and sizes of the files below ``root`` (content identity of a folder)."""
    import os

    if not root.is_dir():
        raise ConfigError(f"data.root={root} is not a folder: give the folder that holds your class folders")
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(folder, name)
            digest.update(f"{os.path.relpath(path, root)}\0{os.path.getsize(path)}\n".encode())
    return digest.hexdigest()
