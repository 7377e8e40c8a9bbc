"""The typed configuration: each setting, its type, its rule, and whether it decides a trial's numbers.

Values live in ``conf/*.yaml`` only. Below the entry points the project passes these plain dataclasses around.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast, get_type_hints

from lora_vit.config.datasets import DATASETS
from lora_vit.config.rules import NO_IDENTITY, choice, nearest, number, refuse, text
from lora_vit.errors import ConfigError
from lora_vit.metrics import METRICS

SCHEMA_VERSION = 3  # of the trial's configuration and record; part of the trial id
AUGMENTATIONS = ("none", "flip", "crop_flip", "randaugment", "color_jitter", "random_erasing", "mixup", "cutmix")
TARGETS = ("q", "k", "v", "o", "fc1", "fc2")  # projections of a block that can get an adapter, in canonical order
SIZES = ("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim")  # that make a torchvision ViT
ADAPTED = ("lora", "dora")  # values of lora.method that have adapters; the others are baselines
_SIZE = number("a whole number", "[1, inf)")
_IMAGES = number("a number of images", "[1, inf)", ", or null for all")
_COUNT = text("auto|0{0,8}[1-9][0-9]{0,8}", "is impossible: give a number from 1 up, or auto")
_WHERE = NO_IDENTITY | {"as_before": None}  # it says where images are; what they are decides
_CUT = text("(?!)", "is what lora-vit cut writes, the rank that was trained: leave it out")
_MICRO_BATCH = text("auto|0{0,8}[1-9][0-9]{0,8}", "is impossible: give a number of images from 1 up, auto, or null")


@dataclass
class ModelConfig:
    """The Vision Transformer (Dosovitskiy et al., 2021) that is adapted; None: the model's own."""

    name: str  # in its library; timm's names say the sizes, which are then None
    library: str = field(metadata=choice("torchvision", "timm"))
    weights: str | None  # a name of published weights, a path, or None: random
    image_size: int | None = field(metadata=_SIZE)  # pixels
    patch_size: int | None = field(metadata=_SIZE)
    num_layers: int | None = field(metadata=_SIZE)
    num_heads: int | None = field(metadata=_SIZE)
    hidden_dim: int | None = field(metadata=_SIZE)
    mlp_dim: int | None = field(metadata=_SIZE)
    # of each colour in [0, 1], subtracted; then ``std`` divides
    mean: list[float] | None = field(metadata=number("three numbers (red, green, blue)", count=3))
    std: list[float] | None = field(metadata=number("three numbers (red, green, blue)", "(0, inf)", count=3))
    interpolation: str | None = field(metadata=choice("bilinear", "bicubic"))
    head_dropout: float = field(metadata=number("a probability", "[0, 1)"))
    weights_sha256: str | None = None  # of the file that ``weights`` names, found out when the trial is composed


@dataclass
class DataConfig:
    """A data set, its splits and its batches."""

    name: str = field(metadata=choice(*DATASETS))
    root: str | None = field(metadata=NO_IDENTITY)
    labels: str | None = field(metadata=_WHERE)
    images: str | None = field(metadata=_WHERE)
    image_column: str | None = field(metadata=_WHERE)
    label_column: str | None = field(metadata=_WHERE)
    split_column: str | None = field(metadata=_WHERE)
    dataset: str | None = field(metadata={"as_before": None})
    target: str | None = field(metadata=_WHERE)
    batch_size: int = field(metadata=number("a whole number", "[1, inf)"))  # global: over all processes
    augment: Any = field(metadata=choice(*AUGMENTATIONS))  # one or a list
    randaugment_num_ops: int = field(metadata=number("a number of operations", "[1, inf)") | {"as_before": 2})
    randaugment_magnitude: int = field(metadata=number("a magnitude", "[0, 30]") | {"as_before": 9})
    color_jitter_brightness: float = field(metadata=number("a number", "[0, inf)") | {"as_before": 0.4})
    color_jitter_contrast: float = field(metadata=number("a number", "[0, inf)") | {"as_before": 0.4})
    color_jitter_saturation: float = field(metadata=number("a number", "[0, inf)") | {"as_before": 0.4})
    color_jitter_hue: float = field(metadata=number("a part of the circle of colours", "[0, 0.5]") | {"as_before": 0.0})
    random_erasing_p: float = field(metadata=number("a probability", "(0, 1]") | {"as_before": 0.5})
    mixup_alpha: float = field(metadata=number("alpha of Beta(alpha, alpha)", "(0, inf)") | {"as_before": 1.0})
    cutmix_alpha: float = field(metadata=number("alpha of Beta(alpha, alpha)", "(0, inf)") | {"as_before": 1.0})
    split_seed: int = field(metadata=number("a whole number", "[0, inf)"))
    val_fraction: float | None = field(metadata=number("a fraction", "(0, 1)"))
    test_fraction: float | None = field(metadata=number("a fraction", "[0, 1)", ", or null for no test images"))
    train_per_class: int | None = field(metadata=_IMAGES)
    train_examples: int | None = field(metadata=_IMAGES | {"as_before": None})
    group: Any = field(metadata={"as_before": None, "kind": "int or str or null"})  # folder level, pattern or column
    on_broken: str = field(metadata=choice("refuse", "skip") | {"as_before": "refuse"})
    official_val: bool
    cache_size: int | None = field(metadata=number("a number of pixels", "[8, inf)"))  # of a side; None: as they are
    # where decoded images are kept; none: nowhere, they are decoded when needed; auto: by what is free
    cache: str = field(metadata=choice("auto", "memory", "disk", "none") | NO_IDENTITY | {"as_before": "auto"})
    cache_dir: str = field(metadata=NO_IDENTITY)
    # behind transparent pixels
    background: list[int] = field(metadata=number("red, green, blue", "[0, 255]", count=3) | {"as_before": [255] * 3})
    # what becomes 0 and 255 where pixels have more than 8 bits; None: the smallest and largest of all
    value_range: list[float] | None = field(metadata=number("low and high", count=2) | {"as_before": None})
    content: str | None = None  # digest of images and classes, found out when composed (None: those of a package)

    def augmentations(self) -> list[str]:
        """Those of ``augment``, in the order in which they are done."""
        given = self.augment if isinstance(self.augment, list) else [self.augment]
        return [name for name in AUGMENTATIONS if name in given]


