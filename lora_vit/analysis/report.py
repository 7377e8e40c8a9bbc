"""One self-contained HTML page: the verdict, tables that sort, pictures, warnings, methods, how to reproduce.

``report.html.j2`` is the page, ``report.css`` its style, ``report.js`` what sorts the tables.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from markupsafe import Markup, escape

from lora_vit.analysis import export, texts
from lora_vit.analysis.summary import Summary
from lora_vit.config.names import value_text

MOST_ROWS = 500
"""Rows of a table on the page; the rest is in the CSV file."""


def page_table(table: pd.DataFrame, file: str = "cells.csv") -> dict[str, Any] | None:
    """A table of text for the template, None for an empty one; ``file`` has the rows after the first MOST_ROWS."""
    shown = table.head(MOST_ROWS).astype(str)
    columns = [{"name": c, "texts": shown[c].tolist(), "right": export.numeric(shown[c])} for c in table.columns]
    return {"columns": columns, "rows": len(shown), "all": len(table), "file": file} if len(table) else None


def inline_svg(data: bytes, name: str) -> Markup:
    """An SVG picture inside the page: no XML head, ids of its own."""
    text = data.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(name.replace("_", " "))}" ', 1))


def html_report(summary: Summary, pictures: dict[str, bytes], command: str) -> str:
    """The whole page. ``pictures``: SVG by name; ``command``: what makes this page again."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    pages.filters["emphasis"] = lambda text: Markup(re.sub(r"\*(.+?)\*", r"<em>\1</em>", str(escape(text))))
    best = summary.trials[(summary.trials["status"] == "completed") & (summary.trials["cell"] == summary.chosen.cell)]
    facts = summary.environment
    commits = facts.loc[(facts["fact"] == "environment.commit") & (facts["value"] != "–"), "value"].tolist()
    return pages.get_template("report.html.j2").render(
        title=", ".join(Path(f).name or f for f in summary.folders)
        + (f", where {summary.where}" if summary.where else ""),
        summary=summary,
        facts=texts.facts(summary),
        cells=page_table(export.readable(summary)),
        sections=[(s.title, page_table(s.table, s.file), s.notes) for s in export.sections(summary)],
        pictures=[inline_svg(data, name) for name, data in pictures.items()],
        methods=texts.methods(summary),
        trials=page_table(_trials(summary), "trials.csv"),
        environment=page_table(summary.environment),
        commands=[*training_commands(best["folder"].head(5).tolist()), command],
        commits=commits[:5],
    )


def _trials(summary: Summary) -> pd.DataFrame:
    """The trials as text."""
    t = summary.trials
    table = t[["trial", "label", "seed", "status"]].rename(columns={"label": "cell"})
    table["epoch"] = t["epoch"].map(value_text)
    table["val accuracy %"] = t["val_accuracy"].map(texts.plain)
    for title, name in (("val loss", "val_loss"), ("training loss", "train_loss")):
        table[title] = ["–" if math.isnan(v) else f"{v:.4f}" for v in t[name]]
    table["seconds"], table["pack"] = t["seconds"].map(texts.duration), t["pack_size"].map(value_text)
    return table


def training_commands(folders: list[str]) -> list[str]:
    """What Hydra was called with to train the trials in these folders, each once; unknown ones are left out."""
    found = []
    for folder in folders:
        try:
            hydra = yaml.safe_load((Path(folder) / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))["hydra"]
            given = [*hydra["overrides"]["hydra"], *hydra["overrides"]["task"]]
            mode = ["-m"] if hydra["mode"] == "MULTIRUN" else []
            found.append(shlex.join(["python", "-m", "lora_vit.train", *mode, *map(str, given)]))
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            continue
    return list(dict.fromkeys(found))
