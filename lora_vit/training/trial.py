"""One trial from start or resume to its end, and its folder (outputs/README.md lists the files)."""

import contextlib
import io
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_vit import records
from lora_vit.config import TrialConfig, ids, to_dict, trial_id
from lora_vit.data.augment import Transform
from lora_vit.data.dataset import ImageData
from lora_vit.data.preprocessing import Preprocessing
from lora_vit.data.stream import Samples
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError, one_line
from lora_vit.files import NO_LOCKS, locked, replacing, write_json, write_row
from lora_vit.lora.adapter import Adapter, write_adapter
from lora_vit.metrics import METRICS, Predictions
from lora_vit.models.vit import PackedViT
from lora_vit.records import TrialRecord
from lora_vit.training.trackers import Tracked

ALL = 1 << 62  # images of a pass that takes its whole batch
EPOCH_CHECKPOINT_EVERY = 5.0  # seconds between checkpoints at the ends of epochs that are shorter than that
OWN_FILES = (  # what a trial writes, beside its folder ``tensorboard``
    *(records.RECORD, records.METRICS, records.TIMING, records.LOG, records.PREDICTIONS, records.CHECKPOINT),
    *("adapter.safetensors", "adapter.json"),
    *(f".hydra/{name}.yaml" for name in ("config", "overrides", "hydra")),
)


class ClaimLost(Exception):  # noqa: N818  (not an error)
    """Another process has taken over the trial with this id: this process writes no more."""


@dataclass
class Setup:
    """What all trials of a pack share: data, device, process, and what builds their model."""

    build_model: Callable[[list[TrialConfig]], PackedViT]
    samples: Samples
    transform: Transform
    device: torch.device
    process: Process
    environment: dict[str, object]  # for the record
    base: dict[str, Any]  # for the adapter's card
    most_evaluated: int = 256  # images of one evaluation step, times trials; halved when memory runs out
    most_trained: int = ALL  # likewise of a pass of a training step, with trainer.micro_batch=auto
    cost: dict[str, Any] = field(default_factory=dict)  # of what they share, for the record
    of_probes: "Setup | None" = None  # the same with features for images, once a probe has asked for them

    @property
    def data(self) -> ImageData:
        return self.samples.data


@dataclass
class TrialState:
    """Where a trial stands; every draw is keyed by it. Tensors are on the CPU, unpadded, without a trial axis."""

    epoch: int = 0  # finished epochs
    step_in_epoch: int = 0
    updates: int = 0  # optimizer updates
    loss_sum: float = 0.0  # of this epoch's steps so far
    metrics_bytes: int = 0  # length of metrics.jsonl
    seconds: float = 0.0  # trained so far
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)  # metrics of the last finished epoch
    values: dict[str, Tensor] = field(default_factory=dict)  # empty: not started
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    loss_scale: float = 2.0**16  # of fp16, as is the next (training/optim.py)
    good_steps: int = 0  # since the scale changed
    micro_batch: int = 0  # images that memory had room for at once, where it had not for all; 0: it had


def save_checkpoint(folder: Path, trial_id: str, state: TrialState) -> None:
    """Replace the folder's checkpoint. Raises OSError (disk full, unwritable) and leaves the last good one."""
    buffer = io.BytesIO()
    torch.save({"trial_id": trial_id, **vars(state)}, buffer)
    with replacing(folder / records.CHECKPOINT) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(folder: Path, trial_id: str) -> TrialState:
    """The folder's checkpoint, or a fresh state. Raises ConfigError for a damaged file or another trial's."""
    if not (path := folder / records.CHECKPOINT).exists():
        return TrialState()
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        owner = values.pop("trial_id")
        state = TrialState(**values)
    except Exception as error:
        raise ConfigError(f"{path} is damaged ({one_line(error)}): remove it, or give trainer.resume=restart") from None
    if owner != trial_id:
        raise ConfigError(f"{path} belongs to trial {owner}, not to {trial_id}")
    return state


