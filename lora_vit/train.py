"""Train one trial or a sweep: ``python -m lora_vit.train lora.rank=8``.

Hydra composes the configuration; torch is imported only once it is known to be good.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_vit import distributed
from lora_vit.errors import ConfigError, Interrupted, RecordError, line_of, reporting
from lora_vit.files import remove_empty

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_vit.config import TrialConfig
    from lora_vit.records import TrialRecord

OF_SWEEPS = ("sweep.", "engine", "hydra.sweep.", "hydra.sweeper.", "hydra/sweeper", "hydra.launcher.", "hydra/launcher")


def task(cfg: DictConfig) -> float:
    """Train the composed trial; returns its validation accuracy (a fraction). Each process of a group calls it."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from lora_vit.compose import refuse_misread_paths
    from lora_vit.config import trial_id
    from lora_vit.resolve import UNKNOWN_ID, from_omegaconf
    from lora_vit.terminal import from_here

    hydra_cfg = HydraConfig.get()
    folder, in_sweep = Path(hydra_cfg.runtime.output_dir), is_multirun()
    given: Any = OmegaConf.to_container(hydra_cfg, resolve=False)

    def validated() -> TrialConfig:
        if not in_sweep:
            refuse_without_effect(given["overrides"])
        refuse_misread_paths([*given["overrides"]["hydra"], *given["overrides"]["task"]])
        return from_omegaconf(cfg, in_sweep, cwd=Path(hydra_cfg.runtime.cwd))

    with past_hydra():
        try:
            config = distributed.on_all(validated)
        finally:
            remove_empty(folder)  # Hydra has made it, in every process
        found = trial_id(config)
        distributed.agree(found, "the processes found different files, and so would train different trials")
        if "${trial_id:" in (given["sweep"]["subdir"] if in_sweep else given["run"]["dir"]):
            folder = folder.with_name(folder.name.replace(UNKNOWN_ID, found))
        files = {
            "config.yaml": OmegaConf.to_yaml(cfg),
            "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra_cfg})),
            "overrides.yaml": OmegaConf.to_yaml(hydra_cfg.overrides.task),
        }
        from lora_vit import run

        try:
            record = run.train(config, folder, files)
        except Interrupted as stop:
            if not in_sweep:
                stop.command = f"the same command with hydra.run.dir={from_here(folder)}"
            raise
        return report(record, folder)


def is_multirun() -> bool:
    """Whether the task is one of several that a sweeper of Hydra's runs."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def refuse_without_effect(overrides: Any) -> None:
    """Raise ConfigError if one of a single run's overrides is about sweeps."""
    for line in (str(line) for part in overrides.values() for line in part):
        if line.lstrip("+~").startswith(OF_SWEEPS):
            raise ConfigError(f"{line} has no effect on a single run: add -m for a sweep, or leave it out")


def report(record: TrialRecord, folder: Path) -> float:
    """Print what the trial came to, with how to look at it; returns its validation accuracy (a fraction)."""
    from lora_vit.records import NO_ACCURACY, RECORD
    from lora_vit.terminal import from_here

    accuracy = record.metrics.get("val_accuracy")
    if accuracy is None:
        raise RecordError(f"{folder / RECORD} {NO_ACCURACY}")
    if not distributed.started_by_ourselves():
        shown = from_here(folder)
        print(f"{shown}\ntensorboard --logdir {shown}/tensorboard\nValidation Accuracy: {accuracy:.2%}")
    return float(accuracy)


@contextlib.contextmanager
def past_hydra() -> Iterator[None]:
    """Carry an error of the task through Hydra, which would print lines of its own, to :func:`through_hydra`."""
    try:
        yield
    except Exception as error:
        if is_multirun() and not isinstance(error, Interrupted):
            raise  # Hydra's sweeper continues with the next
        raise SystemExit(error) from None


@contextlib.contextmanager
def through_hydra() -> Iterator[None]:
    """Raise the task's errors as they were, and what Hydra cannot compose as ConfigError, on every process."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.code, Exception):
            raise error.code from None
        distributed.on_all(functools.partial(_refuse, error))


def _refuse(error: BaseException) -> None:
    """Raise what has stopped Hydra, as a ConfigError if it is the user's."""
    from lora_vit.compose import in_one_line

    if isinstance(error, OSError) and (line := line_of(error)):  # Hydra makes the folder
        raise ConfigError(line.removeprefix("error: ")) from error
    with in_one_line():
        raise error


def main() -> None:
    """Command-line entry. Hydra composes the command line and calls the task; in a group, in each process."""
    with reporting():
        import hydra

        from lora_vit.compose import HYDRA, register

        register()
        if any(a.startswith("sweep=") for a in sys.argv[1:]) and not {"-m", "--multirun"} & set(sys.argv):
            sys.argv.insert(1, "-m")  # a preset is a sweep
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
        with distributed.group():
            given = shlex.join(sys.argv[1:])
            distributed.agree(given, "nodes were started differently, give the same overrides on each")
            with through_hydra():
                hydra.main(config_path="pkg://lora_vit.conf", config_name="config", **HYDRA)(task)()


if __name__ == "__main__":
    main()
