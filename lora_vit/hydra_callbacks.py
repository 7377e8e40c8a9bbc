"""Hydra calls these before a single run or a sweep begins."""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lora_vit.compose import explain, quote_paths
from lora_vit.distributed import started_by_torchrun
from lora_vit.sweep.plan import default_name

PACKED_ONLY = ("sweep.pack_size", "sweep.workers", "sweep.on_failure")
NOT_WHEN_PACKED = {"sweep.subdir": "${trial_id:}", "job.chdir": False, "job.env_set": {}, "output_subdir": None}
"""Settings of Hydra for each job, with the only values that the packed launcher has."""


def _given(config: DictConfig, prefixes: Sequence[str]) -> list[str]:
    """The command line's overrides of keys that begin so."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)  # as given: ${...} is the trials'
    return [line for part in overrides.values() for line in part if line.lstrip("+~").startswith(tuple(prefixes))]


class NameSweep(Callback):
    """Give a sweep without a name one that says what is swept and stays when the values grow.

    ``swept``: the swept keys, noted here for whoever launches the trials.
    """

    def __init__(self, swept: Sequence[str] | None = None):
        self.swept = swept

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra with the config of what is not swept."""
        try:
            self._begin(config)
        except Exception as error:  # of which Hydra would only warn, and go on without a name
            raise SystemExit(f"error: {explain(error)}") from error

    def _begin(self, config: DictConfig) -> None:
        if started_by_torchrun():
            raise SystemExit("error: a sweep starts its own processes: give the same command without torchrun")
        _refuse_without_effect(config)
        params = OmegaConf.to_container(config.hydra.sweeper, resolve=True).get("params") or {}  # type: ignore[union-attr]
        lines = [f"{key}={value}" for key, value in params.items()]
        try:
            given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
            assert isinstance(given, list)
            overrides = OverridesParser.create().parse_overrides([*lines, *map(str, given)])
        except OverrideParseException:
            return  # the sweeper says what is wrong
        values = {o.get_key_element(): o for o in overrides}  # the command line replaces a preset's values
        swept = [key for key, o in values.items() if o.is_sweep_override()]
        if config.sweep.margin is not None and "seed" in swept:
            raise SystemExit("error: a race (sweep.margin) chooses its seeds itself: give its first one, seed=0")
        config.hydra.callbacks.name_sweep.swept = swept
        also = config.hydra.overrides.hydra  # the trials' configs are composed anew
        also.append(f"hydra.callbacks.name_sweep.swept=[{','.join(swept)}]")
        if config.sweep.name is not None:
            return
        fixed = {key: str(o.get_value_element_as_str()) for key, o in values.items() if not o.is_sweep_override()}
        base = OmegaConf.to_container(config, resolve=False)
        assert isinstance(base, dict)
        config.sweep.name = default_name({str(k): v for k, v in base.items()}, swept, fixed)
        also.extend(quote_paths([f"sweep.name={config.sweep.name}"]))


def _refuse_without_effect(config: DictConfig) -> None:
    """End in one line where a setting of Hydra's or of the sweep's would do nothing."""
    if idle := _given(config, ("hydra.run.",)):
        raise SystemExit(f"error: {idle[0]} has no effect on a sweep: give sweep.name or hydra.sweep.dir")
    launcher = str(config.hydra.launcher.get("_target_"))
    packed = launcher.startswith("hydra_plugins.lora_vit.")
    if not packed and (idle := _given(config, PACKED_ONLY)):
        raise SystemExit(f"error: {idle[0]} has no effect under another launcher than hydra/launcher=packed")
    grid = "GridSweeper" in str(config.hydra.sweeper.get("_target_"))
    if config.sweep.dry_run and not (packed and grid):
        raise SystemExit("error: sweep.dry_run=true needs hydra/launcher=packed and hydra/sweeper=grid")
    if config.sweep.margin is None and (idle := _given(config, ("sweep.first_seeds", "sweep.most_seeds"))):
        raise SystemExit(f"error: {idle[0]} has no effect without sweep.margin, which makes the sweep a race")
    batches = OmegaConf.select(config, "hydra.sweeper.max_batch_size")
    if config.sweep.margin is not None and not (packed and grid and config.sweep.wait and batches is None):
        raise SystemExit(
            "error: a race (sweep.margin) decides what trains next: it needs hydra/launcher=packed, "
            "packed_slurm or packed_ray, hydra/sweeper=grid, sweep.wait=true, no max_batch_size"
        )
    if config.sweep.measure and not config.sweep.dry_run:
        raise SystemExit("error: sweep.measure=true has no effect without sweep.dry_run=true: a sweep measures anyway")
    if not config.sweep.wait and "Slurm" not in launcher:
        raise SystemExit("error: sweep.wait=false: only workers on Slurm (packed_slurm) outlive the command")
    if packed:
        for key, only in NOT_WHEN_PACKED.items():
            value: Any = OmegaConf.to_container(config.hydra, resolve=False)
            for name in key.split("."):
                value = value[name]
            if value != only:
                raise SystemExit(f"error: hydra.{key}={value} has no effect under hydra/launcher=packed: leave it out, "
                                 "or choose hydra/launcher=basic")  # fmt: skip
