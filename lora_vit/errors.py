"""What a user can cause: four kinds of error, and the one place that turns them into a line and an exit code."""

import contextlib
import errno
import gc
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SPACE = (*_FULL, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)  # a disk cannot be written, whatever is trained
# Whether the user asks for tracebacks. (The command itself sets the variable later, so that Hydra raises.)
FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"


class UserError(Exception):
    """An error that a user can mend: its text says what was wrong, where, and what to do."""


class ConfigError(UserError, ValueError):
    """What was asked for cannot work; the message names the key, the value and the remedy."""


class RecordError(UserError, ValueError):
    """A file that was left by training cannot be read or is not valid; the message names it."""


class TrialFailed(UserError):  # noqa: N818  (its name is the status)
    """Training ended without the result that was asked for; what is saved stays."""


class Interrupted(UserError):  # noqa: N818  (not an error)
    """The process was asked to stop; everything is saved. ``command`` is what resumes."""

    def __init__(self, signum: int, command: str = "the same command"):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum, self.exit_code, self.command = signum, 128 + signum, command


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    said = "out ?of ?memory|can't allocate memory|not enough memory|alloc_failed"
    ran_out = isinstance(error, RuntimeError) and re.search(said, f"{type(error).__name__} {error}", re.IGNORECASE)
    return isinstance(error, MemoryError) or bool(ran_out)


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """For a command: an error that a user can cause is printed in one line, and ends the process."""
    gc.set_threshold(10_000, 10, 10)  # torch makes a million objects that stay: looking at them took a third of a start
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as >&- does
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):  # names and tables hold what another encoding than UTF-8 lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if find_spec("lora_vit.conf") is None:
            install = f"run `{sys.executable} -m pip install -e {Path(__file__).resolve().parents[1]}`"
            raise ConfigError(f"lora_vit is not installed in this Python: {install}")
        yield
    except (UserError, OSError, ImportError, KeyboardInterrupt) as error:
        sys.exit(report(error))
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, and all is done
        os._exit(0)


def report(error: BaseException, quiet: bool = False) -> int:
    """Print an error, return its exit code: a line (unless ``quiet``) for what a user can cause, or the traceback."""
    if isinstance(error, BrokenPipeError):  # the reader has gone, as with `| head`, before all was done
        os._exit(1)
    text = line_of(error)
    if FULL_ERROR or not text:
        traceback.print_exception(error)
    elif not quiet:
        print(text, file=sys.stderr)
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


def line_of(error: BaseException) -> str:
    """What is printed of an error; empty where only a traceback helps."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Interrupted):
        return f"{error}: saved; {error.command} resumes"
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, ImportError) and "failed to map" in str(error):
        return f"error: too little memory to load a library ({error}): give this process more"
    if not isinstance(error, OSError):
        return ""
    place = error.filename or "a file"
    if isinstance(error, FileNotFoundError):
        return f"error: {place} is gone: was a folder moved or removed meanwhile?"
    if error.errno in _FULL:
        return f"error: {place} cannot be written ({error.strerror}): make room, then the same command resumes"
    if error.errno in NO_SPACE or isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)):
        return f"error: {place} cannot be written or read ({error.strerror}): give another folder, or ask for access"
    return ""
