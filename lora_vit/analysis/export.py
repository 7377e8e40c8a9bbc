"""The tables of a summary as text, and text as Markdown, LaTeX, on a terminal and as one self-contained HTML page.

``report.html.j2`` is the page, ``report.css`` its style, ``report.js`` what sorts the tables.
"""

import contextlib
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import yaml
from markupsafe import Markup
from markupsafe import escape as escape_html
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_vit.analysis.summary import Summary
from lora_vit.analysis.tables import SCALING, best_cell
from lora_vit.analysis.texts import NONE, count, duration, loss, number, plain, points, signed, size
from lora_vit.config.names import METHOD, METHODS, short_names, value_text
from lora_vit.metrics import LOSSES

RATES_NOTE = (
    "the best over learning rates is selected among several and so a little too good, more so the more rates were "
    "tried; the shared rate is selected too, as the best on average, and may suit some settings better"
)
LATEX_ROWS, PAGE_ROWS = 40, 500  # of a table: so many fit a sheet of paper; of more the page names the CSV file
LEAST_NEEDED = (
    "vs full fine-tuning", "vs linear probe", "seconds", "parameters", "pictures ±", "seeds ±", "95 % interval",
)  # fmt: skip
"""Columns of the cells table that a narrow terminal does without, the first first."""

Column = str | tuple[str, str, Callable[[Any], str]]


def as_text(frame: pd.DataFrame, *columns: Column) -> pd.DataFrame:
    """A table of text: for each column its title, its name in the frame, and what says a value; or its name alone.

    ``"low high"`` is an interval between two columns. A column that the frame lacks is left out.
    """
    out = {}
    for column in columns:
        title, name, text = (column, column, value_text) if isinstance(column, str) else column
        ends = [[text(v) for v in frame[end]] for end in name.split() if end in frame]
        if ends:
            rows = zip(*ends, strict=True)
            out[title] = [low if low == NONE or not high else f"{low} to {high[0]}" for low, *high in rows]
    return pd.DataFrame(out, dtype=object)


def readable(summary: Summary, wide: bool = True) -> pd.DataFrame:
    """The cells table as text, of settings those that vary; ``wide=False`` leaves out what fits no terminal."""
    cells, comparison, fixed = summary.cells, summary.comparison, summary.race is None
    short = short_names(summary.settings)
    settings = [(short[c], c, value_text if c != METHOD else lambda v: METHODS.get(v, str(v))) for c in short]
    behind = cells["difference"].where(~cells["mark"].isin(["best", "selected"]))
    table = as_text(
        cells.assign(place=np.arange(1, len(cells) + 1), behind=behind),
        ("#", "place", str),
        *(settings or [("cell", "label", str)]),
        *[("effective scaling" if "lora.scaling" in short else "scaling", SCALING, value_text)] * wide,
        (f"val {summary.title} %", "mean", plain),
        ("95 % interval", "low high", plain),
        *[("adjusted", "adjusted", plain)] * (comparison.blocked and not comparison.complete and fixed),
        *[("sd", "sd", plain)] * wide,
        *("n", "failed", "mark"),
        (f"within {plain(summary.margin or 0)}", "within", lambda within: "yes" if within else ""),
        ("vs best (points)" if wide else "vs best", "behind", signed),
        *[("interval of it", "difference_low difference_high", signed)] * (wide and fixed),
        ("seeds ±", "difference_seeds", plain),
        *[("pictures ±", "difference_pictures", plain)] * bool(summary.pictures),
        ("vs linear probe", "vs_probe", signed),
        ("vs full fine-tuning", "vs_full", signed),
        ("parameters", "trainable_parameters", count),
        ("seconds", "seconds", duration),
        *[("images/s", "images_per_second", duration), ("peak memory", "peak_memory_bytes", size)] * wide,
        *[("adapter", "adapter_bytes", size)] * wide,
        *[(m.title, f"val_{n}", loss) for n, m in LOSSES.items() if wide],
        *[(f"{m.title} vs best", f"d_{n}_low d_{n}_high", lambda v: loss(v, "+")) for n, m in LOSSES.items() if wide],
    )
    for name in ("parameters", "seconds"):
        table[name] += np.where(cells[f"pareto_{name}"], " *", "")
    return table


