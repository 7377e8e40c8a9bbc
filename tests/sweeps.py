"""Sweeps of the small trial without Hydra and torch: what a test of plans, claims and packs needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from plain_trials import plain_trial

from lora_vit.config import SweepConfig, to_dict
from lora_vit.records import TrialRecord, write_record
from lora_vit.sweep.claims import Claims
from lora_vit.sweep.plan import Request, Sweep
from lora_vit.sweep.trial import Trial


def options(**changes: object) -> SweepConfig:
    """How a sweep runs: packs of four, unless changed."""
    plain = SweepConfig(name="s", pack_size="4", workers="auto", retry_failed=False, dry_run=False, wait=True,
                        margin=None, first_seeds=5, most_seeds=30, trials=None)  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def trial_of(changes: dict[str, Any] | None = None, label: str = "") -> Trial:
    """The small trial as a sweep asks for it."""
    return Trial(plain_trial(changes), [f"{key}={value}" for key, value in (changes or {}).items()], label)


def seed_trials(count: int, **changes: Any) -> list[Trial]:
    """Repeats of the small trial; ``changes`` as ``trainer__epochs=3``."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return [trial_of({"seed": seed, **named}) for seed in range(count)]


def sweep_of(folder: Path, trials: list[Trial], workers: int = 1, **changes: Any) -> Sweep:
    """A sweep whose command has asked for these trials; ``race`` and ``search`` are the plan's."""
    about = {key: changes.pop(key, None) for key in ("race", "search")}
    sweep = Sweep(folder)
    is_open = {trial.trial_id for trial in trials if not sweep.state_of(trial).ended}
    sweep.ask(Request(folder, options(**changes), trials, command="train", workers=workers, **about), trials, is_open)
    return sweep


def another(folder: Path, *trials: Trial) -> Claims:
    """A process that has these trials; it lives, for it is this one."""
    claims = Claims(folder)
    claims.look()
    for trial in trials:
        assert claims.take(trial.trial_id)
    return claims


def claimed(folder: Path, trials: list[Trial]) -> list[str]:
    """Whether each trial is free, held or ended."""
    claims = Claims(folder)
    claims.look()
    return [claims.state(trial.trial_id) for trial in trials]


def leave_record(sweep: Sweep, trial: Trial, status: str, **fields: Any) -> None:
    """What a process wrote about the trial."""
    folder = sweep.folder_of(trial)
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, TrialRecord(trial.trial_id, trial.cell_id, status, to_dict(trial.config), **fields))
