"""Start a trial again in several processes: the command that trains it, under torchrun's launcher."""

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_vit import distributed, errors
from lora_vit.config import TrialConfig, to_dict
from lora_vit.errors import ConfigError, Interrupted, TrialFailed, UserError
from lora_vit.records import TrialRecord, read_record, state_of, write_record
from lora_vit.stopping import SIGNALS


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


def launch(config: TrialConfig, folder: Path, world_size: int) -> TrialRecord:
    """Train in processes of this machine, and wait for them; returns the trial's record.

    A signal that asks to stop is passed on. This process is left as it was: torch's launcher sets handlers of signals,
    draws random numbers and logs what it sees.

    Raises:
        ConfigError, TrialFailed: what the processes report, or that one ended without a report.
        Interrupted: everything is saved.
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


def _cause(folder: Path, config: TrialConfig, failures: Mapping[int, Any]) -> UserError:
    """Why the processes failed: what the first of them reports that did not end because of another.

    If it was ended without a report, this becomes the reason in the trial's record.
    """
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
