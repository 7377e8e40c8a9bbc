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
from lora_vit.data.dataset import DataError
from lora_vit.distributed import Process
from lora_vit.records import TrialRecord, read_record, replacing, write_record
from lora_vit.training.loop import Interrupted, StopRequest, train_trials
from lora_vit.training.progress import RunReporter
from lora_vit.training.resume import existing_record, locked, open_trial


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
    if distributed.started_by_torchrun():
        # Rank 0 alone speaks to Hydra; the others wait for its config in `follow`.
        process = distributed.join_process_group()
        try:
            check_world_size(config, process.world_size)
            distributed.from_main((to_dict(config), str(folder)))
            return run_here(config, folder, hydra_files, process)
        finally:
            distributed.leave_process_group()
    world_size, note = choose_world_size(config)
    if note:
        print(note)
    if world_size == 1:
        return run_here(config, folder, hydra_files, Process(), wait)
    record = existing_record(folder, config)
    if record is not None and record.status == "completed" and config.trainer.resume == "auto":
        return record
    return _launch(config, folder, hydra_files, world_size)


def follow() -> None:
    """What ranks above 0 do under torchrun: take the config from rank 0 and train with it."""
    process = distributed.join_process_group()
    try:
        values, folder = distributed.from_main(None)
        run_here(from_dict(values), Path(folder), {}, process)
    finally:
        distributed.leave_process_group()


def run_here(
    config: TrialConfig, folder: Path, hydra_files: dict[str, str], process: Process, wait: bool = False
) -> TrialRecord:
    """Train in this process, one of ``process.world_size``."""
    if process.is_main:
        record = existing_record(folder, config)  # refuses before anything is written
        if not _is_done(record, config):
            with locked(folder, wait):
                record = existing_record(folder, config)  # as another process has left it
                if not _is_done(record, config):
                    return _train(config, folder, hydra_files, process, record)
        assert record is not None
        distributed.from_main(None)
        return record
    return _train(config, folder, hydra_files, process, None)


def _is_done(record: TrialRecord | None, config: TrialConfig) -> bool:
    return record is not None and record.status == "completed" and config.trainer.resume != "restart"


def _train(
    config: TrialConfig,
    folder: Path,
    hydra_files: dict[str, str],
    process: Process,
    record: TrialRecord | None,
) -> TrialRecord:
    with StopRequest() as stop:
        setup = build_setup(config, process)
        trial = None
        if process.is_main:
            trial = open_trial(config, folder, record, True, setup.data.fingerprint)
            trial.record.environment = setup.environment
            trial.record.data = data_card(setup.data)
            write_hydra_files(folder, hydra_files)
        shared = distributed.from_main(None if trial is None else (trial.record, trial.state))
        if trial is None:
            if shared is None:  # rank 0 found the trial completed
                return read_record(folder)
            trial = open_trial(config, folder, shared[0], False, setup.data.fingerprint)
            trial.state = shared[1]
        reporter = RunReporter(process.is_main)
        env = setup.environment
        reporter.console.print(
            f"trial {trial.name} on {env['device']}, {env['precision']}, {process.world_size} process(es)"
        )
        try:
            train_trials([trial], setup, reporter, stop)
        except Interrupted:
            raise
        except BaseException as error:
            if trial.files is not None:
                trial.files.fail(one_line(error), error=error)
            raise
        finally:
            reporter.close()
    if trial.record.status == "failed":
        raise TrialFailed(trial.record.error["message"] if trial.record.error else "failed")
    return trial.record


def data_card(data: Any) -> dict[str, Any]:
    """What the record says of the data."""
    sizes = {name: len(ids) for name, ids in data.splits.items()}
    return {"fingerprint": data.fingerprint, "classes": len(data.class_names), **sizes}


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def write_hydra_files(folder: Path, files: dict[str, str]) -> None:
    """Write ``.hydra/`` into a trial's folder."""
    if files:
        (folder / ".hydra").mkdir(exist_ok=True)
    for name, text in files.items():
        with replacing(folder / ".hydra" / name) as file:
            file.write(text.encode())


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
    try:
        elastic_launch(launch, _worker)(to_dict(config), str(folder), hydra_files)
    except SignalException as error:
        raise Interrupted(int(error.sigval)) from None
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            raise Interrupted(code - 128) from None
        raise TrialFailed(_failure_of_processes(folder, error)) from None
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
        run_here(from_dict(values), Path(folder), hydra_files, process)
    except Interrupted as stop:
        code = stop.exit_code
    except (ConfigError, DataError, TrialFailed) as error:
        if process.is_main:
            print(f"error: {error}", file=sys.stderr)
        code = 1
    finally:
        distributed.leave_process_group()
    if code:
        sys.stdout.flush()
        os._exit(code)
