"""``lora-vit COMMAND ...``: one parser for all commands, and what those on a trained trial share. No torch, no numpy.

Only the module of the command that is given is imported: its ``add_arguments(parser)`` and ``run(args)``, which returns
the exit code. ``python -m MODULE ...`` is the same.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_vit import __version__
from lora_vit.config import DATASETS, TrialConfig, from_dict, is_weights_file
from lora_vit.config.identity import file_and_prefix
from lora_vit.errors import RecordError, reporting
from lora_vit.records import PLAN, TrialRecord, read_record

SWEEPS, RUNS = Path("outputs/sweeps"), Path("outputs/runs")
COMMANDS = {  # the module of each, and what it does
    "train": ("lora_vit.train", "train one trial, or with -m a sweep of trials"),
    "fetch": ("lora_vit.fetch", "bring weights and images here, before jobs that have no network"),
    "sweep": ("lora_vit.sweep.__main__", "list a sweep's trials, or train some of them on this machine"),
    "summarize": ("lora_vit.summarize", "compare the trials of sweeps: tables, pictures, a report"),
    "track": ("lora_vit.track", "hand to a tracker (MLflow, W&B, ...) what trials have left in their folders"),
    "evaluate": ("lora_vit.evaluate", "measure a trained trial on its own images or others, and show the wrong ones"),
    "predict": ("lora_vit.predict", "classify images with a trained trial"),
    "merge": ("lora_vit.merge", "write a trained trial's weights under the backbone's own names"),
    "export": ("lora_vit.export", "write a trained trial for other libraries"),
    "cut": ("lora_vit.cut", "write a trained trial's adapter at a lower rank"),
    "ranks": ("lora_vit.cut", "cut a sweep's trials of the highest rank to lower ones, and measure these"),
}


def main(command: str | None = None) -> None:
    """Run a command with the arguments in ``sys.argv`` and exit with its code; the first one may name it."""
    with reporting():
        sys.path += [""] * ("" not in sys.path)  # one's own modules, as of data.target, lie where `python -m` looks
        given = [*([command] if command else []), *sys.argv[1:]]
        chosen = given[0] if given and given[0] in COMMANDS else ""
        module: Any = import_module(COMMANDS[chosen][0]) if chosen else None
        if chosen == "train":  # Hydra reads its arguments
            sys.argv = ["lora-vit train", *given[1:]]
            module.main()
            return
        about = "LoRA on Vision Transformers: train, compare, use what was trained."
        parser = argparse.ArgumentParser("lora-vit", description=about)
        parser.add_argument("--version", action="version", version=f"lora-vit {__version__}")
        commands = parser.add_subparsers(metavar="COMMAND", required=True)
        for name, (_, what) in COMMANDS.items():
            own = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
            if name == chosen:
                module.add_arguments(own)
        args = parser.parse_args(given, argparse.Namespace(typed=given))
        code = module.run(args)
    sys.exit(code)


def named(text: str) -> Path:
    """The folder that is given to a command; a sweep in ``outputs/sweeps``, or else a run, may be given by its name."""
    places = [folder / text for folder in (SWEEPS, RUNS) if Path(text).name == text not in ("", "..")]
    return next((place for place in places if place.is_dir()), Path(text))


def add_trial(parser: argparse.ArgumentParser, devices: Sequence[str] = ("auto", "cpu", "gpu")) -> None:
    parser.add_argument("folder", help="a completed trial's folder, or a sweep: its best cell's first seed")
    parser.add_argument("--weights", metavar="FILE", help="where the base's weights are, if not where they were")
    parser.add_argument("--device", choices=devices, default=devices[0])


def completed_trial(folder: str | Path, weights: str | None, device: str, root: str | None = None
                    ) -> tuple[Path, TrialRecord, TrialConfig]:  # fmt: skip
    """A trial's (of a sweep the chosen one's) folder, record and config, to use on a device. Raises RecordError."""
    if ((folder := named(str(folder))) / PLAN).is_file():
        from lora_vit.analysis.core import summarize  # imports pandas

        folder = summarize(folder).chosen
        print(f"{folder}: of the best cell, the first seed", file=sys.stderr)
    try:
        record = read_record(folder)
    except FileNotFoundError:
        own = " (load_adapter and merge_adapter take one of your own loop)" * (folder / "adapter.json").is_file()
        raise RecordError(f"{folder} has no record.json: give a trial's folder{own}, or a sweep of {SWEEPS}/") from None
    if record.status != "completed":
        raise RecordError(f"{folder}: the trial is {record.shown_status()}, not completed")
    config = from_dict(record.config)
    if (precision := record.environment.get("precision")) not in ("fp32", "bf16", "fp16", "fp64"):
        raise RecordError(f"record.json was edited: its environment.precision is {precision}")
    if root is not None and DATASETS[config.data.name].in_package:
        raise RecordError(f"--data-root has no effect: data={config.data.name} comes in a package, leave it out")
    config.trainer.precision, config.trainer.accelerator, config.trainer.compile = str(precision), device, False
    config.data.root = config.data.root if root is None else root
    config.model.weights = config.model.weights if weights is None else weights
    config.data.content = config.model.weights_sha256 = None  # the adapter's binding compares, and says what differs
    file, _ = file_and_prefix(config.model.weights)
    if is_weights_file(config.model.weights) and not os.path.exists(os.path.expanduser(file)):
        raise RecordError(f"{config.model.weights} is not there: say with --weights where the trial's weights are now")
    return folder, record, config


def check_out(path: Path, option: str, suffix: str) -> None:
    """Raise RecordError, before any work, where a result cannot be written or would replace another kind of file."""
    if path.suffix != suffix:
        raise RecordError(f"{option} {path}: give a file name that ends in {suffix}")
    with contextlib.suppress(OSError):
        tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent).close()  # as ``files.replacing`` does
        if not path.is_dir():
            return
    raise RecordError(f"{option} {path} cannot be written: give a file in a folder that is there, and is yours")
