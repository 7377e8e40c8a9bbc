"""The files of one trial while it trains: record, metric rows, TensorBoard, checkpoint, predictions, adapter."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_vit import files, records
from lora_vit.files import JsonLines
from lora_vit.records import TrialRecord
from lora_vit.training.checkpoint import TrialState, save_checkpoint
from lora_vit.training.evaluate import Predictions

HEARTBEAT_EVERY = 30.0
"""Seconds between signs of life of a running trial."""

EPOCH_CHECKPOINT_EVERY = 5.0
"""Seconds between checkpoints at the ends of epochs, where epochs are shorter than writing them is worth."""

ROWS_ASK_EVERY = 10.0
"""Seconds after which a training step's row asks whether the trial is still ours."""


class ClaimLost(Exception):  # noqa: N818  (not an error)
    """Another process has taken over the trial with this id: this process writes no more."""


class TrialFiles:
    """Writes one trial's folder (outputs/README.md lists the files). Only rank 0 has one."""

    def __init__(
        self,
        folder: Path,
        record: TrialRecord,
        state: TrialState,
        tensorboard: Path | None = None,
        mine: Callable[[], bool] | None = None,
    ):
        """Open the folder's logs, cut back to what the state knows of.

        Event files go to ``tensorboard`` (``folder/tensorboard`` by default). ``mine``: whether the trial is still this
        process's; methods that write ask first, and raise ClaimLost if it is not.
        """
        self.folder, self.record, self.state = folder, record, state
        self._mine, self._asked = mine, -math.inf
        self._tensorboard_folder = tensorboard or folder / "tensorboard"
        self._tensorboard: Any = None
        self._metrics = JsonLines(folder / records.METRICS, state.metrics_bytes)
        self._timing = JsonLines(folder / records.TIMING)
        self._saved = -math.inf

    def _ask(self, every: float = 0.0) -> None:
        """Raise ClaimLost if the trial is another process's now; ``every``: unless asked within so many seconds."""
        now = time.monotonic()
        if self._mine is None or now - self._asked < every:
            return
        if not self._mine():
            raise ClaimLost(self.record.trial_id)
        self._asked = now

    def say(self, text: str) -> None:
        """A line of ``train.log``."""
        with (self.folder / records.LOG).open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    @property
    def board(self) -> Any:
        """The TensorBoard writer, opened at first use; rows after the resumed step are superseded."""
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            step = int(self.record.metrics.get("step") or 0)
            self._tensorboard = SummaryWriter(str(self._tensorboard_folder), purge_step=step or None)
        return self._tensorboard

    def write_record(self) -> None:
        """Replace ``record.json``."""
        self._ask()
        records.write_record(self.folder, self.record)

    def log_step(self, step: int, epoch: int, loss: float, lr: float, images_per_second: float) -> None:
        """A training step's row; ``step`` counts from 1, ``epoch`` finished epochs."""
        self._ask(ROWS_ASK_EVERY)
        self._metrics.write({"kind": "step", "step": step, "epoch": epoch, "loss": loss, "lr": lr})
        self._timing.write({"step": step, "time": time.time(), "images_per_second": images_per_second})
        self.board.add_scalar("train/loss", loss, step)
        self.board.add_scalar("train/learning_rate", lr, step)
        self.board.add_scalar("train/images_per_second", images_per_second, step)

    def log_epoch(self, step: int, epoch: int, row: dict[str, float]) -> None:
        """An epoch's row: train_loss, and where the epoch was validated val_loss and val_accuracy."""
        self._ask()
        self._metrics.write({"kind": "epoch", "step": step, "epoch": epoch, **row})
        if "val_accuracy" in row:
            self.board.add_scalar("val/accuracy", row["val_accuracy"], step)
            self.board.add_scalar("val/loss", row["val_loss"], step)
        self.board.flush()
        self.say(f"epoch {epoch}  {epoch_figures(row)}")

    def save_checkpoint(self) -> None:
        """Checkpoint the state, which remembers the length of the metric rows."""
        self._ask()
        self.state.metrics_bytes = self._metrics.length()
        save_checkpoint(self.folder, self.record.trial_id, self.state)
        self._saved = time.monotonic()

    def epoch_checkpoint_due(self) -> bool:
        """Whether the end of an epoch is worth a checkpoint; the first always is."""
        every = min(EPOCH_CHECKPOINT_EVERY, self.record.config["trainer"]["checkpoint_every"])
        return time.monotonic() - self._saved >= every

    def write_results(self, splits: dict[str, Predictions], tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
        """Write ``predictions.npz``, ``adapter.safetensors`` and ``adapter.json``."""
        self._ask()
        records.write_predictions(self.folder, {name: split.fields() for name, split in splits.items()})
        write_adapter(self.folder, tensors, card)
        self.record.cost["adapter_bytes"] = (self.folder / "adapter.safetensors").stat().st_size

    def log_hparams(self) -> None:
        """Fill TensorBoard's hparams view: what a sweep varies, and the final metric.

        The view shows five columns by itself, the first ones of the alphabet: short names bring the main ones there.
        """
        c = self.record.config
        hparams = {
            **{key: c["lora"][key] or 0 for key in ("alpha", "dropout", "rank")},
            "lr": c["optimizer"]["lr"],
            "method": c["lora"]["method"],
            "seed": c["seed"],
            "targets": " ".join(c["lora"]["targets"] or []),
            "weight_decay": c["optimizer"]["weight_decay"],
        }
        metric = {"final/val_accuracy": self.record.metrics["val_accuracy"]}
        self.board.add_hparams(hparams, metric, run_name=".")

    def close(self) -> None:
        """Close the logs."""
        self._metrics.close()
        self._timing.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def epoch_figures(row: dict[str, float]) -> str:
    """An epoch's row as text."""
    text = f"train loss {row['train_loss']:.4f}"
    if "val_accuracy" in row:
        text += f"  val loss {row['val_loss']:.4f}  val accuracy {row['val_accuracy']:.2%}"
    return text


def write_adapter(folder: Path, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Replace ``adapter.safetensors`` and ``adapter.json``.

    The file's one metadata entry is a sorted JSON string: with several, safetensors orders them differently in
    every process.
    """
    from safetensors.torch import save

    metadata = {"lora_vit": json.dumps(card, sort_keys=True)}
    data = save({name: tensors[name].contiguous() for name in sorted(tensors)}, metadata)
    with files.replacing(folder / "adapter.safetensors") as file:
        file.write(data)
    files.write_json(folder / "adapter.json", card)
