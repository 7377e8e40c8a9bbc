"""Workers as tasks of a Ray cluster."""

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from lora_vit.errors import ConfigError, Interrupted
from lora_vit.sweep.engines import Engine, into_log


def _worker(folder: str) -> int:
    """What a task runs; its output goes into a file of the folder."""
    from lora_vit.sweep.worker import work

    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray's way to cancel; a command behind & has it ignored
    with into_log(Path(folder) / ".ray"), contextlib.redirect_stderr(sys.stdout):
        try:
            work(Path(folder))
        except Interrupted as error:
            return error.exit_code
    return 0


class Ray(Engine):
    """Engine of ``engine=ray``. The tasks end with the command: they are its own."""

    def __init__(self, parameters: dict[str, Any], folder: Path):
        """``parameters``: the fields of RayEngine. Raises ConfigError if there is no cluster."""
        self.folder, self.parameters = folder.resolve(), parameters
        ours = signal.getsignal(signal.SIGTERM)
        address = parameters["address"] or os.environ.get("RAY_ADDRESS", "local")  # Ray's None joins any cluster here
        try:
            host, _, port = address.rpartition(":")
            if port.isdecimal():  # Ray tries for minutes
                socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR,
                         runtime_env=parameters["runtime_env"] or None)  # fmt: skip
        except (OSError, RuntimeError, ValueError) as error:
            why = f"engine.address={address}: no Ray cluster ({str(error).splitlines()[0]})"
            raise ConfigError(f"{why}: start one with `ray start --head`, or leave the address out") from None
        finally:
            signal.signal(signal.SIGTERM, ours)  # Ray's handler would end the command with code 15
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        self.gpus = float(has_gpus) if parameters["num_gpus"] is None else parameters["num_gpus"]
        self.tasks: list[Any] = []

    def number_of_workers(self, asked: str, trials: Sequence[Any]) -> int:
        if asked != "auto":
            return min(int(asked), len(trials))
        total, needs = ray.cluster_resources(), {"CPU": self.parameters["num_cpus"], "GPU": self.gpus}
        fit = [int(total.get(kind, 0) // need) for kind, need in needs.items() if need]
        return max(1, min([*fit, len(trials)]))

    def start(self, count: int) -> str:
        cpus, others = self.parameters["num_cpus"], self.parameters["resources"] or None
        task = ray.remote(_worker).options(num_cpus=cpus, num_gpus=self.gpus, resources=others, max_retries=0,
                                           name="lora_vit worker")  # fmt: skip
        self.tasks += [task.remote(str(self.folder)) for _ in range(count)]  # they wait where there is no room
        return f"{count} workers: Ray tasks, logs in {self.folder / '.ray'}"

    def look(self) -> tuple[int, list[str]]:
        running, texts = self._running(), []
        for task in [task for task in self.tasks if task not in running]:
            self.tasks.remove(task)
            try:
                if code := ray.get(task):
                    texts.append(f"a worker ended with code {code}")
            except ray.exceptions.TaskCancelledError:
                pass
            except ray.exceptions.RayTaskError as error:
                texts.append(f"a worker failed: {error.cause}")
            except ray.exceptions.RayError as error:
                texts.append(f"a worker was lost: {str(error).strip().splitlines()[0]}")
        return len(running), texts

    def stop(self, now: bool = False) -> None:
        for task in self._running():
            ray.cancel(task)  # interrupts it: it saves

    def _running(self) -> list[Any]:
        return ray.wait(self.tasks, num_returns=len(self.tasks), timeout=0)[1] if self.tasks else []