def sections(summary: Summary) -> list[tuple[str, pd.DataFrame, list[str]]]:
    """Below the cells: a title, a table of text and what must be known to read it; those that hold anything."""
    rates, effects, shared = summary.learning_rates, summary.effects, ""
    if len(rates):
        shared = value_text(rates["shared_lr"].iloc[0])
        rates = rates.assign(best_lr=rates["best_lr"].map(value_text) + np.where(rates["edge"], " (edge)", ""))
    best_over_lr = as_text(
        rates,
        "setting",
        ("best lr", "best_lr", str),
        ("best over lr, %", "best_mean", plain),
        ("95 % interval", "best_low best_high", plain),
        ("of rates", "rates", str),
        (f"at shared lr {shared}, %", "shared_mean", plain),
        ("its 95 % interval", "shared_low shared_high", plain),
    )
    signed_columns = ("effect", "effect", signed), ("95 % interval", "low high", signed)
    main_effects = as_text(effects.table, "setting", "level", "against", "at", *signed_columns)
    of_trials = ("trial", "label", "seed", "status", "epoch", "reason", ("last value", "value", number))
    found = [
        ("Best over lr, and at the shared lr", best_over_lr, [RATES_NOTE] * bool(len(rates))),
        ("Effects (points), each where the other settings are best", main_effects, effects.notes),
        ("Not averaged", as_text(summary.unfinished, *of_trials), []),
    ]
    return [section for section in found if len(section[1]) or section[2]]


def numeric(table: pd.DataFrame) -> list[bool]:
    """Which columns of text hold numbers, and stand on the right."""
    return [all(str(v)[:1] in "+-–0123456789" for v in table[c]) for c in table.columns]


def _in_one_line(text: object) -> str:
    return " ".join(str(text).split())


def markdown_escape(text: object) -> str:
    return re.sub(r"([\\|*`])", r"\\\1", _in_one_line(text)).replace("<", "&lt;")


def markdown(table: pd.DataFrame) -> str:
    rule = ["---:" if right else "---" for right in numeric(table)]
    lines = [[markdown_escape(v) for v in row] for row in (list(table.columns), *table.to_numpy().tolist())]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def table_md(summary: Summary) -> str:
    parts = [f"**{markdown_escape(summary.verdict)}**"]
    parts += [f"> Warning: {markdown_escape(w)}" for w in summary.warnings]
    parts += [markdown(readable(summary)), summary.legend]
    for title, table, notes in sections(summary):
        parts += [f"### {title}", *[markdown(table)] * bool(len(table)), *map(markdown_escape, notes)]
    return "\n\n".join(parts) + "\n"


_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
    "<": r"\textless{}", ">": r"\textgreater{}", **{c: f"\\{c}" for c in "&%$#_{}"},
})  # fmt: skip


def latex_escape(text: object) -> str:
    return _in_one_line(text).translate(_LATEX)


def table_tex(summary: Summary) -> str:
    """``table.tex``, for booktabs and graphicx: no wider than a page, the verdict as caption, warnings as comments."""
    whole = readable(summary, wide=False)
    table, caption = whole.head(LATEX_ROWS), latex_escape(summary.verdict)
    caption += f" The first {LATEX_ROWS} of {len(whole)} cells." if len(whole) > LATEX_ROWS else ""
    comments = "".join(f"% {_in_one_line(line)}\n" for line in [summary.verdict, *summary.warnings])
    style = table.style.hide(axis="index").format(latex_escape).format_index(latex_escape, axis=1)
    align = "".join("r" if right else "l" for right in numeric(table))
    rows = style.to_latex(hrules=True, column_format=align).rstrip()
    head = f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\footnotesize\n\\setlength{{\\tabcolsep}}{{4pt}}\n"
    fits = "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
    return f"{comments}{head}{fits}{rows}}}\n\\end{{table}}\n"


