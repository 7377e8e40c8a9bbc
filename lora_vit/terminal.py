"""The progress of long work (a bar on a terminal, a line now and then elsewhere), and plain tables."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

PLAIN_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""
_PIPED_WIDTH = 400


class Every:
    """Reports, once every so many seconds, that they have passed."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._since = time.monotonic()

    def due(self) -> bool:
        """Whether it is time again."""
        now = time.monotonic()
        if now - self._since <= self.seconds:
            return False
        self._since = now
        return True


class Progress:
    """How far ``total`` units of work are, with rate and time left; as a context also the time of all of it.

    Args:
        what: the work, e.g. "decoding images".
        total: number of units.
        quiet: show nothing.
        unit: name of the units.
        done: units that were done earlier.
    """

    def __init__(self, what: str, total: int, quiet: bool, unit: str = "images", done: int = 0):
        self.what, self.total, self.unit = what, total, unit
        self.figures = ""  # shown instead of the rate
        self.console = make_console(quiet)
        self._done = self._before = done
        self._start = time.perf_counter()
        self._plain = Every(PLAIN_EVERY)
        self._bar: RichProgress | None = None
        if self.console.is_terminal and not quiet:
            text, figures = TextColumn("{task.description}"), TextColumn("{task.fields[figures]}")
            columns = (text, BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn())
            self._bar = RichProgress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(what, total=total, completed=done, figures="")
            self._bar.start()

    def advance(self, count: int) -> None:
        """``count`` more units are done."""
        self._done += count
        rate = (self._done - self._before) / max(time.perf_counter() - self._start, 1e-9)
        figures = self.figures or f"{rate:,.0f} {self.unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, total=self.total, completed=self._done, figures=figures)
        elif self._plain.due():
            left = (self.total - self._done) / rate
            self.console.print(f"{self.what}: {self._done:,}/{self.total:,}  {figures}  about {left:,.0f} s left")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close()
        if kind is None:
            seconds = time.perf_counter() - self._start
            self.console.print(f"{self.what}: {self._done:,} {self.unit} in {seconds:.1f} s")


def make_console(quiet: bool = False) -> Console:
    """For lines and tables; nothing is cut or folded where there is no terminal."""
    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(highlight=False, soft_wrap=True, width=width, quiet=quiet)


def from_here(folder: Path) -> str:
    """A folder as short as a shell can name it from here."""
    full, here = folder.absolute(), Path.cwd()
    return shlex.quote(str(full.relative_to(here) if full.is_relative_to(here) else folder))


def print_table(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], most: int | None = None
) -> None:
    """A plain table under a title, of so many rows at most."""
    table = Table(*header, box=None, pad_edge=False)
    for row in rows[:most]:
        table.add_row(*map(escape, row))
    if title:
        console.print(f"[bold]{title}[/bold]")
    console.print(table)
    if most is not None and len(rows) > most:
        console.print(f"... {len(rows) - most} more")
