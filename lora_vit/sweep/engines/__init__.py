"""What starts a sweep's workers: this machine, Slurm or Ray. Options are typed here; code is imported when used."""

import contextlib
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from lora_vit.errors import ConfigError

LOG_LINES = 5  # the last ones of a worker's log say why it ended


class Engine(Protocol):
    """Starts processes that do ``python -m lora_vit.sweep work FOLDER``; the plan says what to train."""

    outlives_us: bool = False  # whether workers continue when the command ends
    poll_every: float = 2.0  # seconds between two looks of the command

    def number_of_workers(self, asked: str, trials: Sequence[Any]) -> int:
        """How many ``sweep.workers`` means here. Raises ConfigError."""

    def start(self, count: int) -> str:
        """Ask for workers; returns where they report to, and how to stop them. Raises ConfigError."""

    def look(self) -> tuple[int, list[str]]:
        """Workers that run or wait for their turn, and what is to be said of those that have failed, once."""

    def stop(self, now: bool = False) -> None:
        """Ask all workers to save and to end; ``now``: at once, if they are our own."""

    def withdraw(self) -> None:
        """Take back the workers whose turn has not come: nothing is left for them. Those that run end by themselves."""


@contextlib.contextmanager
def into_log(logs: Path) -> Iterator[Path]:
    """What a worker prints goes into a file of the sweep's folder."""
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{platform.node()}-{os.getpid()}.log"
    with path.open("a", buffering=1) as log, contextlib.redirect_stdout(log):
        yield path


@dataclass
class LocalEngine:
    """``engine=local``: processes of this machine, one for each GPU, or several that share a CPU."""

    name: str = "local"


@dataclass
class SlurmEngine:
    """``engine=slurm``: each worker is a job. The names are submitit's, and mean what they mean there."""

    name: str = "slurm"
    job_name: str = "lora_vit"
    timeout_min: int = 60  # minutes of a job; a worker that has not ended by then saves, and is queued again
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None  # of a job; a worker trains on one
    mem_gb: int | None = None
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    constraint: str | None = None
    gres: str | None = None
    signal_delay_s: int = 120  # seconds before the limit at which it is asked to save
    max_num_timeout: int = 100  # how often it is queued again
    array_parallelism: int = 256
    additional_parameters: dict[str, Any] = field(default_factory=dict)  # other options, as sbatch names them
    setup: list[str] | None = None


@dataclass
class RayEngine:
    """``engine=ray``: each worker is a task."""

    name: str = "ray"
    address: str | None = None  # of a running cluster, or ``auto``; None: a cluster of its own on this machine
    num_cpus: float = 1  # of a task
    num_gpus: float | None = None  # of a task; None: 1 if the cluster has GPUs
    resources: dict[str, float] = field(default_factory=dict)  # further ones of a task, by name
    runtime_env: dict[str, Any] = field(default_factory=dict)  # as Ray's


ENGINES: dict[str, Any] = {"local": LocalEngine, "slurm": SlurmEngine, "ray": RayEngine}


def start_engine(options: Any, folder: Path) -> Engine:
    """The engine that the options describe. Raises ConfigError if what it needs is not installed or not there."""
    values = asdict(options)
    name = values.pop("name")
    try:
        module = import_module(f"lora_vit.sweep.engines.{name}")
    except ImportError as error:
        raise ConfigError(f"engine={name} needs {error.name}: pip install 'lora_vit[{name}]'") from None
    return getattr(module, name.title())(values, folder)
