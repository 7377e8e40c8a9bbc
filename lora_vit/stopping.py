"""Requests to stop: signals are remembered until work is saved, then raised as :class:`Interrupted`."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lora_vit.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What terminals, schedulers and launchers ask with: batch systems let a site choose the signal."""


class StopRequest:
    """Remembers a request to stop until the step is finished; a second Ctrl-C ends at once.

    A handler that a launcher had set is called at the end. What the process is to ignore (``nohup``) stays ignored.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in the main thread alone
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        theirs = self._previous.get(self.signum)
        if callable(theirs) and theirs is not signal.default_int_handler:
            theirs(self.signum, None)

    def heed(self) -> None:
        """Raise Interrupted if asked to stop; for long work between steps of training."""
        if self.signum:
            raise Interrupted(self.signum)

    def sleep(self, seconds: float) -> None:
        """Wait; a request to stop ends it early."""
        until = time.monotonic() + seconds
        while not self.signum and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum


@contextlib.contextmanager
def repeating(action: Callable[[], None], every: float) -> Iterator[None]:
    """Call ``action`` every so many seconds in a thread of its own while the context lasts."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every):
            action()

    thread = threading.Thread(target=repeat, daemon=True, name="signs of life")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def waiting(what: str) -> contextlib.AbstractContextManager[None]:
    """On a terminal, a line every few seconds, as long as the context lasts."""
    say = repeating(lambda: print(f"{what} ...", file=sys.stderr), every=4.0)
    return say if sys.stderr.isatty() else contextlib.nullcontext()
