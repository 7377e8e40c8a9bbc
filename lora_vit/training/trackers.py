"""Trackers: where a trial's figures go beside its own files."""

import functools
from pathlib import Path
from typing import Any

from lora_vit.records import TrialRecord


class TensorBoard:
    """Event files, made at first use.

    Another tracker is a class with these four methods, and stands in the list ``trackers`` of
    :class:`~lora_vit.training.trial.TrialRun`, which calls each of them for the trials that write a folder.
    """

    def __init__(self, folder: Path, record: TrialRecord):
        self.folder, self.record = folder, record

    @functools.cached_property
    def writer(self) -> Any:
        """Rows after the resumed step are superseded."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=int(self.record.metrics.get("step") or 0) or None)

    def log_step(self, step: int, loss: float, lr: float, images_per_second: float) -> None:
        """Called at logging steps; ``step`` counts from 1, over all epochs."""
        self.writer.add_scalar("train/loss", loss, step)
        self.writer.add_scalar("train/learning_rate", lr, step)
        self.writer.add_scalar("train/images_per_second", images_per_second, step)

    def log_epoch(self, step: int, row: dict[str, float]) -> None:
        """Called after each epoch with its row."""
        if "val_accuracy" in row:
            for name in dict.fromkeys((self.record.config["trainer"]["metric"], "accuracy", "loss")):
                self.writer.add_scalar(f"val/{name}", row[f"val_{name}"], step)
        self.writer.flush()

    def log_hparams(self) -> None:
        """Called at the end of a trial that is completed: what a sweep varies, and the final metric.

        The view shows five columns by itself, the first of the alphabet: short names bring the main ones there.
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
        name = f"val_{c['trainer']['metric']}"
        self.writer.add_hparams(hparams, {f"final/{name}": self.record.metrics[name]}, run_name=".")

    def close(self) -> None:
        """Called when the trial's files are closed."""
        if "writer" in vars(self):
            self.writer.close()
