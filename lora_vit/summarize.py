"""``python -m lora_vit.summarize NAME``: what can be told apart, what cannot, and what it cost."""

if __name__ == "__main__":  # before the imports, which Ctrl-C then ends in one line
    from lora_vit import cli

    cli.main("summarize")

import argparse
import math
import os
import shlex
import sys
from pathlib import Path

from rich.console import Console

from lora_vit.analysis import export
from lora_vit.analysis.core import summarize
from lora_vit.analysis.load import OUTPUT
from lora_vit.analysis.texts import number
from lora_vit.cli import named
from lora_vit.files import write_files
from lora_vit.terminal import from_here

PICTURES = ("difference", "race", "by_", "search", "cut_ranks", "spectrum")  # how their names begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="+", type=named, metavar="SWEEP", help="a sweep or a run, by its name or folder")
    add("--out", metavar="FOLDER", help=f"where the files go (default: {OUTPUT}/ in the first folder)")
    add("--where", metavar="CONDITION", help='which trials, for example "rank >= 4 and dropout == 0"')
    add("--metric", metavar="NAME", help="what to compare by, as in trainer.metric (default: the trials' own)")
    add("--margin", type=float, metavar="POINTS",
        help="what difference matters: names the cheapest cell shown to be at most that many percentage points below "
             "the best (default: a race's own)")  # fmt: skip
    add("--top", type=int, default=30, metavar="N", help="rows of each table on the terminal (default 30)")
    add("--no-plots", action="store_true", help="tables and report without pictures")


def run(args: argparse.Namespace) -> int:
    """Write the files, print the comparison; 0. Raises RecordError: there is nothing to compare."""
    out = Path(args.out or args.folders[0] / OUTPUT)
    summary = summarize(args.folders, where=args.where, margin=args.margin, metric=args.metric)
    files = {
        "trials.csv": summary.trials.to_csv(index=False).encode(),
        "cells.csv": summary.cells.to_csv(index=False).encode(),
        "table.md": export.table_md(summary).encode(),
        "table.tex": export.table_tex(summary).encode(),
    }
    pictures = {}
    if not args.no_plots:
        from lora_vit.analysis.plots import render  # matplotlib is slow to import

        for name, figure in summary.figures.items():
            pictures[name] = files[f"{name}.svg"] = render(figure, "svg")
            files[f"{name}.png"] = render(figure, "png")
    files["report.html"] = export.html_report(summary, pictures, f"lora-vit {shlex.join(args.typed)}").encode()
    write_files(out, files)
    for old in out.iterdir():  # of an earlier summary
        if old.suffix in (".png", ".svg") and old.name.startswith(PICTURES) and old.name not in files:
            old.unlink()
    console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
    export.terminal(summary, console, max(1, args.top))
    test = f"Test {summary.title} of that cell: {number(summary.test.mean)} ({summary.errors_of_test()})."
    use = f"python -m lora_vit.predict {from_here(summary.chosen)} IMAGE... (or evaluate; merge and export with --out)"
    lines = [test * math.isfinite(summary.test.mean), summary.power_text(), f"Report: {out / 'report.html'}"]
    for line in filter(None, [*lines, f"The best cell's first seed: {use}"]):
        console.print(line, soft_wrap=True, markup=False)  # paths stay whole
    return 0
