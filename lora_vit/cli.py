"""``lora-vit COMMAND ...``: one parser for all commands. ``python -m lora_vit.COMMAND ...`` is the same.

Only the module of the command that is given is imported. It offers ``add_arguments(parser)`` and ``run(args)``, which
returns the exit code; or ``main(arguments)``, where another library reads the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from lora_vit import __version__
from lora_vit.errors import run_command

COMMANDS = {
    "train": ("lora_vit.train", "train one trial, or with -m a sweep of trials"),
    "sweep": ("lora_vit.sweep.__main__", "list a sweep's trials, or train some of them on this machine"),
    "summarize": ("lora_vit.summarize", "compare the trials of sweeps: tables, pictures, a report"),
    "evaluate": ("lora_vit.evaluate", "measure a trained trial's accuracy on its own data"),
    "predict": ("lora_vit.predict", "classify images with a trained trial"),
    "merge": ("lora_vit.merge", "write a trained trial's weights under the backbone's own names"),
    "export": ("lora_vit.export", "write a trained trial for other libraries"),
}
"""Module of each command, and what it does."""


def main(command: str | None = None, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code.

    Args:
        command: one of ``COMMANDS``; None: the first argument names it.
        arguments: those after it; None: what the process was started with.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    run_command(lambda: _run(given if command is None else [command, *given]))


def _run(given: list[str]) -> int | None:
    name, module = given[0] if given else "", None
    if name in COMMANDS:
        module = import_module(COMMANDS[name][0])
        if not hasattr(module, "add_arguments"):
            return module.main(given[1:])
    args = _parser(name, module).parse_args(given)
    return args.run(args)


def _parser(chosen: str, module: Any) -> argparse.ArgumentParser:
    """All commands, with the arguments of the chosen one."""
    parser = argparse.ArgumentParser(
        prog="lora-vit", description="LoRA on Vision Transformers: train, compare, use what was trained."
    )
    parser.add_argument("--version", action="version", version=f"lora-vit {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        if name == chosen:
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
