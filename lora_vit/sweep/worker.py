"""A worker of a sweep: takes packs of open trials, trains them on one device, and leaves records."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_vit.distributed import Process
from lora_vit.errors import NO_SPACE, ConfigError, Interrupted, one_line
from lora_vit.stopping import StopRequest
from lora_vit.sweep.claims import Claims
from lora_vit.sweep.ledger import Ledger
from lora_vit.sweep.measure import PackSizes, out_of_memory
from lora_vit.sweep.plan import Group, Job, SweepRun
from lora_vit.sweep.schedule import Emit, Schedule
from lora_vit.sweep.setups import Setups, free_memory, own_device
from lora_vit.terminal import Every, make_console
from lora_vit.training.loop import train_trials
from lora_vit.training.pack import Pack
from lora_vit.training.setup import Setup
from lora_vit.training.trial import TrialRun, locked_folder

POLL_EVERY = 0.5
"""Seconds between looks while another process claims a pack or measures its size."""


class ClaimLost(Exception):  # noqa: N818  (not an error)
    """Another process took a trial over while this one was not running."""


class PackReporter:
    """Turns what the loop reports into events; ends the pack if a claim of it was lost."""

    def __init__(self, schedule: Schedule):
        self.schedule, self.emit, self.claims = schedule, schedule.emit, schedule.claims
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

    def epoch(self, trial: TrialRun, row: dict[str, float]) -> None:
        """Called after each epoch of each trial."""
        self.emit("epoch", id=trial.name, epoch=trial.state.epoch, val_accuracy=row.get("val_accuracy"))

    def left(self, trial: TrialRun) -> None:
        """Called when a trial is completed or failed."""
        self.flush()
        record = trial.record
        message = record.error["message"] if record.status == "failed" and record.error else ""
        self.schedule.left(trial.name, record.status, record.metrics.get("val_accuracy"), message)


def work(run: SweepRun, emit: Emit, stop: StopRequest) -> None:
    """Be a worker of the run on a device of one's own, until nothing is open that nobody has.

    Raises:
        ConfigError: there is no device.
        Interrupted: everything is saved.
    """
    with own_device(run) as index:
        Worker(run, emit, stop, index).work()


def stopping(emit: Emit, stop: StopRequest) -> Emit:
    """Events as before, of which ``stop`` also asks this process to stop."""

    def passing(kind: str, **fields: Any) -> None:
        emit(kind, **fields)
        if kind == "stop":
            stop.signum = signal.SIGTERM

    return passing


def work_alone(folder: Path, name: str = "") -> int:
    """Be a worker that was started by itself; plain lines say what it does. Returns the exit code.

    Args:
        folder: of the sweep.
        name: of the run; the newest where none is named.

    Raises:
        ConfigError: there is no such run here, or no device.
    """
    console = make_console()
    run = Ledger(folder).open_run(name)
    labels = {job.trial_id: job.label for job in run.jobs}

    def say(kind: str, **fields: Any) -> None:
        if kind == "pack":
            console.print(f"training {', '.join(fields['ids'])}", markup=False)
        elif kind == "left":
            end = fields["message"] if fields["val_accuracy"] is None else f"val accuracy {fields['val_accuracy']:.2%}"
            console.print(f"{fields['id']} {labels[fields['id']]}  {fields['status']}  {end}", markup=False)
        elif kind == "say":
            console.print(fields["text"], markup=False)

    console.print(f"a worker of {folder}: {len(run.jobs)} trials were asked for", markup=False)
    try:
        with StopRequest() as stop:
            work(run, stopping(say, stop), stop)
    except Interrupted as error:
        console.print(f"{error}: saved; any other worker goes on")
        return error.exit_code
    console.print("nothing is open that nobody has")
    return 0


class Worker:
    """Trains a sweep's open trials until none is left. One for each device."""

    def __init__(self, run: SweepRun, emit: Emit, stop: StopRequest, index: int = 0):
        """``emit`` takes events for the view; ``index``: of the GPU."""
        self.run, self.emit, self.stop = run, emit, stop
        self.setups = Setups(Process(local_rank=index))

    def work(self) -> None:
        """Train until nothing is open that nobody has. Raises Interrupted once all is saved."""
        with Claims(self.run.folder) as claims:
            self.claims = claims
            self.schedule = Schedule(self.run, claims, self.emit)
            self.sizes = PackSizes(self.run, self.setups, self.stop, self.emit)
            self.reporter = PackReporter(self.schedule)
            groups, waited = self.schedule.groups, False
            while True:
                self.schedule.look()
                if any(self.train_group(group, waited) for group in groups):
                    waited = False
                elif waited or not any(map(self.schedule.is_free, groups)):
                    return
                else:  # the rest of a pack whose owner is about to take it, or never will
                    waited = True
                    time.sleep(POLL_EVERY)

    def train_group(self, group: Group, strays: bool) -> bool:
        """Train what of a group is free as of the last look; whether another look is worth it."""
        worked = False
        while self.schedule.is_free(group):
            self.stop.heed()
            taken: list[Job] = []
            try:
                size = self.sizes.of(group, self.claims)
                if size is None:
                    time.sleep(POLL_EVERY)
                    return True
                taken = self.schedule.take_pack(group, size, strays)
                if not taken:
                    break
                self.train_taken(group, taken, self.setups.of(taken[0]))
            except ConfigError as error:  # nothing of the group can be built
                for job in taken or group.jobs:
                    if taken or self.claims.take(job.trial_id):
                        self.schedule.refuse(job, error)
            finally:
                self.schedule.give_back(taken)
            worked = True
        return worked

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
        by_offset: dict[int, list[tuple[Job, TrialRun]]] = {}
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

    def attempt(self, trials: list[TrialRun], setup: Setup) -> Exception | None:
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

    def open_all(self, jobs: list[Job], setup: Setup) -> list[tuple[Job, TrialRun]]:
        """Open the trials; those that cannot be are refused."""
        opened = []
        for job in jobs:
            place, board = self.run.folder_of(job), self.run.board_of(job)
            try:
                trial = TrialRun.open(job.config, place, setup, self.run.hydra_files(job), board)
            except ConfigError as error:
                self.schedule.refuse(job, error)
            else:
                opened.append((job, trial))
        return opened

    def fail(self, trial: TrialRun, error: Exception) -> None:
        """Record an error that is a trial's own."""
        trial.fail(one_line(error), error=error)
        error.with_traceback(None)  # whose frames hold the pack, and the error
        self.reporter.left(trial)
