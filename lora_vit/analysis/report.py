"""One self-contained HTML page: the verdict, tables that sort, pictures, warnings, methods, how to reproduce."""

from __future__ import annotations

import math
import re
import shlex
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lora_vit.analysis import export
from lora_vit.analysis.checks import best_cell, number
from lora_vit.analysis.tables import value_text

if TYPE_CHECKING:
    from lora_vit.analysis.core import Summary

MOST_TRIALS = 500
"""Rows of the page's trials table; the rest is in trials.csv."""
MOST_CELLS = 500

STYLE = """
:root { --ink: #1c2430; --soft: #5b6573; --line: #dfe3e8; --blue: #0072B2; --back: #ffffff; --tint: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 15px; font-weight: 600; color: var(--soft); margin: 0 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 38px 0 10px; } h3 { font-size: 15px; margin: 22px 0 6px; }
.verdict { font-size: 21px; line-height: 1.4; margin: 0 0 18px; padding-left: 14px; border-left: 4px solid var(--blue);
  overflow-wrap: anywhere; }
.warning { background: #fff6e5; border-left: 4px solid #E69F00; padding: 8px 12px; margin: 8px 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 18px 0; }
.fact { border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px; }
.fact b { display: block; font-size: 18px; overflow-wrap: anywhere; } .fact span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; max-height: 640px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { padding: 5px 10px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; } tbody tr:hover { background: var(--tint); }
td.n, th.n { text-align: right; } td.long { white-space: normal; min-width: 240px; overflow-wrap: anywhere; }
th { position: sticky; top: 0; background: var(--tint); font-weight: 600; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--blue); }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
.mark { padding: 1px 7px; border-radius: 9px; font-size: 12px; color: #1c2430; background: #eceff2; }
.mark.best { background: #0072B2; color: #fff; } .mark.candidate { background: #cfe6f7; } .mark.worse { background: #fbdcc9; }
.mark.open { background: #fdeecb; }
.note { color: var(--soft); font-size: 13.5px; } code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
pre { background: var(--tint); padding: 10px 12px; border-radius: 6px; overflow-x: auto; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 18px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: 8px; } figure svg { max-width: 100%; height: auto; display: block; margin: auto; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 520px) { main { padding: 16px 12px 40px; } .verdict { font-size: 18px; } th, td { padding: 4px 7px; } }
"""

SCRIPT = """
document.querySelectorAll("table.sortable").forEach(function (table) {
  table.querySelectorAll("th").forEach(function (head, column) {
    head.querySelector("button").addEventListener("click", function () {
      var up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach(function (h) { h.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      var body = table.tBodies[0], rows = Array.from(body.rows).map(function (row) {
        return { row: row, key: row.cells[column].dataset.key, text: row.cells[column].textContent };
      });
      rows.sort(function (a, b) {
        var x = parseFloat(a.key), y = parseFloat(b.key), none = isNaN(x) - isNaN(y);
        if (a.key !== undefined || b.key !== undefined) { if (none) return none; if (x !== y && !isNaN(x)) return up ? x - y : y - x; }
        return up ? a.text.localeCompare(b.text) : b.text.localeCompare(a.text);
      });
      rows.forEach(function (r) { body.appendChild(r.row); });
    });
  });
});
"""

_NUMBER = re.compile(r"^\s*([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)\s*(kB|MB|GB|M|B|%)?[ *]*$")
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "M": 1e6, "B": 1.0, "%": 1.0, None: 1.0}


def sort_key(text: str) -> float:
    """The number that a table's text stands for (``1.2 MB`` is 1,200,000; ``–`` is NaN)."""
    match = _NUMBER.match(text)
    return float(match.group(1).replace(",", "")) * _UNITS[match.group(2)] if match else math.nan


def html_table(table: pd.DataFrame, sortable: bool = True) -> str:
    """A table of text; columns of numbers sort as numbers, everything is escaped."""
    keys = {c: [sort_key(str(v)) for v in table[c]] for c in table.columns}
    texts = {c: [str(v) for v in table[c]] for c in table.columns}
    numeric = {
        c for c in table.columns if any(map(math.isfinite, keys[c]))
        and all(math.isfinite(k) or t in ("–", "") for k, t in zip(keys[c], texts[c], strict=True))
    }  # fmt: skip
    right = {c for c in table.columns if c in numeric or all(t[:1] in "+-–0123456789" for t in texts[c] if t)}

    def cell(column: str, k: int) -> str:
        text = texts[column][k]
        key = f' data-key="{keys[column][k]:.10g}"' if column in numeric else ""
        kind = ' class="n"' if column in right else ' class="long"' if len(text) > 60 else ""
        inner = (
            f'<span class="mark {escape(text.split()[0])}">{escape(text)}</span>' if column == "mark" else escape(text)
        )
        return f"<td{kind}{key}>{inner}</td>"

    head = "".join(
        f"<th{' class=n' if c in right else ''}>"
        + (f"<button>{escape(str(c))}</button>" if sortable else escape(str(c)))
        + "</th>"
        for c in table.columns
    )
    rows = "\n".join("<tr>" + "".join(cell(c, k) for c in table.columns) + "</tr>" for k in range(len(table)))
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def inline_svg(data: bytes, name: str) -> str:
    """An SVG picture inside the page: no XML head, ids of its own."""
    text = data.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(name.replace("_", " "))}" ', 1)


