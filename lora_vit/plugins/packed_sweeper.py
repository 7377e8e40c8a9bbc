"""Hydra's door to sweeps: expands and composes the trials, and hands all of them to the library."""

from dataclasses import dataclass, field
from typing import Any

from hydra.plugins.sweeper import Sweeper


@dataclass
class PackedSweeperConf:
    """``hydra/sweeper=packed``; how it trains is in ``sweep`` and ``engine``. ``params``: overrides of a preset."""

    _target_: str = "hydra_plugins.lora_vit.packed_sweeper.PackedSweeper"
    params: dict[str, Any] = field(default_factory=dict)


class PackedSweeper(Sweeper):
    """Trains the trials of a sweep together, many at once over one frozen backbone."""

    def __init__(self, params: dict[str, Any]): ...  # the composed configuration has them

    def setup(self, *, config: Any, **beside: Any) -> None:
        self.config: Any = config

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep for Hydra; returns the metric of each trial. Raises TrialFailed if a trial has none."""
        from lora_vit.compose import sweep_request
        from lora_vit.stopping import waiting
        from lora_vit.sweep.engines.local import start_early

        if self.config.engine.name == "local" and not self.config.sweep.dry_run:
            start_early()
        request = sweep_request(self.config)
        with waiting("importing torch"):
            from lora_vit.sweep.run import run_sweep

        return list((run_sweep(request) or {}).values())
