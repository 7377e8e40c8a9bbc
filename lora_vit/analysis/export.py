"""The tables of a summary as text, and text as Markdown, LaTeX, on a terminal and as one self-contained HTML page.

``report.html.j2`` is the page, ``report.css`` its style, ``report.js`` what sorts, filters and lights up.
"""

import base64
import functools
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from markupsafe import escape as escape_html
from rich.console import Console
from rich.markup import escape

from lora_vit.analysis.summary import Summary
from lora_vit.analysis.tables import SCALING, best_cell, confused
from lora_vit.analysis.texts import NONE, count, duration, loss, number, plain, points, signed, size
from lora_vit.config.names import METHOD, METHODS, short_names, value_text
from lora_vit.metrics import LOSSES
from lora_vit.records import PREDICTIONS, SEARCH, state_of
from lora_vit.terminal import from_here, is_numeric, print_table

ASKED_NOTE = "the intervals hold for all pairs of the table at once and have the choice of the best cells inside"
TEST_NOTE = "test is shown for cells that were chosen on val, one for each method"
LATEX_ROWS, PAGE_ROWS = 40, 500  # of a table: so many fit a sheet of paper; of more the page names the CSV file
MOST_PROBLEMS = 20  # on the terminal
SPARE = ["seconds", "pictures ±", "images ±", "seeds ±", "P(best)", "95 % interval", "#", "parameters", "best cell"]
"""Columns that a narrow terminal or page does without, the first first; papers and notebooks have the last two."""

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
    cells, fixed = summary.cells, summary.race is None
    short = short_names(summary.settings)
    settings = [(short[c], c, value_text if c != METHOD else lambda v: METHODS.get(v, str(v))) for c in short]
    behind = cells["difference"].where(~cells["mark"].isin(["best", "selected"]))
    table = as_text(
        cells.assign(place=np.arange(1, len(cells) + 1), behind=behind),
        ("#", "place", str),
        *(settings or [("cell", "label", str)]),
        ("sweep", "sweep", str),
        *[("effective scaling" if "lora.scaling" in short else "scaling", SCALING, value_text)] * wide,
        (f"val {summary.title} %", "mean", plain),
        ("95 % interval", "low high", plain),
        *[("sd", "sd", plain)] * wide,
        *("n", "failed", "mark"),
        (f"within {plain(summary.margin or 0)}", "within", lambda within: "yes" if within else ""),
        ("vs best", "behind", signed),
        *[("interval of it", "difference_low difference_high", signed)] * (wide and fixed),
        *[("seeds ±", "difference_seeds", plain)] * (not summary.comparison.overlap),
        *[("pictures ±", "difference_pictures", plain)] * bool(summary.pictures),
        ("P(best)", "p_best", lambda p: f"{p:.2f}" if p == p else NONE),
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
    effects, first = summary.effects, "" if summary.race is None else ", by the first seeds"
    signed_columns = ("effect", "effect", signed), ("95 % interval", "low high", signed)
    asked: list[tuple[str, pd.DataFrame, list[str]]] = []
    for title, table in summary.answers.items():
        shown = as_text(
            table,
            *(title, ("best cell", "label", str), (f"val {summary.title} %", "mean", plain)),
            ("test %", "test", lambda test: plain(test.mean)),
            ("seeds ±", "test", lambda test: plain(summary.halves_of_test(test)[0])),
            ("images ±", "test", lambda test: plain(summary.halves_of_test(test)[1])),
            (f"{table['base'][0]} is", "is", str),
            *(("by", "difference", signed), (f"{summary.sure} interval", "low high", signed)),
            ("parameters", "trainable_parameters", count),
        )
        asked.append((f"Each {title} at its best{first}", shown, [ASKED_NOTE, *[TEST_NOTE] * ("test" in table)]))
    main_effects = as_text(effects.table, "setting", "level", "against", "at", *signed_columns)
    of_trials = ("trial", "label", "seed", "status", "epoch", "reason", ("last value", "value", number))
    found = [
        *asked,
        ("Effects (points), each where the other settings are best", main_effects, effects.notes),
        ("Not averaged", as_text(summary.unfinished, *of_trials), []),
    ]
    return [section for section in found if len(section[1]) or section[2]]


def numeric(table: pd.DataFrame) -> list[bool]:
    return [is_numeric(table[c]) for c in table]


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
    "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "−": "$-$", **{c: f"\\{c}" for c in "&%$#_{}"},
})  # fmt: skip


