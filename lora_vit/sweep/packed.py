"""A worker of a sweep: claims trials, trains them in packs on one device, and leaves records."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_vit.build import build_setup, choose_device, device_name
from lora_vit.config import ConfigError, SweepConfig
from lora_vit.data.dataset import DataError, ImageData, load_data
from lora_vit.distributed import Process
from lora_vit.records import NO_SPACE
from lora_vit.run import data_card, one_line, write_hydra_files
from lora_vit.sweep.claims import Claims
from lora_vit.sweep.ledger import Ledger, is_closed, state_of
from lora_vit.sweep.measure import choose_pack_size
from lora_vit.sweep.plan import Group, Job, digest, make_groups, setup_key
from lora_vit.training.checkpoint import CHECKPOINT
from lora_vit.training.loop import Interrupted, StopRequest, train_trials
from lora_vit.training.pack import Pack, Setup, Trial
from lora_vit.training.resume import existing_record, locked, open_trial, remove_own_files

POLL_EVERY = 0.5
"""Seconds between looks at the trials that other processes have claimed."""

Emit = Callable[..., None]


class ClaimLost(Exception):  # noqa: N818  (not an error)
    """Another process took a trial over while this one was not running."""


class PackReporter:
    """Turns what the loop reports into events; ends the pack if a claim of it was lost."""

    def __init__(self, emit: Emit, claims: Claims, stop: StopRequest, stop_on_failure: bool):
        self.emit, self.claims, self.stop, self.stop_on_failure = emit, claims, stop, stop_on_failure
        self._epochs, self._since = 0.0, time.monotonic()

    def started(self, pack: Pack) -> None:
        """Called before the first step."""
        self.emit("pack", ids=[t.name for t in pack.trials])

    def advance(self, pack: Pack) -> None:
        """Called after every step."""
        self._epochs += pack.K / pack.steps_per_epoch
        if time.monotonic() - self._since > 0.25:
            self.flush()
        if self.claims.lost:
            lost = [t.name for t in pack.trials if t.name in self.claims.lost]
            if lost:
                raise ClaimLost(", ".join(lost))

    def flush(self) -> None:
        """Report the steps so far."""
        self.emit("advance", epochs=self._epochs)
        self._epochs, self._since = 0.0, time.monotonic()

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

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: Path,
        options: SweepConfig,
        launched: float,
        emit: Emit,
        stop: StopRequest,
        index: int = 0,
        workers: int = 1,
    ):
        """Prepare.

        Args:
            jobs: the trials, each once.
            folder: of the sweep.
            options: how it runs.
            launched: when the command began (seconds since 1970): failures older than this may be tried again.
            emit: takes events for the view.
            stop: asked to stop.
            index: which worker, and on GPUs which device.
            workers: how many there are.
        """
        self.folder, self.options, self.launched = folder, options, launched
        self.emit, self.stop, self.workers = emit, stop, workers
        self.process = Process(local_rank=index)
        self.groups = make_groups(jobs)
        self.ledger = Ledger(folder)
        self._closed: set[str] = set()  # finished, or refused
        self._restarted: set[str] = set()
        self._setup: tuple[str, Setup] | None = None
        self._data: tuple[str, ImageData] | None = None
        self._sizes: dict[str, int] = {}
        self._planned: dict[str, list[Job]] = {}  # what was open when we began, in packs' order

    def run(self) -> None:
        """Train until every trial is finished, here or elsewhere. Raises Interrupted once all is saved."""
        with Claims(self.folder) as claims:
            self.claims = claims
            self.reporter = PackReporter(self.emit, claims, self.stop, self.options.on_failure == "stop")
            waited = False
            self._planned = {group.key: self.plan(group) for group in self.groups}
            while not self.stop.signum:
                looks = [self.train_group(group) for group in self.groups]
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
        """Train what can be claimed: whether anything was, and whether others hold what is left."""
        worked = False
        while not self.stop.signum:
            pending = self.pending(group)
            try:
                jobs = self.claim(group, pending) if pending else []
            except (ConfigError, DataError) as error:  # nothing of the group can be built
                for job in pending:
                    self.refuse(job, error)
                break
            if not jobs:
                return worked, bool(pending)
            worked = True
            try:
                self.train_claimed(group, jobs)
            finally:
                for job in jobs:  # those that are not finished are free for the next look
                    self.claims.release(job.trial_id)
        return worked, False

    def plan(self, group: Group) -> list[Job]:
        """What is open now, in the order of packs: interrupted trials first, they were promised before."""
        return sorted(self.pending(group), key=lambda job: not (self.folder / job.trial_id / CHECKPOINT).exists())

    def pending(self, group: Group) -> list[Job]:
        """Trials of the group that are not finished; closes those that are."""
        pending = []
        for job in group.jobs:
            if job.trial_id in self._closed:
                continue
            state = state_of(self.folder / job.trial_id)
            if is_closed(job.config, state, self.options, self.launched):
                self._closed.add(job.trial_id)
                self.emit("closed", id=job.trial_id, state=state)
            else:
                pending.append(job)
        return pending

    def claim(self, group: Group, pending: list[Job]) -> list[Job]:
        """Claim the pending trials of the next pack.

        A process that finds a pack's first open trial taken leaves the whole pack to its owner. So what trains
        together follows from the trials and the pack size alone, not from who was faster.
        """
        if all(self.claims.is_taken(job.trial_id) for job in pending):
            return []
        size = self.pack_size(group, pending)
        if size is None:
            return []
        planned = self._planned[group.key]
        open_ids = {job.trial_id for job in pending}
        for first in range(0, len(planned), size):
            claimed: list[Job] = []
            for job in planned[first : first + size]:
                if job.trial_id not in open_ids:
                    continue
                if not self.claims.take(job.trial_id):
                    break
                state = state_of(self.folder / job.trial_id)
                if is_closed(job.config, state, self.options, self.launched):  # finished since we looked
                    self.claims.release(job.trial_id)
                    continue
                claimed.append(job)
            if claimed:
                return claimed
        return []

    def pack_size(self, group: Group, pending: list[Job]) -> int | None:
        """How many trials of the group train together; None while another process measures that."""
        if group.alone:
            return 1
        if group.key not in self._sizes:
            wanted = self.options.pack_size
            size = self.measured_size(group, pending) if wanted == "auto" else int(wanted)
            if size is None:
                return None
            self._sizes[group.key] = size
        if self.options.pack_size != "auto":
            return self._sizes[group.key]
        share = -(-len(self._planned[group.key]) // self.workers)
        return max(1, min(self._sizes[group.key], share))

    def measured_size(self, group: Group, pending: list[Job]) -> int | None:
        """The size that was measured for the group on this kind of machine, by now or earlier."""
        trials = len(self._planned[group.key])
        if trials == 1:
            return 1
        kind = self.size_key(group)
        known = self.ledger.pack_size(kind, trials)
        if known is None:
            if not self.claims.take(f"size-{kind}"):
                return None
            try:
                known = self.ledger.pack_size(kind, trials)  # perhaps just now by another
                if known is None:
                    known = self.measure(group, pending)
                    self.ledger.keep_pack_size(kind, known)
            finally:
                self.claims.release(f"size-{kind}")
        return int(known["size"])

    def measure(self, group: Group, pending: list[Job]) -> dict[str, Any]:
        """Measure the group's pack size now: ``size`` and the figures behind it."""
        self.emit("say", text=f"measuring the pack size for {group.title}")
        configs, setup = [job.config for job in pending], self.setup_for(pending[0])
        size, measured = choose_pack_size(configs, setup, self.workers, self.stop)
        times = ", ".join(f"{k}: {1e3 * t:.0f} ms" for k, t in measured["seconds_per_trial_epoch"].items())
        self.emit("say", text=f"packs of {size} (one epoch of one trial in packs of {times})")
        return {"size": size, "group": group.title, **measured}

    def size_key(self, group: Group) -> str:
        """What a measured pack size holds for: the group on this kind of machine, with as many workers."""
        device = choose_device(group.jobs[0].config.trainer.accelerator, self.process)
        return digest([group.key, device_name(device), torch.get_num_threads(), self.workers])

    def setup_for(self, job: Job) -> Setup:
        """Data and backbone for a trial; kept while they fit."""
        key = setup_key(job.config)
        if self._setup is None or self._setup[0] != key:
            self._setup = None
            _free_memory()
            data_key = digest(vars(job.config.data))
            if self._data is None or self._data[0] != data_key:
                self._data = (data_key, load_data(job.config.data, quiet=True))
            self._setup = (key, build_setup(job.config, self.process, self._data[1]))
        return self._setup[1]

    def train_claimed(self, group: Group, jobs: list[Job]) -> None:
        """Train claimed trials; what stands at different steps of its epoch trains in packs of its own."""
        try:
            setup = self.setup_for(jobs[0])
        except (ConfigError, DataError) as error:
            for job in jobs:
                self.refuse(job, error)
            return
        with contextlib.ExitStack() as stack:
            free = []
            for job in jobs:
                try:
                    stack.enter_context(locked(self.folder / job.trial_id))
                    free.append(job)
                except ConfigError as error:  # a single run in the same folder, or it cannot be written
                    self.refuse(job, error)
            self.train_pack(group, free, setup)

    def train_pack(self, group: Group, jobs: list[Job], setup: Setup) -> None:
        """Train trials together; after an error, each half by itself, down to the trial that has it."""
        opened = self.open_all(jobs, setup)
        by_offset: dict[int, list[tuple[Job, Trial]]] = {}
        for job, trial in opened:
            by_offset.setdefault(trial.state.step_in_epoch, []).append((job, trial))
        for members in by_offset.values():
            trials = [trial for _, trial in members]
            error = self.attempt(trials, setup)
            if error is None:
                continue
            left = [(job, trial) for job, trial in members if trial.record.status == "running"]
            if len(left) == 1 and len(members) == 1:
                self.fail(*left[0], error)
                continue
            for _, trial in left:
                if trial.files is not None:
                    trial.files.close()
            _free_memory()
            if out_of_memory(error):
                self._sizes[group.key] = max(1, len(members) // 2)
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
                if trial.files is not None:
                    trial.files.close()
            return None
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            return error.with_traceback(None) if len(trials) > 1 else error
        except Exception as error:
            if len(trials) > 1:  # the traceback holds the pack's memory
                error.__traceback__ = None
            return error
        finally:
            self.reporter.flush()
        return None

    def open_all(self, jobs: list[Job], setup: Setup) -> list[tuple[Job, Trial]]:
        """Open the trials; those that cannot be are refused."""
        opened = []
        for job in jobs:
            place = self.folder / job.trial_id
            board = self.board_of(job)
            try:
                record = existing_record(place, job.config)
                anew = job.config.trainer.resume == "restart" and job.trial_id not in self._restarted
                failed_at = record.error.get("step") if record is not None and record.error else None
                if anew or failed_at is not None:  # after a bad step a checkpoint may lack an update
                    remove_own_files(place)
                    shutil.rmtree(board, ignore_errors=True)
                    record = None
                self._restarted.add(job.trial_id)
                trainer = dataclasses.replace(job.config.trainer, resume="auto")  # restarted above, if at all
                config = dataclasses.replace(job.config, trainer=trainer)
                trial = open_trial(config, place, record, True, setup.data.fingerprint, board)
            except (ConfigError, DataError) as error:
                self.refuse(job, error)
                continue
            trial.record.environment = setup.environment
            trial.record.data = data_card(setup.data)
            write_hydra_files(place, job.files)
            opened.append((job, trial))
        return opened

    def board_of(self, job: Job) -> Path:
        """The trial's folder in the sweep's TensorBoard folder; it keeps its name when the grid grows."""
        root = self.folder / "tensorboard"
        name = job.label.replace("/", "_").replace(" ", "_")
        return next(root.glob(f"*{job.trial_id}"), root / f"{name}_{job.trial_id}".lstrip("_"))

    def refuse(self, job: Job, error: Exception) -> None:
        """Leave a trial's folder as it is, and say why."""
        self._closed.add(job.trial_id)
        self.claims.release(job.trial_id)
        self.emit("left", id=job.trial_id, status="refused", val_accuracy=None, message=str(error))
        if self.options.on_failure == "stop":
            self.emit("stop")

    def fail(self, job: Job, trial: Trial, error: Exception) -> None:
        """Record an error that is a trial's own."""
        trial.record.status = "failed"
        if trial.files is not None:
            trial.files.fail(one_line(error), error=error)
        self.reporter.left(trial)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
