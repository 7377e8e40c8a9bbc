"""What the user sees of a sweep's trials: rows of a table, and a view while they are trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lora_vit.records import NO_ACCURACY, RECORD, State
from lora_vit.sweep.claims import ENDED, HELD, Claims
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Trial
from lora_vit.terminal import Progress

HEADER = ("trial", "settings", "status", "epochs", "val accuracy", "")


def trial_row(trial_id: str, label: str, state: State) -> tuple[str, ...]:
    """How a trial stands, as a row under ``HEADER``; the last column says what is wrong."""
    record, status, why = state.record, "waiting" if state.status == "new" else state.status, state.problem
    if record is None:
        return trial_id, label, status, "", "", why
    accuracy = record.metrics.get("val_accuracy")
    why = f"{RECORD} {NO_ACCURACY}" if status == "completed" and accuracy is None else ""
    why = str((record.error or {}).get("message") or why)
    epochs = f"{record.metrics.get('epoch', 0)}/{record.config['trainer']['epochs']}"
    return trial_id, label, status, epochs, "" if accuracy is None else f"{accuracy:.2%}", why


def ending(trial: Trial, state: State) -> str:
    """What a trial has come to, in a line."""
    name, label, status, _, accuracy, why = trial_row(trial.trial_id, trial.label, state)
    return f"{name} {label}  {status}  {why or (accuracy and f'val accuracy {accuracy}')}"


def accuracy_of(state: State | None) -> float | None:
    """The validation accuracy of a trial that is completed."""
    if state is None or state.record is None or state.status != "completed":
        return None
    return state.record.metrics.get("val_accuracy")


@dataclass
class Row:
    """How a trial stands; ``state`` once it has ended."""

    trial: Trial
    state: State | None = None
    is_running: bool = False
    epochs: float = 0.0


class View:
    """Watches the trials of a sweep: a bar, or plain lines when piped, and a line for each trial that ends.

    It reads what any process can read: the plan, the claims and the records. ``trials``: those that the command waits
    for, and how they stand.
    """

    def __init__(self, sweep: Sweep, trials: Iterable[tuple[Trial, State]]):
        self.sweep, self.claims = sweep, Claims(sweep.folder)
        self.rows: dict[str, Row] = {}
        for trial, state in trials:
            epochs = float(state.record.metrics.get("epoch") or 0) if state.record is not None else 0.0
            self.rows[trial.trial_id] = Row(trial, state if state.ended else None, False, epochs)
        self._shown, total = self._epochs()
        self.progress = Progress("sweep", total, quiet=False, unit="epochs", done=self._shown)
        self.console = self.progress.console

    def look(self) -> list[tuple[Trial, State]]:
        """See how the trials stand, and show it; returns those that have ended since the last look."""
        self.claims.look()
        self.sweep.refresh()
        ended: list[tuple[Trial, State]] = []
        for trial in self.sweep.planned:
            row = self.rows.setdefault(trial.trial_id, Row(trial))
            if row.state is not None:
                continue
            standing = self.claims.state(trial.trial_id)
            row.is_running = standing == HELD
            if standing != ENDED:
                row.epochs = max(row.epochs, self.claims.epochs(trial.trial_id))
            elif (state := self.sweep.state_of(trial)).ended:
                row.state = state
                ended.append((trial, state))
            else:  # its record was removed
                self.claims.reopen([trial.trial_id])
        total = sum(row.state is not None for row in self.rows.values())
        for trial, state in ended:
            self.say(f"[{total}/{len(self.rows)}] {ending(trial, state)}")
        running = sum(row.is_running for row in self.rows.values())
        best = max((accuracy_of(row.state) or 0.0 for row in self.rows.values()), default=0.0)
        figures = f"{total}/{len(self.rows)} trials ended, {running} running" + (f", best {best:.2%}" if best else "")
        done, self.progress.total = self._epochs()
        self.progress.figures = figures
        if done > self._shown or self.console.is_terminal:
            self.progress.advance(done - self._shown)
            self._shown = done
        return ended

    def free(self) -> int:
        """Trials that no process has."""
        return sum(row.state is None and not row.is_running for row in self.rows.values())

    def busy(self) -> int:
        return len({self.claims.token_of(name) for name, row in self.rows.items() if row.is_running})

    def open(self) -> list[Trial]:
        """Trials of the plan that have not ended, as far as we have seen."""
        return [trial for trial in self.sweep.planned if self.rows.get(trial.trial_id, Row(trial)).state is None]

    def say(self, text: str) -> None:
        if text:
            self.console.print(text, markup=False)

    def _epochs(self) -> tuple[int, int]:
        """Those that are trained, and all; what has ended needs no more."""
        pairs = [(row, row.trial.config.trainer.epochs) for row in self.rows.values()]
        return int(sum(row.epochs if row.state is None else n for row, n in pairs)), sum(n for _, n in pairs)