def latex_escape(text: object) -> str:
    return re.sub(r"(?<![\w.-])-(?=\d)", "−", _in_one_line(text)).translate(_LATEX)  # a minus before a number


def brief(summary: Summary) -> pd.DataFrame:
    """The cells table in few columns, for papers and notebooks: settings, mean ± sd, mark, difference, size."""
    whole, table = readable(summary), readable(summary, wide=False).drop(columns=SPARE[:-2], errors="ignore")
    for name, form, more in ((f"val {summary.title} %", " ± {}", "sd"), ("vs best", " ({})", "interval of it")):
        table[name] += ["" if v == NONE else form.format(v) for v in whole.get(more, [NONE] * len(whole))]
    return table.assign(parameters=table["parameters"].str.rstrip(" *"))


def table_tex(summary: Summary) -> str:
    """``table.tex`` for a paper, no wider than its page; what its preamble needs, verdict and warnings as comments."""
    whole = brief(summary)
    caption = f"Val {summary.title}: mean ± sd over n {summary.unit}, and difference from the best in points"
    caption += f"{f' with its simultaneous {summary.sure} interval' * (summary.race is None)}."
    caption += f" The first {LATEX_ROWS} of {len(whole)} cells." if len(whole) > LATEX_ROWS else ""
    for told in re.findall(r"(?:^[\w ]+: |(?<=[;.] ))\*.+?[;.](?= |$)", summary.legend):  # of the marks that are there
        caption += f" {told}" * bool({*re.findall(r"\*(.+?)\*", told)} & {*whole["mark"]})
    caption = re.sub(r"\*(.+?)\*", r"\\emph{\1}", latex_escape(caption.rstrip(";.") + "."))
    label = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(Path(f).absolute().name for f in summary.folders))
    needs = r"In the preamble: \usepackage{booktabs,graphicx}"
    comments = "".join(f"% {_in_one_line(line)}\n" for line in [needs, summary.verdict, *summary.warnings])
    align = "".join("r" if right else "l" for right in numeric(whole))
    text = whole.head(LATEX_ROWS).map(latex_escape).rename(columns=latex_escape)
    rows = text.to_latex(index=False, column_format=align).rstrip()
    head = f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\label{{tab:{label}}}\n\\footnotesize\n"
    fits = "\\setlength{\\tabcolsep}{4pt}\n\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
    return f"{comments}{head}{fits}{rows}}}\n\\end{{table}}\n"


def terminal(summary: Summary, console: Console, top: int) -> None:
    """Print the tables, at most ``top`` rows each, what was wrong on reading, warnings and the verdict."""
    many = "s" * (len(summary.cells) > 1)
    cells = (f"{len(summary.cells)} cell{many}, best first", readable(summary, wide=False), list[str]())
    for title, table, notes in [cells, *sections(summary)]:
        print_table(console, title, [*map(str, table)], table.to_numpy().tolist(), top, SPARE)
        for note in notes:
            console.print(f"note: {escape(note)}")
        console.print()
    more = len(summary.problems) - MOST_PROBLEMS
    lines = [f"[yellow]problem:[/yellow] {escape(line)}" for line in summary.problems[:MOST_PROBLEMS]]
    lines += [f"... {more} more problems (see the report)"] * (more > 0)
    lines += [f"[yellow]warning:[/yellow] {escape(line)}" for line in summary.warnings]
    for line in [*lines, f"\n[bold]{escape(summary.verdict)}[/bold]"]:
        console.print(line, soft_wrap=True)  # paths stay whole


def inline_svg(data: bytes, name: str) -> Markup:
    """An SVG picture inside the page: no XML head, ids of its own."""
    text = re.sub(r"<metadata>.*?</metadata>", "", data.decode(), flags=re.S)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    text = re.sub(rf'\bid="{name}-cell-([^"]+)-\w+"', r'data-cell="\1"', text)  # what shows one cell alone
    text = text.replace("#1c2430", "currentColor").replace("#e4e4e4", "var(--line)")  # ink and grid, light and dark
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape_html(name.replace("_", " "))}" ', 1))


