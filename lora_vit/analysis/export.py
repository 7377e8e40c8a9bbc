"""DataFrames to text: the readable cells table, Markdown, LaTeX, CSV and the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from lora_vit.analysis.summary import Metric, Summary
from lora_vit.analysis.tables import BASELINES, METHOD, SCALING, short_names, value_text
from lora_vit.analysis.texts import LEGEND, RACE_LEGEND, count, duration, number, plain, signed, size


def readable(summary: Summary, wide: bool = True) -> pd.DataFrame:
    """The cells table as text, one row per cell, best first; only settings that vary have a column.

    ``wide=False`` leaves out what fits no terminal (sd, worse-by interval, throughput, memory, sizes).
    """
    cells, metric = summary.cells, summary.metric
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
    out[metric.title.lower() + (" %" if metric.accuracy else "")] = _values(metric, cells["mean"])
    out["95 % interval"] = _intervals(metric, cells["low"], cells["high"])
    if summary.comparison.blocked and not summary.comparison.complete and summary.race is None:
        out["adjusted"] = _values(metric, cells["adjusted"])
    if wide:
        out["sd"] = _values(metric, cells["sd"])
    out["n"] = cells["n"].astype(str)
    out["mark"] = cells["mark"]
    if summary.within is not None:
        out[f"within {plain(metric, summary.within.margin)}"] = np.where(cells["within"], "yes", "")
    difference = cells["difference"].where(~cells["mark"].isin(["best", "selected"]))
    out["vs best" + (" (points)" if metric.accuracy and wide else "")] = _values(metric, difference, signed)
    if wide and summary.race is None:
        out["interval of it"] = _intervals(metric, cells["difference_low"], cells["difference_high"], signed)
    for key, title in (("vs_probe", "vs linear probe"), ("vs_full", "vs full fine-tuning")):
        if key in cells:
            out[title] = _values(metric, cells[key], signed)
    star = {True: " *", False: ""}
    out["parameters"] = _each(count, cells["trainable_parameters"]) + cells["pareto_parameters"].map(star)
    out["seconds"] = _each(duration, cells["seconds"]) + cells["pareto_seconds"].map(star)
    if wide:
        out["images/s"] = _each(duration, cells["images_per_second"])
        out["peak memory"] = _each(size, cells["peak_memory_bytes"])
        out["adapter"] = _each(size, cells["adapter_bytes"])
    return out


def legend(summary: Summary) -> str:
    """What the marks of its cells mean."""
    return LEGEND if summary.race is None else RACE_LEGEND


def _each(text: Callable[[Any], str], column: Iterable) -> pd.Series:
    return pd.Series([text(v) for v in column], dtype=object)


def _values(metric: Metric, column: pd.Series, text: Callable[[Metric, float], str] = plain) -> list[str]:
    return [text(metric, v) for v in column]


def _intervals(
    metric: Metric, low: pd.Series, high: pd.Series, text: Callable[[Metric, float], str] = plain
) -> list[str]:
    ends = zip(_values(metric, low, text), _values(metric, high, text), strict=True)
    return ["–" if a == "–" else f"{a} to {b}" for a, b in ends]


def readable_rates(summary: Summary) -> pd.DataFrame:
    """`best over lr` beside `at shared lr` as text."""
    table, metric = summary.learning_rates, summary.metric
    if table.empty:
        return table
    shared = value_text(table["shared_lr"].iloc[0])
    unit = ", %" if metric.accuracy else ""
    edges = [" (edge)" * edge for edge in table["edge"]]
    return pd.DataFrame(
        {
            "setting": table["setting"],
            "best lr": [value_text(lr) + edge for lr, edge in zip(table["best_lr"], edges, strict=True)],
            f"best over lr{unit}": _values(metric, table["best_mean"]),
            "95 % interval": _intervals(metric, table["best_low"], table["best_high"]),
            "of rates": table["rates"].astype(str),
            f"at shared lr {shared}{unit}": _values(metric, table["shared_mean"]),
            "its 95 % interval": _intervals(metric, table["shared_low"], table["shared_high"]),
        }
    )


def readable_effects(summary: Summary) -> pd.DataFrame:
    """Main effects as text (points for accuracies)."""
    t, metric = summary.effects.table, summary.metric
    return pd.DataFrame(
        {
            "setting": t["setting"],
            "level": _each(value_text, t["level"]),
            "against": _each(value_text, t["against"]),
            "effect": _values(metric, t["effect"], signed),
            "95 % interval": _intervals(metric, t["low"], t["high"], signed),
            "p (setting)": [f"{p:.2g}" for p in t["p"]],
        }
    )


def readable_unfinished(summary: Summary) -> pd.DataFrame:
    """What is not in the averages as text."""
    t = summary.unfinished
    last = [number(summary.metric, v) for v in t["value"]]
    return t.drop(columns="value").assign(epoch=_each(value_text, t["epoch"]), **{"last value": last}).astype(str)


def readable_pivot(summary: Summary) -> pd.DataFrame:
    """The pivot as text; empty where none was asked for."""
    table = summary.pivot
    if table is None:
        return pd.DataFrame()
    rows = {f"{table.index.name} \\ {table.columns.name}": _each(value_text, table.index)}
    return pd.DataFrame({**rows, **{value_text(c): _values(summary.metric, table[c]) for c in table.columns}})


def more_tables(summary: Summary) -> dict[str, pd.DataFrame]:
    """The tables below the cells by title, without the empty ones."""
    found = {
        "Best over lr, and at the shared lr": readable_rates(summary),
        "Main effects": readable_effects(summary),
        "Pivot": readable_pivot(summary),
        "Not averaged": readable_unfinished(summary),
    }
    return {title: table for title, table in found.items() if len(table)}


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; text right-aligned where it is a number."""
    head = "| " + " | ".join(markdown_escape(c) for c in table.columns) + " |"
    rule = "|" + "|".join("---:" if numeric(table[c]) else "---" for c in table.columns) + "|"
    rows = ["| " + " | ".join(markdown_escape(v) for v in row) + " |" for row in table.itertuples(index=False)]
    return "\n".join([head, rule, *rows])


