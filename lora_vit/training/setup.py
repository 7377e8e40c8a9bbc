"""What all trials of a pack share: the model's maker, the data and the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_vit.config import TrialConfig
from lora_vit.data.augment import Transform
from lora_vit.data.dataset import ImageData
from lora_vit.data.stream import EvalStream, Samples, TrainStream
from lora_vit.distributed import Process
from lora_vit.models.vit import PackedViT


@dataclass
class Setup:
    """What all trials of a pack share, and how their model is built."""

    build_model: Callable[[list[TrialConfig]], PackedViT]
    samples: Samples
    transform: Transform
    device: torch.device
    process: Process
    compile: bool
    environment: dict[str, object] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> ImageData:
        """The data set."""
        return self.samples.data

    def train_stream(self, config: TrialConfig) -> TrainStream:
        """The ordered, augmented batches of a trial (this process's part)."""
        p = self.process
        return TrainStream(self.samples, self.transform, config.data.batch_size, config.seed, p.rank, p.world_size)

    def eval_stream(self, split: str, batch_size: int) -> EvalStream:
        """Every sample of a split once (this process's share)."""
        p = self.process
        return EvalStream(self.samples, self.transform, split, batch_size, p.rank, p.world_size)
