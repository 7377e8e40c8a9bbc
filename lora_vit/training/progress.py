"""What the user sees of a single run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from lora_vit.training.pack import Pack
from lora_vit.training.trackers import epoch_figures
from lora_vit.training.trial import Trial


class RunReporter:
    """Progress of one trial (rank 0); silent on other ranks."""

    def __init__(self, main: bool):
        self.console = Console(highlight=False, soft_wrap=True, quiet=not main)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._since = time.perf_counter()
        self._show_bar = main and self.console.is_terminal and sys.stderr.isatty()

    def started(self, pack: Pack) -> None:
        """Print the table of parameters and begin the bar."""
        trial, steps = pack.trials[0], pack.steps_per_epoch
        counts = trial.record.parameters
        columns = (Column("count", justify="right"), Column("share", justify="right"))
        table = Table("parameters", *columns, box=None, pad_edge=False)
        for name in ("adapter", "head", "trainable", "total"):
            table.add_row(name, f"{counts[name]:,}", f"{counts[name] / counts['total']:.2%}")
        self.console.print(table)
        if trial.config.lora.method == "lora":
            lora = trial.config.lora
            factor = lora.effective_scaling()
            self.console.print(f"LoRA rank {lora.rank}, alpha {lora.alpha:g}: effective scaling {factor:g}")
        if self._show_bar:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            done = trial.state.epoch * steps + trial.state.step_in_epoch
            total = trial.config.trainer.epochs * steps
            self._task = self._bar.add_task("training", total=total, completed=done, figures="")

    def advance(self, pack: Pack) -> None:
        """One more step."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def step(self, pack: Pack, losses: list[float], rates: list[float], images_per_second: float) -> None:
        """Figures of a logging step."""
        figures = f"loss {losses[0]:.4f}  lr {rates[0]:.2e}  {images_per_second:,.0f} images/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, figures=figures)
        elif time.perf_counter() - self._since > 10:
            self._since = time.perf_counter()
            epochs = pack.trials[0].config.trainer.epochs
            done = pack.step_of(pack.trials[0])
            total = epochs * pack.steps_per_epoch
            left = (total - done) * pack.step_state.global_batch / max(images_per_second, 1e-9)
            self.console.print(f"step {done}/{total}  {figures}  about {left:,.0f} s left")

    def epoch(self, trial: Trial, row: dict[str, float]) -> None:
        """One line for an epoch."""
        self.console.print(f"epoch {trial.state.epoch}/{trial.config.trainer.epochs}  {epoch_figures(row)}")

    def left(self, trial: Trial) -> None:
        """Nothing: the entry prints the end."""

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