def terminal(summary: Summary, console: Console, top: int) -> None:
    """Print the tables, at most ``top`` rows each, without columns that find no room; no number or word is broken."""
    many = "s" * (len(summary.cells) > 1)
    cells = (f"{len(summary.cells)} cell{many}, best first", readable(summary, wide=False), list[str]())
    for title, whole, notes in [cells, *sections(summary)]:
        table = whole.head(top)
        columns = dict(zip(table.columns, numeric(table), strict=True))
        widths = {}
        for c, right in columns.items():
            unbroken = table[c] if right else " ".join(table[c]).split()
            widths[c] = max(map(len, [*c.split(), *unbroken]))
        room = console.width - sum(widths.values()) - 2 * (len(widths) - 1)  # two blanks between columns
        for c in LEAST_NEEDED:
            if room < 0 and c in widths:
                room += widths.pop(c) + 2
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for c, least in widths.items():
            more = min(max(map(len, [c, *table[c]])) - least, max(room, 0))
            side: Any = "right" if columns[c] else "left"
            grid.add_column(escape(c), justify=side, overflow="fold", width=None if room < 0 else least + more)
            room -= more
        for row in table[list(widths)].itertuples(index=False):
            grid.add_row(*map(escape, row))
        if len(table):
            console.print(grid)
        if len(whole) > top:
            console.print(f"... {len(whole) - top} more rows (see the files)")
        if left_out := [c for c in columns if c not in widths]:
            console.print(f"The terminal is too narrow for: {', '.join(left_out)} (see the files)")
        for note in notes:
            console.print(f"note: {escape(note)}")
        console.print()


def inline_svg(data: bytes, name: str) -> Markup:
    """An SVG picture inside the page: no XML head, ids of its own."""
    text = re.sub(r"<metadata>.*?</metadata>", "", data.decode(), flags=re.S)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape_html(name.replace("_", " "))}" ', 1))


def html_report(summary: Summary, pictures: dict[str, bytes], command: str, live: str = "") -> str:
    """The whole page. ``pictures``: SVG by name; ``command``: what makes this page again; ``live``: of a server."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    pages.filters.update(number=number, plain=plain, points=points)
    pages.filters["emphasis"] = lambda text: Markup(re.sub(r"\*(.+?)\*", r"<em>\1</em>", str(escape_html(text))))
    names = ", ".join(Path(f).name or f for f in summary.folders)
    trials, facts = summary.trials, summary.environment
    best, completed = best_cell(summary.cells), trials["status"] == "completed"
    commands = []  # what Hydra was called with to train trials of the best cell, where that is known
    for folder in trials.loc[completed & (trials["cell"] == best["cell"]), "folder"].head(5):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            hydra = yaml.safe_load((Path(folder) / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))["hydra"]
            given = [*hydra["overrides"]["hydra"], *hydra["overrides"]["task"]]
            mode = ["-m"] if hydra["mode"] == "MULTIRUN" else []
            commands.append(shlex.join(["python", "-m", "lora_vit.train", *mode, *map(str, given)]))
    commits = facts.loc[(facts["fact"] == "environment.commit") & (facts["value"] != NONE), "value"].tolist()
    return pages.get_template("report.html.j2").render(
        title=names + (f", where {summary.where}" if summary.where else ""),
        summary=summary,
        live=live,
        best=best,
        tested=math.isfinite(summary.test.mean),
        power=summary.power(),
        completed=int(completed.sum()),
        numeric=numeric,
        most=PAGE_ROWS,
        cells=readable(summary),
        sections=sections(summary),
        pictures=[inline_svg(data, name) for name, data in pictures.items()],
        trials=as_text(
            trials,
            *("trial", ("cell", "label", str), "seed", "status", "epoch"),
            (f"val {summary.title} %", f"val_{summary.metric}", plain),
            ("val loss", "val_loss", loss),
            ("training loss", "train_loss", loss),
            ("seconds", "seconds", duration),
            ("pack", "pack_size", value_text),
        ),
        commands=dict.fromkeys([*commands, command]),
        commits=commits[:5],
    )
