"""The view of a sweep: one bar and a table refreshed in place, or plain lines when piped.

It reads what any process can read: the plan, the claims and the records.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lora_vit.records import State
from lora_vit.sweep.claims import ENDED, HELD, Claims
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Trial
from lora_vit.terminal import PLAIN_EVERY, Every, make_console

RUNNING_ROWS, BEST_ROWS = 12, 5


@dataclass
class Row:
    """How a trial stands; ``epochs`` are trained."""

    trial: Trial
    status: str = "waiting"
    epochs: float = 0.0
    val_accuracy: float | None = None
    message: str = ""

    @property
    def ended(self) -> bool:
        """Whether the trial needs no more training."""
        return self.status not in ("waiting", "running")


def _ended_row(row: Row, state: State) -> Row:
    row.status, row.message, record = state.status, state.problem, state.record
    if record is not None:
        row.epochs, row.val_accuracy = float(record.metrics.get("epoch") or 0), record.metrics.get("val_accuracy")
        row.message = str((record.error or {}).get("message") or "")
    return row


class View:
    """Watches the planned trials of a sweep."""

    def __init__(self, sweep: Sweep, ended: Iterable[tuple[Trial, State]]):
        """``ended``: trials that the command asks for as well, and that need no training."""
        self.sweep, self.claims = sweep, Claims(sweep.folder)
        self.console = make_console()
        self.rows: dict[str, Row] = {trial.trial_id: _ended_row(Row(trial), state) for trial, state in ended}
        self._began, self._done_before = time.monotonic(), -1.0
        self._plain = Every(PLAIN_EVERY)
        self._live: Live | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("sweep", left="")
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def look(self) -> list[tuple[Trial, State]]:
        """See how the trials stand, and show it; returns those that have ended since the last look."""
        self.claims.look()
        self.sweep.refresh()
        ended = []
        for batch in self.sweep.batches:
            for trial in batch:
                row = self.rows.setdefault(trial.trial_id, Row(trial))
                if not row.ended and (state := self._see(row)) is not None:
                    ended.append((trial, state))
        if self._done_before < 0:
            self._done_before = self._done()
        self._show([self.rows[trial.trial_id] for trial, _ in ended])
        return ended

    def _see(self, row: Row) -> State | None:
        """Bring a row up to date; its state if the trial has ended."""
        name = row.trial.trial_id
        standing = self.claims.state(name)
        if standing != ENDED:
            row.status = "running" if standing == HELD else "waiting"
            row.epochs = max(row.epochs, self.claims.epochs(name))
            return None
        state = self.sweep.state_of(row.trial)
        if not state.ended:  # its record was removed
            self.claims.reopen(name)
            return None
        _ended_row(row, state)
        return state

    def free(self) -> int:
        """Trials that no process has."""
        return sum(not row.ended and row.status != "running" for row in self.rows.values())

    def busy(self) -> int:
        """Processes that train."""
        return len({self.claims.holder(name) for name, row in self.rows.items() if row.status == "running"})

    def open(self) -> list[Trial]:
        """Trials of the plan that have not ended, as far as we have seen."""
        planned = (trial for batch in self.sweep.batches for trial in batch)
        return [trial for trial in planned if trial.trial_id not in self.rows or not self.rows[trial.trial_id].ended]

    def say(self, text: str) -> None:
        """A line above the bar."""
        if text:
            self.console.print(text, markup=False)

    def close(self) -> None:
        """Take bar and table away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, ended: list[Row]) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
            return
        for row in ended:
            self.console.print(self._trial_line(row), markup=False)
        if self._plain.due():
            self.console.print(self._progress_line())

    def _trial_line(self, row: Row) -> str:
        end = f"val accuracy {row.val_accuracy:.2%}" if row.val_accuracy is not None else ""
        text = row.message if row.status != "completed" else end
        return f"[{self._ended()}/{len(self.rows)}] {row.trial.trial_id} {row.trial.label}  {row.status}  {text}"

    def _ended(self) -> int:
        return sum(row.ended for row in self.rows.values())

    def _total(self) -> int:
        return sum(row.trial.config.trainer.epochs for row in self.rows.values())

    def _done(self) -> float:
        return sum(row.trial.config.trainer.epochs if row.ended else row.epochs for row in self.rows.values())

    def _left(self) -> str:
        """How long the rest takes, at the average speed since the command began."""
        trained = self._done() - self._done_before
        if trained <= 0:
            return ""
        seconds = (self._total() - self._done()) * (time.monotonic() - self._began) / trained
        return f"about {timedelta(seconds=round(seconds))} left"

    def _progress_line(self) -> str:
        ended = f"{self._ended()}/{len(self.rows)} trials ended"
        return ", ".join(filter(None, (f"{self._done():.0f}/{self._total()} epochs", ended, self._left())))

    def _picture(self) -> Group:
        said = f"sweep  {self._ended()}/{len(self.rows)} trials"
        self._bar.update(self._task, total=self._total(), completed=self._done(), description=said, left=self._left())
        columns = ("trial", "setting", "rank", "alpha", "dropout", "lr", "seed", "epoch", "val accuracy", "status")
        table = Table(*columns, box=None, pad_edge=False)
        running = [row for row in self.rows.values() if row.status == "running"]
        completed = [row for row in self.rows.values() if row.status == "completed" and row.val_accuracy is not None]
        best = sorted(completed, key=lambda row: -(row.val_accuracy or 0.0))
        for row in [*running[:RUNNING_ROWS], *best[:BEST_ROWS]]:
            c = row.trial.config
            values = (c.lora.rank, c.lora.alpha, c.lora.dropout, c.optimizer.lr)
            table.add_row(
                row.trial.trial_id,
                c.lora.method if c.lora.method != "lora" else " ".join(c.lora.targets or []),
                *("-" if v is None else f"{v:g}" for v in values),
                str(c.seed),
                f"{row.epochs:.0f}/{c.trainer.epochs}",
                f"{row.val_accuracy:.2%}" if row.val_accuracy is not None else "",
                row.status,
            )
        return Group(table, self._bar)
