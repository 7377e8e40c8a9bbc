"""The training loop: packs of trials, epoch by epoch, until each is completed, failed or interrupted."""

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from lora_vit.config.names import METHODS
from lora_vit.errors import Interrupted
from lora_vit.metrics import figures
from lora_vit.stopping import StopRequest, repeating
from lora_vit.terminal import Every, Progress, make_console
from lora_vit.training.pack import Pack
from lora_vit.training.trial import ClaimLost, Setup, TrialRun, epoch_figures


class Reporter:
    """Reports to the user how training goes. The methods do nothing here."""

    def started(self, pack: Pack) -> None: ...  # before the first step
    def advance(self, pack: Pack) -> None: ...  # after every step
    def step(self, pack: Pack, losses: list[float], rates: list[float], images_per_second: float) -> None: ...  # logged
    def epoch(self, trial: TrialRun, row: dict[str, float]) -> None: ...  # after each epoch of each trial
    def left(self, trial: TrialRun) -> None: ...  # completed or failed


class RunReporter(Reporter):
    """Shows a single run: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = make_console()
        self._progress = Progress("nothing", 0, quiet=True)  # until the first pack is there

    def started(self, pack: Pack) -> None:
        """Print the data, the place and the table of parameters, and start the bar."""
        trial, setup, steps = pack.trials[0], pack.setup, pack.steps_per_epoch
        where = "{device}, {precision}, {world_size} process(es)".format(**setup.environment)
        self.console.print(setup.data.line(setup.transform.image_size, trial.config.trainer.metric), markup=False)
        self.console.print(f"trial {trial.name} on {where}")
        n = trial.record.parameters
        for of in ("adapter", "head", "trainable", "total"):
            self.console.print(f"{n[of]:13,}  {n[of] / n['total']:8.3%}  {of} parameters")
        if (lora := trial.config.lora).adapts:
            settings = f"{METHODS[lora.method]} rank {lora.rank}, alpha {lora.alpha:g}"
            self.console.print(f"{settings}: effective scaling {lora.effective_scaling():g}")
        total, done = trial.config.trainer.epochs * steps, pack.step_of(trial)
        self._progress = Progress("training", total, unit="steps", done=done)
        self.console = self._progress.console  # lines go above the bar

    def advance(self, pack: Pack) -> None:
        self._progress.advance(1)

    def step(self, pack: Pack, losses: list[float], rates: list[float], images_per_second: float) -> None:
        self._progress.figures = f"loss {losses[0]:.4f}  lr {rates[0]:.2e}  {images_per_second:,.0f} images/s"

    def epoch(self, trial: TrialRun, row: dict[str, float]) -> None:
        self.console.print(f"epoch {trial.state.epoch}/{trial.config.trainer.epochs}  {epoch_figures(trial, row)}")

    def close(self) -> None:
        self._progress.close()


def train_trials(trials: list[TrialRun], setup: Setup, reporter: Reporter, stop: StopRequest) -> None:
    """Train trials in one pack until each is completed or failed. Raises Interrupted, after the trials are saved."""

    def beat() -> None:
        for trial in trials:
            trial.beat()

    staying = trials
    reset_peak_memory(setup.device)
    pack: Pack | None
    pack = Pack(trials, setup)
    for k, trial in enumerate(trials):
        trial.record.parameters = pack.parameter_counts(k)
        trial.record.cost |= {"pack_size": pack.K, **setup.cost}
        trial.write_record()
    reporter.started(pack)
    with repeating(beat, every=30.0), computing(setup.device, trials[0].config.trainer.deterministic):
        try:
            while pack is not None:
                if ended := train_epoch(pack, reporter, stop) or complete(pack):
                    for trial in ended:
                        reporter.left(trial)
                    staying = [trial for trial in staying if trial not in ended]
                    pack.pull()
                    pack = None  # before the next one takes its memory
                    pack = Pack(staying, setup) if staying else None
                if pack is not None and stop_requested(pack, stop, logging=True):
                    raise Interrupted(stop.signum or signal.SIGTERM)
        except (Interrupted, SystemExit, KeyboardInterrupt):  # of somebody's signal handler, of a second Ctrl-C
            # Saved, unless ``pack`` (None between two) is in the midst of an update.
            to_save = staying if pack is None else [] if pack.updating else pack.pull()
            for trial in staying:
                try:
                    if trial in to_save:
                        trial.save()
                    if trial.record.status == "running":
                        trial.interrupt()
                except ClaimLost:  # another process trains it
                    trial.close()
            raise


def train_epoch(pack: Pack, reporter: Reporter, stop: StopRequest) -> list[TrialRun]:
    """Train the rest of an epoch; returns the trials that failed, at whose step it ends. Raises Interrupted."""
    if any(trial.done() for trial in pack.trials):  # stopped between its last epoch and its end
        return []
    saving, first = Every(pack.trials[0].config.trainer.checkpoint_every), pack.trials[0].state
    charged, logged_step, logged_seconds = time.perf_counter(), pack.step_in_epoch, first.seconds
    for lr_K1 in pack.learning_rates():
        losses_K = pack.step(lr_K1, bool(stop.signum))
        reporter.advance(pack)
        last = pack.step_in_epoch == pack.steps_per_epoch
        logging = last or pack.step_in_epoch % pack.trials[0].config.trainer.log_every == 0
        stopping = stop_requested(pack, stop, logging)
        if logging or stopping:
            charged = charge(pack, charged)
            failed = fail_bad(pack, last)
            if logging:
                losses, rates = losses_K.tolist(), lr_K1[:, 0].tolist()
                images = (pack.step_in_epoch - logged_step) * pack.global_batch
                speed = images / max(first.seconds - logged_seconds, 1e-9)  # of all trials together
                logged_step, logged_seconds = pack.step_in_epoch, first.seconds
                for k, trial in enumerate(pack.trials):
                    if trial not in failed:
                        trial.log_step(pack.step_of(trial), trial.state.epoch, losses[k], rates[k], speed)
                reporter.step(pack, losses, rates, speed)
            if failed:
                return failed
        if stopping and not last:
            raise Interrupted(stop.signum or signal.SIGTERM)
        if not last and saving.due():
            charged = charge(pack, charged)
            for trial in pack.pull():
                trial.save()
    charge(pack, charged)
    finish_epoch(pack, reporter)
    return []


def charge(pack: Pack, since: float) -> float:
    """Charge the time since then to the pack's trials, in equal shares; returns the time now, in seconds."""
    now = time.perf_counter()
    for trial in pack.trials:
        trial.state.seconds += (now - since) / pack.K
    return now


