"""Train one trial or a sweep: ``python -m lora_vit.train lora.rank=8``.

Hydra composes the configuration; torch is imported only once it is known to be good.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_vit.compose import explain, from_omegaconf, register_schema
from lora_vit.config import ConfigError, SweepConfig
from lora_vit.stopping import Interrupted

_NO_TRAINING = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--version", "--shell-completion")


def task(cfg: DictConfig) -> float:
    """Train the composed trial; returns its validation accuracy (a fraction)."""
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    config = from_omegaconf(cfg, in_sweep)
    from lora_vit.run import run

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    files = {
        "config.yaml": OmegaConf.to_yaml(cfg),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra_cfg})),
        "overrides.yaml": OmegaConf.to_yaml(hydra_cfg.overrides.task),
    }
    try:
        record = run(config, folder, files, wait=in_sweep)  # two settings may name one trial
    except ValueError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # Hydra made it; where the run was refused at once it is empty
        raise
    accuracy = float(record.metrics["val_accuracy"])
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    print(f"{shown}\ntensorboard --logdir {shown}/tensorboard\nValidation Accuracy: {accuracy:.2%}")
    return accuracy


def run_sweep(
    jobs: list[Any], folder: Path, options: SweepConfig, idle: list[str]
) -> dict[str, float | Exception] | None:
    """Train the trials of a sweep together; the packed launcher calls this."""
    from lora_vit.sweep.processes import start_early

    start_early(jobs, options)  # before torch is imported here
    from lora_vit.sweep import runner

    return runner.run_sweep(jobs, folder, options, idle)


task.run_sweep = run_sweep  # type: ignore[attr-defined]


@functools.wraps(task)
def one_line_task(cfg: DictConfig) -> float:
    """The task with user errors as one line; Hydra would add lines of its own to an exception."""
    try:
        return task(cfg)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        _end(error)
        raise


def main() -> None:
    """Command-line entry: errors that a user can cause end in one line and exit code 1."""
    register_schema()
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if under_torchrun:
        if {"-m", "--multirun"} & set(sys.argv[1:]):
            fail("a sweep starts its own processes: run `python -m lora_vit.train -m ...` without torchrun")
        if os.environ["RANK"] != "0":
            if not set(_NO_TRAINING) & set(sys.argv[1:]):
                _guarded(_follow)
            return
    chosen = task if os.environ.get("HYDRA_FULL_ERROR") == "1" else one_line_task
    _guarded(hydra.main(version_base="1.3", config_path="pkg://lora_vit.conf", config_name="config")(chosen))


def _follow() -> None:
    from lora_vit.run import follow

    follow()


def _guarded(action: Any) -> None:
    """Run; turn user errors into one line. HYDRA_FULL_ERROR=1 shows the traceback instead."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        action()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra hand us its exceptions instead of printing them
    try:
        action()
    except KeyboardInterrupt:
        sys.exit(130)
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    except Exception as error:
        _end(error)


def _end(error: Exception) -> None:
    """Exit as the error asks for; raise again what is not the user's."""
    if isinstance(error, ConfigError) or type(error).__name__ in ("SweepFailed", "WorkerFailed"):
        fail(str(error))
    if str(error).startswith("Config group override must be a string"):
        fail("a group has no option 'null': leave it out, or choose one (see --help)")
    if "lora_vit.run" not in sys.modules:
        if isinstance(error, OSError):  # from Hydra, which makes the folder
            fail(f"{error.filename} cannot be made a folder ({error.strerror}): choose another hydra.run.dir")
        raise error
    from lora_vit.records import NO_SPACE
    from lora_vit.run import TrialFailed

    if isinstance(error, Interrupted):
        single = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.RUN
        same = "the same command with the same hydra.run.dir" if single else "the same command"
        print(f"{error}: saved; {same} goes on", file=sys.stderr)
        sys.exit(error.exit_code)
    if isinstance(error, TrialFailed):
        fail(str(error))
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        what = error.filename or "the trial's folder"
        fail(f"{what} cannot be written ({error.strerror}): make room, then the same command goes on")
    raise error


def fail(message: str) -> None:
    """Say what was wrong in one line and exit with code 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
