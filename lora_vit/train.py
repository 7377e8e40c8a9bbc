"""Train one trial or a sweep: ``python -m lora_vit.train lora.rank=8``.

Hydra composes the configuration; torch is imported only once it is known to be good.
"""

from __future__ import annotations

import errno
import functools
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_vit.compose import explain, from_omegaconf, not_swept, quote_paths, register_schema
from lora_vit.config import TrialConfig
from lora_vit.errors import NO_SPACE, ConfigError, Interrupted, RecordError
from lora_vit.records import NO_ACCURACY, RECORD, TrialRecord, state_of
from lora_vit.start import started_by_torchrun
from lora_vit.sweep.ledger import Ledger
from lora_vit.sweep.plan import Job, SweepRun, label
from lora_vit.terminal import from_here

_FAILURES = ("TrialFailed", "TrialFailed", "TrialFailed", "TrialFailed")
"""Errors that say all in one line, by name: their modules import torch."""
_FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"


def task(cfg: DictConfig, process: Any = None) -> float:
    """Train the composed trial; returns its validation accuracy (a fraction). ``process``: as ``run`` takes it."""
    hydra_cfg = HydraConfig.get()
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    config, folder = from_omegaconf(cfg, in_sweep), Path(hydra_cfg.runtime.output_dir)
    files = {
        "config.yaml": OmegaConf.to_yaml(cfg),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra_cfg})),
        "overrides.yaml": OmegaConf.to_yaml(hydra_cfg.overrides.task),
    }
    if in_sweep:
        _begin_in_sweep(cfg, config, folder)
    from lora_vit.run import run

    try:  # In a sweep we wait, for two settings may name one trial.
        record = run(config, folder, files, in_sweep, process)
    except Interrupted as stop:
        if in_sweep and "BasicLauncher" in hydra_cfg.launcher._target_:
            _end(stop)  # which, unlike an exception, also ends the launcher that would begin the next trial
        raise
    return report(record, folder)


def _begin_in_sweep(cfg: DictConfig, config: TrialConfig, folder: Path) -> None:
    """What a packed sweep does for its trials: the plan has them, and one that failed is not tried again unasked."""
    hydra_cfg = HydraConfig.get()
    given = [str(line) for line in hydra_cfg.overrides.task]
    job = Job(config, given)
    job.label = label(given, not_swept(hydra_cfg, [given]).union(job.idle()))
    Ledger(Path(hydra_cfg.runtime.cwd, hydra_cfg.sweep.dir)).add([job])
    state = state_of(folder, config, job.trial_id)
    ended = state.ended
    if state.status == "failed" and state.record is not None and ended:
        from lora_vit.errors import TrialFailed

        why = (state.record.error or {}).get("message", "failed")
        raise TrialFailed(f"{why} (trial {job.trial_id}, recorded earlier); sweep.retry_failed=true tries it again")


def report(record: TrialRecord, folder: Path) -> float:
    """Print what the trial came to, with how to look at it; returns its validation accuracy (a fraction)."""
    accuracy = record.metrics.get("val_accuracy")
    if accuracy is None:
        raise RecordError(f"{folder / RECORD} {NO_ACCURACY}")
    shown = from_here(folder)
    print(f"{shown}\ntensorboard --logdir {shown}/tensorboard\nValidation Accuracy: {accuracy:.2%}")
    return float(accuracy)


def run_sweep(asked: SweepRun, engine: Any = None) -> dict[str, float | Exception] | None:
    """Train the trials of a sweep together, on workers of our own or of an engine; the packed launcher calls this."""
    from lora_vit.sweep.processes import start_early

    if engine is None:
        start_early(asked.jobs, asked.options)  # before torch is imported here
    from lora_vit.sweep import runner

    return runner.run_sweep(asked, engine)


task.run_sweep = run_sweep  # type: ignore[attr-defined]


@functools.wraps(task)
def one_line_task(cfg: DictConfig, process: Any = None) -> float:
    """The task with user errors as one line; Hydra would add lines of its own to an exception."""
    try:
        return task(cfg, process)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        _end(error, single=True)
        raise


def main() -> None:
    """Command-line entry: errors that a user can cause end in one line and exit code 1."""
    register_schema()
    sys.argv[1:] = quote_paths(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra hand us its exceptions instead of printing them
    try:
        if started_by_torchrun():
            _in_group()
        else:
            through_hydra(one_line_task)
    except Exception as error:
        _end(error)


def through_hydra(task_function: Any) -> None:
    """Let Hydra compose the command line (``sys.argv``) and hand it to the task."""
    hydra.main(version_base="1.3", config_path="pkg://lora_vit.conf", config_name="config")(task_function)()


def _in_group() -> None:
    """A process that torchrun started: rank 0 alone speaks to Hydra, and the others end when it does."""
    from lora_vit import distributed

    process = distributed.join_process_group()
    try:
        different = list(dict.fromkeys(map(shlex.join, distributed.from_all(sys.argv[1:]))))
        if len(different) > 1 and process.local_rank == 0:
            fail(f"nodes were started differently, give the same overrides on each: {' | '.join(different)}")
        if len(different) > 1:
            sys.exit(1)
        if process.is_main:
            with distributed.leading(process):
                _lead(process)
        else:
            from lora_vit.run import follow

            sys.exit(follow(process))
    except distributed.TrialFailed:
        if process.is_main:
            raise
        sys.exit(1)
    finally:
        distributed.leave_process_group()


def _lead(process: Any) -> None:
    """Rank 0's part, which says itself what is wrong: once it has left the group, torchrun ends it."""
    try:
        through_hydra(functools.wraps(task)(lambda cfg: one_line_task(cfg, process)))
    except SystemExit as end:
        if isinstance(end.code, str):
            fail(end.code.removeprefix("error: "))
        if end.code:
            raise
    except Exception as error:
        _end(error)


def _end(error: Exception, single: bool = False) -> None:
    """Exit as the error asks for; raise again what is not the user's, or where HYDRA_FULL_ERROR=1 asks for all."""
    if _FULL_ERROR:
        raise error
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        fail(explain(error))
    if isinstance(error, (ConfigError, RecordError)) or type(error).__name__ in _FAILURES:
        fail(str(error))
    if str(error).startswith("Config group override must be a string"):
        fail("a group has no option 'null': leave it out, or choose one (see --help)")
    if isinstance(error, Interrupted):
        same = "the same command with the same hydra.run.dir" if single else "the same command"
        print(f"{error}: saved; {same} goes on", file=sys.stderr)
        sys.exit(error.exit_code)
    if isinstance(error, BrokenPipeError):  # nobody reads any more
        os._exit(1)
    composing = "lora_vit.run" not in sys.modules  # Hydra makes the folder
    if isinstance(error, OSError) and (error.errno in NO_SPACE or composing):
        what = f"{error.filename or 'a file'} cannot be written ({error.strerror})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fail(f"{what}: make room, then the same command goes on")
        fail(f"{what}: choose another folder with hydra.run.dir, or in a sweep with sweep.name or hydra.sweep.dir")
    if isinstance(error, FileNotFoundError):
        fail(f"{error.filename} is gone: was a folder moved or removed meanwhile?")
    raise error


def fail(message: str) -> None:
    """Say what was wrong in one line and exit with code 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
