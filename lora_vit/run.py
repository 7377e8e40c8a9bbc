"""Run one trial in its folder, in as many processes as it asks for."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_vit import distributed
from lora_vit.build import build_setup, check_world_size, choose_world_size
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError, Interrupted, TrialFailed, one_line
from lora_vit.records import TrialRecord, read_record, write_record
from lora_vit.start import not_importing_main
from lora_vit.stopping import SIGNALS, StopRequest
from lora_vit.training.loop import train_trials
from lora_vit.training.progress import RunReporter
from lora_vit.training.trial import TrialRun, completed_record, locked_folder

AFTER_CAUSE = 2.0
"""Seconds that a process outlives another that failed: torch's agent tells of the first that it sees ended."""




def run(
    config: TrialConfig,
    folder: Path,
    hydra_files: dict[str, str],
    wait: bool = False,
    process: Process | None = None,
) -> TrialRecord:
    """Train the trial to its end, or report that it is finished already.

    Args:
        config: validated.
        folder: the trial's.
        hydra_files: name to text of what goes into ``.hydra/`` once the run is accepted.
        wait: for another process that is training this very trial, instead of refusing.
        process: rank 0 of a group that stands, whose others :func:`follow`; None: as many are started as are asked for.

    Raises:
        ConfigError: nothing was trained; the message is one line.
        TrialFailed: the trial's record says why.
        TrialFailed: another process of the group cannot go on.
        Interrupted: everything is saved.
    """
    restart, to_start = config.trainer.resume == "restart", 1
    with _not_left_empty(folder):
        if process is not None:
            _check_group(config, process.world_size)
        else:
            to_start, note = choose_world_size(config)
            if note:
                print(note)
        completed = completed_record(folder, config)  # refuses before anything is written
        if completed is not None and not restart:
            return completed
        if to_start > 1:
            return _launch(config, folder, hydra_files, to_start)
        with locked_folder(folder, wait):
            completed = completed_record(folder, config)  # as another process has left it
            if completed is not None and not restart:
                return completed
            return _train(config, folder, hydra_files, process or Process(), restart)


def follow(process: Process) -> int:
    """Train in a process of a rank above 0 what rank 0 trains, if anything; returns the exit code.

    It writes nothing, and leaves it to rank 0 to say what is wrong.
    """
    try:
        with StopRequest() as stop:
            config = distributed.from_main(None)
            if config is TrialFailed:
                return 1
            if config is not None:
                setup = distributed.on_all(functools.partial(build_setup, config, process))
                trial = TrialRun(config, *distributed.from_main(None))
                train_trials([trial], setup, RunReporter(False), stop)
                _unless_failed(trial.record)
    except Interrupted as error:
        return error.exit_code
    except (ConfigError, TrialFailed):
        return 1
    except TrialFailed:
        time.sleep(AFTER_CAUSE)
        return 1
    return 0


def _check_group(config: TrialConfig, world_size: int) -> None:
    """Raise ConfigError where the trial cannot train in so many processes that stand already."""
    check_world_size(config, world_size)
    devices = config.trainer.devices
    if devices not in ("auto", str(world_size)):
        raise ConfigError(f"trainer.devices={devices}: torchrun has started {world_size} processes, leave it out")


@contextlib.contextmanager
def _not_left_empty(folder: Path) -> Iterator[None]:
    """Remove the folder that Hydra made where the run was refused at once."""
    try:
        yield
    except ValueError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def _train(
    config: TrialConfig, folder: Path, hydra_files: dict[str, str], process: Process, restart: bool
) -> TrialRecord:
    with StopRequest() as stop:
        distributed.from_main(config)
        process.has_led = True
        setup = distributed.on_all(functools.partial(build_setup, config, process))
        trial = TrialRun.open(config, folder, setup, hydra_files, restart=restart)
        distributed.from_main((trial.record, trial.state))
        reporter = RunReporter(True)
        env = setup.environment
        reporter.console.print(setup.data.line(setup.transform.image_size), markup=False)
        reporter.console.print(
            f"trial {trial.name} on {env['device']}, {env['precision']}, {process.world_size} process(es)"
        )
        try:
            train_trials([trial], setup, reporter, stop)
        except Interrupted:
            raise
        except Exception as error:
            trial.fail(one_line(error), error=error)
            raise
        finally:
            reporter.close()
    return _unless_failed(trial.record)


def _unless_failed(record: TrialRecord) -> TrialRecord:
    if record.status == "failed":
        raise TrialFailed(record.error["message"] if record.error else "failed")
    return record




def _launch(config: TrialConfig, folder: Path, hydra_files: dict[str, str], world_size: int) -> TrialRecord:
    """Start the processes through torch's elastic launcher and wait for them."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(f"trainer.devices={config.trainer.devices}: processes are started from the main thread "
                          "alone, so give 1 or call from there")  # fmt: skip
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )

    def pass_on(signum: int, frame: Any) -> None:
        raise SignalException("asked to stop", signal.Signals(signum))  # torch's agent hands it to the processes

    try:
        with _as_it_was(), not_importing_main():
            # One thread per core in all: a process alone would take every core, and each process would.
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
            for signum in SIGNALS:
                if signal.getsignal(signum) is signal.SIG_DFL and signum != signal.SIGTERM:
                    signal.signal(signum, pass_on)
            elastic_launch(launch, _worker)(config, folder, hydra_files)
    except SignalException as error:
        raise Interrupted(int(error.sigval)) from None
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code - 128 in SIGNALS:
            raise Interrupted(code - 128) from None
        raise TrialFailed(_failure_of_processes(folder, error)) from None
    return read_record(folder)


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Put back what torch's launcher leaves changed: handlers, variables, Python's generator."""
    handlers = {s: signal.getsignal(s) for s in (*SIGNALS, signal.SIGQUIT)}
    variables, generator = dict(os.environ), random.getstate()
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        os.environ.clear()
        os.environ.update(variables)
        random.setstate(generator)


def _failure_of_processes(folder: Path, error: Any) -> str:
    """The reason why processes failed, also put into the record if it does not say so itself."""
    rank, failure = error.get_first_failure()
    message = str(failure.message).strip()
    last = message.splitlines()[-1] if message else ""
    reason = f"process {rank} ended with code {failure.exitcode}" + (f": {last}" if last else "")
    try:
        record = read_record(folder)
    except (OSError, ValueError):
        return reason
    if record.status == "failed" and record.error and record.error.get("step") is not None:
        return str(record.error["message"])
    record.status, record.finished = "failed", time.time()
    record.error = {"message": reason, "traceback": message, "step": None}
    write_record(folder, record)
    return reason


def _worker(config: TrialConfig, folder: Path, hydra_files: dict[str, str]) -> None:
    """A started process: join the others and train."""
    process = distributed.join_process_group()
    code = 0
    try:
        if process.is_main:
            with distributed.leading(process):
                run(config, folder, hydra_files, process=process)
        else:
            code = follow(process)
    except Interrupted as stop:
        code = stop.exit_code
    except (ConfigError, TrialFailed, TrialFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
        if isinstance(error, TrialFailed):
            time.sleep(AFTER_CAUSE)
    finally:
        distributed.leave_process_group()
    if code:
        sys.stdout.flush()
        os._exit(code)
