"""DataFrames to text: the readable cells table, Markdown, LaTeX, CSV and the terminal."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lora_vit.analysis.checks import number
from lora_vit.analysis.tables import METHOD, SCALING, names, value_text

if TYPE_CHECKING:
    from lora_vit.analysis.core import Summary


def count(value: float) -> str:
    """A number in few characters: 1,234 or 85.8 M."""
    if not math.isfinite(value):
        return "–"
    return f"{value / 1e6:,.2f} M" if value >= 1e6 else f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes as kB, MB or GB (powers of 1000)."""
    if not math.isfinite(value):
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f} B"


def duration(value: float) -> str:
    """Seconds, with tenths below a hundred."""
    return "–" if not math.isfinite(value) else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def interval(summary: Summary, low: float, high: float, signed: bool = False) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return "–"
    return f"{number(summary, low, signed)} to {number(summary, high, signed)}".replace(" %", "")


def readable(summary: Summary, wide: bool = True) -> pd.DataFrame:
    """The cells table as text, one row per cell, best first; only settings that vary have a column.

    ``wide=False`` leaves out what fits no terminal (sd, worse-by interval, throughput, memory, sizes).
    """
    cells = summary.cells
    short = names(summary.settings)
    out = pd.DataFrame({"#": np.arange(1, len(cells) + 1).astype(str)})
    if METHOD in summary.settings:
        out["method"] = (
            cells[METHOD].map({"none": "linear probe", "full": "full fine-tuning", "lora": "LoRA"}).to_numpy()
        )
    for c in summary.settings:
        if c != METHOD:
            out[short[c]] = [value_text(v) for v in cells[c]]
    if SCALING in cells and wide:
        out["scaling"] = [value_text(v) for v in cells[SCALING]]
    if len(out.columns) == 1:
        out["cell"] = cells["label"].to_numpy()
    unit = " %" if summary.metric.accuracy else ""
    points = " (points)" if summary.metric.accuracy else ""
    out[f"{summary.metric.title.lower()}{unit}"] = _values(summary, cells["mean"])
    out["95 % interval"] = [
        interval(summary, lo, hi).replace(" %", "") for lo, hi in zip(cells["low"], cells["high"], strict=True)
    ]
    if summary.comparison.blocked and not summary.comparison.complete:
        out["adjusted"] = _values(summary, cells["adjusted"])
    if wide:
        out["sd"] = [number(summary, v, True).lstrip("+") for v in cells["sd"]]
    out["n"] = cells["n"].astype(str).to_numpy()
    out["mark"] = cells["mark"].to_numpy()
    out[f"vs best{points if wide else ''}"] = [
        "–" if m == "best" else number(summary, v, True)
        for v, m in zip(cells["difference"], cells["mark"], strict=True)
    ]
    if wide:
        out["interval of it"] = [
            interval(summary, lo, hi, True)
            for lo, hi in zip(cells["difference_low"], cells["difference_high"], strict=True)
        ]
    for key, title in (("vs_probe", "vs linear probe"), ("vs_full", "vs full fine-tuning")):
        if key in cells:
            out[title] = [number(summary, v, True) for v in cells[key]]
    return _costs(out, cells, wide)


def _costs(out: pd.DataFrame, cells: pd.DataFrame, wide: bool) -> pd.DataFrame:
    def star(front: str) -> list[str]:
        return [" *" if f else "" for f in cells[front]]

    out["parameters"] = [
        count(v) + s for v, s in zip(cells["trainable_parameters"], star("pareto_parameters"), strict=True)
    ]
    out["seconds"] = [duration(v) + s for v, s in zip(cells["seconds"], star("pareto_seconds"), strict=True)]
    if wide:
        out["images/s"] = [duration(v) for v in cells["images_per_second"]]
        out["peak memory"] = [size(v) for v in cells["peak_memory_bytes"]]
        out["adapter"] = [size(v) for v in cells["adapter_bytes"]]
    return out


def _values(summary: Summary, column: pd.Series) -> list[str]:
    return [number(summary, v).replace(" %", "") for v in column]


def readable_rates(summary: Summary) -> pd.DataFrame:
    """`best over lr` beside `at shared lr` as text."""
    table = summary.learning_rates
    if table.empty:
        return table
    shared = value_text(table["shared_lr"].iloc[0])
    unit = ", %" if summary.metric.accuracy else ""
    with_edge = [
        value_text(lr) + (" (edge)" if e else "") for lr, e in zip(table["best_lr"], table["edge"], strict=True)
    ]
    return pd.DataFrame(
        {
            "setting": table["setting"],
            "best lr": with_edge,
            f"best over lr{unit}": _values(summary, table["best_mean"]),
            "95 % interval": [
                interval(summary, a, b) for a, b in zip(table["best_low"], table["best_high"], strict=True)
            ],
            "of rates": table["rates"].astype(str),
            f"at shared lr {shared}{unit}": _values(summary, table["shared_mean"]),
            "its 95 % interval": [
                interval(summary, a, b) for a, b in zip(table["shared_low"], table["shared_high"], strict=True)
            ],
        }
    )


