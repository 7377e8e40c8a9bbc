"""What all trials of a pack share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_vit.config import TrialConfig
from lora_vit.data.augment import Transform
from lora_vit.data.dataset import ImageData
from lora_vit.data.stream import Batch, Samples, TrainStream
from lora_vit.distributed import Process
from lora_vit.models.vit import PackedViT


@dataclass
class Setup:
    """Data, device, process, and what builds the trials' model."""

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

    def eval_stream(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every sample of a split once, in order, divided among the processes; nothing is padded or dropped."""
        ids = self.data.splits[split][self.process.rank :: self.process.world_size]
        for start in range(0, len(ids), batch_size):
            own = ids[start : start + batch_size]
            images, labels = self.samples.gather(own)
            yield Batch(self.transform.eval(images), labels, own)
