"""Hydra's door to sweeps: expands and composes the trials, and hands all of them to the library."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class PackedSweeperConf:
    """``hydra/sweeper=packed``; how it trains is in ``sweep`` and ``engine``. ``params``: overrides of a preset."""

    _target_: str = "hydra_plugins.lora_vit.packed_sweeper.PackedSweeper"
    params: dict[str, Any] = field(default_factory=dict)


class PackedSweeper(Sweeper):
    """Trains the trials of a sweep together, many at once over one frozen backbone."""

    def __init__(self, params: dict[str, Any]): ...  # the composed configuration has them

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.callbacks, self.task = hydra_context.callbacks, task_function
        self.config: Any = config

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep for Hydra; returns the metric of each trial. Raises TrialFailed if a trial has none."""
        from lora_vit.compose import sweep_request
        from lora_vit.stopping import waiting
        from lora_vit.sweep.engines.local import start_early

        if self.config.engine.name == "local" and not self.config.sweep.dry_run:
            start_early()
        request = sweep_request(self.config)
        request.ended = functools.partial(self._call_back, request.folder)
        with waiting("importing torch"):
            from lora_vit.sweep.run import run_sweep

        return list((run_sweep(request) or {}).values())

    def _call_back(self, folder: Path, trial: Any, state: Any) -> None:
        """What Hydra calls for each job, once the trial has ended."""
        if not self.callbacks.callbacks:
            return
        from lora_vit.config import to_dict
        from lora_vit.errors import TrialFailed

        values: Any = to_dict(trial.config)
        own = {"runtime": {"output_dir": str(folder / trial.trial_id)}, "output_subdir": ".hydra"}
        config = DictConfig({**values, "hydra": OmegaConf.merge(self.config.hydra, own)})
        job = JobReturn(overrides=trial.overrides, cfg=config, hydra_cfg=self.config)
        if state.status == "completed":
            value = state.record.metrics.get(f"val_{trial.config.trainer.metric}")
            job.status, job.return_value = JobStatus.COMPLETED, value
        else:
            job.status, job.return_value = JobStatus.FAILED, TrialFailed(state.problem or state.record.error["message"])
        self.callbacks.on_job_start(config=config, task_function=self.task)
        self.callbacks.on_job_end(config=config, job_return=job)
