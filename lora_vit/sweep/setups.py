"""Data and backbone of a worker, kept while the next trials need the same."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence

import torch

from lora_vit.build import build_setup
from lora_vit.data.dataset import ImageData, load_data
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError
from lora_vit.files import locked
from lora_vit.sweep.plan import Job, SweepRun, digest, setup_key
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


def uses_gpus(jobs: Sequence[Job]) -> bool:
    """Whether any trial runs on a GPU, of which each worker has one to itself."""
    return any(job.config.trainer.accelerator != "cpu" for job in jobs) and torch.cuda.is_available()


@contextlib.contextmanager
def own_device(run: SweepRun) -> Iterator[int]:
    """The first visible GPU that no other worker of the sweep has; 0 on a CPU, which workers share.

    Raises:
        ConfigError: every visible GPU has a worker.
    """
    if not uses_gpus(run.jobs):
        yield 0
        return
    for index in range(torch.cuda.device_count()):
        lock = run.folder / ".claims" / f"gpu-{torch.cuda.get_device_properties(index).uuid}"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(lock, wait=False))
            except BlockingIOError:
                continue
            torch.cuda.set_device(index)
            yield index
            return
    raise ConfigError(
        f"every GPU that is visible here ({torch.cuda.device_count()}) has a worker of this sweep already: start one "
        "worker for each GPU"
    )


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