@dataclass
class OptimizerConfig:
    """AdamW or SGD, and the learning-rate schedule."""

    name: str = field(metadata=choice("adamw", "sgd") | {"as_before": "adamw"})
    lr: float = field(metadata=number("a learning rate", "(0, inf)"))
    weight_decay: float = field(metadata=number("a number", "[0, inf)"))
    betas: list[float] = field(metadata=number("two numbers", "[0, 1)", ", for example [0.9,0.999]", count=2))
    eps: float = field(metadata=number("a small number", "(0, inf)", ", for example 1e-8"))
    momentum: float = field(metadata=number("a number", "[0, 1)") | {"as_before": 0.9})
    schedule: str = field(metadata=choice("linear", "cosine", "constant"))
    warmup: float = field(metadata=number("a fraction of all steps", "[0, 1)"))
    clip_norm: float | None = field(metadata=number("a norm", "(0, inf)", ", or null for no clipping"))
    label_smoothing: float = field(metadata=number("a number", "[0, 1)"))
    head_lr: float | None = field(metadata=number("a learning rate", "(0, inf)", ", or null") | {"as_before": None})
    lora_b_lr_ratio: float = field(metadata=number("a multiple of optimizer.lr", "(0, inf)") | {"as_before": 1.0})
    class_weights: Any = field(metadata={"as_before": None})  # None, balanced, or a number for each class


@dataclass
class LoraConfig:
    """Which adapters (LoRA: Hu et al., 2021; DoRA: Liu et al., 2024), or which baseline (then the rest is None)."""

    method: str = field(metadata=choice(*ADAPTED, "none", "full"))
    rank: int | None = field(metadata=number("a whole number", "[1, inf)", ", or lora=none to train the head alone"))
    alpha: float | None = field(metadata=number("a number", "(0, inf)"))
    dropout: float | None = field(metadata=number("a probability", "[0, 1)"))
    targets: list[str] | None = field(metadata=choice(*TARGETS, also=", or give lora=none"))
    blocks: list[int] | None = field(metadata=number("blocks", "[0, inf)", ", or null for all"))
    scaling: str | None = field(metadata=choice("standard", "rslora"))
    bias: str | None = field(metadata=choice("none", "lora_only", "all"))
    cut: str | None = field(default=None, metadata=_CUT | {"as_before": None})  # the rank that was trained; never given

    @property
    def adapts(self) -> bool:
        return self.method in ADAPTED

    @property
    def trains_trunk(self) -> bool:
        """Whether parameters of the trunk are trained, so that trials cannot share it."""
        return self.method == "full" or self.bias not in (None, "none")

    @property
    def columns(self) -> int:
        """Those of ``lora_B``: the rank, or where one threshold has cut all layers, what each had."""
        return int(self.cut.split()[0]) if self.cut and "threshold" in self.cut else cast(int, self.rank)

    def effective_scaling(self) -> float:
        """Factor of an adapter's output: alpha/rank, or alpha/sqrt(rank) for rsLoRA."""
        alpha, rank = cast(tuple[float, int], (self.alpha, self.rank))  # given with adapters
        return alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)


