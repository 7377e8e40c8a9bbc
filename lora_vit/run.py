"""Run one trial in its folder: in this process, in those that torchrun has started, or in those that we start."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lora_vit import distributed
from lora_vit.build import build_setup, check_world_size, choose_world_size
from lora_vit.config import TrialConfig
from lora_vit.errors import ConfigError, Interrupted, TrialFailed, one_line
from lora_vit.files import remove_empty
from lora_vit.launch import launch
from lora_vit.records import TrialRecord
from lora_vit.stopping import StopRequest
from lora_vit.training.loop import train_trials
from lora_vit.training.progress import RunReporter
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
    restart = config.trainer.resume == "restart"

    def take() -> TrialRecord | None:
        """Lock the folder until ``held`` is left; the record of a trial that is completed and not restarted."""
        held.callback(remove_empty, folder)
        held.enter_context(locked_folder(folder))
        completed = completed_record(folder, config)
        return None if restart else completed

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
