"""What a user can cause: four kinds of error, and the one place that turns them into a line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
"""Errors of a disk that cannot be written, whatever is trained."""


class UserError(Exception):
    """An error that a user can mend: its text says what was wrong, where, and what to do."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """What was asked for cannot work; the message names the key, the value and the remedy."""


class RecordError(UserError, ValueError):
    """A file that was left by training cannot be read or is not valid; the message names it."""


class TrialFailed(UserError):  # noqa: N818  (its name is the status)
    """Training ended without the result that was asked for; what is saved stays."""


class Interrupted(UserError):  # noqa: N818  (not an error)
    """The process was asked to stop; everything is saved."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum, self.exit_code = signum, 128 + signum


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def run_command(action: Callable[[], int | None], quiet: bool = False) -> NoReturn:
    """Run a command and exit with its code; see :func:`exit_code`."""
    sys.exit(exit_code(action, quiet))


def exit_code(action: Callable[[], int | None], quiet: bool = False) -> int:
    """Run a command and return its code; an error that a user can cause is printed in one line.

    ``quiet``: print nothing, for a process whose errors another one reports. ``HYDRA_FULL_ERROR=1`` shows tracebacks.
    """
    try:
        return action() or 0
    except BrokenPipeError:  # the reader has gone, as with `| head`
        os._exit(0)
    except (UserError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or not (text := _text(error)):
            raise
        if not quiet:
            print(text, file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        if not quiet:
            print("interrupted", file=sys.stderr)
        return 130


def _text(error: UserError | OSError) -> str:
    """What is printed of an error; empty where only a traceback helps."""
    if isinstance(error, Interrupted):
        return f"{error}: saved; the same command resumes"
    if isinstance(error, UserError):
        return f"error: {error}"
    place = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"error: {place} cannot be written ({error.strerror}): make room, then the same command resumes"
    if error.errno in NO_SPACE or isinstance(error, PermissionError):
        return f"error: {place} cannot be written or read ({error.strerror}): give another folder"
    if isinstance(error, FileNotFoundError):
        return f"error: {place} is gone: was a folder moved or removed meanwhile?"
    return ""
