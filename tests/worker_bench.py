"""Workers whose packs do what a test says: records and claims are real, nothing trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stage import setup_of
from sweeps import claimed, sweep_of

from lora_vit.records import read_record
from lora_vit.stopping import StopRequest
from lora_vit.sweep.claims import Claims
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Trial
from lora_vit.sweep.worker import Worker
from lora_vit.training.trial import TrialRun

Act = Callable[[list[TrialRun], Worker], None]


class Bench:
    """Workers whose packs do what ``act`` says, and then complete; each worker stands for a process."""

    def __init__(self, folder: Path):
        self.folder, self.stop = folder, StopRequest()
        self.act: Act = lambda trials, reporter: None
        self.built: Callable[[Trial], object] = lambda trial: setup_of()
        self.packs: list[list[int]] = []
        self.said: list[str] = []
        self.runs: list[TrialRun] = []

    def train(self, trials: list[TrialRun], setup: object, reporter: Worker, stop: StopRequest) -> None:
        assert setup is setup_of()
        assert stop is self.stop
        self.packs.append([trial.config.seed for trial in trials])
        self.runs += trials
        for trial in trials:
            trial.write_record()
        self.act(trials, reporter)
        for trial in trials:
            if trial.record.status == "running":
                self.complete(trial, reporter)

    def complete(self, trial: TrialRun, reporter: Worker) -> None:
        trial.record.metrics["val_accuracy"] = 0.75
        trial.complete()
        reporter.left(trial)

    def ask(self, trials: list[Trial], **options: Any) -> Sweep:
        return sweep_of(self.folder, trials, **options)

    def work(self, trials: list[Trial] | None = None, **options: Any) -> Worker:
        """Ask for the trials, and be a new worker."""
        if trials is not None:
            self.ask(trials, **options)
        claims = Claims(self.folder)
        worker = Worker(Sweep.existing(self.folder), claims, self.stop, self.said.append)
        try:
            worker.work()
        finally:
            for name in list(claims._held):  # as `living` does
                claims.release(name)
        return worker

    def fails(self, kind: type[Exception], *words: str) -> None:
        """Be a new worker, which ends so."""
        with pytest.raises(kind) as ended:
            self.work()
        assert all(word in str(ended.value) for word in words), ended.value

    def statuses(self, trials: list[Trial]) -> list[str]:
        return [read_record(self.folder / trial.trial_id).status for trial in trials]

    def states(self, trials: list[Trial]) -> list[str]:
        return claimed(self.folder, trials)


def breaks(error: Callable[[], Exception], seeds: set[int] | None = None, more_than: int = 0) -> Act:
    """Packs with one of these seeds (None: with any) and of more than so many trials raise the error."""

    def act(trials: list[TrialRun], reporter: Worker) -> None:
        if len(trials) > more_than and (seeds is None or seeds & {t.config.seed for t in trials}):
            raise error()

    return act