def stop_requested(pack: Pack, stop: StopRequest, logging: bool) -> bool:
    """Whether any process was asked to stop; all processes get the same answer at the same step."""
    if pack.setup.process.world_size == 1:
        return bool(stop.signum)
    waits = pack.setup.device.type == "cpu" or logging  # for this step, else for the one before
    return bool((pack.flat.stop if waits else pack.flat.earlier_stop()).item() > 0)


def fail_bad(pack: Pack, last: bool) -> list[TrialRun]:
    """Fail the trials with a loss or gradient that was not finite, and say what to try; returns them."""
    # At an epoch's last step the parameters count as well: no next loss will tell.
    finite = torch.isfinite(pack.flat.values_KP).all(1).tolist() if last else [True] * pack.K
    failed = []
    for trial, bad_step, is_finite in zip(pack.trials, pack.first_bad_step_K.tolist(), finite, strict=True):
        if bad_step < 0 and is_finite:
            continue
        step = bad_step + 1 or pack.step_of(trial)
        what = "a parameter" if bad_step < 0 else "the loss or its gradient"
        o = trial.config.optimizer
        remedy = "a smaller optimizer.lr" + ("" if o.clip_norm is not None else " or optimizer.clip_norm=1")
        if pack.loss_scale is not None and bad_step >= 0:
            what = "in fp16, whatever the loss scale, " + what
            remedy = "trainer.precision=fp32 (bf16 where the device has it), or " + remedy
        trial.fail(f"{what} is not finite at step {step} (optimizer.lr={o.lr:g}): try {remedy}", step)
        failed.append(trial)
    return failed


