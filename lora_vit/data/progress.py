"""Progress of long work with data: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Context that shows how far ``total`` units of work are, with rate and time left.

    Args:
        what: the work, e.g. "decoding images".
        total: number of units.
        quiet: show nothing.
        unit: name of the rate's unit.
    """

    def __init__(self, what: str, total: int, quiet: bool, unit: str = "images"):
        self.what, self.total, self.quiet, self.unit = what, total, quiet, unit
        self._console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._done = 0
        self._start = self._said = time.perf_counter()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._start = self._said = time.perf_counter()
        if self._console.is_terminal and not self.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = RichProgress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, rate="")
        return self

    def advance(self, count: int) -> None:
        """``count`` more units are done."""
        self._done += count
        now = time.perf_counter()
        rate = self._done / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{rate:,.0f} {self.unit}/s")
        elif now - self._said > _EVERY:
            self._said = now
            left = (self.total - self._done) / rate
            self._console.print(
                f"{self.what}: {self._done:,}/{self.total:,}  {rate:,.0f} {self.unit}/s  about {left:,.0f} s left"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            seconds = time.perf_counter() - self._start
            self._console.print(f"{self.what}: {self._done:,} {self.unit} in {seconds:.1f} s")
