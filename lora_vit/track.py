"""``lora-vit track SWEEP --to mlflow``: hand to a tracker what trials have left in their folders."""

import argparse

from lora_vit.cli import main
from lora_vit.files import read_rows
from lora_vit.records import METRICS, read_record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sweep", help="name of a sweep in outputs/sweeps, or its folder; outputs/runs: the single runs in there")
    add("--to", nargs="+", required=True, metavar="TRACKER", help="one, and settings: mlflow tracker.mlflow.uri=URI")


def run(args: argparse.Namespace) -> int:
    """Send the rows of each trial; the tracker skips those that it already has. Exit code 1 if one of them fails."""
    from lora_vit import api
    from lora_vit.sweep.__main__ import find
    from lora_vit.sweep.plan import Sweep, trial_folders
    from lora_vit.training.trackers import Tracked

    chosen = api.compose(["experiment=quickstart", f"tracker=[{args.to[0]}]", *args.to[1:]]).tracker
    sweep, failed = Sweep(find(args.sweep)), 0
    boards = {name: sweep.folder / "tensorboard" / trial.board for name, trial in sweep.trials.items()}
    for folder in (folders := trial_folders(sweep.folder)):
        record = read_record(folder)
        record.config["tracker"], record.untracked = chosen, {}
        tracked = Tracked(record, folder, boards.get(folder.name))
        for row in read_rows(folder / METRICS):
            tracked.row(row)
        tracked.finish(record.shown_status())
        failed += bool(record.untracked)
    print(f"{len(folders) - failed} of {len(folders)} trials are in {args.to[0]}")
    return int(failed > 0)


if __name__ == "__main__":
    main("track")
