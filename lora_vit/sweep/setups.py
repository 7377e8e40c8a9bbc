"""Data and backbone of a worker, kept while the next trials need the same."""

from __future__ import annotations

import gc

import torch

from lora_vit.build import build_setup
from lora_vit.data.dataset import ImageData, load_data
from lora_vit.distributed import Process
from lora_vit.sweep.plan import Job, digest, setup_key
from lora_vit.training.setup import Setup


class Setups:
    """Makes what trials train on; the last data set and the last backbone are kept."""

    def __init__(self, process: Process):
        self.process = process
        self._setup: tuple[str, Setup] | None = None
        self._data: tuple[str, ImageData] | None = None

    def of(self, job: Job) -> Setup:
        """Data and backbone for a trial. Raises ConfigError."""
        key = setup_key(job.config)
        if self._setup is None or self._setup[0] != key:
            self._setup = None
            free_memory()
            data_key = digest(vars(job.config.data))
            if self._data is None or self._data[0] != data_key:
                self._data = (data_key, load_data(job.config.data, quiet=True))
            self._setup = (key, build_setup(job.config, self.process, self._data[1]))
        return self._setup[1]


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
