"""The tables of a summary as text, and text as Markdown, LaTeX and on a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from lora_vit.analysis.summary import Summary
from lora_vit.analysis.tables import SCALING
from lora_vit.analysis.texts import count, duration, number, plain, signed, size
from lora_vit.config.names import BASELINES, METHOD, short_names, value_text

RATES_NOTE = (
    "the best over learning rates is selected among several and so a little too good, more so the more rates were "
    "tried; at the shared rate nothing was selected, but the rate may suit some settings better"
)
LATEX_ROWS = 40
"""Of a table, so that it fits a page."""
LEAST_NEEDED = ("vs full fine-tuning", "vs linear probe", "seconds", "parameters", "95 % interval")
"""Columns of the cells table that a narrow terminal does without, the first first."""


def readable(summary: Summary, wide: bool = True) -> pd.DataFrame:
    """The cells table as text, one row per cell, best first; only settings that vary have a column.

    ``wide=False`` leaves out what fits no terminal (sd, interval of the difference, throughput, memory, sizes).
    """
    cells, fixed = summary.cells, summary.race is None
    short = short_names(summary.settings)
    out = pd.DataFrame({"#": np.arange(1, len(cells) + 1).astype(str)})
    if METHOD in summary.settings:
        out["method"] = [BASELINES.get(m, "LoRA") for m in cells[METHOD]]
    for c in summary.settings:
        if c != METHOD:
            out[short[c]] = _each(value_text, cells[c])
    if SCALING in cells and wide:
        out["scaling"] = _each(value_text, cells[SCALING])
    if len(out.columns) == 1:
        out["cell"] = cells["label"]
    out["val accuracy %"] = _each(plain, cells["mean"])
    out["95 % interval"] = _intervals(cells, "low", "high")
    if summary.comparison.blocked and not summary.comparison.complete and fixed:
        out["adjusted"] = _each(plain, cells["adjusted"])
    if wide:
        out["sd"] = _each(plain, cells["sd"])
    out["n"] = cells["n"].astype(str)
    out["mark"] = cells["mark"]
    if summary.within is not None:
        out[f"within {plain(summary.within.margin)}"] = np.where(cells["within"], "yes", "")
    behind = cells["difference"].where(~cells["mark"].isin(["best", "selected"]))
    out["vs best (points)" if wide else "vs best"] = _each(signed, behind)
    if wide and fixed:
        out["interval of it"] = _intervals(cells, "difference_low", "difference_high", signed)
    for key, title in (("vs_probe", "vs linear probe"), ("vs_full", "vs full fine-tuning")):
        if key in cells:
            out[title] = _each(signed, cells[key])
    star = {True: " *", False: ""}
    out["parameters"] = _each(count, cells["trainable_parameters"]) + cells["pareto_parameters"].map(star)
    out["seconds"] = _each(duration, cells["seconds"]) + cells["pareto_seconds"].map(star)
    if wide:
        out["images/s"] = _each(duration, cells["images_per_second"])
        out["peak memory"] = _each(size, cells["peak_memory_bytes"])
        out["adapter"] = _each(size, cells["adapter_bytes"])
    return out


def _each(text: Callable[[Any], str], column: Iterable) -> pd.Series:
    return pd.Series([text(v) for v in column], dtype=object)


def _intervals(frame: pd.DataFrame, low: str, high: str, text: Callable[[float], str] = plain) -> list[str]:
    ends = zip(_each(text, frame[low]), _each(text, frame[high]), strict=True)
    return ["–" if a == "–" else f"{a} to {b}" for a, b in ends]


@dataclass(frozen=True)
class Section:
    """A table of text below the cells, what must be known to read it, and the file with more of it."""

    title: str
    table: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    file: str = "cells.csv"


def sections(summary: Summary) -> list[Section]:
    """The tables below the cells, without empty ones."""
    rates = summary.learning_rates
    found = [
        Section("Best over lr, and at the shared lr", _rates(rates), [RATES_NOTE] if len(rates) else []),
        Section("Main effects (points)", _effects(summary.effects.table), summary.effects.notes),
        Section("Not averaged", _unfinished(summary.unfinished), file="trials.csv"),
    ]
    return [section for section in found if len(section.table) or section.notes]


def _rates(table: pd.DataFrame) -> pd.DataFrame:
    """`best over lr` beside `at shared lr` as text."""
    if table.empty:
        return table
    edges = [" (edge)" * edge for edge in table["edge"]]
    return pd.DataFrame(
        {
            "setting": table["setting"],
            "best lr": _each(value_text, table["best_lr"]) + edges,
            "best over lr, %": _each(plain, table["best_mean"]),
            "95 % interval": _intervals(table, "best_low", "best_high"),
            "of rates": table["rates"].astype(str),
            f"at shared lr {value_text(table['shared_lr'].iloc[0])}, %": _each(plain, table["shared_mean"]),
            "its 95 % interval": _intervals(table, "shared_low", "shared_high"),
        }
    )


def _effects(table: pd.DataFrame) -> pd.DataFrame:
    """Main effects as text, in points."""
    texts = {name: _each(value_text, table[name]) for name in ("setting", "level", "against")}
    interval = _intervals(table, "low", "high", signed)
    return pd.DataFrame({**texts, "effect": _each(signed, table["effect"]), "95 % interval": interval})


def _unfinished(table: pd.DataFrame) -> pd.DataFrame:
    """The trials that are not in the averages, as text."""
    epoch, last = _each(value_text, table["epoch"]), _each(number, table["value"])
    return table.drop(columns="value").assign(epoch=epoch, **{"last value": last}).astype(str)


def numeric(column: pd.Series) -> bool:
    """Whether a column of text holds numbers, and stands on the right."""
    return all(str(v)[:1] in "+-–0123456789" for v in column)


def markdown_escape(text: object) -> str:
    """Text as Markdown prints it, in one line."""
    return re.sub(r"([\\|*`])", r"\\\1", " ".join(str(text).split())).replace("<", "&lt;")


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; text right-aligned where it is a number."""
    rule = ["---:" if numeric(table[c]) else "---" for c in table.columns]
    lines = [[markdown_escape(v) for v in row] for row in (list(table.columns), *table.to_numpy().tolist())]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def table_md(summary: Summary) -> str:
    """``table.md``: verdict, warnings and the tables."""
    parts = [f"**{markdown_escape(summary.verdict)}**"]
    parts += [f"> Warning: {markdown_escape(w)}" for w in summary.warnings]
    parts += [markdown(readable(summary)), summary.legend]
    for section in sections(summary):
        parts += [f"### {section.title}", *([markdown(section.table)] if len(section.table) else [])]
        parts += map(markdown_escape, section.notes)
    return "\n\n".join(parts) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
    "<": r"\textless{}", ">": r"\textgreater{}", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def latex_escape(text: object) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(c, c) for c in " ".join(str(text).split()))


