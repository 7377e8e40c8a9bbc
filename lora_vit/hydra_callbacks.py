"""Hydra calls these before a single run or a sweep begins."""

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lora_vit.compose import refuse_impossible
from lora_vit.start import started_by_torchrun
from lora_vit.sweep.plan import default_name


class RefuseImpossible(Callback):
    """Validate the trial before Hydra makes its folder; SystemExit passes through Hydra's own handling."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra with the composed config."""
        if idle := _given(config, "sweep."):
            raise SystemExit(f"error: {idle[0]} has no effect on a single run: add -m for a sweep, or leave it out")
        refuse_impossible(config)


def _given(config: DictConfig, prefix: str) -> list[str]:
    """The command line's overrides of keys that begin so."""
    return [line for line in map(str, config.hydra.overrides.task) if line.lstrip("+~").startswith(prefix)]


class NameSweep(Callback):
    """Give a sweep without a name one that says what is swept and stays when the values grow."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra with the config of what is not swept."""
        if started_by_torchrun():
            raise SystemExit("error: a sweep starts its own processes: give the same command without torchrun")
        idle = [line for line in _given(config, "sweep.") if not line.startswith("sweep.name=")]
        if idle and "PackedLauncher" not in str(config.hydra.launcher.get("_target_")):
            raise SystemExit(f"error: {idle[0]} has no effect under another launcher than hydra/launcher=packed")
        if config.sweep.name is not None:
            return
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
        fixed = {key: str(o.get_value_element_as_str()) for key, o in values.items() if not o.is_sweep_override()}
        base = OmegaConf.to_container(config, resolve=False)
        assert isinstance(base, dict)
        name = default_name({str(k): v for k, v in base.items()}, swept, fixed)
        config.sweep.name = name
        config.hydra.overrides.hydra.append(f"sweep.name={name}")  # the trials' configs are composed anew
