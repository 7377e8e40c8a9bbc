"""What a worker trains on: its device, data and backbone."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from lora_vit.build import build_setup
from lora_vit.data.dataset import ImageData
from lora_vit.data.load import load_data
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError
from lora_vit.sweep.claims import Claims
from lora_vit.sweep.trial import Trial, digest, setup_key
from lora_vit.training.setup import Setup


class Setups:
    """Makes what trials train on; the last data set and the last backbone are kept."""

    def __init__(self, process: Process):
        self.process = process
        self._setup: tuple[str, Setup] | None = None
        self._data: tuple[str, ImageData] | None = None

    def of(self, trial: Trial) -> Setup:
        """Data and backbone for a trial. Raises ConfigError."""
        key = setup_key(trial.config)
        if self._setup is None or self._setup[0] != key:
            self._setup = None
            free_memory()
            data_key = digest(vars(trial.config.data))
            if self._data is None or self._data[0] != data_key:
                self._data = (data_key, load_data(trial.config.data, quiet=True))
            self._setup = (key, build_setup(trial.config, self.process, self._data[1]))
        return self._setup[1]


def uses_gpus(trials: Sequence[Trial]) -> bool:
    """Whether any trial runs on a GPU; each worker then has one to itself."""
    return any(trial.config.trainer.accelerator != "cpu" for trial in trials) and torch.cuda.is_available()


def own_device(trials: Sequence[Trial], claims: Claims) -> int:
    """The index of the first visible GPU that no other worker of the sweep has; 0 on a CPU, which workers share.

    The GPU is claimed like a trial. Raises ConfigError if every visible GPU has a worker.
    """
    if not uses_gpus(trials):
        return 0
    claims.look()
    for index in range(torch.cuda.device_count()):
        if claims.take(f"gpu-{torch.cuda.get_device_properties(index).uuid}"):
            torch.cuda.set_device(index)
            return index
    raise ConfigError(f"every GPU that is visible here ({torch.cuda.device_count()}) has a worker of this sweep "
                      "already: start one worker for each GPU")  # fmt: skip


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