def markdown_escape(text: object) -> str:
    """Text as Markdown prints it, in one line."""
    return re.sub(r"([\\|*`])", r"\\\1", " ".join(str(text).split())).replace("<", "&lt;")


def numeric(column: pd.Series) -> bool:
    """Whether a column of text holds numbers, and stands on the right."""
    return all(str(v)[:1] in "+-–0123456789" for v in column)


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


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


def table_md(summary: Summary) -> str:
    """``table.md``: verdict, warnings and the tables."""
    parts = [
        f"**{markdown_escape(summary.verdict)}**",
        *(f"> Warning: {markdown_escape(w)}" for w in summary.warnings),
        markdown(readable(summary)),
        legend(summary),
    ]
    for title, table in more_tables(summary).items():
        parts += [f"### {title}", markdown(table), *(summary.effects.notes if title == "Main effects" else [])]
    return "\n\n".join(parts) + "\n"


COST_COLUMNS = ("parameters", "seconds", "images/s", "peak memory", "adapter")
LATEX_ROWS = 40
"""Of a table, so that it fits a page."""


def table_tex(summary: Summary) -> str:
    """``table.tex``: the columns that answer in one table, costs in a second, the warnings as comments."""
    table = readable(summary)
    more = f" The first {LATEX_ROWS} of {len(table)} cells." if len(table) > LATEX_ROWS else ""
    comments = "".join(f"% {' '.join(w.split())}\n" for w in [summary.verdict, *summary.warnings])
    table = table.head(LATEX_ROWS)
    named = list(table.columns)[: list(table.columns).index("95 % interval") - 1]
    costs = [c for c in table.columns if c in COST_COLUMNS or c.removeprefix("vs ") in BASELINES.values()]
    answers = table.drop(columns=[*costs, "interval of it"], errors="ignore")
    return (
        comments
        + latex(answers, summary.verdict + more)
        + "\n"
        + latex(table[named + costs], "The same cells: costs." + more)
    )


LEAST_NEEDED = ("vs full fine-tuning", "vs linear probe", "seconds", "parameters", "95 % interval")
"""Columns of the cells table that a narrow terminal does without, the first first."""


def _narrowest(column: pd.Series) -> int:
    """Characters that a column needs so that no number and no word is broken."""
    text = [str(v) for v in column]
    words = [w for t in [str(column.name), *([] if numeric(column) else text)] for w in t.split()]
    return max(map(len, [*words, *(text if numeric(column) else [])]), default=1)


def _widths(table: pd.DataFrame, width: int) -> list[int] | None:
    """Characters of each column, two blanks between them, so that headers and text wrap; None where that is no use."""
    least = [_narrowest(table[c]) for c in table.columns]
    whole = [max(len(str(c)), *(len(str(v)) for v in table[c])) for c in table.columns]
    room = width - sum(least) - 2 * (len(least) - 1)
    if room < 0:
        return None
    widths = []
    for low, high in zip(least, whole, strict=True):
        widths.append(low + min(high - low, room))
        room -= widths[-1] - low
    return widths


def terminal(summary: Summary, console: Any, top: int) -> None:
    """Print the tables; at most ``top`` rows each."""
    from rich.markup import escape
    from rich.table import Table

    def show(table: pd.DataFrame, title: str) -> None:
        rows, columns, table = len(table), table.columns, table.head(top)
        widths = _widths(table, console.width)
        for c in LEAST_NEEDED:
            if widths is None:
                table = table.drop(columns=c, errors="ignore")
                widths = _widths(table, console.width)
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for k, c in enumerate(table.columns):
            side: Any = "right" if numeric(table[c]) else "left"
            grid.add_column(escape(str(c)), justify=side, overflow="fold", width=widths[k] if widths else None)
        for row in table.itertuples(index=False):
            grid.add_row(*(escape(str(v)) for v in row))
        console.print(grid)
        if rows > top:
            console.print(f"... {rows - top} more rows (see the files)")
        if left_out := [c for c in columns if c not in table]:
            console.print(f"The terminal is too narrow for: {', '.join(left_out)} (see the files)")
        console.print()

    show(readable(summary, wide=False), f"{len(summary.cells)} cell{'s' * (len(summary.cells) > 1)}, best first")
    for title, table in more_tables(summary).items():
        points = " (points)" if title == "Main effects" and summary.metric.accuracy else ""
        show(table, title + points)
