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
from lora_vit.build import ModelFactory, build_setup, choose_device
from lora_vit.config import LoraConfig, TrialConfig
from lora_vit.data.preprocessing import Preprocessing
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError
from lora_vit.lora.adapter import bind, merged_state_dict, put_on, read_adapter
from lora_vit.lora.backbones import new_backbone
from lora_vit.records import read_record
from lora_vit.training.checkpoint import TrialState
from lora_vit.training.pack import Pack
from lora_vit.training.trial import TrialRun

TOLERANCE = 1e-3  # of a logit, in fp32, relative to the largest logit (or 1): both sides round each product


def trained_pack(folders: Sequence[Path], config: TrialConfig, writes: bool = False) -> Pack:
    """Trials as the trainer had them when it recorded their figures, which they have again if one ``writes`` them.

    ``config``: of one of them; they differ by a cut of its adapters alone. Raises ConfigError as ``bind``.
    """
    setup, trials = build_setup(config, Process()), []
    for folder in folders:
        adapter, record = read_adapter(folder), read_record(folder)
        bind(adapter, setup.base, setup.data.class_names, setup.data.card())
        own = replace(config, lora=LoraConfig(**record.config["lora"]))
        state = TrialState(epoch=config.trainer.epochs, values=adapter.tensors)
        trials.append(TrialRun(own, record, state, folder if writes else None))
    return Pack(trials, setup)


class TrainedModel:
    """A completed trial's adapter on its base. Raises ConfigError where it cannot be read or the base is another."""

    def __init__(self, folder: Path, config: TrialConfig):
        self.config, self.adapter = config, read_adapter(folder)
        self.class_names: list[str] = self.adapter.card["class_names"]
        device = choose_device(config.trainer.accelerator, Process())
        self.factory = ModelFactory(config, len(self.class_names), device, torch.float32)
        bind(self.adapter, self.factory.base)
        self.preprocessing = Preprocessing.of(self.adapter.card)
        how = self.preprocessing.to_dict()
        self.about = {"class_names": self.class_names, "model": config.model.name, "preprocessing": how}

    @cached_property
    def adapted(self) -> nn.Module:
        """Base and adapter apart, as it was trained."""
        model = copy.deepcopy(self.factory.original)
        put_on(model, self.adapter)
        return model.to(self.factory.device).eval()

    @cached_property
    def merged(self) -> Any:
        """The library's own model with the adapter in its weights."""
        model = new_backbone(self.factory.base, len(self.class_names))
        model.load_state_dict(merged_state_dict(self.factory.original, self.adapter))
        return model.to(self.factory.device).eval()

    def compare(self, others: Callable[[Tensor], Tensor], what: str) -> None:
        """Print how far the logits of ``what`` are from the trial's. Raises ConfigError where they are too far."""
        shape = (16, 3, *2 * [self.preprocessing.image_size])
        images = torch.rand(shape, generator=randomness.generator("merge")).to(self.factory.device) * 4 - 2
        with torch.no_grad():
            ours, theirs = self.adapted(images), others(images)
        largest, changed = float((ours - theirs).abs().max()), int((ours.argmax(-1) != theirs.argmax(-1)).sum())
        print(f"largest logit difference {largest:.2e}, {changed} of {len(ours)} predictions changed on made images")
        if not largest <= TOLERANCE * max(1.0, float(ours.abs().max())):
            raise ConfigError(f"{what} differs by {largest:.2e}; nothing written")