def html_report(summary: Summary, pictures: dict[str, bytes], command: str) -> str:
    """The whole page. ``pictures``: SVG by name; ``command``: what makes this page again."""
    title = ", ".join(_base(f) for f in summary.folders) + (f", where {summary.where}" if summary.where else "")
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(summary.verdict)}</p>',
        *(f'<div class="warning">{escape(w)}</div>' for w in summary.warnings),
        _facts(summary),
        "<h2>Cells</h2>",
        _capped(export.readable(summary), MOST_CELLS, "cells.csv"),
        f'<p class="note">{_emphasis(export.LEGEND)}</p>',
        *_more_tables(summary),
        "<h2>Pictures</h2>" if pictures else "",
        '<div class="pictures">'
        + "".join(f"<figure>{inline_svg(d, n)}</figure>" for n, d in pictures.items())
        + "</div>",
        *_not_averaged(summary),
        "<h2>What was done</h2>",
        *(f"<p>{escape(line)}</p>" for line in methods(summary)),
        "<h2>Trials</h2>",
        _capped(_trials(summary), MOST_TRIALS, "trials.csv"),
        "<h2>Environment</h2>",
        html_table(summary.environment.astype(str), sortable=False),
        "<h2>How to reproduce</h2>",
        _reproduce(summary, command),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}: summary</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(p for p in parts if p)
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def _base(folder: str) -> str:
    return folder.rstrip("/").rsplit("/", 1)[-1] or folder


def _emphasis(text: str) -> str:
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", escape(text))


def _capped(table: pd.DataFrame, most: int, file: str) -> str:
    more = (
        f'<p class="note">The first {most:,} of {len(table):,}; all of them are in {file}.</p>'
        if len(table) > most
        else ""
    )
    return html_table(table.head(most)) + more


