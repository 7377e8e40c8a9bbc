"""A trained trial as plain models in fp32, for ``predict merge export``, or as the trainer had it, for ``evaluate``."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_vit import randomness
from lora_vit.build import build_setup, choose_device, inputs_of
from lora_vit.config import SIZES, LoraConfig, ModelConfig, TrialConfig, is_weights_file
from lora_vit.data.dataset import ImageData
from lora_vit.data.preprocessing import Preprocessing
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError
from lora_vit.lora.adapter import base_of, bind, load_adapter, merged_state_dict, put_on, read_adapter
from lora_vit.lora.backbones import TORCHVISION, head_name, new_backbone
from lora_vit.models.vit import trunk_of
from lora_vit.models.weights import load_weights
from lora_vit.records import read_record
from lora_vit.training.pack import Pack
from lora_vit.training.trial import TrialRun, TrialState

TOLERANCE = 1e-3  # of a logit, in fp32, relative to the largest logit (or 1): both sides round each product


def trained_pack(folders: Sequence[Path], config: TrialConfig, writes: bool = False,
                 others: ImageData | None = None) -> Pack:  # fmt: skip
    """Trials as the trainer had them when it recorded their figures, which they have again if one ``writes`` them.

    ``config``: of one of them; they differ by a cut of its adapters alone; ``others``: pictures of their classes
    in the place of their own. Raises ConfigError as ``bind``.
    """
    setup, trials = build_setup(config, Process(), others), []
    for folder in folders:
        adapter, record = read_adapter(folder), read_record(folder)
        bind(adapter, setup.base, setup.data.class_names, None if others else setup.data.card())
        own = replace(config, lora=LoraConfig(**record.config["lora"]))
        state = TrialState(epoch=config.trainer.epochs, values=adapter.tensors)
        trials.append(TrialRun(own, record, state, folder if writes else None))
    return Pack(trials, setup)


def base_of_saved(folder: Path, weights: str | None) -> ModelConfig:
    """The base of ``save_adapter``'s folder, with weights from a file. Raises ConfigError where none is given."""
    base = read_adapter(folder).card["base"]
    if not is_weights_file(weights):
        what = f"{folder} has the weights of its adapter's base nowhere"
        raise ConfigError(f"{what}: give --weights FILE, the plain model's state_dict before it was trained")
    library = "torchvision" if base["architecture"] == TORCHVISION else "timm"
    unset = dict.fromkeys(("mean", "std", "interpolation"))
    return ModelConfig(base["model"], library, weights, **{k: base.get(k) for k in SIZES}, **unset, head_dropout=0.0)


class TrainedModel:
    """A completed trial's adapter on its base. Raises ConfigError where it cannot be read or the base is another.

    One of somebody's own loop may lack class names, then numbers, and what is done to pictures: ``preprocessing`` None.
    """

    def __init__(self, folder: Path, model: ModelConfig, accelerator: str):
        """``model``: of the base."""
        self.model, self.adapter, self.base = model, read_adapter(folder), trunk_of(model)
        card, self.device = self.adapter.card, choose_device(accelerator)
        self.image_size: int = card["base"]["image_size"]
        if note := load_weights(self.base, model):
            print(note)
        if "output" in card:  # somebody's model need not be what its name makes
            load_adapter(copy.deepcopy(self.base), folder)
        else:
            bind(self.adapter, {**base_of(self.base), **inputs_of(model, self.base)})
        classes = len(self.adapter.tensors.get(f"{head_name(self.base)}.bias", ()))
        self.class_names: list[str] = card.get("class_names") or [str(i) for i in range(classes)]
        self.preprocessing: Any = None if "output" in card and "preprocessing" not in card else Preprocessing.of(card)
        how = self.preprocessing and self.preprocessing.to_dict()
        self.about = {"class_names": self.class_names, "model": model.name, "preprocessing": how}

    @cached_property
    def adapted(self) -> nn.Module:
        """Base and adapter apart, as it was trained."""
        model = copy.deepcopy(self.base)
        put_on(model, self.adapter)
        return model.to(self.device).eval()

    @cached_property
    def merged(self) -> Any:
        """The library's own model with the adapter in its weights."""
        model = new_backbone(self.adapter.card["base"], len(self.class_names))
        model.load_state_dict(merged_state_dict(self.base, self.adapter))
        return model.to(self.device).eval()

    def compare(self, others: Callable[[Tensor], Tensor], what: str) -> None:
        """Print how far the logits of ``what`` are from the trial's. Raises ConfigError where they are too far."""
        shape = (16, 3, self.image_size, self.image_size)
        images = torch.rand(shape, generator=randomness.generator("merge")).to(self.device) * 4 - 2
        with torch.no_grad():
            ours, theirs = self.adapted(images), others(images)
        largest, changed = float((ours - theirs).abs().max()), int((ours.argmax(-1) != theirs.argmax(-1)).sum())
        print(f"largest logit difference {largest:.2e}, {changed} of {len(ours)} predictions changed on made images")
        if not largest <= TOLERANCE * max(1.0, float(ours.abs().max())):
            raise ConfigError(f"{what} differs by {largest:.2e}; nothing written")