@dataclass
class TrainerConfig:
    """How to train, and what of it is written down. The last epoch is always validated."""

    epochs: int = field(metadata=number("a whole number", "[1, inf)"))
    precision: str = field(metadata=choice("auto", "fp32", "bf16", "fp16", "fp64"))
    accelerator: str = field(metadata=choice("auto", "gpu", "cpu") | NO_IDENTITY)
    devices: str = field(metadata=_COUNT | NO_IDENTITY)
    compile: bool
    deterministic: bool = field(metadata=NO_IDENTITY | {"as_before": True})
    micro_batch: str | None = field(metadata=_MICRO_BATCH | NO_IDENTITY | {"as_before": "auto"})
    checkpoint_activations: bool = field(metadata=NO_IDENTITY | {"as_before": False})
    resume: str = field(metadata=choice("auto", "restart") | NO_IDENTITY)
    checkpoint_every: float = field(metadata=number("seconds", "(0, 300]") | NO_IDENTITY)
    log_every: int = field(metadata=number("a number of steps", "[1, inf)") | NO_IDENTITY)
    validate_every: int = field(metadata=number("a number of epochs", "[1, inf)") | NO_IDENTITY)
    metric: str = field(metadata=choice(*METRICS) | NO_IDENTITY | {"as_before": "accuracy"})


@dataclass
class TrialConfig:
    """One trial: everything that decides its numbers, its seed included, and where and how it runs."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    lora: LoraConfig
    trainer: TrainerConfig
    seed: int = field(metadata=number("a whole number", f"[0, {2**63 - 1}]"))
    tracker: dict[str, Any] = field(metadata=NO_IDENTITY)  # by name: _target_ (see training/trackers.py) and settings


@dataclass
class SweepConfig:
    """How a sweep (``-m``) runs; none of it decides a trial's numbers. ``conf/config.yaml`` says what each means."""

    name: str | None = field(metadata=text("[^/.][^/]*", "cannot be a folder's name: give a word without '/'"))
    pack_size: str = field(metadata=_COUNT)
    workers: str = field(metadata=_COUNT)
    retry_failed: bool
    dry_run: bool
    wait: bool
    margin: float | None = field(metadata=number("points of the val metric", "(0, 100)", ", or null for no race"))
    first_seeds: int = field(metadata=number("the seeds that a race starts with,", "[2, inf)"))
    most_seeds: int = field(metadata=number("a number of seeds", "[2, inf)"))
    trials: int | None = field(metadata=number("a number of trials", "[1, inf)", ", or null for every combination"))


@dataclass
class RootConfig(TrialConfig):
    """The composed configuration: a trial, how its sweep runs, and what starts the sweep's workers."""

    sweep: SweepConfig
    engine: Any


# The parts of a trial's config by name: model, data, optimizer, lora, trainer.
SECTIONS: dict[str, Any] = {k: cls for k, cls in get_type_hints(TrialConfig).items() if dataclasses.is_dataclass(cls)}
_SETTINGS = {f"{name}.{f.name}": f for name, cls in SECTIONS.items() for f in fields(cls)}
# Every setting that decides a trial's numbers, by dotted name, and the other ones.
IDENTITY = tuple(name for name, f in _SETTINGS.items() if f.metadata.get("identity", True))
WITHOUT_IDENTITY = tuple(name for name in _SETTINGS if name not in IDENTITY)
# Settings that an earlier version did not have, each with the value at which a trial is what it was there.
ADDED = {name: f.metadata["as_before"] for name, f in _SETTINGS.items() if "as_before" in f.metadata}
TENSORBOARD = {"tensorboard": {"_target_": "lora_vit.training.trackers.TensorBoard"}}  # how all were tracked before
# What each key may be, in words.
_ALL = _SETTINGS | {f"sweep.{f.name}": f for f in fields(SweepConfig)} | {f.name: f for f in fields(TrialConfig)}
SAYS = {k: f.metadata.get("says", "true or false" if f.type is bool else "one text") for k, f in _ALL.items()}
# Settings that an earlier version had, each with the only value that is left. They stay in every trial's id.
REMOVED = {"lora.init": "kaiming_uniform", "optimizer.decay_bias_and_norm": True}
OF_ADAPTERS = (*(key for key in _SETTINGS if key.startswith("lora.")), "optimizer.lora_b_lr_ratio")[1:]  # not method
# What is chosen, and the settings that then do nothing.
_UNREAD: dict[str, Sequence[str]] = {
    "optimizer.name=adamw": ["optimizer.momentum"],
    "optimizer.name=sgd": ["optimizer.betas", "optimizer.eps"],
    "lora=full": OF_ADAPTERS,
    "lora=none": [*OF_ADAPTERS, "optimizer.head_lr"],  # nothing but the head is trained, at optimizer.lr
    "model=timm": [f"model.{key}" for key in SIZES[1:]],  # the name says them
    **{f"data={name}": known.unread() for name, known in DATASETS.items()},
}
# The value that each then has, if not None.
_RESTING = {**ADDED, "optimizer.betas": [0.9, 0.999], "optimizer.eps": 1e-8, "data.official_val": False}


