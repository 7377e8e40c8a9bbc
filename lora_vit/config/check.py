"""What settings mean for each other; what each may be stands with its field in :mod:`lora_vit.config.schema`."""

import math
import re
from operator import attrgetter

from lora_vit.config.datasets import DATASETS
from lora_vit.config.identity import is_weights_file
from lora_vit.config.rules import check_fields, one_of, refuse
from lora_vit.config.schema import SECTIONS, SIZES, DataConfig, LoraConfig, ModelConfig, SweepConfig, TrialConfig, idle


def validate(trial: TrialConfig) -> None:
    """Check one trial, across fields too. Raises ConfigError: in one line, the key, the value and what to do."""
    for name in SECTIONS:
        check_fields(getattr(trial, name), f"{name}.")
    check_fields(trial)
    for key, (resting, here) in idle(trial).items():
        if (value := attrgetter(key)(trial)) != resting:
            refuse(key, value, f"has no effect with {here}: leave it out, or change that")
    _check_model(trial.model)
    _check_data(trial.data)
    _check_lora(trial.lora, trial.model)
    weights = trial.optimizer.class_weights
    numbers = weights if isinstance(weights, list) and weights else [1.0]
    if weights not in (None, "balanced", numbers) or not all(type(n) is float and 0 < n < math.inf for n in numbers):
        remedy = "give balanced, a number above 0 for each class, as [1,2.5], or null"
        refuse("optimizer.class_weights", weights, f"is impossible: {remedy}")


def validate_sweep(sweep: SweepConfig) -> None:
    """Check how a sweep is to run. Raises ConfigError likewise."""
    check_fields(sweep, "sweep.")
    if sweep.most_seeds < (least := sweep.first_seeds):
        refuse("sweep.most_seeds", sweep.most_seeds, f"is impossible: give at least sweep.first_seeds={least}")


def _check_model(m: ModelConfig) -> None:
    if m.library == "timm":
        if not re.fullmatch(r"[\w.]+", m.name):
            refuse("model.name", m.name, "is not a name of timm's: give one like vit_small_patch14_dinov2.lvd142m")
        if m.weights not in (None, "DEFAULT") and not is_weights_file(m.weights):
            refuse("model.weights", m.weights, "is unknown for timm: give DEFAULT, a file, hf_hub:ID or null")
        return
    one_of("model.name", m.name, ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14", "vit_tiny"))
    for key in SIZES:
        if getattr(m, key) is None:
            refuse(f"model.{key}", None, f"is impossible: {m.name} is made from its sizes, give a number from 1 up")
    size, patch, _, heads, width, _ = (getattr(m, key) for key in SIZES)
    if size % patch:
        near = max(patch, size // patch * patch)
        refuse("model.image_size", size, f"is not a multiple of the patch size {patch}: give {near} or {near + patch}")
    if width % heads:
        refuse("model.hidden_dim", width, f"is not a multiple of model.num_heads={heads}: change one of them")


def _check_data(d: DataConfig) -> None:
    known = DATASETS[d.name]
    for part in ("val", "test"):
        key, fraction = f"data.{part}_fraction", getattr(d, f"{part}_fraction")
        if part not in (*known.always, *known.perhaps) and fraction is None:
            refuse(key, None, f"is impossible: data={d.name} has no {part} images of its own, give a fraction")
    if not (names := d.augmentations()):
        refuse("data.augment", None, "is impossible: give none, or what is to be done")
    if "none" in names[:-1] or {"flip", "crop_flip"} <= {*names}:
        refuse("data.augment", d.augment, f"is impossible: leave {names[0]} out")
    if "color_jitter" in names and not any(v for key, v in vars(d).items() if key.startswith("color_jitter_")):
        refuse("data.augment", d.augment, "changes no colour: give one of data.color_jitter_* above 0")
    if d.batch_size == 1 and names[-1] in ("mixup", "cutmix"):
        refuse("data.batch_size", 1, f"leaves nothing for {names[-1]} to mix an image with: give at least 2")
    if (per_class := d.train_per_class) and d.train_examples:
        refuse("data.train_examples", d.train_examples, f"and data.train_per_class={per_class} are two ways: give one")
    val, test = d.val_fraction or 0, d.test_fraction or 0
    if val + test >= 1:
        refuse("data.val_fraction", val, f"and data.test_fraction={test} leave nothing to train on: stay below 1")
    if d.root and d.images:
        refuse("data.images", d.images, f"and data.root={d.root} name two folders for the table's images: give one")
    if d.cache == "none" and d.on_broken == "skip":
        refuse("data.cache", "none", "finds broken files only in training: give disk with data.on_broken=skip")
    if d.value_range is not None and d.value_range[0] >= d.value_range[1]:
        refuse("data.value_range", d.value_range, "is impossible: give low and high of deep images, or null")


def _check_lora(lora: LoraConfig, model: ModelConfig) -> None:
    for name, value in vars(lora).items():
        if lora.adapts and value is None and name not in ("blocks", "cut"):
            refuse(f"lora.{name}", value, "is impossible: give a value, or lora=none for a linear probe")
    width = min(model.hidden_dim or math.inf, model.mlp_dim or math.inf)
    if (lora.rank or 0) > width:
        refuse("lora.rank", lora.rank, f"is impossible: the layers of {model.name} are {width} wide, give at most that")
    if model.num_layers is not None and max(lora.blocks or [0]) >= model.num_layers:
        last = model.num_layers - 1
        refuse("lora.blocks", lora.blocks, f"is impossible: give blocks in 0 .. {last}, which {model.name} has")
