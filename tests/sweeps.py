"""Sweeps of the small trial without Hydra and torch: what a test of plans, claims and schedules needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from plain_trials import plain_trial

from lora_vit.config import SweepConfig, to_dict
from lora_vit.records import TrialRecord, write_record
from lora_vit.sweep.plan import Job, SweepRun

LAUNCHED = 1000.0
"""When the command of the made-up sweeps began."""


def options(**changes: object) -> SweepConfig:
    """How a sweep runs: packs of four, unless changed."""
    plain = SweepConfig(
        name="s",
        pack_size="4",
        workers="auto",
        retry_failed=False,
        on_failure="continue",
        dry_run=False,
        measure=False,
        wait=True,
        margin=None,
        first_seeds=5,
        most_seeds=30,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def plain_job(changes: dict[str, Any] | None = None, label: str = "") -> Job:
    """The small trial as a job."""
    return Job(plain_trial(changes), [f"{key}={value}" for key, value in (changes or {}).items()], label=label)


def seed_jobs(count: int, **changes: Any) -> list[Job]:
    """Repeats of the small trial; ``changes`` as ``trainer__epochs=3``."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return [plain_job({"seed": seed, **named}) for seed in range(count)]


def sweep_run(folder: Path, jobs: list[Job], workers: int = 1, **changes: object) -> SweepRun:
    """A command's run of these jobs, begun at ``LAUNCHED``."""
    return SweepRun(tuple(jobs), folder, options(**changes), LAUNCHED, workers)


def leave_record(run: SweepRun, job: Job, status: str, **fields: Any) -> None:
    """What an earlier process wrote about the job, before the command began unless ``fields`` say otherwise."""
    run.folder_of(job).mkdir(parents=True, exist_ok=True)
    values = {"started": LAUNCHED - 20, "finished": LAUNCHED - 10, **fields}
    write_record(run.folder_of(job), TrialRecord(job.trial_id, job.cell_id, status, to_dict(job.config), **values))


class Events(list[tuple[str, dict[str, Any]]]):
    """Takes events as a view does, and keeps them."""

    def __call__(self, kind: str, **fields: Any) -> None:
        self.append((kind, fields))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The fields of the events of one kind."""
        return [fields for name, fields in self if name == kind]