def readable_effects(summary: Summary) -> pd.DataFrame:
    """Main effects as text (points for accuracies)."""
    t = summary.effects.table
    if t.empty:
        return t
    return pd.DataFrame(
        {
            "setting": t["setting"],
            "level": [value_text(v) for v in t["level"]],
            "against": [value_text(v) for v in t["against"]],
            "effect": [number(summary, v, True) for v in t["effect"]],
            "95 % interval": [interval(summary, a, b, True) for a, b in zip(t["low"], t["high"], strict=True)],
            "p (setting)": [f"{p:.2g}" for p in t["p"]],
        }
    )


def readable_unfinished(summary: Summary) -> pd.DataFrame:
    t = summary.unfinished
    out = t.drop(columns="value").copy()
    out["epoch"] = ["–" if math.isnan(v) else str(int(v)) for v in t["epoch"]]
    out["last value"] = [number(summary, v) for v in t["value"]]
    return out.astype(str)


def readable_pivot(summary: Summary) -> pd.DataFrame:
    assert summary.pivot is not None
    table = summary.pivot
    rows = {f"{table.index.name} \\ {table.columns.name}": [value_text(v) for v in table.index]}
    body: dict[str, Any] = {value_text(c): _values(summary, table[c]) for c in table.columns}
    return pd.DataFrame({**rows, **body})


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; text right-aligned where it is a number."""
    head = "| " + " | ".join(markdown_escape(c) for c in table.columns) + " |"
    rule = "|" + "|".join("---:" if _numeric(table[c]) else "---" for c in table.columns) + "|"
    rows = ["| " + " | ".join(markdown_escape(v) for v in row) + " |" for row in table.itertuples(index=False)]
    return "\n".join([head, rule, *rows])


def markdown_escape(text: object) -> str:
    """Text as Markdown prints it, in one line."""
    return re.sub(r"([\\|*`])", r"\\\1", " ".join(str(text).split())).replace("<", "&lt;")


def _numeric(column: pd.Series) -> bool:
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
    """A table for the LaTeX package booktabs."""
    align = "".join("r" if _numeric(table[c]) else "l" for c in table.columns)
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{latex_escape(caption)}}}",
        f"\\begin{{tabular}}{{{align}}}",
        "\\toprule",
        " & ".join(latex_escape(c) for c in table.columns) + " \\\\",
        "\\midrule",
        *(" & ".join(latex_escape(v) for v in row) + " \\\\" for row in table.itertuples(index=False)),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def table_md(summary: Summary) -> str:
    """``table.md``: verdict, warnings and the tables."""
    parts = [
        f"**{markdown_escape(summary.verdict)}**",
        *(f"> Warning: {markdown_escape(w)}" for w in summary.warnings),
        markdown(readable(summary)),
        LEGEND,
    ]
    if not summary.learning_rates.empty:
        parts += ["### Best over lr, and at the shared lr", markdown(readable_rates(summary))]
    if not summary.effects.table.empty:
        parts += ["### Main effects", markdown(readable_effects(summary)), *summary.effects.notes]
    if summary.pivot is not None:
        parts += ["### Pivot", markdown(readable_pivot(summary))]
    if len(summary.unfinished):
        parts += ["### Not averaged", markdown(readable_unfinished(summary))]
    return "\n\n".join(parts) + "\n"


def table_tex(summary: Summary) -> str:
    """``table.tex``: the cells table, the warnings as comments."""
    comments = "".join(f"% {' '.join(w.split())}\n" for w in [summary.verdict, *summary.warnings])
    return comments + latex(readable(summary), summary.verdict)


LEGEND = (
    "Marks: *best* has the highest mean; *candidate* may still be the true best (the true best is among best and "
    "candidates with 95 %); *worse* is shown to be worse than the best (5 % risk over all pairs together); *open* is "
    "no candidate, yet not shown to be worse; *no verdict*: one seed. A star marks the Pareto front of the metric "
    "against that cost."
)


LEAST_NEEDED = ("vs full fine-tuning", "vs linear probe", "seconds", "parameters", "95 % interval")
"""Columns of the cells table that a narrow terminal does without, the first first."""


def _narrowest(column: pd.Series) -> int:
    """Characters that a column needs so that no number and no word is broken."""
    text = [str(v) for v in column]
    words = [w for t in [str(column.name), *([] if _numeric(column) else text)] for w in t.split()]
    return max(map(len, [*words, *(text if _numeric(column) else [])]), default=1)


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
        if table.empty:
            return
        rows, columns, table = len(table), table.columns, table.head(top)
        widths = _widths(table, console.width)
        for c in LEAST_NEEDED:
            if widths is None:
                table = table.drop(columns=c, errors="ignore")
                widths = _widths(table, console.width)
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for k, c in enumerate(table.columns):
            side: Any = "right" if _numeric(table[c]) else "left"
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
    show(readable_rates(summary), "Best over lr, and at the shared lr")
    show(readable_effects(summary), "Main effects" + (" (points)" if summary.metric.accuracy else ""))
    if summary.pivot is not None:
        show(readable_pivot(summary), "Pivot")
    show(readable_unfinished(summary), "Not averaged")
