"""How a command starts: Ctrl-C while it imports, a clone that is not installed, torchrun's variables. Light."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

GROUP = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process, and what a process group cannot do without."""
LOSE_EXCEPTIONS = ("_frozen_importlib", "importlib", "hydra", "omegaconf", "antlr4")


def begin_command() -> None:
    """For ``python -m lora_vit...``: end in one line on Ctrl-C, and where the package is not installed."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # so a shell tells what is started behind &
        signal.signal(signal.SIGINT, interrupt)
    sys.excepthook = _one_line_interrupt
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as >&- does
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):  # names and tables hold what another encoding than UTF-8 lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()
    except OSError as error:
        sys.exit(f"error: the folder that this is started in is gone ({error.strerror}): cd to one that is there")
    if find_spec("lora_vit.conf") is None:
        clone = Path(__file__).resolve().parent.parent
        sys.exit(f"error: lora_vit is not installed in this Python: run `{sys.executable} -m pip install -e {clone}`")


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Handler of Ctrl-C: ends at once in imports and in composing, which lose exceptions and leave nothing behind."""
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package in LOSE_EXCEPTIONS:
            os.write(2, b"interrupted\n")
            os._exit(130)
        if package in ("lora_vit", "__main__") and frame.f_code.co_name != "<module>":
            break
        frame = frame.f_back
    raise KeyboardInterrupt


def _one_line_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr)
    sys.exit(130)


@contextlib.contextmanager
def not_importing_main() -> Iterator[None]:
    """Processes started meanwhile leave alone the script that we run in, which to import could mean to run again."""
    main = vars(sys.modules["__main__"])
    before: dict[str, Any] = {name: main.pop(name) for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(before)


def started_by_torchrun() -> bool:
    """Whether this is a process of a group that torchrun (or another launcher) described in the environment.

    Raises:
        ConfigError: the description of a group of several is not whole.
    """
    from lora_vit.errors import ConfigError

    given = {name: os.environ[name] for name in GROUP if os.environ.get(name)}
    missing = [name for name in GROUP if name not in given]
    if missing:
        alone = given.get("WORLD_SIZE", "1") == "1" or "RANK" not in given
        if alone and "TORCHELASTIC_RUN_ID" not in os.environ:
            return False  # left over by a scheduler
        raise ConfigError(f"{_shown(given)} without {' and '.join(missing)}: start with torchrun, or unset RANK")
    rank, size, port = given["RANK"], given["WORLD_SIZE"], given["MASTER_PORT"]
    if not (rank.isdecimal() and size.isdecimal() and port.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"{_shown(given)} describe no process group: start with torchrun, or unset RANK")
    return True


def _shown(given: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in given.items())
