"""``python -m lora_vit.sweep NAME [--serve]``: a sweep's trials as they stand; ``... work FOLDER``: one more worker."""

if __name__ == "__main__":  # before the imports, which Ctrl-C then ends in one line
    from lora_vit import cli

    cli.main("sweep")

import argparse
from collections import Counter
from pathlib import Path

from lora_vit.cli import SWEEPS, named
from lora_vit.errors import ConfigError
from lora_vit.records import PLAN
from lora_vit.sweep.engines.local import work_for_command
from lora_vit.sweep.plan import Sweep, trial_folders
from lora_vit.sweep.view import header, print_summary, standing
from lora_vit.terminal import make_console, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List a sweep's trials: status, epochs trained, metric on val. `work FOLDER` is one more worker for it: "
        "it trains packs of open trials on one device of this machine, until none is open or held by another worker."
    )
    parser.add_argument("sweep", help="name of a sweep in outputs/sweeps, or its folder; or the word `work`")
    parser.add_argument("folder", nargs="?", help="of the sweep to work on (-: a command says on standard input what)")
    parser.add_argument("--serve", nargs="?", type=int, const=0, metavar="PORT",
                        help="show the summary's page in a browser of this machine while the sweep runs")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.folder is None and args.serve is None:
        return show(find(args.sweep))
    if args.folder is None:
        from lora_vit.sweep.serve import serve  # imports pandas and matplotlib

        serve(find(args.sweep), args.serve)
    elif args.sweep != "work" or args.serve is not None:
        raise ConfigError(f"{args.sweep} {args.folder}: give one sweep (--serve goes with it alone), or `work FOLDER`")
    elif args.folder == "-":
        return work_for_command()
    else:
        from lora_vit.sweep.worker import work  # imports torch

        work(named(args.folder))
    return 0


def find(text: str) -> Path:
    """The sweep's folder. Raises ConfigError with the names that exist."""
    folder = named(text)
    if (folder / PLAN).is_file() or trial_folders(folder):
        return folder
    names = sorted(p.name for p in SWEEPS.iterdir() if p.is_dir()) if SWEEPS.is_dir() else []
    known = f" (one of: {', '.join(names)})" if names else ""
    raise ConfigError(f"{text} is neither a sweep in {SWEEPS}/ nor the folder of one: give a name{known}")


def show(folder: Path) -> int:
    """Print the trials, the best first within each status."""
    sweep = Sweep(folder)
    rows = [row for _, row in standing(sweep)]
    console = make_console()
    print_table(console, "", header(sweep.metric), rows)
    total = ", ".join(f"{n} {status}" for status, n in Counter(row[2] for row in rows).most_common())
    console.print(f"{folder}: {len(rows)} trials" + (f" ({total})" if rows else ""))
    if sweep.race:
        print_summary(console, sweep)
    return 0
