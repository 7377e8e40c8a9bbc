"""Train one trial or a sweep: ``python -m lora_vit.train lora.rank=8``. Hydra composes; only then torch is imported."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from lora_vit import distributed
from lora_vit.errors import ConfigError, Interrupted, RecordError, reporting
from lora_vit.files import remove_empty


def task(cfg: Any) -> float:
    """What Hydra calls. Errors are carried past it, which would print its own lines, but of one of several trials."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        return train(cfg, HydraConfig.get(), in_sweep)
    except Exception as error:
        if in_sweep and not isinstance(error, Interrupted):
            raise
        raise SystemExit(error) from None


def train(cfg: Any, hydra_cfg: Any, in_sweep: bool) -> float:
    """Train the composed trial; returns its metric on val (a fraction)."""
    from omegaconf import OmegaConf

    from lora_vit.compose import first_of, refuse_misread_paths
    from lora_vit.config import TrialConfig, trial_id
    from lora_vit.metrics import METRICS
    from lora_vit.records import NO_FIGURE, NO_TEST, RECORD
    from lora_vit.resolve import UNKNOWN_ID, from_omegaconf
    from lora_vit.stopping import waiting
    from lora_vit.terminal import from_here

    folder = Path(hydra_cfg.runtime.output_dir)
    given: Any = OmegaConf.to_container(hydra_cfg, resolve=False)

    def validated() -> TrialConfig:
        overrides = [*given["overrides"]["hydra"], *given["overrides"]["task"]]
        of_sweeps = ("sweep.", "engine", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher")
        if not in_sweep and (line := first_of(overrides, *of_sweeps)):
            raise ConfigError(f"{line} has no effect on a single run: add -m for a sweep, or leave it out")
        refuse_misread_paths(overrides)
        return from_omegaconf(cfg, {} if in_sweep else None, cwd=Path(hydra_cfg.runtime.cwd))

    try:
        config = distributed.on_all(validated)
    finally:
        remove_empty(folder)  # Hydra has made it, in every process
    started = dict.fromkeys(distributed.from_all(f"trial {trial_id(config)} of {shlex.join(sys.argv[1:])}"))
    if len(started) > 1:
        raise ConfigError(f"give each process the same overrides and files: {' | '.join(started)}")
    if "${trial_id:" in (given["sweep"]["subdir"] if in_sweep else given["run"]["dir"]):
        folder = folder.with_name(folder.name.replace(UNKNOWN_ID, trial_id(config)))
    files = {"config": cfg, "hydra": {"hydra": hydra_cfg}, "overrides": hydra_cfg.overrides.task}
    with waiting("importing torch"):
        from lora_vit import run

    shown = from_here(folder)
    try:
        record = run.train(config, folder, {f"{name}.yaml": OmegaConf.to_yaml(part) for name, part in files.items()})
    except Interrupted as stop:
        if not in_sweep:
            stop.command = f"the same command with hydra.run.dir={shown}"
        raise
    board = f"tensorboard --logdir {shown}/tensorboard\n" * ("tensorboard" in config.tracker)
    print(f"{shown}\n{board}", end="" if record.data.get("test") else f"{NO_TEST}\n")
    for name in dict.fromkeys((config.trainer.metric, "accuracy")):  # accuracy is the last line
        if (value := record.metrics.get(f"val_{name}")) is None:
            raise RecordError(f"{folder / RECORD} {NO_FIGURE.format(name)}")
        print(f"Validation {METRICS[name].title.title()}: {value:.2%}")
    return float(record.metrics[f"val_{config.trainer.metric}"])


def main() -> None:
    """Command-line entry. Hydra composes the command line and calls the task; in a group, in each process."""
    with reporting():
        import hydra

        from lora_vit.compose import HYDRA, first_of, in_one_line, register

        register()
        given = [a for a in sys.argv[1:] if a not in ("-m", "--multirun")]
        many = len(given) < len(sys.argv) - 1 or first_of(given, "sweep=")  # a preset is a sweep
        sys.argv[1:] = ["-m", *given] if many else given  # Hydra wants it before the first override
        if wrong := next((a for a in given if re.match(r"--(?!config-|package|info|cfg|experimental-)\S+=", a)), ""):
            raise ConfigError(f"{wrong}: give it without dashes, as {wrong[2:]}")
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
        with distributed.group():
            try:
                with in_one_line():
                    hydra.main(config_path="pkg://lora_vit.conf", config_name="config", **HYDRA)(task)()
            except SystemExit as end:
                raise end.code if isinstance(end.code, Exception) else end from None
            except Exception as error:
                distributed.from_all(str(error))  # the others may have composed
                raise


if __name__ == "__main__":
    main()
