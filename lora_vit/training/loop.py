"""The training loop: packs of trials, epoch by epoch, until each is completed, failed or interrupted."""

from __future__ import annotations

import resource
import signal
import time
from types import FrameType
from typing import Any, Protocol

import torch

from lora_vit.training.evaluate import Predictions
from lora_vit.training.pack import Pack, Setup, Trial


class Reporter(Protocol):
    """Who tells the user how training goes."""

    def started(self, pack: Pack) -> None:
        """Called before the first step."""

    def step(self, pack: Pack, losses: list[float], rates: list[float], images_per_second: float) -> None:
        """Called at logging steps."""

    def advance(self, pack: Pack) -> None:
        """Called after every step."""

    def epoch(self, trial: Trial, row: dict[str, float]) -> None:
        """Called after each epoch of each trial."""

    def left(self, trial: Trial) -> None:
        """Called when a trial is completed or failed."""


class Interrupted(Exception):  # noqa: N818  (not an error)
    """The process was asked to stop; everything is saved."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopRequest:
    """Remembers SIGTERM and Ctrl-C until the step is finished; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def heed(self) -> None:
        """Raise Interrupted if asked to stop; for long work between steps of training."""
        if self.signum:
            raise Interrupted(self.signum)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum


def train_trials(trials: list[Trial], setup: Setup, reporter: Reporter, stop: StopRequest) -> None:
    """Train trials in one pack to their ends.

    Their records tell how each ended. Raises Interrupted after saving everything.
    """
    first = Pack(trials, setup)
    describe(first)
    reporter.started(first)
    pack: Pack | None = first
    while pack is not None:
        bad = [] if any(t.done() for t in pack.trials) else train_epoch(pack, reporter, stop)
        if not bad and pack.step_in_epoch == pack.steps_per_epoch:
            finish_epoch(pack, reporter)
        finished = [t for t in pack.trials if t.done()]
        if finished:
            finish_trials(pack, finished)
        for trial in bad + finished:
            reporter.left(trial)
        if bad or finished:
            pack = pack.without(bad + finished)
        if pack is not None and stop_requested(pack, stop, logging=True):
            save(pack)
            raise interrupt(pack, stop)


def train_epoch(pack: Pack, reporter: Reporter, stop: StopRequest) -> list[Trial]:
    """Train to the epoch's end, or to the logging step at which trials are found bad; returns those."""
    rates = pack.learning_rates()
    clock = Clock(pack)
    for lr_K1 in rates:
        losses_K = pack.step(lr_K1, bool(stop.signum))
        reporter.advance(pack)
        last = pack.step_in_epoch == pack.steps_per_epoch
        logging = last or pack.step_in_epoch % pack.trials[0].config.trainer.log_every == 0
        if logging:
            bad = log_step(pack, losses_K, lr_K1, clock, reporter)
            if bad:
                return bad
        if stop_requested(pack, stop, logging) and not last:
            clock.charge()
            save(pack)
            raise interrupt(pack, stop)
        if not last and clock.checkpoint_due():
            clock.charge()
            save(pack)
    clock.charge()
    return []


class Clock:
    """Seconds and images since the last look, charged to the trials in equal shares."""

    def __init__(self, pack: Pack):
        self.pack = pack
        self._charged = self._logged = self._saved = time.perf_counter()
        self._step_logged = pack.step_in_epoch

    def charge(self) -> None:
        """Add the time since the last charge to the trials."""
        now = time.perf_counter()
        for trial in self.pack.trials:
            trial.state.seconds += (now - self._charged) / self.pack.K
        self._charged = now

    def images_per_second(self) -> float:
        """Of all trials together since the last call."""
        now, step = time.perf_counter(), self.pack.step_in_epoch
        images = (step - self._step_logged) * self.pack.step_state.global_batch * self.pack.K
        rate = images / max(now - self._logged, 1e-9)
        self._logged, self._step_logged = now, step
        return rate

    def checkpoint_due(self) -> bool:
        """Whether ``checkpoint_every`` seconds have passed since the last."""
        now = time.perf_counter()
        due = now - self._saved >= self.pack.trials[0].config.trainer.checkpoint_every
        if due:
            self._saved = now
        return due


def log_step(pack: Pack, losses_K: torch.Tensor, lr_K1: torch.Tensor, clock: Clock, reporter: Reporter) -> list[Trial]:
    """Read this step's figures from the device, write them, and mark and return the trials that went bad."""
    losses, lrs = losses_K.tolist(), lr_K1[:, 0].tolist()
    first_bad = pack.step_state.first_bad_step_K.tolist()
    clock.charge()
    speed = clock.images_per_second()
    bad = []
    for k, trial in enumerate(pack.trials):
        step = trial.state.epoch * pack.steps_per_epoch + pack.step_in_epoch
        if first_bad[k] >= 0:
            bad.append(trial)
            mark_bad(trial, first_bad[k] + 1)
        elif trial.files is not None:
            trial.files.log_step(step, trial.state.epoch, losses[k], lrs[k], speed)
    reporter.step(pack, losses, lrs, speed)
    return bad


