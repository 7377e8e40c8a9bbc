"""Workers as processes of this machine: one for each GPU, or several that share a CPU's cores.

They are ``python -m lora_vit.sweep work FOLDER`` like all others. One process imports torch and is forked for each
worker, and it is started before the command knows what to train, so that the import costs no time.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_vit.config import TrialConfig
from lora_vit.errors import ConfigError
from lora_vit.stopping import SIGNALS, repeating
from lora_vit.sweep.engines import LOG_LINES, Engine, into_log

_waiting: list[Any] = []


def start_early() -> None:
    """Have a process that imports torch and waits for its orders; it prints into ``said``."""
    if not _waiting:
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (it lives as long as the process)
        command = [sys.executable, "-m", "lora_vit.sweep", "work", "-"]
        process: Any = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=said, stderr=said,
                                        start_new_session=True)  # fmt: skip
        process.said = said
        _waiting.append(process)


def _last_words(process: Any) -> list[str]:
    """The last lines of what a process has said; it gets no orders any more."""
    process.said.seek(0)
    lines = process.said.readlines()[-LOG_LINES:]
    process.said.close()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    return [line.rstrip() for line in lines]


class Local(Engine):
    """Engine of ``engine=local``. The workers end with the command."""

    poll_every = 0.5

    def __init__(self, parameters: dict[str, Any], folder: Path):
        self.folder = folder.resolve()
        self._crews: list[Any] = []  # processes, each forked for ``count`` workers
        self._threads = 1
        start_early()

    def number_of_workers(self, asked: str, trials: Sequence[Any]) -> int:
        import torch

        from lora_vit.sweep.pack_size import MEMORY_SHARE, attainable_memory, gpus_of

        wanted = 0 if asked == "auto" else int(asked)
        if most := gpus_of(trials):
            if wanted > most:
                raise ConfigError(f"sweep.workers={wanted}: only {most} GPUs are visible, give at most that")
        else:  # processes of few threads wait less for one another than one of many does
            largest = max(expected_bytes(trial.config) for trial in trials)
            fit = int(MEMORY_SHARE * attainable_memory(torch.device("cpu")) // largest)
            most = min(torch.get_num_threads(), 8, fit)
            limit, cores = os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1
            if limit and not wanted and most == torch.get_num_threads() < min(cores, len(trials)):
                print(f"note: OMP_NUM_THREADS={limit} leaves {most} of {cores} cores: unset it, or give sweep.workers")
        count = max(1, min(wanted or most, len(trials)))
        self._threads = max(1, torch.get_num_threads() // count)
        return count

    def start(self, count: int) -> str:
        start_early()
        process = _waiting.pop()
        with contextlib.suppress(BrokenPipeError):  # it has ended: `look` says why
            orders = {"folder": str(self.folder), "count": count, "threads": self._threads}
            process.stdin.write(json.dumps(orders) + "\n")
            process.stdin.flush()
        process.count = count
        self._crews.append(process)
        return ""

    def look(self) -> tuple[int, list[str]]:
        news = []
        for process in [process for process in self._crews if process.poll() is not None]:
            self._crews.remove(process)
            lines, code = _last_words(process), process.returncode
            if code and code - 128 not in SIGNALS:
                news.append("\n  ".join([f"workers have failed (exit code {code}):", *lines]))
        return sum(process.count for process in self._crews), news  # each counts until all of its workers have ended

    def stop(self, now: bool = False) -> None:
        for process in self._crews:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if now else process.send_signal(signal.SIGTERM)

    def withdraw(self) -> None:
        for process in _waiting:  # it has nothing to save
            process.kill()
        for process in (*_waiting, *self._crews):  # these end by themselves
            process.wait()
            _last_words(process)
        _waiting.clear()
        self._crews.clear()


def expected_bytes(config: TrialConfig) -> int:
    """About what a process holds that trains such a trial on a CPU.

    Python and torch (400 MiB), the weights twice (loading), and for each token of the batch what each block keeps for
    its backward pass: seven vectors of the width and one of the MLP's.
    """
    from lora_vit.models.vit import shape_of  # imports torch

    m = shape_of(config.model)
    weights = (4 if config.lora.method == "full" else 2) * m.layers * m.width * (4 * m.width + 2 * m.mlp)
    return (400 << 20) + 4 * (weights + m.layers * config.data.batch_size * m.tokens * (7 * m.width + m.mlp))


def work_for_command() -> int:
    """Import torch, wait for a command's orders, fork workers that end with it; returns their largest exit code."""
    import torch

    from lora_vit.sweep.worker import exit_code

    if not (line := sys.stdin.readline()):
        return 0
    orders = json.loads(line)
    torch.set_num_threads(orders["threads"])
    ours, folder, pids = os.getpid(), Path(orders["folder"]), list[int]()

    def end_if_alone() -> None:
        if os.getppid() != ours:
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(orders["count"]):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.close(0)  # a worker
        with into_log(folder / ".local"), repeating(end_if_alone, 1.0):
            code = exit_code(folder)
        os._exit(code)

    def stop(*_: Any) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=lambda: stop(sys.stdin.read()), daemon=True).start()  # it ends with the command
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return max(code if code >= 0 else 128 - code for code in codes)