class TrialRun:
    """A trial: what it is, where it stands, and the folder that it writes; a rank other than 0 has none.

    Methods that write ask first whether the trial is still this process's, and raise ClaimLost if it is not.
    """

    def __init__(self, config: TrialConfig, record: TrialRecord | None = None, state: TrialState | None = None,
                 folder: Path | None = None, tensorboard: Path | None = None,
                 mine: Callable[[], bool] = lambda: True):  # fmt: skip
        """Open the folder's logs, cut back to what the state knows of. Without record and state the trial is new."""
        self.config, self.state, self.folder = config, state or TrialState(), folder
        self.record = record or TrialRecord(*ids(config), "running", to_dict(config), started=time.time())
        self._mine, self._asked, self._saved = mine, -math.inf, -math.inf
        if folder is not None:
            step = int(self.state.last.get("step", 0)) + self.state.step_in_epoch
            self._tracked = Tracked(self.record, folder, tensorboard, step)
            self._metrics, self._timing = ((folder / n).open("ab") for n in (records.METRICS, records.TIMING))
            self._metrics.truncate(self.state.metrics_bytes)

    @classmethod
    def open(cls, config: TrialConfig, folder: Path, setup: Setup, hydra_files: dict[str, str],
             tensorboard: Path | None = None, restart: bool = False,
             mine: Callable[[], bool] = lambda: True) -> "TrialRun":  # fmt: skip
        """The trial in its folder, ready to train; no other process may use the folder.

        It starts from scratch in a folder without a record and where it failed at a step; else it resumes. ``restart``
        removes what it left; one that is completed must. ``hydra_files``: name to text; ``tensorboard``: where event
        files go, if not below. Raises ConfigError where folder, data or checkpoint are not this trial's, ClaimLost.
        """
        if (there := records.state_of(folder, config)).problem:
            raise ConfigError(there.problem)
        if not mine():
            raise ClaimLost(trial_id(config))
        for path in (folder / name for name in OWN_FILES):
            for temporary in path.parent.glob(f".{path.name}.*"):  # of a process that was killed while it replaced it
                temporary.unlink(missing_ok=True)
        record, state = there.record, None
        if record is None or restart or (record.error or {}).get("step") is not None:
            for name in OWN_FILES:
                (folder / name).unlink(missing_ok=True)
            for board in filter(None, (folder / "tensorboard", tensorboard)):
                if board.is_dir():
                    shutil.rmtree(board)
            record = None
        elif there.status == "completed":
            raise ValueError(f"{folder}: the trial is completed")  # its checkpoint is gone
        else:
            precisions = record.environment.get("precision"), setup.environment.get("precision")
            for what, was, here in (
                ("other splits (fingerprint", record.data.get("fingerprint"), setup.data.fingerprint),
                ("another precision (trainer.precision=auto is", *precisions),
            ):
                if was not in (None, here):
                    remedy = "resume it where and with what it was started, or give trainer.resume=restart"
                    raise ConfigError(f"{folder} was started with {what} {was} there, {here} here): {remedy}")
            state = load_checkpoint(folder, record.trial_id)
            record.config, record.error, record.finished = to_dict(config), None, None
            record.metrics, record.best, record.status = dict(state.last), dict(state.best), "running"
        trial = cls(config, record, state, folder, tensorboard, mine)
        trial.record.environment, trial.record.data = setup.environment, setup.data.card()
        for name, text in hydra_files.items():
            (folder / ".hydra").mkdir(exist_ok=True)
            with replacing(folder / ".hydra" / name) as file:
                file.write(text.encode())
        return trial

    @property
    def name(self) -> str:
        return self.record.trial_id

    def done(self) -> bool:
        return self.state.epoch >= self.config.trainer.epochs

    def beat(self) -> None:
        """Give a sign of life, the time of ``record.json``; another thread may call this."""
        if self.folder is not None and self.record.status == "running":
            with contextlib.suppress(OSError):  # a disk that cannot be written ends the training itself
                os.utime(self.folder / records.RECORD)

    def _ask(self, every: float = 0.0) -> Path | None:
        """The folder, if any. Raises ClaimLost if another process has the trial; asks once in so many seconds."""
        if time.monotonic() - self._asked >= every:
            if not self._mine():
                raise ClaimLost(self.name)
            self._asked = time.monotonic()
        return self.folder

    def write_record(self) -> None:
        if folder := self._ask():
            if self.record.status != "running":
                self._tracked.finish(self.record.status)
            records.write_record(folder, self.record)

    def log_step(self, step: int, epoch: int, loss: float, lr: float, images_per_second: float) -> None:
        """Write a row; ``step`` counts from 1, ``epoch`` finished epochs."""
        if self._ask(every=10.0):
            row = {"kind": "step", "step": step, "epoch": epoch, "loss": loss, "lr": lr}
            write_row(self._metrics, row)
            write_row(self._timing, {"step": step, "time": time.time(), "images_per_second": images_per_second})
            self._tracked.row({**row, "images_per_second": images_per_second})

    def log_epoch(self, step: int, epoch: int, row: dict[str, float]) -> None:
        """Write an epoch's row: train_loss, and where it was validated the figures of val."""
        if self._ask():
            write_row(self._metrics, {"kind": "epoch", "step": step, "epoch": epoch, **row})
            self._tracked.row({"step": step, **row})
            self.say(f"epoch {epoch}  {epoch_figures(self, row)}")

    def save(self) -> None:
        """Write the checkpoint. Raises OSError (disk full, unwritable) and leaves the last good one."""
        if folder := self._ask():
            os.fsync(self._metrics.fileno())
            self.state.metrics_bytes = os.fstat(self._metrics.fileno()).st_size
            save_checkpoint(folder, self.name, self.state)
            self._saved = time.monotonic()

    def epoch_checkpoint_due(self) -> bool:
        """Whether the end of an epoch is worth a checkpoint; the first and the last always are."""
        every = min(EPOCH_CHECKPOINT_EVERY, self.config.trainer.checkpoint_every)
        return self.folder is not None and (self.done() or time.monotonic() - self._saved >= every)

    def write_results(self, splits: dict[str, Predictions], tensors: dict[str, Tensor], setup: Setup) -> None:
        """Write the predictions, and the adapter with a card that says enough to put it on its base and use it."""
        if not (folder := self._ask()):
            return
        arrays: Any = {f"{split}.{name}": values for split, own in splits.items() for name, values in vars(own).items()
                       if name != "loss"}  # fmt: skip
        with replacing(folder / records.PREDICTIONS) as file:  # no clock in it: equal predictions give equal bytes
            np.savez(file, **arrays)
        place = folder.parent if (folder.parent / records.PLAN).is_file() else folder  # a sweep's trials share them
        names = place / f"names-{setup.data.fingerprint}.json"
        if setup.data.root is not None and not names.exists():
            write_json(names, {"root": str(setup.data.root), "names": list(setup.data.names)})
        inputs: Any = (setup.base[key] for key in ("image_size", "mean", "std", "interpolation"))
        card: dict[str, Any] = {
            "schema": self.record.schema,
            "trial_id": self.name,
            "base": setup.base,
            "data": self.record.data,
            "lora": self.record.config["lora"],
            "effective_scaling": self.config.lora.effective_scaling() if self.config.lora.adapts else None,
            "preprocessing": Preprocessing(setup.data.decoding, *inputs).to_dict(),
            "class_names": setup.data.class_names,
        }
        write_adapter(folder, Adapter(tensors, card))
        self.record.cost["adapter_bytes"] = (folder / "adapter.safetensors").stat().st_size

    def say(self, text: str) -> None:
        """A line of ``train.log``."""
        if self.folder is not None:
            with (self.folder / records.LOG).open("a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def close(self) -> None:
        """Close the logs; the record stays as it was written last."""
        if self.folder is not None:
            self._metrics.close()
            self._timing.close()
            self._tracked.finish("running")  # for another process, if it has not ended here

    def complete(self) -> None:
        """Record that the trial is completed; its results are written, so that its checkpoint goes."""
        self.record.status, self.record.finished = "completed", time.time()
        self.write_record()
        self.say(self.record.status)
        if self.folder is not None:
            (self.folder / records.CHECKPOINT).unlink(missing_ok=True)
        self.close()

    def interrupt(self) -> None:
        """Record that the trial was asked to stop; it resumes from its checkpoint."""
        self.record.status = "interrupted"
        self._end(self.record.status)

    def fail(self, message: str, step: int | None = None, error: BaseException | None = None) -> None:
        """Record that the trial failed, with the reason; ``step``: the training step that is to blame."""
        trace = "".join(traceback.format_exception(error)) if error is not None else None
        self.record.error = {"message": message, "step": step, "traceback": trace}
        self.record.status, self.record.finished = "failed", time.time()
        self._end(trace or message)

    def _end(self, said: str) -> None:
        try:
            with contextlib.suppress(OSError):  # a full disk is often the reason itself
                self.write_record()
                self.say(said)
        finally:
            self.close()


def epoch_figures(trial: TrialRun, row: dict[str, float]) -> str:
    """An epoch's row as text."""
    text = f"train loss {row['train_loss']:.4f}"
    if "val_accuracy" in row:
        text += f"  val loss {row['val_loss']:.4f}"
        for name in dict.fromkeys((trial.config.trainer.metric, "accuracy")):
            text += f"  val {METRICS[name].title} {row[f'val_{name}']:.2%}"
    return text


def lock_folder(folder: Path, held: contextlib.ExitStack) -> None:
    """Add to ``held`` a trial's folder, made if need be. Raises ConfigError if another process holds it or none can."""
    try:
        held.enter_context(locked(folder / ".lock", wait=False))
    except BlockingIOError:
        raise ConfigError(f"{folder}: another process is training there, wait for it or stop it") from None
    except OSError as error:
        remedy = "mount its file system with locks (Lustre: -o flock), or " * (error.errno in NO_LOCKS)
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): {remedy}give another folder") from None
