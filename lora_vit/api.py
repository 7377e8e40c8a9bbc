"""What the commands do, in a notebook or a script; docs/python.md has examples and says which errors are raised."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from lora_vit.cli import named
from lora_vit.compose import Composer, expand, in_one_line, initialized, own_groups, refuse_misread_paths
from lora_vit.config import RootConfig, TrialConfig, to_dict
from lora_vit.data.dataset import forget
from lora_vit.distributed import started_by_torchrun
from lora_vit.errors import ConfigError
from lora_vit.evaluate import evaluate as evaluate
from lora_vit.export import export as export
from lora_vit.merge import merge as merge
from lora_vit.predict import predict as predict
from lora_vit.records import TrialRecord, read_record
from lora_vit.resolve import from_omegaconf
from lora_vit.sweep.trial import Trial


class Sweep(NamedTuple):
    """A finished sweep: its folder, and its trials' records in the order in which they were asked for."""

    folder: Path
    records: list[TrialRecord]


def compose(overrides: Sequence[str] = (), config_dir: str | os.PathLike[str] | None = None) -> TrialConfig:
    """The config of ``python -m lora_vit.train --config-dir CONFIG_DIR OVERRIDES``. Raises ConfigError."""
    forget()  # files may have changed since the last call
    with initialized():
        refuse_misread_paths(overrides)
        return from_omegaconf(Composer()([*own_groups(config_dir), *overrides]))


def train(config: TrialConfig, folder: str | os.PathLike[str]) -> TrialRecord:
    """Train a trial in a folder, or resume it there; a completed one is returned as it is.

    Raises ConfigError: nothing was trained; TrialFailed: the record says why; Interrupted: everything is saved.
    """
    from lora_vit import run

    if started_by_torchrun():
        raise ConfigError("processes are started by lora_vit itself: run the script without torchrun")
    config = checked(config)
    return run.train(config, Path(folder), {"config.yaml": OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))})


def sweep(
    trials: Sequence[str] | Sequence[TrialConfig], folder: str | os.PathLike[str] | None = None,
    config_dir: str | os.PathLike[str] | None = None, **options: Any,
) -> Sweep:  # fmt: skip
    """Train many trials together; raises as :func:`train`.

    ``trials``: configs, or overrides as after ``python -m lora_vit.train -m``, in which commas separate values.
    ``folder``: of the sweep; overrides may do without one, and get the folder that the command would give them.
    ``config_dir``: with groups of one's own, as Hydra's ``--config-dir``.
    ``options``: as of ``sweep``, for example ``pack_size="4"``; not ``dry_run`` or ``wait``, which are the command's.
    """
    forget()
    lines = [trial for trial in trials if isinstance(trial, str)]
    if not lines and folder is None:
        raise ConfigError("sweep() needs a folder for trials that are given as configs")
    with initialized():  # in place of configs, a trial that looks at no file
        asked = [*own_groups(config_dir), *(lines or ("data=fake", "model=vit_tiny", "model.weights=null"))]
        request = expand([*asked, *(f"sweep.{key}={value}" for key, value in options.items())], folder)
    if not lines:
        request.trials = [Trial(checked(trial)) for trial in trials if not isinstance(trial, str)]
    if request.options.dry_run or not request.options.wait:
        raise ConfigError("sweep.dry_run=true and sweep.wait=false are for the command: sweep() trains, and waits")
    from lora_vit.sweep.run import run_sweep  # imports torch

    names = list(run_sweep(request) or ())
    if request.search is None and request.options.margin is None:
        names = [trial.trial_id for trial in request.trials]
    return Sweep(request.folder, [read_record(request.folder / name) for name in names])


def summarize(*folders: str | os.PathLike[str], **choices: Any) -> Any:
    """:func:`lora_vit.analysis.core.summarize` of folders, or sweeps by name. Raises RecordError."""
    from lora_vit.analysis.core import summarize as compare

    return compare([named(folder) if isinstance(folder, str) else folder for folder in folders], **choices)


def checked(config: TrialConfig) -> TrialConfig:
    """A config whose fields may have been changed, as it would be composed. Raises ConfigError."""
    given = {name: part if name in ("seed", "tracker") else vars(part) for name, part in vars(config).items()}
    with in_one_line():
        return from_omegaconf(OmegaConf.merge(OmegaConf.structured(RootConfig), given))
