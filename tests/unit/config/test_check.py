"""Each bound of each check: a value just inside is taken, one just outside refused in one line that says it all."""

from __future__ import annotations

import dataclasses
import math

import pytest
from plain_trials import BASELINE, plain_trial

from lora_vit.config import SweepConfig, validate, validate_sweep
from lora_vit.errors import ConfigError

OK = None
NO_ADAPTERS = {**BASELINE, "lora.method": "none"}
WHOLE = "is impossible: give a whole number from 1 up"


def one(key, value):
    return {key: value}


MODEL = [
    *((one("model.name", name), OK) for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")),
    (one("model.name", "vit_b_61"), "model.name=vit_b_61 is unknown, did you mean 'vit_b_16'? (one of: vit_b_16, "
     "vit_b_32, vit_l_16, vit_l_32, vit_h_14, vit_tiny)"),
    *((one(f"model.{key}", 0), f"model.{key}=0 {WHOLE}")
      for key in ("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim")),
    ({"model.image_size": 1, "model.patch_size": 1}, OK),
    ({"model.num_layers": 1, "model.num_heads": 1, "model.hidden_dim": 1, "lora.rank": 1}, OK),
    ({"model.mlp_dim": 1, "lora.rank": 1}, OK),
    (one("model.image_size", 20), "model.image_size=20 is not a multiple of the patch size 8: give for example 16 or "
     "24"),
    (one("model.image_size", 5), "model.image_size=5 is not a multiple of the patch size 8: give for example 8 or 16"),
    (one("model.num_heads", 3), "model.hidden_dim=32 is not a multiple of model.num_heads=3"),
    (one("model.head_dropout", 0.0), OK),
    (one("model.head_dropout", 0.99), OK),
    (one("model.head_dropout", 1.0), "model.head_dropout=1.0 is impossible: give a probability in [0, 1)"),
    (one("model.head_dropout", -0.01), "model.head_dropout=-0.01 is impossible: give a probability in [0, 1)"),
]  # fmt: skip

DATA = [
    *((one("data.name", name), OK) for name in ("tiny_imagenet", "imagefolder")),
    ({"data.name": "digits", "data.cache_size": None}, OK),
    (one("data.name", "digit"), "data.name=digit is unknown, did you mean 'digits'? (one of: tiny_imagenet, digits, "
     "cifar10, cifar100, imagefolder, fake)"),
    *((one("data.augment", name), OK) for name in ("flip", "crop_flip")),
    (one("data.augment", "mixup"), "data.augment=mixup is unknown (one of: none, flip, crop_flip)"),
    (one("data.batch_size", 1), OK),
    (one("data.batch_size", 0), f"data.batch_size=0 {WHOLE}"),
    (one("data.split_seed", 1), OK),
    (one("data.split_seed", -1), "data.split_seed=-1 is impossible: give a whole number from 0 up"),
    *((one(f"data.{key}_fraction", value), f"data.{key}_fraction={value} is impossible: give a fraction in (0, 1)")
      for key in ("val", "test") for value in (0.0, 1.0)),
    ({"data.name": "imagefolder", "data.val_fraction": 0.99, "data.test_fraction": None}, OK),
    ({"data.name": "imagefolder", "data.val_fraction": None, "data.test_fraction": 0.99}, OK),
    *(({"data.name": name, f"data.{part}_fraction": None}, f"data.{part}_fraction=null, but data={name} has no {part} "
       "images of its own: give a fraction") for name in ("fake", "tiny_imagenet") for part in ("val", "test")),
    *(({"data.name": name, "data.test_fraction": None, "data.cache_size": None}, OK)
      for name in ("cifar10", "cifar100")),
    ({"data.name": "cifar10", "data.test_fraction": None, "data.val_fraction": None}, "data.val_fraction=null, but "
     "data=cifar10 has no val images of its own: give a fraction"),
    ({"data.name": "cifar100", "data.test_fraction": 0.1}, "data.test_fraction=0.1 has no effect with data=cifar100, "
     "which has test images of its own: leave it null"),
    *(({"data.name": name, "data.test_fraction": None if "cifar" in name else 0.1, "data.cache_size": 16},
       f"data.cache_size=16 has no effect with data={name}, whose images have one size: leave it null")
      for name in ("cifar10", "cifar100", "digits")),
    ({"data.name": "tiny_imagenet", "data.cache_size": 16}, OK),
    ({"data.val_fraction": 0.001, "data.test_fraction": 0.001}, OK),
    ({"data.val_fraction": 0.5, "data.test_fraction": 0.49}, OK),
    ({"data.val_fraction": 0.5, "data.test_fraction": 0.5}, "data.val_fraction=0.5 and data.test_fraction=0.5 leave "
     "nothing to train on: their sum must be below 1"),
    (one("data.train_per_class", 1), OK),
    (one("data.train_per_class", 0), "data.train_per_class=0 is impossible: give 1 or more, or null for all"),
    (one("data.cache_size", None), OK),
    (one("data.cache_size", 8), OK),
    (one("data.cache_size", 7), "data.cache_size=7 is impossible: give a number of pixels from 8 up"),
    ({"data.official_val": True, "data.name": "tiny_imagenet"}, OK),
    (one("data.official_val", True), "data.official_val=true has no effect with data=fake: only tiny_imagenet has one"),
]  # fmt: skip

BETAS = "is impossible: give two numbers in [0, 1), as [0.9,0.999]"
OPTIMIZER = [
    *((one("optimizer.schedule", name), OK) for name in ("cosine", "constant")),
    (one("optimizer.schedule", "cosin"), "optimizer.schedule=cosin is unknown, did you mean 'cosine'? (one of: linear, "
     "cosine, constant)"),
    (one("optimizer.lr", 1e-30), OK),
    *((one("optimizer.lr", value), f"optimizer.lr={value} is impossible: give a learning rate above 0")
      for value in (0.0, -1.0, math.inf, math.nan)),
    (one("optimizer.weight_decay", 0.0), OK),
    (one("optimizer.weight_decay", -1e-9), "optimizer.weight_decay=-1e-09 is impossible: give 0 or more"),
    (one("optimizer.weight_decay", math.inf), "optimizer.weight_decay=inf is impossible: give 0 or more"),
    (one("optimizer.eps", 1e-30), OK),
    (one("optimizer.eps", 0.0), "optimizer.eps=0.0 is impossible: give a small number above 0, for example 1e-8"),
    (one("optimizer.betas", [0.0, 0.0]), OK),
    *((one("optimizer.betas", value), f"optimizer.betas={value} {BETAS}")
      for value in ([0.9], [0.9, 0.99, 0.999], [], [0.9, 1.0], [1.0, 0.9], [-0.1, 0.9], [0.9, math.nan])),
    (one("optimizer.warmup", 0.99), OK),
    *((one("optimizer.warmup", value), f"optimizer.warmup={value} is impossible: give the fraction of all steps, in "
       "[0, 1)") for value in (1.0, -0.1)),
    (one("optimizer.clip_norm", 1e-9), OK),
    (one("optimizer.clip_norm", 0.0), "optimizer.clip_norm=0.0 is impossible: give a norm above 0, or null for no "
     "clipping"),
    (one("optimizer.label_smoothing", 0.99), OK),
    *((one("optimizer.label_smoothing", value), f"optimizer.label_smoothing={value} is impossible: give a number in "
       "[0, 1)") for value in (1.0, -0.1)),
]  # fmt: skip

LORA = [
    (NO_ADAPTERS, OK),
    ({**NO_ADAPTERS, "lora.method": "full"}, OK),
    (one("lora.method", "dora"), "lora.method=dora is unknown, did you mean 'lora'? (one of: lora, none, full)"),
    ({**NO_ADAPTERS, "lora.rank": 8, "lora.alpha": 1.0}, "lora.rank=8 has no effect with lora=none: drop it, or choose "
     "adapters with lora=default"),
    ({**NO_ADAPTERS, "lora.method": "full", "lora.blocks": [0]}, "lora.blocks=[0] has no effect with lora=full: drop "
     "it, or choose adapters with lora=default"),
    *((one(f"lora.{key}", None), f"lora.{key} has no value: give one, or lora=none for a linear probe")
      for key in ("rank", "alpha", "dropout", "targets", "scaling", "init", "bias")),
    (one("lora.rank", 1), OK),
    (one("lora.rank", 0), "lora.rank=0 is impossible: give 1 or more (lora=none trains the head alone)"),
    (one("lora.rank", 32), OK),
    (one("lora.rank", 33), "lora.rank=33 is impossible: the layers of vit_tiny are 32 wide, give at most that"),
    ({"lora.rank": 25, "model.mlp_dim": 24}, "lora.rank=25 is impossible: the layers of vit_tiny are 24 wide, give at "
     "most that"),
    (one("lora.alpha", 1e-9), OK),
    *((one("lora.alpha", value), f"lora.alpha={value} is impossible: give a number above 0")
      for value in (0.0, -1.0, math.inf, math.nan)),
    (one("lora.dropout", 0.99), OK),
    *((one("lora.dropout", value), f"lora.dropout={value} is impossible: give a probability in [0, 1)")
      for value in (1.0, -0.1)),
    *((one("lora.targets", [name]), OK) for name in ("q", "k", "v", "o", "fc1", "fc2")),
    (one("lora.targets", []), "lora.targets=[] adapts nothing: give some of q, k, v, o, fc1, fc2, or lora=none"),
    (one("lora.targets", ["q", "fc3"]), "lora.targets=fc3 is unknown, did you mean 'fc2'? (one of: q, k, v, o, fc1, "
     "fc2)"),
    (one("lora.targets", ["q", "k", "q"]), "lora.targets=['q', 'k', 'q'] names a target twice"),
    (one("lora.blocks", [0]), OK),
    (one("lora.blocks", [1, 0]), OK),
    *((one("lora.blocks", value), f"lora.blocks={value} must name at least one block, each once (null: all)")
      for value in ([], [1, 1])),
    (one("lora.blocks", [0, 2]), "lora.blocks=[0, 2]: block 2 is not in 0 .. 1 of vit_tiny"),
    (one("lora.blocks", [-1]), "lora.blocks=[-1]: block -1 is not in 0 .. 1 of vit_tiny"),
    (one("lora.scaling", "rslora"), OK),
    (one("lora.scaling", "lora"), "lora.scaling=lora is unknown, did you mean 'rslora'? (one of: standard, rslora)"),
    (one("lora.init", "gaussian"), OK),
    (one("lora.init", "zeros"), "lora.init=zeros is unknown (one of: kaiming_uniform, gaussian)"),
    (one("lora.bias", "lora_only"), OK),
    (one("lora.bias", "all"), OK),
    (one("lora.bias", "some"), "lora.bias=some is unknown, did you mean 'none'? (one of: none, lora_only, all)"),
]  # fmt: skip

NUMBER = "is impossible: give a number from 1 up, or auto"
NO_NUMBERS = ("0", "-1", "two", "", "1.5", "²")
TRAINER = [
    (one("trainer.epochs", 1), OK),
    (one("trainer.epochs", 0), f"trainer.epochs=0 {WHOLE}"),
    *((one("trainer.precision", name), OK) for name in ("auto", "fp32", "bf16")),
    (one("trainer.precision", "half"), "trainer.precision=half is unknown (one of: auto, fp32, bf16, fp64)"),
    *((one("trainer.accelerator", name), OK) for name in ("auto", "gpu")),
    (one("trainer.accelerator", "tpu"), "trainer.accelerator=tpu is unknown, did you mean 'gpu'? (one of: auto, gpu, "
     "cpu)"),
    (one("trainer.resume", "restart"), OK),
    (one("trainer.resume", "no"), "trainer.resume=no is unknown (one of: auto, restart)"),
    *((one("trainer.devices", value), OK) for value in ("1", "8")),
    *((one("trainer.devices", value), f"trainer.devices={value} {NUMBER}") for value in NO_NUMBERS),
    (one("trainer.checkpoint_every", 0.001), OK),
    *((one("trainer.checkpoint_every", value), f"trainer.checkpoint_every={value} is impossible: seconds in (0, 300]")
      for value in (0.0, 300.001)),
    (one("trainer.log_every", 2), OK),
    (one("trainer.log_every", 0), "trainer.log_every=0 is impossible: give a number of steps from 1 up"),
    (one("trainer.validate_every", 5), OK),
    (one("trainer.validate_every", 0), "trainer.validate_every=0 is impossible: give a number of epochs from 1 up"),
    (one("seed", 2**63 - 1), OK),
    (one("seed", 2**63), "seed=9223372036854775808 is impossible: give a whole number from 0 up"),
    (one("seed", -1), "seed=-1 is impossible: give a whole number from 0 up"),
]  # fmt: skip

FOLDER = "cannot be a folder's name: give a word without '/'"
SWEEP = [
    *((one(key, value), OK) for key in ("pack_size", "workers") for value in ("auto", "1", "64")),
    *((one(key, value), f"sweep.{key}={value} {NUMBER}") for key in ("pack_size", "workers") for value in NO_NUMBERS),
    (one("on_failure", "stop"), OK),
    (one("on_failure", "retry"), "sweep.on_failure=retry is unknown (one of: continue, stop)"),
    *((one("margin", value), OK) for value in (None, 0.01, 99.0)),
    *((one("margin", value), f"sweep.margin={value} is impossible: give points above 0, or null: no race")
      for value in (0.0, -1.0, 100.0, math.inf, math.nan)),
    ({"first_seeds": 2, "most_seeds": 2}, OK),
    (one("first_seeds", 1), "sweep.first_seeds=1 is impossible: a race needs 2 seeds to begin with"),
    (one("most_seeds", 4), "sweep.most_seeds=4 is impossible: give at least sweep.first_seeds=5"),
    (one("name", None), OK),
    (one("name", "a.b"), OK),
    *((one("name", value), f"sweep.name={value} {FOLDER}") for value in ("", "a/b", "/a", ".", "..", ".a")),
]  # fmt: skip


def case_name(case: object) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items()) if isinstance(case, dict) else ""


def refusal(check, config) -> str | None:
    """What a check says of a config; None where it accepts it."""
    try:
        check(config)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("changes", "message"), [({}, OK), *MODEL, *DATA, *OPTIMIZER, *LORA, *TRAINER], ids=case_name)
def test_a_trial(changes, message):
    assert refusal(validate, plain_trial(changes)) == message


@pytest.mark.parametrize(("changes", "message"), [({}, OK), *SWEEP], ids=case_name)
def test_a_sweep(changes, message):
    sweep = dataclasses.replace(
        SweepConfig("s", "4", "auto", False, "continue", False, False, True, None, 5, 30), **changes
    )
    assert refusal(validate_sweep, sweep) == message
