"""Run one trial in its folder: in this process, in those that torchrun has started, or in those that we start."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from lora_vit import distributed
from lora_vit.build import build_setup, check_world_size, choose_world_size
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError, Interrupted, TrialFailed, one_line
from lora_vit.files import remove_empty
from lora_vit.launch import launch
from lora_vit.records import TrialRecord
from lora_vit.stopping import StopRequest
from lora_vit.training.loop import train_trials
from lora_vit.training.progress import RunReporter
from lora_vit.training.setup import Setup
from lora_vit.training.trial import TrialRun, completed_record, locked_folder


def train(config: TrialConfig, folder: Path, hydra_files: dict[str, str]) -> TrialRecord:
    """Train the trial to its end, or return its record if it is completed already.

    Every process of a group calls this; rank 0 alone looks at the folder and writes. Outside a group, a trial that
    asks for several devices trains in as many processes of their own.

    Args:
        config: validated; the same in every process.
        folder: the trial's, made if need be; it does not stay empty.
        hydra_files: name to text of what goes into ``.hydra/``.

    Raises:
        ConfigError: nothing was trained; the message is one line.
        TrialFailed: the trial's record says why, or a process could not take part.
        Interrupted: everything is saved.
    """
    process, devices = distributed.this_process(), config.trainer.devices
    if distributed.started_by_torchrun():
        check_world_size(config, process.world_size)
        if devices not in ("auto", str(process.world_size)):
            started = f"torchrun has started {process.world_size} processes"
            raise ConfigError(f"trainer.devices={devices}: {started}, leave it out")
    else:
        world_size, note = choose_world_size(config)
        if note:
            print(note)
        if world_size > 1:
            return launch(config, folder, world_size)
    with contextlib.ExitStack() as held:
        completed = distributed.from_main(distributed.on_all(lambda: _take(config, folder, process, held)))
        if completed is not None:
            return completed
        with StopRequest() as stop:
            setup = distributed.on_all(functools.partial(build_setup, config, process))
            trial = _open(config, folder, setup, hydra_files)
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


def _take(config: TrialConfig, folder: Path, process: Process, held: contextlib.ExitStack) -> TrialRecord | None:
    """On rank 0, lock the folder until ``held`` is left; the record of a trial that is completed and not restarted."""
    if not process.is_main:
        return None
    held.callback(remove_empty, folder)
    held.enter_context(locked_folder(folder))
    completed = completed_record(folder, config)
    return None if config.trainer.resume == "restart" else completed


def _open(config: TrialConfig, folder: Path, setup: Setup, hydra_files: dict[str, str]) -> TrialRun:
    """The trial at the state that its folder holds; without files except on rank 0."""

    def open_here() -> TrialRun | None:
        restart = config.trainer.resume == "restart"
        return TrialRun.open(config, folder, setup, hydra_files, restart=restart) if setup.process.is_main else None

    trial = distributed.on_all(open_here)
    standing = distributed.from_main((trial.record, trial.state) if trial else None)
    assert standing is not None
    return trial or TrialRun(config, *standing)