def notebook(summary: Summary) -> str:
    """What a notebook shows: verdict, warnings, cells and the first picture, as HTML that changes nothing around it."""
    cells, png = brief(summary), next((figure._repr_png_() for figure in summary.figures.values()), b"")
    picture = base64.b64encode(png).decode()
    return page("notebook", summary=summary, cells=cells, right=numeric(cells), picture=picture)


def again(summary: Summary, *settings: str) -> str:
    """The command of the sweep with other settings, into the same folder; empty where there is not one."""
    is_search = any((Path(folder) / SEARCH).is_file() for folder in summary.folders)  # whose seed is not to choose
    if not summary.command or "\n" in summary.command or is_search:
        return ""
    keys = {setting.partition("=")[0] for setting in settings}
    words = [word for word in shlex.split(summary.command) if word.partition("=")[0] not in keys]
    if not any(word.startswith(("sweep.name=", "hydra.sweep.dir=")) for word in words):
        words += [f"hydra.sweep.dir={word}" for word in shlex.split(from_here(Path(summary.folders[0])))]
    return shlex.join([*words, *settings])


def confusion(folder: Path) -> pd.DataFrame:
    """A trial's val pictures by class (rows) and predicted class; empty where they are not known."""
    try:
        names = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))["class_names"]
        with np.load(folder / PREDICTIONS) as arrays:
            return confused(arrays["val.labels"], arrays["val.predicted"], names)
    except Exception:  # numpy and zipfile raise many kinds where a file is cut off; the claims say what they lack
        return pd.DataFrame()


def html_report(summary: Summary, pictures: dict[str, bytes], command: str, live: Any = None) -> str:
    """The whole page. ``pictures``: SVG by name; ``command``: what makes this page again; ``live``: of a server."""
    names = ", ".join(Path(f).name or f for f in summary.folders)
    chosen = summary.chosen
    cells, few = readable(summary), readable(summary, wide=False)
    if "cell" not in cells:
        cells.insert(1, "cell", summary.cells["label"])
    return page(
        "html",
        title=names + (f", where {summary.where}" if summary.where else ""),
        summary=summary,
        live=live,
        best=best_cell(summary.cells),
        numeric=numeric,
        most=PAGE_ROWS,
        cells=cells,
        settings=short_names(summary.settings),
        spare=[*(c for c in cells if c not in few and c != "cell"), *SPARE],
        by_id=dict(zip(summary.cells["cell"], summary.cells.to_dict("records"), strict=True)),
        sections=sections(summary),
        pictures={name: inline_svg(data, name) for name, data in pictures.items()},
        trials=as_text(
            summary.trials,
            *("trial", ("cell", "label", str), "split", "seed", "status", "epoch"),
            (f"val {summary.title} %", f"val_{summary.metric}", plain),
            ("val loss", "val_loss", loss),
            ("training loss", "train_loss", loss),
            ("seconds", "seconds", duration),
            ("pack", "pack_size", value_text),
        ),
        asked=state_of(chosen).record,
        chosen=from_here(chosen),
        matrix=confusion(chosen),
        needed=summary.design.seeds_needed if summary.margin is None else summary.design.seeds_within,
        again=functools.partial(again, summary),
        command=command,
    )


def page(template: str, **values: Any) -> str:
    """``report.TEMPLATE.j2`` with these values."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    pages.filters.update(number=number, plain=plain, points=points, duration=duration, value=value_text)
    pages.filters["tried"] = lambda of: ", ".join(  # the values of a setting
        METHODS.get(v, str(v)) if of.name == METHOD else value_text(v)
        for v in sorted(of.dropna().unique(), key=lambda v: (isinstance(v, str), v))
    )
    pages.filters["emphasis"] = lambda text: Markup(re.sub(r"\*(.+?)\*", r"<em>\1</em>", str(escape_html(text))))
    return pages.get_template(f"report.{template}.j2").render(**values)
