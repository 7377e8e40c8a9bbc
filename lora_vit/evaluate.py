"""Evaluate a trained trial on its own pictures or others: ``lora-vit evaluate FOLDER --split val --out errors``."""

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_vit.cli import add_trial, check_out, completed_trial, main
from lora_vit.errors import ConfigError
from lora_vit.files import write_csv, write_files
from lora_vit.metrics import METRICS, Predictions
from lora_vit.records import PREDICTIONS, TrialRecord

ROWS = 10  # of the classes on the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trial(parser)
    add = parser.add_argument
    add("--data-root", help="where the data set is now, or other labelled images of the same classes")
    add("--labels", metavar="FILE", help="a table of images and labels, of others than the trial's own")
    add("--columns", nargs=2, metavar=("IMAGE", "LABEL"), help="of that table, where their names do not say it")
    add("--split", help="of its own images: val, test (default), train or official_val")
    add("--csv", type=Path, help="write a row for each image to this file: wrong ones first, then by probability")
    add("--out", type=Path, help="write classes, confusion matrix and a page of the worst errors into this folder")


def evaluate(folder: str | Path, split: str | None = None, weights: str | None = None, data_root: str | None = None,
             device: str = "auto", labels: str | None = None, columns: Sequence[str] | None = None,
             recorded: bool = False) -> tuple[Any, TrialRecord]:  # fmt: skip
    """A completed trial's :class:`~.analysis.evaluated.Evaluated` on a split of its data, and its record.

    ``folder``: a trial's, or a sweep: its best cell's first seed; ``weights``, ``data_root``: where those that it was
    trained on are now, if elsewhere. Without a split ``data_root`` may be other images of its classes, as ``labels`` is
    (a table; ``columns``: of image and label in it): all of them are one part. ``recorded``: take the predictions of
    val and test from the record, where data and record agree. Raises ConfigError, RecordError.
    """
    folder, record, config = completed_trial(folder, weights, device)
    from lora_vit.analysis.evaluated import Evaluated
    from lora_vit.data.dataset import forget, known_content, load_data
    from lora_vit.data.other import EXTERNAL, elsewhere, external
    from lora_vit.lora.adapter import read_adapter
    from lora_vit.trained import trained_pack
    from lora_vit.training.loop import computing

    if columns and labels is None:
        raise ConfigError(f"--columns {' '.join(columns)}: give the table with --labels, or leave this out")
    forget()  # files may have changed since
    card, others, own = read_adapter(folder).card, None, config.data
    if data_root is not None or labels is not None:
        config.data, content = elsewhere(own, data_root, labels, columns, card), record.config["data"]["content"]
        if known_content(config.data) != content:
            if split is not None:
                raise ConfigError(f"--split {split} is of the trial's own data, which these are not: leave it out")
            others, line = external(config.data, own, content, card)
            print(line)
    part, predictions = split or ("test" if others is None else EXTERNAL), None
    if recorded and others is None and (data := load_data(config.data)).fingerprint == record.data["fingerprint"]:
        predictions = _recorded(folder, part, record)
    if predictions is None:
        pack = trained_pack([folder], config, others=others)
        data = pack.setup.data
        if part not in data.splits:
            raise ConfigError(f"--split {part} does not exist here (one of: {', '.join(data.splits)})")
        with computing(pack.setup.device, config.trainer.deterministic):
            predictions = pack.predict(part)[0]
    return Evaluated(**vars(predictions), data=data, part=part), record


def _recorded(folder: Path, split: str, record: TrialRecord) -> Predictions | None:
    """What a record holds of a split; None where it has no predictions, or those of another version."""
    import numpy as np

    try:
        with np.load(folder / PREDICTIONS) as arrays:
            own = {f.name: arrays[f"{split}.{f.name}"] for f in dataclasses.fields(Predictions) if f.name != "loss"}
        return Predictions(**own, loss=record.metrics[f"{split}_loss"])
    except Exception:  # numpy and zipfile raise many kinds where a file is cut off
        return None


def run(args: argparse.Namespace) -> int:
    """Print the trial's figures on a split and what its record says; exit code 1 where they differ."""
    if args.csv is not None:
        check_out(args.csv, "--csv", ".csv")
    if args.out is not None:
        write_files(args.out, {})  # refused before any work
    given = args.folder, args.split, args.weights, args.data_root, args.device, args.labels, args.columns
    try:
        found, record = evaluate(*given, recorded=args.csv is not None or args.out is not None)
    except ConfigError as error:  # the settings are options here
        said = re.sub(r"data\.(root|images)\b", "--data-root", str(error)).replace("data.labels", "--labels")
        said = re.sub(r"data\.(image|label)_column", "--columns", said)
        raise ConfigError(said) from None
    from lora_vit.terminal import make_console, print_table

    differs, classes = False, found.classes_text()
    print_table(make_console(), "Classes, least recall first", [*classes], classes.to_numpy().tolist(), ROWS)
    for name in dict.fromkeys(("balanced_accuracy", record.config["trainer"]["metric"], "accuracy")):
        value, title = METRICS[name].of(found), METRICS[name].title.title()
        ends = ", 95 % interval {1:.2%} to {2:.2%}".format(*found.accuracy()) if name == "accuracy" else ""
        print(f"{found.part.capitalize()} {title}: {value:.2%}  ({len(found.ids):,} images){ends}")
        if (recorded := record.metrics.get(f"{found.part}_{name}", value)) != value:
            print(f"the record says {recorded:.4%}: other hardware or versions")
            differs = True
    if args.csv is not None:
        rows = found.pictures()
        write_csv(args.csv, [[*rows], *rows.to_numpy().tolist()])
    if args.out is not None:
        from lora_vit.analysis.plots import confusion, render  # matplotlib is slow to import

        words = sys.argv[2 if sys.argv[1:2] == ["evaluate"] else 1 :]
        files = {
            "classes.csv": found.classes().to_csv(index=False).encode(),
            "confusion.csv": found.confusion().to_csv().encode(),
            "confusion.png": render(confusion(found.confusion()), "png"),
            "errors.html": found.errors_page(record.trial_id, f"lora-vit evaluate {shlex.join(words)}").encode(),
        }
        write_files(args.out, files)
        print(f"Wrong pictures: {args.out / 'errors.html'}")
    return int(differs)


if __name__ == "__main__":
    main("evaluate")
