"""The progress of long work (a bar on a terminal, a line now and then elsewhere), and plain tables."""

import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn
from rich.progress import Progress as RichProgress
from rich.table import Table


class Every:
    """Reports, once every so many seconds, that they have passed."""

    def __init__(self, seconds: float):
        self.seconds, self._since = seconds, time.monotonic()

    def due(self) -> bool:
        if passed := time.monotonic() - self._since > self.seconds:
            self._since = time.monotonic()
        return passed


class Progress:
    """How far ``total`` units of work are (``done`` earlier), with rate and time left; as a context also its time."""

    def __init__(self, what: str, total: int, quiet: bool = False, unit: str = "images", done: int = 0):
        self.what, self.total, self.unit = what, total, unit
        self.figures = ""  # shown instead of the rate
        self.console = make_console(quiet)
        self.done = self._before = done
        self._start = self._since = time.perf_counter()
        self._plain = Every(10.0)  # seconds between two lines where there is no terminal
        self._bar: RichProgress | None = None
        if self.console.is_terminal and not quiet:
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[figures]}")
            self._bar = RichProgress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(what, total=total, completed=done, figures="")
            self._bar.start()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        ran = now - self._since
        rate = (self.done - self._before) / max(ran, 1e-9)
        figures = self.figures or f"{rate:,.{'0f' if rate >= 10 else '2g'}} {self.unit}/s"
        if self._since > self._start and ran > 20.0 and rate:  # of seconds: the rate is sure
            figures += f"  about {(self.total - self.done) / rate:,.0f} s left"
        if self._bar is not None:
            self._bar.update(self._task, total=self.total, completed=self.done, figures=figures)
        elif self._plain.due():
            self.console.print(f"{self.what}: {self.done:,}/{self.total:,} {self.unit}  {figures}")
        if count and self._since == self._start:  # what came before was the start
            self._since, self._before = now, self.done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        self.close()
        if kind is None:
            self.console.print(f"{self.what}: {self.done:,} {self.unit} in {time.perf_counter() - self._start:.1f} s")


def make_console(quiet: bool = False) -> Console:
    """For lines and tables; nothing is cut or folded where there is no terminal."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 400, quiet=quiet)


def from_here(folder: Path) -> str:
    """A folder as short as a shell can name it from here."""
    full, here = folder.absolute(), Path.cwd()
    return shlex.quote(str(full.relative_to(here) if full.is_relative_to(here) else folder))


def is_numeric(texts: Iterable[object]) -> bool:
    """Whether a column of text holds numbers, and stands on the right."""
    return all(str(text)[:1] in "+-–0123456789" for text in texts)


def print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]],
                most: int = 10**9, spare: Sequence[str] = ()) -> None:  # fmt: skip
    """A plain table under a title, of so many rows at most; no number or word is broken while ``spare`` has columns.

    Those are left out where the terminal is too narrow, the first first.
    """
    columns = {name: [row[i] for row in rows[:most]] for i, name in enumerate(header)}
    widths = {}
    for name, texts in columns.items():
        unbroken = texts if is_numeric(texts) else " ".join(texts).split()
        widths[name] = max(map(len, [*name.split(), *unbroken]), default=0)
    room = console.width - sum(widths.values()) - 2 * (len(widths) - 1)  # two blanks between columns
    for name in spare:
        if room < 0 and name in widths:
            room += widths.pop(name) + 2
    table = Table(box=None, pad_edge=False)
    for name, least in widths.items():
        more = min(max(map(len, [name, *columns[name]])) - least, max(room, 0))
        side: Any = "right" if is_numeric(columns[name]) else "left"
        table.add_column(escape(name), justify=side, overflow="fold", width=None if room < 0 else least + more)
        room -= more
    for row in zip(*(columns[name] for name in widths), strict=True):
        table.add_row(*map(escape, row))
    if title:
        console.print(f"[bold]{title}[/bold]")
    if rows:
        console.print(table)
    if len(rows) > most:
        console.print(f"... {len(rows) - most} more")
    if left_out := [name for name in columns if name not in widths]:
        console.print(f"The terminal is too narrow for: {', '.join(left_out)} (see the files)")