def mark_bad(trial: Trial, step: int) -> None:
    """Record that a loss or gradient was not finite, and what to try."""
    o = trial.config.optimizer
    remedy = "a smaller optimizer.lr" if o.clip_norm is not None else "a smaller optimizer.lr or optimizer.clip_norm=1"
    message = f"the loss or its gradient is not finite at step {step} (optimizer.lr={o.lr:g}): try {remedy}"
    trial.record.error = {"message": message, "step": step, "traceback": None}
    trial.record.status = "failed"
    if trial.files is not None:
        trial.files.fail(message, step)


def stop_requested(pack: Pack, stop: StopRequest, logging: bool) -> bool:
    """Whether any process was asked to stop; all processes get the same answer at the same step."""
    if pack.setup.process.world_size == 1:
        return bool(stop.signum)
    if pack.setup.device.type == "cpu" or logging:  # elsewhere reading costs a sync
        return bool(pack.flat.stop.item() > 0)
    return False


def interrupt(pack: Pack, stop: StopRequest) -> Interrupted:
    """Mark the trials interrupted; they are saved."""
    for trial in pack.trials:
        trial.record.status = "interrupted"
        if trial.files is not None:
            trial.files.write_record()
            trial.files.close()
    return Interrupted(stop.signum or signal.SIGTERM)


def save(pack: Pack) -> None:
    """Checkpoint every trial of the pack."""
    pack.pull()
    for trial in pack.trials:
        if trial.files is not None:
            trial.files.save_checkpoint()


def finish_epoch(pack: Pack, reporter: Reporter) -> None:
    """Validate where it is due, write the epoch's rows and records, and checkpoint."""
    due = [validation_due(trial) for trial in pack.trials]
    predictions = pack.predict("val") if any(due) else None
    pack.pull()
    sums = pack.step_state.loss_sum_K.tolist()
    pack.end_epoch()
    for k, trial in enumerate(pack.trials):
        state, step = trial.state, trial.state.epoch * pack.steps_per_epoch
        row = {"train_loss": sums[k] / pack.steps_per_epoch}
        if due[k] and predictions is not None:
            val = predictions[k]
            row |= {"val_loss": val.loss, "val_accuracy": val.accuracy}
            if not state.best or val.accuracy > state.best["val_accuracy"]:
                state.best = {"epoch": state.epoch, "val_accuracy": val.accuracy}
        state.last = {"epoch": state.epoch, "step": step, **row}
        update_record(pack, trial, k)
        if trial.files is not None:
            trial.files.log_epoch(step, state.epoch, row)
            if trial.done() or trial.files.epoch_checkpoint_due():
                trial.files.save_checkpoint()
            trial.files.write_record()
        reporter.epoch(trial, row)


def validation_due(trial: Trial) -> bool:
    """Whether the trial, whose epoch has just been trained, is validated after it."""
    epoch, trainer = trial.state.epoch + 1, trial.config.trainer
    return epoch % trainer.validate_every == 0 or epoch >= trainer.epochs


def update_record(pack: Pack, trial: Trial, k: int) -> None:
    """Bring the record up to the trial's state."""
    record, state = trial.record, trial.state
    record.metrics, record.best = dict(state.last), dict(state.best)
    images = state.last.get("step", 0) * pack.step_state.global_batch
    record.cost.update(
        seconds=state.seconds,
        images_per_second=images / state.seconds if state.seconds else None,
        peak_memory_bytes=peak_memory(pack.setup.device),
        pack_size=pack.K,
    )


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: on the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def finish_trials(pack: Pack, finished: list[Trial]) -> None:
    """Test the finished trials, write their results, and mark them completed."""
    assert pack.padding_is_zero(), "padded ranks have moved"
    splits: dict[str, list[Predictions]] = {
        name: pack.predict(name) for name in pack.setup.data.splits if name != "train"
    }
    for k, trial in enumerate(pack.trials):
        if trial not in finished:
            continue
        record = trial.record
        update_record(pack, trial, k)
        for name, predictions in splits.items():
            if name != "val":
                record.metrics[f"{name}_accuracy"] = predictions[k].accuracy
                record.metrics[f"{name}_loss"] = predictions[k].loss
        record.finished = time.time()
        if trial.files is not None:
            columns = {name: predictions[k].fields() for name, predictions in splits.items()}
            tensors = pack.export(k, pack.flat.values_KP)
            trial.files.write_results(columns, tensors, adapter_card(pack.setup, trial))
            trial.files.log_hparams()
            trial.files.write_record("completed")
            trial.files.close()
        record.status = "completed"


def adapter_card(setup: Setup, trial: Trial) -> dict[str, Any]:
    """What ``adapter.json`` says: enough to put the adapter on its base and use it."""
    c = trial.record.config
    height, width = (int(n) for n in setup.data.images.shape[-2:])
    return {
        "schema": trial.record.schema,
        "trial_id": trial.record.trial_id,
        "base": dict(setup.base_weights),
        "model": c["model"],
        "lora": c["lora"],
        "effective_scaling": trial.config.lora.effective_scaling() if c["lora"]["method"] == "lora" else None,
        "decoded_size": height if height == width else None,
        "class_names": list(setup.data.class_names),
    }


def describe(pack: Pack) -> None:
    """Put parameter counts and environment into the records and mark the trials running."""
    for k, trial in enumerate(pack.trials):
        trial.record.parameters = pack.parameter_counts(k)
        trial.record.cost["pack_size"] = pack.K
        if trial.files is not None:
            trial.files.write_record("running")
