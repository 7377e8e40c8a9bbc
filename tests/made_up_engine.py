"""A sweep's command without workers: an engine that leaves their records, and the command's way through."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sweeps import leave_record, options, trial_of

from lora_vit.sweep.claims import ENDED, Claims
from lora_vit.sweep.packs import Packs
from lora_vit.sweep.plan import Request, Sweep
from lora_vit.sweep.run import run_sweep
from lora_vit.sweep.trial import Trial


class Engine:
    """Its workers train all that is free when they are looked at: each trial comes to what ``outcome`` says."""

    outlives_us, poll_every = False, 0.0

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[int] = []
        self.trained: list[Trial] = []
        self.stops: list[bool] = []
        self.alive = self.withdrawn = 0
        self.works, self.ends = True, True
        self.news: list[str] = []
        self.looked: Callable[[], None] = lambda: None
        self.outcome: Callable[[Trial], dict[str, Any]] = lambda trial: {"metrics": {"val_accuracy": 0.75}}

    def number_of_workers(self, asked: str, trials: list[Any]) -> int:
        return min(2 if asked == "auto" else int(asked), len(trials))

    def start(self, count: int) -> str:
        self.started.append(count)
        self.alive += count
        return f"{count} workers"

    def look(self) -> tuple[int, list[str]]:
        self.looked()
        if self.alive and self.works:
            self.work()
        self.alive = 0 if self.ends else self.alive
        return self.alive, [self.news.pop()] if self.news else []

    def work(self, most: int = 99) -> None:
        sweep, claims = Sweep.existing(self.folder), Claims(self.folder)
        packs = Packs(sweep, claims)
        packs.look()
        for _, (trial,) in itertools.islice(packs.take(lambda group: 1), most):
            fields = {"status": "completed"} | self.outcome(trial)
            leave_record(sweep, trial, **fields)
            claims.release(trial.trial_id, ENDED)
            self.trained.append(trial)

    def stop(self, now: bool = False) -> None:
        self.stops.append(now)
        self.alive = 0

    def withdraw(self) -> None:
        self.withdrawn += 1


def run(folder: Path, trials: list[Trial], **changes: Any) -> Any:
    """What a command comes to that asks for these trials."""
    return run_sweep(Request(folder, options(**changes), trials, command="the command"))


def fails(trial: Trial) -> dict[str, Any]:
    if trial.config.seed != 1:
        return {"metrics": {"val_accuracy": 0.5}}
    return {"status": "failed", "error": {"message": "the loss is not finite", "step": 3}}


def race_trials(*ranks: int) -> list[Trial]:
    return [trial_of({"lora.rank": rank, "seed": 0}, f"rank={rank}") for rank in ranks]