def latex(table: pd.DataFrame, caption: str) -> str:
    """A table for the LaTeX packages booktabs and graphicx, in small type, shrunk where it is wider than the page."""
    align = "".join("r" if numeric(table[c]) else "l" for c in table.columns)
    style = table.style.hide(axis="index").format(latex_escape).format_index(latex_escape, axis=1)
    rows = style.to_latex(hrules=True, column_format=align)
    fits = "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
    head = "\\begin{table}\n\\centering\n\\caption{" + latex_escape(caption) + "}\n\\footnotesize\n"
    return f"{head}\\setlength{{\\tabcolsep}}{{4pt}}\n{fits}{rows.rstrip()}}}\n\\end{{table}}\n"


def table_tex(summary: Summary) -> str:
    """``table.tex``: the columns that the terminal has, the verdict as caption, the warnings as comments."""
    table = readable(summary, wide=False)
    more = f" The first {LATEX_ROWS} of {len(table)} cells." if len(table) > LATEX_ROWS else ""
    comments = "".join(f"% {' '.join(line.split())}\n" for line in [summary.verdict, *summary.warnings])
    return comments + latex(table.head(LATEX_ROWS), summary.verdict + more)


def terminal(summary: Summary, console: Any, top: int) -> None:
    """Print the tables; at most ``top`` rows each."""
    many = "s" * (len(summary.cells) > 1)
    _print_table(Section(f"{len(summary.cells)} cell{many}, best first", readable(summary, wide=False)), console, top)
    for section in sections(summary):
        _print_table(section, console, top)


def _print_table(section: Section, console: Any, top: int) -> None:
    """Print a table in which headers and text wrap, without the columns that the terminal has no room for."""
    from rich.markup import escape
    from rich.table import Table

    table = section.table.head(top)
    widths = {c: _narrowest(table[c]) for c in table.columns}
    room = console.width - sum(widths.values()) - 2 * (len(widths) - 1)  # two blanks between columns
    for c in LEAST_NEEDED:
        if room < 0 and c in widths:
            room += widths.pop(c) + 2
    grid = Table(title=section.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for c, least in widths.items():
        more = min(max(len(str(v)) for v in (c, *table[c])) - least, max(room, 0))
        side: Any = "right" if numeric(table[c]) else "left"
        grid.add_column(escape(str(c)), justify=side, overflow="fold", width=None if room < 0 else least + more)
        room -= more
    for row in table[list(widths)].itertuples(index=False):
        grid.add_row(*(escape(str(v)) for v in row))
    if len(table):
        console.print(grid)
    if len(section.table) > top:
        console.print(f"... {len(section.table) - top} more rows (see the files)")
    if left_out := [c for c in table.columns if c not in widths]:
        console.print(f"The terminal is too narrow for: {', '.join(left_out)} (see the files)")
    for note in section.notes:
        console.print(f"note: {escape(note)}")
    console.print()


def _narrowest(column: pd.Series) -> int:
    """Characters that a column needs so that no number and no word is broken."""
    whole = list(column) if numeric(column) else [word for text in column for word in str(text).split()]
    return max(map(len, [*str(column.name).split(), *map(str, whole)]), default=1)