def finish_epoch(pack: Pack, reporter: Reporter) -> None:
    """Validate where it is due, write the epoch's rows and records, and checkpoint."""
    trainer, ends = pack.trials[0].config.trainer, [trial.state.epoch + 1 for trial in pack.trials]
    validated = [end % trainer.validate_every == 0 or end >= trainer.epochs for end in ends]
    try:
        predictions = pack.predict("val") if any(validated) else []
    except Exception:  # memory may have run out: what was trained is kept
        for trial in pack.pull():
            trial.save()
        raise
    sums = pack.loss_sum_K.tolist()
    pack.end_epoch()
    if due := [trial for trial in pack.trials if trial.epoch_checkpoint_due()]:
        pack.pull()
    for k, trial in enumerate(pack.trials):
        state, record, step = trial.state, trial.record, pack.step_of(trial)
        row = {"train_loss": sums[k] / pack.steps_per_epoch}
        if validated[k]:
            row |= figures("val", predictions[k])
            if row[judged_by := f"val_{trainer.metric}"] > state.best.get(judged_by, -1.0):
                state.best = {"epoch": state.epoch, judged_by: row[judged_by]}
        state.last = {"epoch": state.epoch, "step": step, **row}
        record.metrics, record.best = dict(state.last), dict(state.best)
        speed = step * pack.global_batch / state.seconds if state.seconds else None
        peak = max(peak_memory(pack.setup.device), record.cost.get("peak_memory_bytes") or 0)
        record.cost.update(seconds=state.seconds, images_per_second=speed, peak_memory_bytes=peak, pack_size=pack.K)
        trial.log_epoch(step, state.epoch, row)
        trial.write_record()
        if trial in due:
            trial.save()
        reporter.epoch(trial, row)


@contextlib.contextmanager
def computing(device: torch.device, deterministic: bool) -> Iterator[None]:
    """On a GPU, compute fp32 in fp32, not TF32, and ``deterministic``: the same bits each time; torch is restored."""
    with contextlib.ExitStack() as as_before:
        if device.type == "cuda":
            backends: Any = torch.backends
            told: Any = [(place, "fp32_precision", "ieee") for place in (backends.cuda.matmul, backends.cudnn.conv)]
            if deterministic:  # else attention's backward adds in the order in which its blocks happen to end
                # it would be a pass over each new tensor
                told.append((torch.utils.deterministic, "fill_uninitialized_memory", False))
                mode = torch.get_deterministic_debug_mode()
                as_before.callback(torch.use_deterministic_algorithms, mode > 0, warn_only=mode == 1)
                torch.use_deterministic_algorithms(True)  # also of compiled models
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch before 2.10 asks for
            for place, name, value in told:
                as_before.callback(setattr, place, name, getattr(place, name))
                setattr(place, name, value)
        yield


def reset_peak_memory(device: torch.device) -> None:
    """Have :func:`peak_memory` count from here, where the system can; elsewhere it is that of the process's life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held since the reset: on the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):  # ``ru_maxrss`` would also count the process that started this
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # else in KiB


def complete(pack: Pack) -> list[TrialRun]:
    """Test the trials whose epochs are all trained, write their results, and mark them completed; returns them."""
    if not (finished := [(k, trial) for k, trial in enumerate(pack.trials) if trial.done()]):
        return []
    splits = {name: pack.predict(name) for name in pack.setup.data.splits if name != "train"}
    for k, trial in finished:
        own = {name: predictions[k] for name, predictions in splits.items()}
        for name in [name for name in own if f"{name}_accuracy" not in trial.record.metrics]:  # val too of what was cut
            trial.record.metrics |= figures(name, own[name])
        trial.write_results(own, pack.export(k, pack.flat.values_KP), pack.setup)
        trial.complete()
    return [trial for _, trial in finished]
