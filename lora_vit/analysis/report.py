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
from lora_vit.analysis.tables import value_text

MOST_ROWS = 500
"""Rows of a table on the page; the rest is in the CSV file."""

_NUMBER = re.compile(r"^\s*([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)\s*(kB|MB|GB|M|B|%)?[ *]*$")
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "M": 1e6, "B": 1.0, "%": 1.0, None: 1.0}


def sort_key(text: str) -> float:
    """The number that a table's text stands for (``1.2 MB`` is 1,200,000; ``–`` is NaN)."""
    match = _NUMBER.match(text)
    return float(match.group(1).replace(",", "")) * _UNITS[match.group(2)] if match else math.nan


def page_table(table: pd.DataFrame, file: str = "cells.csv") -> dict[str, Any] | None:
    """A table of text for the template, None for an empty one; columns of numbers (``numbers``) sort as numbers.

    ``file`` has the rows after the first MOST_ROWS.
    """
    shown = table.head(MOST_ROWS).astype(str)
    columns = []
    for name in table.columns:
        values = shown[name].tolist()
        keys = [sort_key(v) for v in values]
        sorts = any(map(math.isfinite, keys)) and all(
            math.isfinite(k) or v in ("–", "") for k, v in zip(keys, values, strict=True)
        )
        right = sorts or export.numeric(shown[name])
        columns.append({"name": name, "texts": values, "numbers": keys if sorts else None, "right": right})
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
        legend=export.legend(summary),
        rates=page_table(export.readable_rates(summary)),
        effects=page_table(export.readable_effects(summary)),
        pivot=page_table(export.readable_pivot(summary)),
        pair=texts.pair_text(summary) if summary.pair else None,
        pictures=[inline_svg(data, name) for name, data in pictures.items()],
        unfinished=page_table(export.readable_unfinished(summary), "trials.csv"),
        methods=texts.methods(summary),
        trials=page_table(_trials(summary), "trials.csv"),
        environment=page_table(summary.environment),
        commands=[*training_commands(best["folder"].head(5).tolist()), command],
        commits=commits[:5],
    )


def _trials(summary: Summary) -> pd.DataFrame:
    t = summary.trials
    return pd.DataFrame(
        {
            "trial": t["trial"],
            "cell": t["label"],
            "seed": t["seed"],
            "status": t["status"],
            "epoch": [value_text(v) for v in t["epoch"]],
            "val accuracy %": ["–" if math.isnan(v) else f"{100 * v:.2f}" for v in t["val_accuracy"]],
            "val loss": ["–" if math.isnan(v) else f"{v:.4f}" for v in t["val_loss"]],
            "training loss": ["–" if math.isnan(v) else f"{v:.4f}" for v in t["train_loss"]],
            "seconds": [texts.duration(v) for v in t["seconds"]],
            "pack": [value_text(v) for v in t["pack_size"]],
        }
    )


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
