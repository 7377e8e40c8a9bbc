"""What the user sees of a sweep: one bar and a table refreshed in place, or plain lines when piped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lora_vit.records import State
from lora_vit.sweep.plan import Job
from lora_vit.terminal import PLAIN_EVERY, Every, make_console

RUNNING_ROWS, BEST_ROWS = 12, 5


@dataclass
class Row:
    """Where a trial stands."""

    job: Job
    status: str = "waiting"
    epoch: int = 0
    val_accuracy: float | None = None
    message: str = ""


class View:
    """Takes the events of all workers. ``emit`` is what they call."""

    def __init__(self, jobs: Sequence[Job]):
        self.console = make_console()
        self.rows = {job.trial_id: Row(job) for job in jobs}
        self.total = sum(job.config.trainer.epochs for job in jobs)
        self.done = 0.0  # trial-epochs
        self.trained = 0.0  # of these, by this command
        self.stop_asked = False
        self._began = time.monotonic()
        self._plain, self._redraw = Every(PLAIN_EVERY), Every(0.5)
        self.live: Live | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
            )
            self.task = self.bar.add_task("sweep", total=self.total, left="")
            self.live = Live(self._picture(), console=self.console, auto_refresh=False, transient=True)
            self.live.start()

    def emit(self, kind: str, **fields: object) -> None:
        """Take an event: pack, advance, epoch, left, ended, say or stop."""
        getattr(self, f"_on_{kind}")(**fields)
        if self.live is not None:
            if kind != "advance" or self._redraw.due():
                self.live.update(self._picture(), refresh=True)
        elif self._plain.due():
            self.console.print(self._progress_line())

    def close(self) -> None:
        """Take bar and table away."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _on_pack(self, ids: list[str]) -> None:
        for trial_id in ids:
            self.rows[trial_id].status = "running"
        if self.live is None and len(ids) > 1:
            self.console.print(f"training {len(ids)} trials together")

    def _on_advance(self, epochs: float) -> None:
        self.trained += epochs
        self.done = min(self.done + epochs, float(self.total))

    def _on_epoch(self, id: str, epoch: int, val_accuracy: float | None) -> None:
        row = self.rows[id]
        if row.epoch == 0 and epoch > 1:  # went on from a checkpoint
            self.done = min(self.done + epoch - 1, float(self.total))
        row.epoch = epoch
        row.val_accuracy = row.val_accuracy if val_accuracy is None else val_accuracy

    def _on_left(self, id: str, status: str, val_accuracy: float | None, message: str) -> None:
        row = self.rows[id]
        if row.status == status == "refused":
            return  # by another worker too
        row.status, row.message = status, message
        row.val_accuracy = val_accuracy if val_accuracy is not None else row.val_accuracy
        if status != "completed":
            self.done = min(self.done + row.job.config.trainer.epochs - row.epoch, float(self.total))
        if self.live is None:
            self.console.print(self._trial_line(row), markup=False)

    def _on_ended(self, id: str, state: State) -> None:
        row, record = self.rows[id], state.record
        if row.status != state.status:  # finished earlier, or by another command
            epochs = row.job.config.trainer.epochs
            self.done = min(self.done + epochs - row.epoch, float(self.total))
            row.status, row.message = state.status, state.problem
            row.epoch = int(record.metrics.get("epoch") or 0) if record is not None else 0
            row.val_accuracy = record.metrics.get("val_accuracy") if record is not None else None

    def _on_say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def _on_stop(self) -> None:
        self.stop_asked = True

    def is_ended(self, job: Job) -> bool:
        """Whether the trial needs no more training."""
        return self.rows[job.trial_id].status not in ("waiting", "running")

    def ended(self) -> int:
        """Trials that need no more training."""
        return sum(self.is_ended(row.job) for row in self.rows.values())

    def _trial_line(self, row: Row) -> str:
        end = f"val accuracy {row.val_accuracy:.2%}" if row.val_accuracy is not None else ""
        text = row.message if row.status != "completed" else end
        return f"[{self.ended()}/{len(self.rows)}] {row.job.trial_id} {row.job.label}  {row.status}  {text}"

    def _left(self) -> str:
        """How long the rest takes, at the average speed of what this command has trained."""
        if not self.trained:
            return ""
        seconds = (self.total - self.done) * (time.monotonic() - self._began) / self.trained
        return f"about {timedelta(seconds=round(seconds))} left"

    def _progress_line(self) -> str:
        parts = (f"{self.done:.0f}/{self.total} epochs", f"{self.ended()}/{len(self.rows)} trials ended", self._left())
        return ", ".join(part for part in parts if part)

    def _picture(self) -> Group:
        ended = f"sweep  {self.ended()}/{len(self.rows)} trials"
        self.bar.update(self.task, completed=self.done, description=ended, left=self._left())
        columns = ("trial", "setting", "rank", "alpha", "dropout", "lr", "seed", "epoch", "val accuracy", "status")
        table = Table(*columns, box=None, pad_edge=False)
        running = [row for row in self.rows.values() if row.status == "running"]
        best = sorted(
            (row for row in self.rows.values() if row.status == "completed" and row.val_accuracy is not None),
            key=lambda row: -(row.val_accuracy or 0.0),
        )
        for row in [*running[:RUNNING_ROWS], *best[:BEST_ROWS]]:
            c = row.job.config
            accuracy = f"{row.val_accuracy:.2%}" if row.val_accuracy is not None else ""
            values = (c.lora.rank, c.lora.alpha, c.lora.dropout, c.optimizer.lr)
            table.add_row(
                row.job.trial_id,
                c.lora.method if c.lora.method != "lora" else " ".join(c.lora.targets or []),
                *("-" if v is None else f"{v:g}" for v in values),
                str(c.seed),
                f"{row.epoch}/{c.trainer.epochs}",
                accuracy,
                row.status,
            )
        return Group(table, self.bar)
