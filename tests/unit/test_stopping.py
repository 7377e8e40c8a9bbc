"""Signals that ask to stop: remembered, raised when the work allows it, and handed on to who had a handler before."""

from __future__ import annotations

import signal
import threading

import pytest

from lora_vit.errors import Interrupted
from lora_vit.stopping import SIGNALS, StopRequest

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""What terminals, schedulers and launchers send."""
each = pytest.mark.parametrize("signum", [getattr(signal, name) for name in NAMES])


@pytest.fixture(autouse=True)
def handlers_as_before():
    """What a test sets is undone; each begins with Python's own handlers."""
    before = {s: signal.getsignal(s) for s in SIGNALS}
    for signum in SIGNALS:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@each
def test_each_is_remembered_and_raised_when_heeded(signum):
    """Python's own handler of Ctrl-C is not called: what is saved needs no KeyboardInterrupt on top."""
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        stop.heed()
        signal.raise_signal(signum)
        assert stop.signum == signum
        with pytest.raises(Interrupted, match=f"interrupted by {signum.name}") as caught:
            stop.heed()
        assert (caught.value.signum, caught.value.exit_code) == (signum, 128 + signum)
    assert signal.getsignal(signum) is before


@each
def test_a_handler_from_before_is_called_when_the_work_is_saved(signum):
    called = []

    def theirs(number, frame):
        called.append((number, frame, signal.getsignal(signum)))

    signal.signal(signum, theirs)
    with StopRequest():
        signal.raise_signal(signum)
        assert called == []
    assert called == [(signum, None, theirs)], "called once, in its own place again"
    with StopRequest():
        signal.raise_signal(next(s for s in SIGNALS if s != signum))
    assert len(called) == 1, "only for its own signal"


@each
def test_what_is_ignored_stays_ignored(signum):
    signal.signal(signum, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signum)
        assert (stop.signum, signal.getsignal(signum)) == (0, signal.SIG_IGN)
        other = next(s for s in SIGNALS if s != signum)
        signal.raise_signal(other)
        assert stop.signum == other
    assert signal.getsignal(signum) is signal.SIG_IGN


def test_only_a_ctrl_c_after_another_signal_ends_at_once():
    """Schedulers repeat themselves; the last one is reported."""
    with StopRequest() as stop:
        for repeated in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(repeated)
            assert stop.signum == repeated
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signum == repeated


def test_handlers_are_taken_back_after_an_error_and_a_thread_sets_none():
    with pytest.raises(ValueError, match="x"), StopRequest():
        raise ValueError("x")
    assert [signal.getsignal(s) for s in SIGNALS if s != signal.SIGINT] == [signal.SIG_DFL] * 5
    seen: list[object] = []

    def enter() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
