"""Each bound of each setting: values just inside are taken, those just outside refused in one line with a remedy."""

from __future__ import annotations

import math

import pytest
from plain_trials import BASELINE, PLAIN, plain_trial
from sweeps import options

from lora_vit.config import SECTIONS, validate, validate_sweep
from lora_vit.errors import ConfigError
from lora_vit.metrics import METRICS

NO_ADAPTERS = {**BASELINE, "lora.method": "none"}
NO_NUMBERS = ("0", "-1", "two", "", "1.5", "²", "9" * 5000)
BELOW_ONE = ([0.0, 0.99], [-0.01, 1.0, math.nan], "[0, 1)")
ABOVE_ZERO = ([1e-30, 1e30], [0.0, -1.0, math.inf, math.nan], "above 0")
FROM_ONE = ([1], [0, -1], "from 1 up")

ALONE = {  # values taken, values refused, what the refusal says beside key=value
    "model.library": ([], ["tim"], "did you mean 'timm'? (one of: torchvision, timm)"),
    "model.image_size": ([8, 16], [0], "whole number from 1 up"),
    "model.patch_size": ([1], [0], "whole number from 1 up"),
    "model.num_layers": ([1], [0], "whole number from 1 up"),
    "model.num_heads": ([1], [0], "whole number from 1 up"),
    "model.hidden_dim": ([4], [0], "whole number from 1 up"),
    "model.mlp_dim": ([4], [0], "whole number from 1 up"),
    "model.mean": ([None, [0.0, -1.0, 1.0]], [[0.5], [0.5] * 4, [0.5, 0.5, math.inf]], "three numbers (red"),
    "model.std": ([[1e-9, 1.0, 1.0]], [[0.5], [0.5, 0.0, 0.5]], "three numbers (red, green, blue) above 0"),
    "model.interpolation": (["bilinear", "bicubic", None], ["cubic"], "did you mean 'bicubic'?"),
    "model.head_dropout": BELOW_ONE,
    "data.name": ([], ["digit"], "did you mean 'digits'? (one of: tiny_imagenet, digits, cifar10, cifar100,"),
    "data.batch_size": FROM_ONE,
    "data.augment": (["none", "flip", "crop_flip", ["crop_flip", "mixup"]], ["mix", 5, [], ["flip", "flip"]], ""),
    "data.randaugment_num_ops": ([], [0], "from 1 up"),
    "data.randaugment_magnitude": ([], [-1, 31], "a magnitude in [0, 30]"),
    **{f"data.color_jitter_{kind}": ([], [-0.1, math.inf], "from 0 up")
       for kind in ("brightness", "contrast", "saturation")},
    "data.color_jitter_hue": ([], [-0.1, 0.6], "in [0, 0.5]"),
    "data.random_erasing_p": ([], [0.0, 1.1], "a probability in (0, 1]"),
    "data.mixup_alpha": ([], [0.0, math.inf], "above 0"),
    "data.cutmix_alpha": ([], [0.0, math.inf], "above 0"),
    "data.split_seed": ([0, 1], [-1], "from 0 up"),
    "data.val_fraction": ([0.001, 0.7], [0.0, 1.0], "a fraction in (0, 1)"),
    "data.test_fraction": ([0.0, 0.001, 0.7], [-0.1, 1.0], "a fraction in [0, 1)"),
    "data.train_per_class": ([1, None], [0], "or null for all"),
    "data.train_examples": ([1, None], [0], "or null for all"),
    "data.on_broken": (["skip"], ["drop"], "(one of: refuse, skip)"),
    "data.cache_size": ([8, None], [7], "pixels from 8 up"),
    "data.background": ([[0, 0, 0], [255, 255, 255]], [[0, 0], [0, 0, 256], [-1, 0, 0]], "green, blue in [0, 255]"),
    "data.cache": (["auto"], ["ram"], "one of: auto, memory, disk, none"),
    "data.value_range": ([[0.0, 4095.0], [-1.5, 1.0], None], [[0.0], [0.0, math.inf]], "low and high"),
    "optimizer.name": (["adamw"], ["sdg"], "did you mean 'sgd'? (one of: adamw, sgd)"),
    "optimizer.momentum": ([], [-0.1, 1.0], "[0, 1)"),
    "optimizer.lr": ABOVE_ZERO,
    "optimizer.weight_decay": ([0.0], [-1e-9, math.inf], "from 0 up"),
    "optimizer.betas": ([[0.0, 0.0]], [[0.9], [0.9] * 3, [], [0.9, 1.0], [-0.1, 0.9], [0.9, math.nan]],
                        "two numbers in [0, 1), for example [0.9,0.999]"),
    "optimizer.eps": ([1e-30], [0.0], "above 0, for example 1e-8"),
    "optimizer.schedule": (["linear", "cosine", "constant"], ["cosin"], "did you mean 'cosine'?"),
    "optimizer.warmup": ([0.0, 0.99], [1.0, -0.1], "a fraction of all steps in [0, 1)"),
    "optimizer.clip_norm": ([1e-9, None], [0.0], "above 0, or null for no clipping"),
    "optimizer.label_smoothing": BELOW_ONE,
    "optimizer.head_lr": ([None, *ABOVE_ZERO[0]], *ABOVE_ZERO[1:]),
    "optimizer.lora_b_lr_ratio": ABOVE_ZERO,
    "optimizer.class_weights": ([None, "balanced", [1, 2.5]], ["equal", 2.0, [], [0.0], [1.0, math.nan], [1.0, "a"]],
                                "a number above 0 for each class"),
    "lora.method": (["dora"], ["loha"], "did you mean 'lora'? (one of: lora, dora, none, full)"),
    "lora.rank": ([1, 32], [0], "or lora=none to train the head alone"),
    "lora.alpha": ABOVE_ZERO,
    "lora.dropout": BELOW_ONE,
    "lora.targets": ([["q"], ["k", "v", "o", "fc1", "fc2"]], [[], ["q", "k", "q"]], "each once, or give lora=none"),
    "lora.blocks": ([[0], [1, 0], None], [[], [1, 1], [-1]], "or null for all"),
    "lora.scaling": (["standard", "rslora"], ["lora"], "did you mean 'rslora'?"),
    "lora.bias": (["lora_only", "all"], ["some"], "(one of: none, lora_only, all)"),
    "lora.cut": ([None], ["16", "16 by threshold"], "the rank that was trained: leave it out"),
    "trainer.epochs": FROM_ONE,
    "trainer.precision": (["auto", "fp32", "bf16", "fp16", "fp64"], ["half"], "(one of: auto, fp32, bf16, fp16, fp64)"),
    "trainer.accelerator": (["auto", "gpu", "cpu"], ["tpu"], "did you mean 'gpu'?"),
    "trainer.devices": (["auto", "1", "8"], NO_NUMBERS, "from 1 up, or auto"),
    "trainer.micro_batch": (["auto", "1", "64", None], NO_NUMBERS, "number of images from 1 up, auto, or null"),
    "trainer.resume": (["auto", "restart"], ["no"], "(one of: auto, restart)"),
    "trainer.checkpoint_every": ([0.001, 300.0], [0.0, 300.001], "seconds in (0, 300]"),
    "trainer.log_every": ([1, 2], [0], "steps from 1 up"),
    "trainer.validate_every": ([1, 5], [0], "epochs from 1 up"),
    "trainer.metric": ([*METRICS], ["f1", "brier"], "(one of: accuracy, balanced_accuracy, macro_f1, top5_accuracy,"),
    "seed": ([0, 2**63 - 1], [-1, 2**63], "whole number in [0, 9223372036854775807]"),
}  # fmt: skip
FREE = {"model.name", "model.weights", "model.weights_sha256", "data.root", "data.official_val", "data.cache_dir",
        "data.content", "data.labels", "data.images", "data.image_column", "data.label_column", "data.split_column",
        "data.dataset", "data.target", "data.group", "trainer.compile", "trainer.deterministic",
        "trainer.checkpoint_activations"}  # fmt: skip
