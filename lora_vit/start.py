"""How a command starts: Ctrl-C while it imports, a clone that is not installed, torchrun's variables. Light."""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType

from lora_vit.config import ConfigError

GROUP = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process, and what a process group cannot do without."""


def begin_command() -> None:
    """For ``python -m lora_vit...``: end in one line on Ctrl-C, and where the package is not installed."""
    signal.signal(signal.SIGINT, interrupt)
    sys.excepthook = _one_line_interrupt
    if find_spec("lora_vit.conf") is None:
        clone = Path(__file__).resolve().parent.parent
        sys.exit(f"error: lora_vit is not installed in this Python: run `{sys.executable} -m pip install -e {clone}`")


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Handler of Ctrl-C: ends at once during imports, which lose exceptions and leave nothing to clean up."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _one_line_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def started_by_torchrun() -> bool:
    """Whether this is a process of a group that torchrun (or another launcher) described in the environment.

    Raises:
        ConfigError: the description of a group of several is not whole.
    """
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
