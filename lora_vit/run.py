"""Run one trial in its folder: in this process, in those that torchrun has started, or in those that we start."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lora_vit import distributed, errors
from lora_vit.build import build_setup, check_world_size, choose_world_size
from lora_vit.config import TrialConfig, to_dict
from lora_vit.errors import ConfigError, Interrupted, TrialFailed, UserError, one_line
from lora_vit.files import remove_empty
from lora_vit.records import TrialRecord, read_record, state_of, write_record
from lora_vit.stopping import SIGNALS, StopRequest
from lora_vit.training.loop import train_trials
from lora_vit.training.progress import RunReporter
from lora_vit.training.trial import TrialRun, locked_folder


def train(config: TrialConfig, folder: Path, hydra_files: dict[str, str]) -> TrialRecord:
    """Train the validated trial to its end, or return its record if it is completed already.

    Every process of a group calls this; rank 0 alone looks at the folder and writes. Outside a group, a trial that
    asks for several devices trains in as many processes of their own. The folder is made if need be and does not stay
    empty; ``hydra_files``: name to text of what goes into ``.hydra/``.

    Raises:
        ConfigError: nothing was trained; the message is one line.
        TrialFailed: the trial's record says why, or a process could not take part.
        Interrupted: everything is saved.
    """
    process, restart = distributed.this_process(), config.trainer.resume == "restart"
    if distributed.started_by_torchrun():
        check_world_size(config, process.world_size)
        if (devices := config.trainer.devices) not in ("auto", str(process.world_size)):
            started = f"torchrun has started {process.world_size} processes"
            raise ConfigError(f"trainer.devices={devices}: {started}, leave it out")
    else:
        world_size, note = choose_world_size(config)
        if note:
            print(note)
        if world_size > 1:
            return launch(config, folder, world_size)

    def take() -> TrialRecord | None:
        held.callback(remove_empty, folder)
        held.enter_context(locked_folder(folder))
        there = state_of(folder, config)
        if there.problem:
            raise ConfigError(there.problem)
        return there.record if there.status == "completed" and not restart else None

    with contextlib.ExitStack() as held:
        completed = distributed.from_main(distributed.on_all(lambda: take() if process.is_main else None))
        if completed is not None:
            return completed
        with StopRequest() as stop:
            setup = distributed.on_all(lambda: build_setup(config, process))
            opened = distributed.on_all(lambda: TrialRun.open(config, folder, setup, hydra_files, restart=restart)
                                        if process.is_main else None)  # fmt: skip
            standing: Any = distributed.from_main(opened and (opened.record, opened.state))
            trial = opened or TrialRun(config, *standing)  # without files
            reporter = RunReporter()
            try:
                train_trials([trial], setup, reporter, stop)
            except Interrupted:
                raise
            except Exception as error:
                trial.fail(one_line(error), error=error)
                raise
            finally:
                reporter.close()
    if trial.record.status == "failed":
        raise TrialFailed(trial.record.error["message"] if trial.record.error else "failed")
    return trial.record


def launch(config: TrialConfig, folder: Path, world_size: int) -> TrialRecord:
    """Train in processes of this machine: the command that trains the trial, under torchrun's launcher.

    A signal that asks to stop is passed on. This process is left as it was: torch's launcher sets handlers of signals,
    draws random numbers and logs what it sees. Raises as :func:`train`, also where a process ends without a report.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(f"trainer.devices={config.trainer.devices}: processes are started from the main thread "
                          "alone, so give 1 or call from there")  # fmt: skip
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def pass_on(signum: int, frame: Any) -> None:
        raise SignalException("asked to stop", signal.Signals(signum))  # torch's agent hands it to the processes

    threads = os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // world_size))
    command = [f"HYDRA_FULL_ERROR={int(errors.FULL_ERROR)}", f"OMP_NUM_THREADS={threads}",
               f"PYTHONPATH={os.pathsep.join(filter(None, sys.path))}", sys.executable, "-m", "lora_vit.train",
               *overrides_of(config), f"hydra.run.dir={_literal(str(folder.absolute()))}"]  # fmt: skip
    options = LaunchConfig(1, 1, world_size, run_id=distributed.OWN_RUN, rdzv_backend="c10d",
                           rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.2)  # fmt: skip
    logger = logging.getLogger("torch.distributed.elastic")
    with contextlib.ExitStack() as as_before:
        as_before.callback(random.setstate, random.getstate())
        as_before.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        for signum in (*SIGNALS, signal.SIGQUIT):
            handler = signal.getsignal(signum)
            as_before.callback(signal.signal, signum, handler)
            if handler is signal.SIG_DFL:
                signal.signal(signum, pass_on)
        try:
            elastic_launch(options, "/usr/bin/env")(*command)
        except SignalException as error:
            raise Interrupted(int(error.sigval)) from None
        except ChildFailedError as error:
            raise _cause(folder, config, error.failures) from None
    return read_record(folder)


def overrides_of(config: TrialConfig) -> list[str]:
    """The command line of a config: every setting by name, as Hydra's grammar has to be given it."""
    values = to_dict(config)
    seed = values.pop("seed")
    settings = {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}
    return [f"{key}={_literal(value)}" for key, value in {**settings, "seed": seed}.items()]


def _literal(value: Any) -> str:
    """A value in Hydra's grammar; text is neither interpolated nor read as another type."""
    if isinstance(value, str):
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # OmegaConf's escape
        return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + m[2].replace("'", r"\'"), text) + "'"
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    return "null" if value is None else str(value).lower()  # a boolean or a number


def _cause(folder: Path, config: TrialConfig, failures: dict[int, Any]) -> UserError:
    """What the first process reports that did not end because of another; if nothing, its record gets the reason."""
    said = {r: f.message["message"] if isinstance(f.message, dict) else "" for r, f in failures.items()}
    first = min(failures, key=lambda r: (distributed.PEER_ENDED in said[r], failures[r].timestamp))
    code = failures[first].exitcode
    if code - 128 in SIGNALS:
        return Interrupted(code - 128)
    kind, _, text = said[first].partition(": ")
    if text:
        return ConfigError(text) if kind == "ConfigError" else TrialFailed(text)
    reason = f"process {first} ended with code {code}"
    record = state_of(folder, config).record
    if record is not None and record.status != "completed":
        record.status, record.finished = "failed", time.time()
        record.error = {"message": reason, "traceback": None, "step": None}
        write_record(folder, record)
    return TrialFailed(reason)