"""Settings without bounds of their own."""

DIGITS = {"data.name": "digits", "data.cache_size": None}
CIFAR = {"data.name": "cifar10", "data.cache_size": None, "data.test_fraction": None}
TIMM = {"model.library": "timm", "model.name": "vit_tiny_patch16_224",
        **dict.fromkeys(f"model.{key}" for key in ("patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim"))}
JITTER = {"data.augment": "color_jitter", "data.color_jitter_brightness": 0.0, "data.color_jitter_saturation": 0.0}
WIDTH_24 = {"model.mlp_dim": 24}
TOGETHER = [  # changes, and what is said of them; none: they are taken
    ({}, ()),
    *(({"model.name": name}, ()) for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")),
    ({"model.name": "vit_b_61"}, ("model.name=vit_b_61 is unknown, did you mean 'vit_b_16'?", "vit_tiny)")),
    ({"model.image_size": None}, ("model.image_size=null", "vit_tiny is made from its sizes")),
    ({"model.image_size": 20}, ("model.image_size=20 is not a multiple of the patch size 8", "16 or 24")),
    ({"model.image_size": 5}, ("model.image_size=5 ", "8 or 16")),
    ({"model.num_heads": 3}, ("model.hidden_dim=32 is not a multiple of model.num_heads=3",)),
    ({"model.num_heads": 1, "model.hidden_dim": 1, "lora.rank": 1}, ()),
    (TIMM, ()),
    ({**TIMM, "model.weights": "DEFAULT"}, ()),
    ({**TIMM, "model.patch_size": 16}, ("model.patch_size=16 has no effect with model=timm", "leave it out")),
    ({**TIMM, "model.name": "a b"}, ("model.name=a b is not a name of timm's", "vit_small_patch14_dinov2")),
    ({**TIMM, "model.weights": "V1"}, ("model.weights=V1 is unknown", "DEFAULT", "null")),
    ({**TIMM, "lora.rank": 1000, "lora.blocks": [99]}, ()),
    (DIGITS, ()),
    (CIFAR, ()),
    ({"data.name": "imagefolder", "data.val_fraction": 0.99, "data.test_fraction": None}, ()),
    ({"data.name": "imagefolder", "data.val_fraction": None, "data.test_fraction": 0.99}, ()),
    *(({"data.name": name, f"data.{part}_fraction": None}, (f"data.{part}_fraction=null", f"data={name} has no {part}"))
      for name in ("fake", "tiny_imagenet") for part in ("val", "test")),
    ({**CIFAR, "data.val_fraction": None}, ("data.val_fraction=null", "give a fraction")),
    ({**CIFAR, "data.test_fraction": 0.1}, ("data.test_fraction=0.1 has no effect with data=cifar10", "leave it out")),
    *(({**data, "data.cache_size": 16}, ("data.cache_size=16 has no effect", data["data.name"], "leave it out"))
      for data in (DIGITS, CIFAR, {**CIFAR, "data.name": "cifar100"})),
    *(({**data, "data.background": [0, 0, 0]}, ("data.background=[0, 0, 0] has no effect", data["data.name"]))
      for data in (DIGITS, CIFAR)),
    *(({**data, "data.value_range": [0.0, 1.0]}, ("data.value_range=[0.0, 1.0] has no effect",))
      for data in (DIGITS, CIFAR)),
    *(({**data, "data.cache": "none"}, ("data.cache=none has no effect",)) for data in (DIGITS, CIFAR, {})),
    ({"data.name": "imagefolder", "data.cache": "none"}, ()),
    *(({"data.value_range": [low, 1.0]}, ("data.value_range=", "low and high of deep images")) for low in (1.0, 2.0)),
    ({"data.name": "tiny_imagenet", "data.cache_size": 16}, ()),
    ({"data.val_fraction": 0.5, "data.test_fraction": 0.49}, ()),
    ({"data.name": "table", "data.root": "a", "data.images": "b"}, ("data.images=b and data.root=a", "give one")),
    ({"data.name": "imagefolder", "data.cache": "none", "data.on_broken": "skip"}, ("data.cache=none", "give disk")),
    ({"data.train_examples": 9, "data.train_per_class": 2}, ("data.train_examples=9 and data.train_per_class=2",)),
    ({"data.val_fraction": 0.5, "data.test_fraction": 0.5}, ("data.val_fraction=0.5 and data.test_fraction=0.5",
                                                             "below 1")),
    ({"data.official_val": True, "data.name": "tiny_imagenet"}, ()),
    ({"data.official_val": True}, ("data.official_val=true has no effect with data=fake",)),
    ({"data.augment": None}, ("data.augment=null is impossible: give none",)),
    *(({"data.augment": names}, (f"data.augment={names} is impossible: leave {names[0]} out",))
      for names in (["none", "mixup"], ["flip", "mixup", "crop_flip"])),
    ({"data.batch_size": 1, "data.augment": ["flip", "cutmix"]}, ("data.batch_size=1 leaves nothing for cutmix", "2")),
    *(({f"data.{key}": 0.25, "data.augment": "flip"}, (f"data.{key}=0.25 has no effect", "data.augment=flip"))
      for key in ("random_erasing_p", "mixup_alpha", "cutmix_alpha")),
    ({"data.mixup_alpha": 0.25, "data.augment": "mixup"}, ()),
    ({**JITTER, "data.color_jitter_contrast": 0.0}, ("data.augment=color_jitter changes no colour", "above 0")),
    ({"data.augment": [["mixup"]]}, ("data.augment=['mixup'] is unknown",)),
    (JITTER, ()),
    ({**JITTER, "data.augment": "flip"}, ("data.color_jitter_brightness=0.0 has no effect with data.augment=flip",)),
    ({"optimizer.name": "sgd", "optimizer.momentum": 0.0}, ()),
    ({"optimizer.momentum": 0.0}, ("optimizer.momentum=0.0 has no effect with optimizer.name=adamw",)),
    ({"optimizer.name": "sgd", "optimizer.eps": 1.0}, ("optimizer.eps=1.0 has no effect with optimizer.name=sgd",)),
    ({"optimizer.name": "sgd", "optimizer.betas": [0.9, 0.9]}, ("optimizer.betas=[0.9, 0.9] has no effect",)),
    ({**NO_ADAPTERS, "optimizer.head_lr": 1.0}, ("optimizer.head_lr=1.0 has no effect with lora=none",)),
    ({**NO_ADAPTERS, "optimizer.lora_b_lr_ratio": 2.0}, ("optimizer.lora_b_lr_ratio=2.0 has no effect", "lora=none")),
    ({**NO_ADAPTERS, "lora.method": "full", "optimizer.head_lr": 1.0}, ()),
    ({"lora.method": "dora", "optimizer.lora_b_lr_ratio": 2.0}, ()),
    (NO_ADAPTERS, ()),
    ({**NO_ADAPTERS, "lora.method": "full"}, ()),
    ({**NO_ADAPTERS, "lora.rank": 8, "lora.alpha": 1.0}, ("lora.rank=8 has no effect with lora=none", "change that")),
    ({**NO_ADAPTERS, "lora.method": "full", "lora.blocks": [0]}, ("lora.blocks=[0] has no effect with lora=full",)),
    *(({f"lora.{key}": None}, (f"lora.{key}=null", "or lora=none for a linear probe"))
      for key in ("rank", "alpha", "dropout", "targets", "scaling", "bias")),
    ({"lora.targets": ["q", "fc3"]}, ("lora.targets=fc3 is unknown, did you mean 'fc2'?",)),
    ({"lora.rank": 33}, ("lora.rank=33 ", "vit_tiny are 32 wide")),
    ({"lora.rank": 24, **WIDTH_24}, ()),
    ({"lora.rank": 25, **WIDTH_24}, ("lora.rank=25 ", "vit_tiny are 24 wide")),
    ({"lora.blocks": [0, 2]}, ("lora.blocks=[0, 2] ", "0 .. 1", "vit_tiny")),
]  # fmt: skip

OF_SWEEPS = [  # changes, and what is said of them
    *(({key: value}, ()) for key in ("pack_size", "workers") for value in ("auto", "1", "64")),
    *(({key: value}, (f"sweep.{key}={value} ", "from 1 up, or auto"))
      for key in ("pack_size", "workers") for value in NO_NUMBERS),
    *(({"margin": value}, ()) for value in (None, 0.01, 99.0)),
    *(({"margin": value}, (f"sweep.margin={value} ", "null for no race"))
      for value in (0.0, -1.0, 100.0, math.inf, math.nan)),
    ({"first_seeds": 2, "most_seeds": 2}, ()),
    ({"most_seeds": 10**9}, ()),
    ({"first_seeds": 1}, ("sweep.first_seeds=1 ", "from 2 up")),
    ({"most_seeds": 4}, ("sweep.most_seeds=4 ", "at least sweep.first_seeds=5")),
    *(({"trials": value}, ()) for value in (None, 1, 1000)),
    ({"trials": 0}, ("sweep.trials=0 ", "null for every combination")),
    *(({"name": value}, ()) for value in (None, "a.b")),
    *(({"name": value}, (f"sweep.name={value} ", "without '/'")) for value in ("", "a/b", "/a", ".", "..", ".a")),
]  # fmt: skip


def case_name(case: object) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items())[:60] if isinstance(case, dict) else ""


