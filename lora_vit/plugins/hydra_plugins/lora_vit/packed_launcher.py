"""Hydra's doors to the packed sweep: a launcher, and a grid sweeper that composes each trial once."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from lora_vit.compose import (
    GridSweeperConf,
    PackedLauncherConf,
    PackedRayConf,
    PackedSlurmConf,
    compose_all,
    sweep_from_omegaconf,
)
from lora_vit.errors import ConfigError
from lora_vit.sweep.ledger import Ledger
from lora_vit.sweep.plan import SweepRun, refuse_seed_dependent, this_command, without_seed

# Options of lora_vit.compose: what Hydra's launchers pickle must load in a Python that lacks this folder.
for group, name, node in (
    ("launcher", "packed", PackedLauncherConf),
    ("launcher", "packed_slurm", PackedSlurmConf),
    ("launcher", "packed_ray", PackedRayConf),
    ("sweeper", "grid", GridSweeperConf),
):
    ConfigStore.instance().store(group=f"hydra/{group}", name=name, node=node, provider="lora_vit")


class PackedLauncher(BasicLauncher):
    """Trains the trials of a sweep together.

    It packs when the task function offers ``run_sweep``; any other task runs one after another, as with
    ``hydra/launcher=basic``.
    """

    def engine(self, folder: Path) -> Any:
        """What starts the workers, where it is not the command itself."""
        return None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose and validate all, then hand plain configs to ``run_sweep``. Called by Hydra."""
        run_sweep = getattr(self.task_function, "run_sweep", None)
        if run_sweep is None:
            return super().launch(job_overrides, initial_job_idx)
        assert self.config is not None
        assert self.hydra_context is not None
        options, launched = sweep_from_omegaconf(self.config.sweep), time.time()
        jobs = compose_all(self.hydra_context.config_loader, self.config, job_overrides)
        if options.margin is not None:
            seed = f"seed={jobs[0].config.seed + 1}"
            again = [[*without_seed(lines), seed] for lines in job_overrides]
            refuse_seed_dependent(jobs, compose_all(self.hydra_context.config_loader, self.config, again))
        folder = Path(str(self.config.hydra.sweep.dir))
        hydra_cfg = OmegaConf.masked_copy(self.config, ["hydra"])
        run = SweepRun(tuple(jobs), folder, options, launched, hydra=OmegaConf.to_yaml(hydra_cfg))
        outcomes = run_sweep(run, self.engine(folder))
        if outcomes is None:  # a dry run, or workers that are not waited for
            return []
        return [
            JobReturn(
                overrides=job.overrides,
                hydra_cfg=hydra_cfg,  # one for all: a copy for each takes seconds for a thousand
                working_dir=str(folder / job.trial_id),
                task_name=self.config.hydra.job.name,
                status=JobStatus.FAILED if isinstance(outcomes[job.trial_id], Exception) else JobStatus.COMPLETED,
                _return_value=outcomes[job.trial_id],
            )
            for job in jobs
        ]


class PackedSlurmLauncher(PackedLauncher):
    """The packed launcher with workers that are Slurm jobs."""

    def __init__(self, **parameters: Any):
        super().__init__()
        self.parameters: Any = OmegaConf.to_container(OmegaConf.create(parameters), resolve=True)

    def engine(self, folder: Path) -> Any:
        """Slurm through submitit. Raises ConfigError where one of them is missing."""
        try:
            from lora_vit.sweep.slurm import Slurm
        except ImportError:
            raise ConfigError("hydra/launcher=packed_slurm needs submitit: pip install 'lora_vit[slurm]'") from None
        return Slurm(self.parameters, folder)


class PackedRayLauncher(PackedSlurmLauncher):
    """The packed launcher with workers that are Ray tasks."""

    def engine(self, folder: Path) -> Any:
        """Ray. Raises ConfigError where it is missing."""
        try:
            from lora_vit.sweep.ray_cluster import Ray
        except ImportError:
            raise ConfigError("hydra/launcher=packed_ray needs Ray: pip install 'lora_vit[ray]'") from None
        return Ray(self.parameters)


class GridSweeper(BasicSweeper):
    """Hydra's basic sweeper for our task: every trial is validated and in the plan before any launcher begins."""

    def sweep(self, arguments: list[str]) -> Any:
        """Run the grid. Called by Hydra. Raises the first trial's failure once all are done, or are to stop."""
        if not hasattr(getattr(self.launcher, "task_function", None), "run_sweep"):
            return super().sweep(arguments)
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        loader = self.hydra_context.config_loader
        overrides = OverridesParser.create(config_loader=loader).parse_overrides([*self._parse_config(), *arguments])
        for override in overrides:
            if override.is_sweep_override() and override.key_or_group.startswith(("sweep.", "hydra.")):
                raise ConfigError(f"{override.key_or_group} is the sweep's own and cannot be swept: give it one value")
        batches = self.split_arguments(overrides, self.max_batch_size)
        if not any(batches):
            raise ConfigError("the sweep is empty: a swept key has no value, give it some as lora.rank=2,4")
        if not isinstance(self.launcher, PackedLauncher) or len(batches) > 1:
            jobs = compose_all(loader, self.config, [line for batch in batches for line in batch])
            if not self.config.sweep.dry_run:
                Ledger(Path(str(self.config.hydra.sweep.dir))).add(jobs, this_command())
        returns: list[Sequence[JobReturn]] = []
        for batch in batches:
            done = self.launcher.launch(batch, initial_job_idx=sum(map(len, returns)))
            returns.append(done)
            failed = [job for done in returns for job in done if job.status == JobStatus.FAILED]
            if failed and (len(returns) == len(batches) or self.config.sweep.on_failure == "stop"):
                raise failed[0]._return_value
        return returns
