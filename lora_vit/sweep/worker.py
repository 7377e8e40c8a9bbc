"""A worker of a sweep: takes packs of open trials, trains them on one device, and leaves records."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from lora_vit.config import ConfigError
from lora_vit.distributed import Process
from lora_vit.records import NO_SPACE
from lora_vit.run import one_line
from lora_vit.stopping import Interrupted, StopRequest
from lora_vit.sweep.claims import Claims
from lora_vit.sweep.measure import PackSizes, out_of_memory
from lora_vit.sweep.plan import Group, Job, SweepRun
from lora_vit.sweep.schedule import Emit, Schedule
from lora_vit.sweep.setups import Setups, free_memory
from lora_vit.terminal import Every
from lora_vit.training.loop import train_trials
from lora_vit.training.pack import Pack
from lora_vit.training.setup import Setup
from lora_vit.training.trial import Trial, locked_folder

POLL_EVERY = 0.5
"""Seconds between looks at the trials that other processes have claimed."""


class ClaimLost(Exception):  # noqa: N818  (not an error)
    """Another process took a trial over while this one was not running."""


class PackReporter:
    """Turns what the loop reports into events; ends the pack if a claim of it was lost."""

    def __init__(self, emit: Emit, claims: Claims, stop_on_failure: bool):
        self.emit, self.claims, self.stop_on_failure = emit, claims, stop_on_failure
        self._epochs, self._now_and_then = 0.0, Every(0.25)

    def started(self, pack: Pack) -> None:
        """Called before the first step."""
        self.emit("pack", ids=[t.name for t in pack.trials])

    def advance(self, pack: Pack) -> None:
        """Called after every step."""
        self._epochs += pack.K / pack.steps_per_epoch
        if self._now_and_then.due():
            self.flush()
        if self.claims.lost:
            lost = [t.name for t in pack.trials if t.name in self.claims.lost]
            if lost:
                raise ClaimLost(", ".join(lost))

    def flush(self) -> None:
        """Report the steps so far."""
        self.emit("advance", epochs=self._epochs)
        self._epochs = 0.0

    def step(self, pack: Pack, losses: list[float], rates: list[float], images_per_second: float) -> None:
        """Called at logging steps."""

    def epoch(self, trial: Trial, row: dict[str, float]) -> None:
        """Called after each epoch of each trial."""
        self.emit("epoch", id=trial.name, epoch=trial.state.epoch, val_accuracy=row.get("val_accuracy"))

    def left(self, trial: Trial) -> None:
        """Called when a trial is completed or failed."""
        self.flush()
        failed = trial.record.status == "failed"
        message = trial.record.error["message"] if failed and trial.record.error else ""
        accuracy = trial.record.metrics.get("val_accuracy")
        self.emit("left", id=trial.name, status=trial.record.status, val_accuracy=accuracy, message=message)
        self.claims.release(trial.name)
        if failed and self.stop_on_failure:
            self.emit("stop")


class Worker:
    """Trains a sweep's open trials until none is left. One for each device."""

    def __init__(self, run: SweepRun, emit: Emit, stop: StopRequest, index: int = 0):
        """``emit`` takes events for the view; ``index``: which worker of the run, and on GPUs which device."""
        self.run, self.emit, self.stop = run, emit, stop
        self.setups = Setups(Process(local_rank=index))

    def work(self) -> None:
        """Train until every trial has ended, here or elsewhere. Raises Interrupted once all is saved."""
        with Claims(self.run.folder) as claims:
            self.schedule = Schedule(self.run, claims, self.emit)
            self.sizes = PackSizes(self.run, self.setups, self.stop, self.emit)
            self.reporter = PackReporter(self.emit, claims, self.run.options.on_failure == "stop")
            waited = False
            while not self.stop.signum:
                looks = [self.train_group(group) for group in self.schedule.groups]
                if any(worked for worked, _ in looks):
                    continue
                if not any(open_elsewhere for _, open_elsewhere in looks):
                    return
                if not waited:
                    self.emit("say", text="another process has the remaining trials: waiting for it")
                    waited = True
                time.sleep(POLL_EVERY)
            raise Interrupted(self.stop.signum)

    def train_group(self, group: Group) -> tuple[bool, bool]:
        """Train what nobody has: whether anything was trained, and whether others have what is left."""
        worked = False
        while not self.stop.signum:
            jobs = self.schedule.open_jobs(group)
            try:
                taken = self.take_pack(group, jobs)
                if not taken:
                    return worked, bool(jobs)
                setup = self.setups.of(taken[0])
            except ConfigError as error:  # nothing of the group can be built
                for job in jobs:
                    self.schedule.refuse(job, error)
                break
            worked = True
            try:
                self.train_taken(group, taken, setup)
            finally:
                self.schedule.give_back(taken)
        return worked, False

    def take_pack(self, group: Group, jobs: list[Job]) -> list[Job]:
        """Claim the next pack of these open trials; empty while others have them, or measure how many fit."""
        if self.schedule.all_taken(jobs):
            return []
        size = self.sizes.of(group, jobs, self.schedule.planned(group), self.schedule.claims)
        return [] if size is None else self.schedule.take_pack(group, jobs, size)

    def train_taken(self, group: Group, jobs: Sequence[Job], setup: Setup) -> None:
        """Train claimed trials in their folders."""
        with contextlib.ExitStack() as stack:
            free = []
            for job in jobs:
                try:
                    stack.enter_context(locked_folder(self.run.folder_of(job)))
                    free.append(job)
                except ConfigError as error:  # a single run in the same folder, or it cannot be written
                    self.schedule.refuse(job, error)
            self.train_pack(group, free, setup)

    def train_pack(self, group: Group, jobs: list[Job], setup: Setup) -> None:
        """Train trials together that stand at one step of their epochs; after an error, each half by itself.

        Down to the trial that has the error, which alone is recorded as failed.
        """
        by_offset: dict[int, list[tuple[Job, Trial]]] = {}
        for job, trial in self.open_all(jobs, setup):
            by_offset.setdefault(trial.state.step_in_epoch, []).append((job, trial))
        for members in by_offset.values():
            error = self.attempt([trial for _, trial in members], setup)
            if error is None:
                continue
            left = [(job, trial) for job, trial in members if trial.record.status == "running"]
            if len(left) == 1 and len(members) == 1:
                self.fail(left[0][1], error)
                continue
            for _, trial in left:
                trial.close()
            free_memory()
            if out_of_memory(error):
                self.sizes.halve(group, len(members))
            half = max(1, len(left) // 2)
            self.emit("say", text=f"a pack of {len(members)} ended ({one_line(error)}): packs of {half} go on from "
                      "their last checkpoints")  # fmt: skip
            rest = [job for job, _ in left]
            for part in (rest[:half], rest[half:]):
                if part:
                    self.train_pack(group, part, setup)

    def attempt(self, trials: list[Trial], setup: Setup) -> Exception | None:
        """Train a pack; returns what went wrong, for another try with fewer."""
        try:
            train_trials(trials, setup, self.reporter, self.stop)
        except Interrupted:
            raise
        except ClaimLost as error:
            self.emit("say", text=f"{error} was taken over by another process")
            for trial in trials:
                trial.close()
            return None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise
            return error.with_traceback(None) if len(trials) > 1 else error  # a traceback holds the pack's memory
        finally:
            self.reporter.flush()
        return None

    def open_all(self, jobs: list[Job], setup: Setup) -> list[tuple[Job, Trial]]:
        """Open the trials; those that cannot be are refused."""
        opened = []
        for job in jobs:
            place, board = self.run.folder_of(job), self.run.board_of(job)
            try:
                trial = Trial.open(job.config, place, setup, self.run.launched, job.files, board)
            except ConfigError as error:
                self.schedule.refuse(job, error)
            else:
                opened.append((job, trial))
        return opened

    def fail(self, trial: Trial, error: Exception) -> None:
        """Record an error that is a trial's own."""
        trial.fail(one_line(error), error=error)
        error.with_traceback(None)  # whose frames hold the pack, and the error
        self.reporter.left(trial)