def refusal(check, config) -> str:
    """What a check says of a config; nothing where it accepts it."""
    try:
        check(config)
    except ConfigError as error:
        return str(error)
    return ""


def assert_said(said: str, says: tuple[str, ...]) -> None:
    assert said.startswith(says[0] if says else "")
    assert bool(said) == bool(says)
    assert all(part in said for part in says)


def test_every_setting_has_bounds_or_is_known_to_have_none():
    settings = {f"{section}.{key}" for section in SECTIONS for key in PLAIN[section]} | {"seed"}
    assert ALONE.keys() | FREE == settings
    assert not ALONE.keys() & FREE


@pytest.mark.parametrize(("key", "taken", "refused", "remedy"), [(key, *case) for key, case in ALONE.items()])
def test_a_setting_alone(key, taken, refused, remedy):
    for value in taken:
        assert refusal(validate, plain_trial({key: value})) == ""
    for value in refused:
        said = refusal(validate, plain_trial({key: value}))
        assert said.startswith(f"{key}={value} is ")
        assert remedy in said
        assert "\n" not in said


@pytest.mark.parametrize(("changes", "says"), TOGETHER, ids=case_name)
def test_settings_together(changes, says):
    assert_said(refusal(validate, plain_trial(changes)), says)


@pytest.mark.parametrize(("changes", "says"), OF_SWEEPS, ids=case_name)
def test_a_sweep(changes, says):
    assert_said(refusal(validate_sweep, options(**changes)), says)