def idle(trial: TrialConfig) -> dict[str, tuple[Any, str]]:
    """Settings that do nothing in this trial: the value that each then has, and what makes it so."""
    data, done = trial.data, trial.data.augmentations()
    undone = tuple(f"data.{name}_" for name in AUGMENTATIONS if name not in done)
    why = {key: f"data.augment={data.augment}" for key in _SETTINGS if key.startswith(undone)}
    for chosen in (f"optimizer.name={trial.optimizer.name}", f"lora={trial.lora.method}",
                   f"model={trial.model.library}", f"data={data.name}"):  # fmt: skip
        why |= dict.fromkeys(_UNREAD.get(chosen, ()), chosen)
    return {key: (_RESTING.get(key), here) for key, here in why.items()}


to_dict = dataclasses.asdict  # nested plain values, ready for JSON


def deciding(trial: TrialConfig) -> dict[str, Any]:
    """The settings that decide a trial's numbers, as the version had them that first had a trial with these numbers."""
    values = to_dict(trial)
    del values["tracker"]
    for section in SECTIONS:
        own = values[section]
        before = _meant(ADDED, section, own).items()
        kept = {key: own[key] for key in own if f"{section}.{key}" in IDENTITY and (key, own[key]) not in before}
        values[section] = kept | _meant(REMOVED, section, own)
    return values


def _meant(settings: Mapping[str, Any], section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ADDED or REMOVED (``settings``) in a section with these values; a baseline's adapters have None."""
    idle = section == "lora" and values.get("method") not in ADAPTED
    own = {name.partition(".")[2]: value for name, value in settings.items() if name.startswith(f"{section}.")}
    return dict.fromkeys(own) if idle else own


def from_dict(values: Mapping[str, Any]) -> TrialConfig:
    """Inverse of :func:`to_dict`, also of an earlier version's; numbers take their field's type. Raises ConfigError."""
    sections = {name: _section(name, values.get(name)) for name in SECTIONS}
    seed = values.get("seed")
    if type(seed) is not int:
        raise ConfigError(f"seed={seed} is not a whole number: give one, or several as seed=0,1 in a sweep")
    return TrialConfig(**sections, seed=seed, tracker=values.get("tracker", TENSORBOARD))


def _section(name: str, values: Any) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"config section '{name}' is missing")
    values = {**_meant(ADDED, name, values), **values}
    for key, left in _meant(REMOVED, name, values).items():
        if (given := values.pop(key, left)) != left:
            refuse(f"{name}.{key}", given, f"is of an earlier version, this one has only {left}: leave it out")
    types = {f.name: str(f.type) for f in fields(SECTIONS[name])}
    for key in sorted(values.keys() ^ types, key=lambda key: (key in types, key)):
        raise ConfigError(unknown_key(f"{name}.{key}") if key in values else f"the key '{name}.{key}' is missing")
    for key, value in values.items():
        typed: Any = float if "float" in types[key] and value is not None else lambda one: one
        if key == "class_weights":  # of any type
            typed = lambda one: float(one) if isinstance(one, int) else one  # noqa: E731
        values[key] = list(map(typed, value)) if isinstance(value, (list, tuple)) else typed(value)
    return SECTIONS[name](**values)


def unknown_key(key: str) -> str:
    """What is said of a key that no composed config has."""
    if key.startswith("tracker."):
        return f"'{key}' is no setting of a tracker that is chosen: choose it, as tracker=[tensorboard,mlflow]"
    if key in SAYS:
        return f"there is no '{key}': leave --config-name out, an experiment is chosen by experiment=NAME"
    return f"unknown key '{key}'{nearest(key, [*SAYS]) or ' (see --help)'}"


def wrong_type(value: str | None, key: str) -> str:
    """What is said of a value of another type than the key's; ``value``: as OmegaConf says it."""
    shown = {None: "null", "None": "null", "$VALUE": "[...]"}.get(value, value)
    says = SAYS.get(key.partition("[")[0], "what docs/settings.md says")
    return f"{key}={shown} is impossible: give {'one ' * says.startswith('of ')}{says}"
