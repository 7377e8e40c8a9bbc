"""What all trials of a pack share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_vit.config import TrialConfig
from lora_vit.data.augment import Transform
from lora_vit.data.dataset import ImageData
from lora_vit.data.stream import Samples
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
        return self.samples.data
