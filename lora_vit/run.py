"""Run one trial in its folder, in as many processes as it asks for."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lora_vit import distributed
from lora_vit.build import build_setup, check_world_size, choose_world_size
from lora_vit.config import ConfigError, TrialConfig, from_dict, to_dict
from lora_vit.distributed import Process
from lora_vit.records import TrialRecord, read_record, write_record
from lora_vit.stopping import SIGNALS, Interrupted, StopRequest
from lora_vit.training.loop import train_trials
from lora_vit.training.progress import RunReporter
from lora_vit.training.trial import Trial, ended_record, locked_folder


class TrialFailed(Exception):  # noqa: N818  (its name is the status)
    """The trial ended as failed; the reason is in the record and in the message."""


def run(config: TrialConfig, folder: Path, hydra_files: dict[str, str], wait: bool = False) -> TrialRecord:
    """Train the trial to its end, or report that it is finished already.

    Args:
        config: validated.
        folder: the trial's.
        hydra_files: name to text of what goes into ``.hydra/`` once the run is accepted.
        wait: for another process that is training this very trial, instead of refusing.

    Raises:
        ConfigError, DataError: nothing was trained; the message is one line.
        TrialFailed: the trial's record says why.
        Interrupted: everything is saved.
    """
    launched = time.time()
    if distributed.started_by_torchrun():
        # Rank 0 alone speaks to Hydra; the others wait for its config in `follow`.
        process = distributed.join_process_group()
        try:
            check_world_size(config, process.world_size)
            distributed.from_main(to_dict(config))
            return run_here(config, folder, hydra_files, process, launched)
        finally:
            distributed.leave_process_group()
    world_size, note = choose_world_size(config)
    if note:
        print(note)
    if world_size == 1:
        return run_here(config, folder, hydra_files, Process(), launched, wait)
    ended = ended_record(folder, config, launched)
    return ended if ended is not None else _launch(config, folder, hydra_files, world_size)


def follow() -> None:
    """What ranks above 0 do under torchrun: take the config from rank 0 and train with it."""
    process = distributed.join_process_group()
    try:
        run_follower(from_dict(distributed.from_main(None)), process)
    finally:
        distributed.leave_process_group()


def run_here(
    config: TrialConfig,
    folder: Path,
    hydra_files: dict[str, str],
    process: Process,
    launched: float,
    wait: bool = False,
) -> TrialRecord:
    """Train in this process, rank 0 of ``process.world_size``."""
    ended = ended_record(folder, config, launched)  # refuses before anything is written
    if ended is None:
        with locked_folder(folder, wait):
            ended = ended_record(folder, config, launched)  # as another process has left it
            if ended is None:
                return _train(config, folder, hydra_files, process, launched)
    distributed.from_main(None)
    return ended


def _train(
    config: TrialConfig, folder: Path, hydra_files: dict[str, str], process: Process, launched: float
) -> TrialRecord:
    with StopRequest() as stop:
        setup = build_setup(config, process)
        trial = Trial.open(config, folder, setup, launched, hydra_files)
        distributed.from_main((trial.record, trial.state))
        reporter = RunReporter(True)
        env = setup.environment
        reporter.console.print(setup.data.line(config.model.image_size), markup=False)
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


def run_follower(config: TrialConfig, process: Process) -> None:
    """Train in this process, of a rank above 0: it writes nothing."""
    with StopRequest() as stop:
        setup = build_setup(config, process)
        shared = distributed.from_main(None)
        if shared is None:  # rank 0 found the trial ended
            return
        trial = Trial(config, *shared)
        train_trials([trial], setup, RunReporter(False), stop)
    _unless_failed(trial.record)


def _unless_failed(record: TrialRecord) -> TrialRecord:
    if record.status == "failed":
        raise TrialFailed(record.error["message"] if record.error else "failed")
    return record


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _launch(config: TrialConfig, folder: Path, hydra_files: dict[str, str], world_size: int) -> TrialRecord:
    """Start the processes through torch's elastic launcher and wait for them."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # One thread per core in all: a process alone would take every core, and each process would.
    threads = max(1, (os.cpu_count() or 1) // world_size)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )

    def pass_on(signum: int, frame: Any) -> None:
        raise SignalException("asked to stop", signal.Signals(signum))  # torch's agent hands it to the processes

    unhandled = [s for s in SIGNALS if signal.getsignal(s) is signal.SIG_DFL and s != signal.SIGTERM]
    for signum in unhandled:
        signal.signal(signum, pass_on)
    try:
        elastic_launch(launch, _worker)(to_dict(config), str(folder), hydra_files)
    except SignalException as error:
        raise Interrupted(int(error.sigval)) from None
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code - 128 in SIGNALS:
            raise Interrupted(code - 128) from None
        raise TrialFailed(_failure_of_processes(folder, error)) from None
    finally:
        for signum in unhandled:
            signal.signal(signum, signal.SIG_DFL)
    return read_record(folder)


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


def _worker(values: dict[str, Any], folder: str, hydra_files: dict[str, str]) -> None:
    """A started process: join the others and train."""
    process = distributed.join_process_group()
    code = 0
    try:
        if process.is_main:
            run_here(from_dict(values), Path(folder), hydra_files, process, time.time())
        else:
            run_follower(from_dict(values), process)
    except Interrupted as stop:
        code = stop.exit_code
    except (ConfigError, TrialFailed) as error:
        if process.is_main:
            print(f"error: {error}", file=sys.stderr)
        code = 1
    finally:
        distributed.leave_process_group()
    if code:
        sys.stdout.flush()
        os._exit(code)
