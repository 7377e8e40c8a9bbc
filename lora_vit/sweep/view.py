"""What the user sees of a sweep's trials: rows of a table, and a view while they are trained."""

import contextlib
from collections.abc import Sequence

from rich.console import Console

from lora_vit.errors import RecordError
from lora_vit.metrics import METRICS
from lora_vit.records import NO_FIGURE, RECORD, State, state_of
from lora_vit.sweep.claims import ENDED, HELD, Claims
from lora_vit.sweep.plan import Sweep, trial_folders
from lora_vit.sweep.trial import Trial
from lora_vit.terminal import Progress

SHOWN = 30  # rows of a table at the end of a command


def print_summary(console: Console, sweep: Sweep) -> None:
    """The cells and the verdict as ``summarize`` has them; nothing before a trial is completed."""
    from lora_vit.analysis import export  # imports pandas
    from lora_vit.analysis.core import summarize

    with contextlib.suppress(RecordError):
        export.terminal(summarize(sweep.folder, metric=sweep.metric), console, SHOWN)


def header(metric: str) -> tuple[str, ...]:
    return "trial", "settings", "status", "epochs", f"val {METRICS[metric].title}", ""


def trial_row(trial_id: str, label: str, state: State, metric: str) -> tuple[str, ...]:
    """How a trial stands, as a row below :func:`header`; the last column says what is wrong."""
    record, status, why = state.record, "waiting" if state.status == "new" else state.status, state.problem
    if record is None:
        return trial_id, label, status, "", "", why
    value = record.metrics.get(f"val_{metric}")
    why = f"{RECORD} {NO_FIGURE.format(metric)}" if status == "completed" and value is None else ""
    why = str((record.error or {}).get("message") or why)
    epochs = f"{record.metrics.get('epoch', 0)}/{record.config['trainer']['epochs']}"
    return trial_id, label, status, epochs, "" if value is None else f"{value:.2%}", why


def ending(trial: Trial, state: State, metric: str) -> str:
    name, label, status, _, value, why = trial_row(trial.trial_id, trial.label, state, metric)
    return f"{name} {label}  {status}  {why or (value and f'val {METRICS[metric].title} {value}')}"


def value_of(state: State, metric: str) -> float | None:
    """What a trial is compared by, if it is completed."""
    return state.record.metrics.get(f"val_{metric}") if state.record and state.status == "completed" else None


def standing(sweep: Sweep) -> list[tuple[State, tuple[str, ...]]]:
    """Every trial that is planned or there, as its record and a row say: the best first within each status."""
    names = dict.fromkeys([*sweep.trials, *(path.name for path in trial_folders(sweep.folder))])
    states = {name: state_of(sweep.folder / name) for name in names}
    order = ("completed", "running", "interrupted", "stopped", "failed", "refused", "new")
    best = sorted(states, key=lambda n: (order.index(states[n].status), -(value_of(states[n], sweep.metric) or 0.0)))
    labels = {name: trial.label for name, trial in sweep.trials.items()}
    return [(states[n], trial_row(n, labels.get(n, ""), states[n], sweep.metric)) for n in best]


class View:
    """Watches the trials of a sweep: a bar, or plain lines when piped, and a line for each trial that ends."""

    def __init__(self, sweep: Sweep, trials: Sequence[tuple[Trial, State]]):
        self.sweep, self.claims = sweep, Claims(sweep.folder)
        self.trials = {trial.trial_id: trial for trial, _ in trials}  # we wait for, and others have added
        self.ended = {trial.trial_id: state for trial, state in trials if state.ended}
        self._trained = {t.trial_id: float(s.record.metrics.get("epoch") or 0) for t, s in trials if s.record}
        done, total = self._epochs()
        self.progress = Progress("sweep", total, quiet=False, unit="epochs", done=done)
        self.console = self.progress.console

    def look(self) -> list[tuple[Trial, State]]:
        """See how the trials stand, and show it; returns those that have ended since the last look."""
        self.claims.look()
        self.sweep.refresh()
        new: list[tuple[Trial, State]] = []
        for trial in self.open():
            name = trial.trial_id
            self.trials[name] = trial
            if self.claims.state(name) != ENDED:
                self._trained[name] = max(self._trained.get(name, 0.0), self.claims.epochs(name))
            elif (state := self.sweep.state_of(trial)).ended:
                self.ended[name] = state
                new.append((trial, state))
            else:  # its record was removed
                self.claims.reopen([name])
        count = f"{len(self.ended)}/{len(self.trials)}"
        for trial, state in new:
            self.say(f"[{count}] {ending(trial, state, self.sweep.metric)}")
        best = max((value_of(state, self.sweep.metric) or 0.0 for state in self.ended.values()), default=0.0)
        running = f"{count} trials ended, {len(self.running())} running"
        self.progress.figures = running + (f", best {best:.2%}" if best else "")
        done, self.progress.total = self._epochs()
        if done > self.progress.done or self.console.is_terminal:
            self.progress.advance(done - self.progress.done)
        return new

    def open(self) -> list[Trial]:
        """Trials that we wait for or that are planned, and have not ended as far as we have seen."""
        every = {**self.trials, **{trial.trial_id: trial for trial in self.sweep.planned}}
        return [trial for name, trial in every.items() if name not in self.ended]

    def running(self) -> list[str]:
        return [name for name in self.trials if name not in self.ended and self.claims.state(name) == HELD]

    def missing(self, alive: int) -> int:
        """Trials for which there is no process: of so many that are ``alive``, the idle ones will take some."""
        running = self.running()
        busy = {self.claims.token_of(name) for name in running}
        return len(self.trials) - len(self.ended) - len(running) - max(0, alive - len(busy))

    def say(self, text: str) -> None:
        if text:
            self.console.print(text, markup=False)

    def _epochs(self) -> tuple[int, int]:
        """Those that are trained, and all; what has ended needs no more."""
        of = {name: trial.config.trainer.epochs for name, trial in self.trials.items()}
        done = sum(n if name in self.ended else self._trained.get(name, 0.0) for name, n in of.items())
        return int(done), sum(of.values())
