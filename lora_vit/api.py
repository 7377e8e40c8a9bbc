"""Compose, train, sweep and summarize from a notebook or a script: what the commands do, with exceptions.

>>> from lora_vit import api
>>> config = api.compose(["experiment=quickstart", "lora.rank=8"])
>>> record = api.train(config, "outputs/runs/rank8")
>>> sweep = api.sweep(["experiment=quickstart", "lora.rank=2,8", "seed=0,1,2"])
>>> api.summarize(sweep.folder).cells

Hydra's state, the working folder, signal handlers and logging are left as they were. Interrupted is raised where the
process is asked to stop (Ctrl-C, a notebook's stop button): what was trained is saved, and the same call goes on.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_vit import train as command
from lora_vit.compose import explain, from_omegaconf, quote_paths, register_schema
from lora_vit.config import RootConfig, TrialConfig, to_dict
from lora_vit.data.dataset import forget
from lora_vit.distributed import started_by_torchrun
from lora_vit.errors import ConfigError
from lora_vit.records import TrialRecord, read_record


class Sweep(NamedTuple):
    """A finished sweep: its folder, and its trials' records in the order of the grid."""

    folder: Path
    records: list[TrialRecord]


def compose(overrides: Sequence[str] = ()) -> TrialConfig:
    """The config of ``python -m lora_vit.train OVERRIDES``. Raises ConfigError."""
    with _hydras_state(), hydra.initialize_config_module("lora_vit.conf", version_base="1.3"):
        return from_omegaconf(hydra.compose("config", quote_paths(overrides)))


def train(config: TrialConfig, folder: str | os.PathLike[str]) -> TrialRecord:
    """Train a trial in a folder, or go on where it was stopped there; what is completed is returned as it is.

    Raises:
        ConfigError: nothing was trained; the message is one line.
        TrialFailed: the trial's record says why.
        Interrupted: everything is saved.
    """
    from lora_vit import run

    _refuse_torchrun()
    given = {name: vars(part) if name != "seed" else part for name, part in vars(config).items()}
    try:  # its fields may have been changed
        config = from_omegaconf(OmegaConf.merge(OmegaConf.structured(RootConfig), given, {"sweep": {"dry_run": False}}))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    return run.train(config, Path(folder), {"config.yaml": OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))})


def sweep(overrides: Sequence[str], folder: str | os.PathLike[str] | None = None) -> Sweep:
    """``python -m lora_vit.train -m OVERRIDES``: commas separate values. ``folder``: instead of outputs/sweeps/NAME.

    Raises:
        ConfigError: nothing was trained; the message says which trials cannot run, and why.
        TrialFailed: some trials failed; the records say why.
        Interrupted: everything is saved.
    """
    if wrong := [o for o in overrides if o.startswith(("-", "hydra/launcher", "hydra/sweeper", "sweep.dry_run"))]:
        raise ConfigError(f"{wrong[0]} is for the command: sweep() takes settings, and trains in packs")
    _refuse_torchrun()
    trained: dict[Path, None] = {}

    def run_sweep(asked: Any, engine: Any = None) -> Any:
        if asked.options.dry_run or not asked.options.wait:
            raise ConfigError("sweep.dry_run=true and sweep.wait=false are for the command: sweep() trains, and waits")
        outcomes: Any = command.run_sweep(asked, engine)
        trained.update(dict.fromkeys(asked.folder / trial_id for trial_id in outcomes))
        return outcomes

    @functools.wraps(command.task)
    def task(cfg: Any) -> Any:
        raise ConfigError("sweep() trains in packs: leave out launchers other than the packed ones")

    task.run_sweep = run_sweep  # type: ignore[attr-defined]
    place = [] if folder is None else [f"hydra.sweep.dir={os.fspath(folder)}"]
    with _hydras_state(["-m", *overrides, *place]):
        command.through_hydra(task)
    return Sweep(next(iter(trained)).parent, [read_record(trial) for trial in trained])


def _refuse_torchrun() -> None:
    if started_by_torchrun():
        raise ConfigError("processes are started by lora_vit itself: run the script without torchrun")


def summarize(*folders: str | os.PathLike[str], **choices: Any) -> Any:
    """:func:`lora_vit.analysis.summarize` of the folders: tables as DataFrames. Raises RecordError."""
    from lora_vit.analysis import summarize as compare

    return compare(folders, **choices)


@contextlib.contextmanager
def _hydras_state(arguments: Sequence[str] = ()) -> Iterator[None]:
    """Our schema and command line in Hydra, its errors as ConfigError; then all as it was before."""
    singletons = [vars(kind.instance()) for kind in (GlobalHydra, HydraConfig, VersionBase)]
    before = [dict(values) for values in singletons]
    nodes, argv = ConfigStore.instance().repo["hydra"], sys.argv
    hydras_own = nodes["config.yaml"]
    GlobalHydra.instance().clear()
    forget()  # files may have changed since the last call
    try:
        register_schema()
        sys.argv = ["lora_vit.train", *quote_paths(arguments)]
        with env_override({"HYDRA_FULL_ERROR": "1"}):  # exceptions instead of printed errors
            yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None
    except SystemExit as end:
        raise ConfigError(str(end.code).removeprefix("error: ")) from None
    finally:
        sys.argv, nodes["config.yaml"] = argv, hydras_own
        for values, old in zip(singletons, before, strict=True):
            values.update(old)