def _facts(summary: Summary) -> str:
    best, chosen, design = best_cell(summary.cells), summary.chosen, summary.design
    rows = [(number(summary, best["mean"]), f"{summary.metric.title.lower()} of {best['label']}, n = {int(best['n'])}")]
    if math.isfinite(chosen.test):
        seeds = f"± {100 * chosen.between_seeds:.2f} between seeds, " if math.isfinite(chosen.between_seeds) else ""
        rows.append(
            (
                f"{100 * chosen.test:.2f} %",
                f"test accuracy of that cell alone ({seeds}± {100 * chosen.of_test_set:.2f} from the {chosen.images:,} test images)",
            )
        )
    if math.isfinite(design.detectable):
        unit = " points" if summary.metric.accuracy else ""
        size = number(summary, design.detectable, True).lstrip("+")
        rows.append((size + unit, "smallest true difference that this design finds with 80 %"))
    if summary.metric.accuracy and summary.comparison.possible:
        needed = design.seeds_for_half_a_point
        rows.append((f"{needed}" if needed else "more than 200", "seeds needed to find half a point with 80 %"))
    done = int((summary.trials["status"] == "completed").sum())
    rows.append((f"{done} of {len(summary.trials)}", f"trials completed, in {len(summary.cells)} cells"))
    return (
        '<div class="facts">'
        + "".join(f'<div class="fact"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in rows)
        + "</div>"
    )


def _more_tables(summary: Summary) -> list[str]:
    parts = []
    if not summary.learning_rates.empty:
        parts += [
            "<h2>Best over lr, and at the shared lr</h2>",
            _capped(export.readable_rates(summary), MOST_CELLS, "cells.csv"),
        ]
        parts.append(
            '<p class="note">The best over learning rates is selected among several and so a little too good, more so '
            "the more rates were tried; at the shared rate nothing was selected, but the rate may suit some settings better.</p>"
        )
    if not summary.effects.table.empty or summary.effects.notes:
        parts.append("<h2>Main effects</h2>")
        if not summary.effects.table.empty:
            parts.append(html_table(export.readable_effects(summary)))
        parts += [f'<p class="note">{escape(n[:1].upper() + n[1:])}.</p>' for n in summary.effects.notes]
    if summary.pivot is not None:
        parts += ["<h2>Pivot</h2>", html_table(export.readable_pivot(summary))]
    if summary.pair is not None:
        parts += ["<h2>Two trained models on the same images</h2>", f"<p>{escape(pair_text(summary))}</p>"]
    return parts


def pair_text(summary: Summary) -> str:
    """McNemar's result in words, with what it does not say."""
    assert summary.pair is not None
    first, second, r = summary.pair
    says = "differ" if r.differ else "are not shown to differ"
    return (
        f"These two trained models {says} on the {r.images:,} val images: {first} alone is right on {r.only_first}, "
        f"{second} alone on {r.only_second} (difference {100 * r.difference:+.2f} points, exact McNemar p = {r.p:.2g}). "
        "This is about these two models, not about their settings: another seed may come out the other way."
    )


def _not_averaged(summary: Summary) -> list[str]:
    parts = []
    if len(summary.unfinished):
        parts += ["<h2>Not averaged</h2>", _capped(export.readable_unfinished(summary), MOST_TRIALS, "trials.csv")]
    if summary.problems:
        shown = summary.problems[:50]
        more = [f"... {len(summary.problems) - 50} more"] if len(summary.problems) > 50 else []
        parts.append("<h3>Problems on reading</h3>")
        parts.append("<ul>" + "".join(f"<li>{escape(p)}</li>" for p in [*shown, *more]) + "</ul>")
    return parts


def _trials(summary: Summary) -> pd.DataFrame:
    t = summary.trials
    return pd.DataFrame(
        {
            "trial": t["trial"],
            "cell": t["label"],
            "seed": t["seed"].astype(str),
            "status": t["status"],
            "epoch": [value_text(v) for v in t["epoch"]],
            "val accuracy %": ["–" if math.isnan(v) else f"{100 * v:.2f}" for v in t["val_accuracy"]],
            "val loss": ["–" if math.isnan(v) else f"{v:.4f}" for v in t["val_loss"]],
            "training loss": ["–" if math.isnan(v) else f"{v:.4f}" for v in t["train_loss"]],
            "seconds": [export.duration(v) for v in t["seconds"]],
            "pack": [value_text(v) for v in t["pack_size"]],
        }
    )


def methods(summary: Summary) -> list[str]:
    """Plain words: what the figures mean and how the marks were found."""
    c, d, m = summary.comparison, summary.design, summary.metric
    lines = [
        f"Every figure is the {m.title.lower()} after the last epoch, never the best epoch. Trials that differ only in "
        "their seed are repeats of one cell; the interval of a cell is a t interval over its seeds.",
    ]
    if not c.possible:
        return [*lines, "No cells were compared: at least two cells with two seeds each are needed."]
    seeds = f"{c.seeds} seeds" + ("" if c.complete else ", some missing")
    block = (
        "Trials with the same seed see the same data order, so the seed is a block"
        if c.blocked
        else "Cells share no seeds, so there are no blocks"
    )
    lines.append(
        f"{block}; {int(c.compared.sum())} cells and {seeds} leave {c.df} degrees of freedom. A trial's error is "
        f"{number(summary, c.sd, True).lstrip('+')}{' points' if m.accuracy else ''} (pooled over all cells: "
        f"{number(summary, c.pooled_sd, True).lstrip('+')})."
        + (" The wider error is that of the half of the cells which spreads most, or the pair's own." if c.wide else "")
    )
    lines.append(
        "'Worse' is a claim over all pairs, because the best cell is itself picked by its result: Tukey's studentized "
        "range, 5 % risk that any such claim is false. 'Candidate for best' is Hsu's comparison with the best: the true "
        "best is among best and candidates with 95 %. How often both err, by simulation: docs/statistics.md."
        + (
            " With fewer than five seeds, verdicts about a single cell that spreads far more than all others err more "
            "often."
            if c.wide and c.repeats < 5
            else ""
        )
    )
    unit = " points" if m.accuracy else ""
    text = f"This design finds a true difference of {number(summary, d.detectable, True).lstrip('+')}{unit} from the best with 80 %."
    if m.accuracy:
        needed = f"{d.seeds_for_half_a_point} seeds" if d.seeds_for_half_a_point else "more than 200 seeds"
        text += f" Half a point would take {needed} per cell."
    lines.append(text)
    if math.isfinite(d.optimism):
        lines.append(
            "Winner's curse: the best of several cells looks better than it is. If all cells were equally good, the best "
            f"mean would still lie about {number(summary, d.optimism, True).lstrip('+')}{unit} above them. The test figure "
            "was not used to choose and has no such bias."
        )
    if not summary.effects.table.empty:
        lines.append(
            "Main effects come from a linear model with the seed as block, over the trials with adapters. Each level is "
            "compared with the setting's first level; intervals are 95 % each for itself, not together."
        )
    return lines


def training_commands(folders: list[str]) -> list[str]:
    """What Hydra was called with to train the trials in these folders, each once; unknown ones are left out."""
    import yaml

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


def _reproduce(summary: Summary, command: str) -> str:
    trials = summary.trials[summary.trials["status"] == "completed"]
    lines = [*training_commands(trials.loc[trials["cell"] == summary.chosen.cell, "folder"].head(5).tolist()), command]
    commits = summary.environment.loc[summary.environment["fact"] == "environment.commit", "value"].tolist()
    known = [c for c in commits if c != "–"]
    note = f"<p>The trials ran at commit {escape(', '.join(known[:5]))}.</p>" if known else ""
    folders = "<p>Each trial's resolved config is in its folder, in <code>.hydra/config.yaml</code> and <code>record.json</code>.</p>"
    return f"<pre>{escape(chr(10).join(lines))}</pre>{note}{folders}"
