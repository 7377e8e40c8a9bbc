"""Numbers as people read them: the same on the terminal, in the files and on the page."""

import math

import pandas as pd
from rich.filesize import decimal

NONE = "–"


def plain(value: float) -> str:
    """A metric in % or a difference in points, without its unit."""
    return f"{100 * value:.2f}" if math.isfinite(value) else NONE


def number(value: float) -> str:
    return plain(value) + " %" * math.isfinite(value)


def signed(value: float) -> str:
    """A difference in points with its sign (none before a zero)."""
    text = plain(value)
    return text if text == NONE else f"{float(text):+.2f}" if float(text) else text.lstrip("-")


def points(value: float) -> str:
    return f"{plain(value)} points"


def count(value: float) -> str:
    """A number in few characters: 1,234 or 85.80 M."""
    if not math.isfinite(value):
        return NONE
    return f"{value / 1e6:,.2f} M" if value >= 1e6 else f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes as kB, MB or GB (powers of 1000)."""
    return decimal(int(value), precision=2) if math.isfinite(value) else NONE


def duration(value: float) -> str:
    """Seconds, with tenths below a hundred."""
    return f"{value:,.{1 if value < 100 else 0}f}" if math.isfinite(value) else NONE


def loss(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if math.isfinite(value) else NONE


def seeds(value: float, of_splits: float = 0.0) -> str:
    return f"{int(value)} {'splits' if of_splits else 'seeds'}" if value > 1 else "one seed"


def with_interval(cell: pd.Series) -> str:
    """A cell's mean with its interval, if it has one."""
    interval = f" (95 % interval {number(cell['low'])} to {number(cell['high'])})" if math.isfinite(cell["low"]) else ""
    return number(cell["mean"]) + interval
