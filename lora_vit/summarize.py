"""``python -m lora_vit.summarize outputs/sweeps/NAME``: what can be told apart, what cannot, and what it cost."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which Ctrl-C then ends in one line
    from lora_vit import cli

    cli.main("summarize")

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_vit.analysis import Summary, export, summarize, texts
from lora_vit.analysis.load import OUTPUT
from lora_vit.analysis.report import html_report
from lora_vit.errors import RecordError
from lora_vit.files import replacing

PICTURES = ("cells", "race", "by_", "heat_", "learning_curves", "pareto_")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m lora_vit.summarize", description="Compare the trials of one or more folders."
    )
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="a sweep's or a run's folder")
    p.add_argument("--out", metavar="FOLDER", help=f"where the files go (default: {OUTPUT}/ in the first folder)")
    p.add_argument("--metric", default="val_accuracy", help="val_accuracy (default), val_loss or train_loss")
    p.add_argument("--where", metavar="CONDITION", help='which trials, for example "rank >= 4 and dropout == 0"')
    p.add_argument("--pivot", nargs=2, metavar=("ROW", "COLUMN"), help="a table of one setting against another")
    p.add_argument("--compare", nargs=2, metavar="TRIAL", help="McNemar's test of two trained models on the val images")
    p.add_argument("--spreads", choices=("auto", "equal", "unequal"), default="auto",
                   help="whether cells are taken to spread equally over seeds (default: tested)")  # fmt: skip
    p.add_argument("--margin", type=float, metavar="POINTS",
                   help="what difference matters: names the cheapest cell shown to be at most that far below the best "
                        "(percentage points, for a loss its units; default: a race's own)")  # fmt: skip
    p.add_argument("--top", type=int, default=30, metavar="N", help="rows of each table on the terminal (default 30)")
    p.add_argument("--no-plots", action="store_true", help="tables and report without pictures")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison and write the files; 0, or 1 with one line on stderr."""
    args = parser().parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        out = Path(args.out) if args.out else Path(args.folders[0]) / OUTPUT
        summary = summarize(args.folders, args.metric, args.where, args.pivot, args.compare, args.spreads, args.margin)
        files = render_files(summary, "python -m lora_vit.summarize " + shlex.join(given), not args.no_plots)
        write_files(out, files)
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(summary, args.top, out)
    return 0


def render_files(summary: Summary, command: str, pictures: bool = True) -> dict[str, bytes]:
    """Every file of a summary by name, in the order of writing (the report last)."""
    files = {
        "trials.csv": summary.trials.to_csv(index=False).encode(),
        "cells.csv": summary.cells.to_csv(index=False).encode(),
        "table.md": export.table_md(summary).encode(),
        "table.tex": export.table_tex(summary).encode(),
    }
    if summary.pivot is not None:
        files["pivot.csv"] = summary.pivot.to_csv().encode()
    inside = {}
    if pictures:
        from lora_vit.analysis.plots import draw_all, render  # matplotlib is slow to import

        for name, figure in draw_all(summary).items():
            inside[name] = files[f"{name}.svg"] = render(figure, "svg")
            files[f"{name}.png"] = render(figure, "png")
    files["report.html"] = html_report(summary, inside, command).encode()
    return files


def write_files(out: Path, files: dict[str, bytes]) -> None:
    """Write each file atomically; pictures of an earlier summary that this one does not have are removed.

    Raises:
        RecordError: the folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with replacing(out / name) as file:
                file.write(data)
        for old in out.iterdir():
            ours = old.name == "pivot.csv" or (old.suffix in (".png", ".svg") and old.name.startswith(PICTURES))
            if ours and old.name not in files:
                old.unlink()
    except OSError as error:
        raise RecordError(f"{out} cannot be written ({error.strerror}): give another folder with --out") from None


def _print(summary: Summary, top: int, out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
    export.terminal(summary, console, max(1, top))

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)  # paths stay whole

    for line in summary.effects.notes:
        say(f"note: {escape(line)}")
    if summary.pair is not None:
        say(escape(texts.pair_text(summary)))
    for problem in summary.problems[:20]:
        say(f"[yellow]problem:[/yellow] {escape(problem)}")
    if len(summary.problems) > 20:
        say(f"... {len(summary.problems) - 20} more problems (see the report)")
    for warning in summary.warnings:
        say(f"[yellow]warning:[/yellow] {escape(warning)}")
    say(f"\n[bold]{escape(summary.verdict)}[/bold]")
    for line in texts.closing(summary):
        say(line)
    say(f"Report: {escape(str(out / 'report.html'))}")
