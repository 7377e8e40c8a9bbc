"""Run one trial in its folder: in this process, in those that torchrun has started, or in those that we start."""

import contextlib
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_vit import distributed, errors
from lora_vit.build import build_setup, check_devices, choose_world_size, with_features
from lora_vit.config import TrialConfig, from_dict, to_dict
from lora_vit.errors import ConfigError, Interrupted, TrialFailed, UserError, one_line, out_of_memory
from lora_vit.files import remove_empty
from lora_vit.records import TrialRecord, read_record, state_of, write_record
from lora_vit.stopping import SIGNALS, StopRequest
from lora_vit.training.loop import RunReporter, train_trials
from lora_vit.training.trackers import OFF
from lora_vit.training.trial import TrialRun, lock_folder


def train(config: TrialConfig, folder: Path, hydra_files: dict[str, str]) -> TrialRecord:
    """Train the validated trial to its end, or return its record if it is completed already.

    Every process of a group calls this; rank 0 alone looks at the folder and writes. Raises ConfigError: nothing was
    trained; TrialFailed: the record says why, or a process could not take part; Interrupted: everything is saved.
    """
    OFF.clear()  # a server may be back since an earlier call
    process, restart = distributed.this_process(), config.trainer.resume == "restart"
    started = process.world_size if distributed.started_by_torchrun() else 0
    if (world_size := choose_world_size(config, started)) > max(1, started):
        return launch(config, folder, hydra_files, world_size)

    def take() -> TrialRecord | None:
        held.callback(remove_empty, folder)
        lock_folder(folder, held)
        there = state_of(folder, config)
        if there.problem:
            raise ConfigError(there.problem)
        return there.record if there.status == "completed" and not restart else None

    with contextlib.ExitStack() as held, _remedy_for_memory():
        completed = distributed.from_main(distributed.on_all(lambda: take() if process.rank == 0 else None))
        if completed is not None:
            return completed
        with StopRequest() as stop, contextlib.closing(RunReporter()) as reporter:
            check_devices(config.trainer.accelerator, process, held)
            setup = distributed.on_all(lambda: with_features(build_setup(config, process), config, stop.heed))
            opened = distributed.on_all(lambda: TrialRun.open(config, folder, setup, hydra_files, restart=restart)
                                        if process.rank == 0 else None)  # fmt: skip
            standing: Any = distributed.from_main(opened and (opened.record, opened.state))
            trial = opened or TrialRun(config, *standing)  # without files
            try:
                train_trials([trial], setup, reporter, stop)
            except Exception as error:
                if not isinstance(error, Interrupted):
                    trial.fail(one_line(error), error=error)
                raise
    if trial.record.status == "failed":
        raise TrialFailed(trial.record.error["message"] if trial.record.error else "failed")
    return trial.record


@contextlib.contextmanager
def _remedy_for_memory() -> Iterator[None]:
    """Raise TrialFailed, with what to do, in the place of an error that says that memory ran out."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        what = "trainer.micro_batch=auto, trainer.checkpoint_activations=true, trainer.precision=bf16 or fp16"
        smaller = "fewer lora.targets or blocks, a smaller model or model.image_size"
        raise TrialFailed(f"{one_line(error)}: give what is not given yet of {what}, {smaller}") from error


def main() -> None:
    """A process that :func:`launch` has started; its argument is what to train, and the command that asks for it."""
    config, folder, hydra_files, sys.argv = json.loads(sys.argv[1])
    with errors.reporting(), distributed.group():
        train(from_dict(config), Path(folder), hydra_files)


def launch(config: TrialConfig, folder: Path, hydra_files: dict[str, str], world_size: int) -> TrialRecord:
    """Train in processes of this machine that torch's launcher starts; a signal that asks to stop is passed on.

    This process is left as it was: the launcher sets handlers of signals, draws random numbers and logs what it sees.
    Raises as :func:`train`, also where a process ends without a report.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(f"trainer.devices={config.trainer.devices}: only the main thread starts processes, so give 1")
    from joblib import cpu_count  # those that this process may use
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def pass_on(signum: int, frame: Any) -> None:
        raise SignalException("asked to stop", signal.Signals(signum))  # torch's agent hands it to the processes

    threads = os.environ.get("OMP_NUM_THREADS", max(1, cpu_count() // world_size))
    command = [f"HYDRA_FULL_ERROR={int(errors.FULL_ERROR)}", f"OMP_NUM_THREADS={threads}",
               f"PYTHONPATH={os.pathsep.join(filter(None, sys.path))}", sys.executable, "-m", "lora_vit.run",
               json.dumps([to_dict(config), str(folder.absolute()), hydra_files, sys.argv])]  # fmt: skip
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


if __name__ == "__main__":
    main()
