"""Train one trial or a sweep: ``python -m lora_vit.train lora.rank=8``.

Hydra composes the configuration; torch is imported only once it is known to be good.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_vit import distributed
from lora_vit.errors import ConfigError, Interrupted, RecordError, line_of, run_command
from lora_vit.files import remove_empty
from lora_vit.terminal import from_here

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_vit.config import TrialConfig
    from lora_vit.records import TrialRecord

OF_SWEEPS = ("sweep.", "hydra.sweep.", "hydra.sweeper.", "hydra/sweeper", "hydra.launcher.", "hydra/launcher")


def task(cfg: DictConfig) -> float:
    """Train the composed trial; returns its validation accuracy (a fraction). Each process of a group calls it."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from lora_vit.compose import UNKNOWN_ID, from_omegaconf
    from lora_vit.config import trial_id

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)

    def validated() -> TrialConfig:
        refuse_without_effect(OmegaConf.to_container(hydra_cfg.overrides, resolve=False))
        return from_omegaconf(cfg)

    try:
        config = distributed.on_all(validated)
    finally:
        remove_empty(folder)  # Hydra has made it, in every process
    distributed.agree(trial_id(config), "the processes found different files, and so would train different trials")
    folder = folder.with_name(folder.name.replace(UNKNOWN_ID, trial_id(config)))
    files = {
        "config.yaml": OmegaConf.to_yaml(cfg),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra_cfg})),
        "overrides.yaml": OmegaConf.to_yaml(hydra_cfg.overrides.task),
    }
    from lora_vit import run

    try:
        record = run.train(config, folder, files)
    except Interrupted as stop:
        stop.command = f"the same command with hydra.run.dir={from_here(folder)}"
        raise
    return report(record, folder)


def refuse_without_effect(overrides: Any) -> None:
    """Raise ConfigError if one of a single run's overrides is about sweeps."""
    for line in (str(line) for part in overrides.values() for line in part):
        if line.lstrip("+~").startswith(OF_SWEEPS):
            raise ConfigError(f"{line} has no effect on a single run: add -m for a sweep, or leave it out")


def report(record: TrialRecord, folder: Path) -> float:
    """Print what the trial came to, with how to look at it; returns its validation accuracy (a fraction)."""
    from lora_vit.records import NO_ACCURACY, RECORD

    accuracy = record.metrics.get("val_accuracy")
    if accuracy is None:
        raise RecordError(f"{folder / RECORD} {NO_ACCURACY}")
    if not distributed.started_by_ourselves():
        shown = from_here(folder)
        print(f"{shown}\ntensorboard --logdir {shown}/tensorboard\nValidation Accuracy: {accuracy:.2%}")
    return float(accuracy)


def run_sweep(asked: Any, engine: Any = None) -> Any:
    """Train the trials of a sweep together; the packed launcher calls this."""
    from lora_vit.sweep import runner

    return runner.run_sweep(asked, engine)


task.run_sweep = run_sweep  # type: ignore[attr-defined]


def compose_and_train() -> None:
    """Let Hydra compose the command line and train; in a group, each process does so."""
    from lora_vit.compose import quote_paths, register_schema

    register_schema()
    sys.argv[1:] = quote_paths(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    with distributed.group():
        given = shlex.join(sys.argv[1:])
        distributed.agree(given, "nodes were started differently, give the same overrides on each")
        through_hydra(task)


def through_hydra(task_function: Any) -> None:
    """Let Hydra compose ``sys.argv`` for the task. In a group, every process fails with what one of them cannot compose.

    Raises:
        ConfigError: in one line, what Hydra has to say.
    """
    import hydra

    failed: list[Exception] = []

    @functools.wraps(task_function)  # Hydra looks at its name and module
    def run(cfg: Any) -> Any:
        try:
            return task_function(cfg)
        except Exception as error:
            failed.append(error)
            raise SystemExit from error  # to an exception Hydra would add lines of its own

    try:
        hydra.main(version_base="1.3", config_path="pkg://lora_vit.conf", config_name="config")(run)()
    except (Exception, SystemExit) as error:
        if failed:
            raise failed[0] from None
        distributed.on_all(functools.partial(_refuse, error))


def _refuse(error: BaseException) -> None:
    """Raise what has stopped Hydra, as a ConfigError if it is the user's."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from lora_vit.compose import explain

    if isinstance(error, (HydraException, OmegaConfBaseException)):
        raise ConfigError(explain(error)) from error
    if str(error).startswith("Config group override must be a string"):
        raise ConfigError("a group has no option 'null': leave it out, or choose one (see --help)") from error
    if isinstance(error, OSError) and (line := line_of(error)):  # Hydra makes the folder
        raise ConfigError(line.removeprefix("error: ")) from error
    if isinstance(error, SystemExit) and isinstance(error.code, str):
        raise ConfigError(error.code.removeprefix("error: "))
    raise error


def main() -> None:
    """Command-line entry."""
    run_command(compose_and_train)


if __name__ == "__main__":
    main()
