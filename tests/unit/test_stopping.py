"""Signals that ask to stop: remembered, told, and handed on to who had a handler before."""

from __future__ import annotations

import signal
import sys
import threading

import pytest

from lora_vit.errors import Interrupted
from lora_vit.start import begin_command, interrupt
from lora_vit.stopping import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers_as_before():
    """What a test sets is undone; each begins with Python's own handlers."""
    before = {s: signal.getsignal(s) for s in SIGNALS}
    for signum in SIGNALS:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_the_signals_of_terminals_schedulers_and_launchers():
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    assert [s.name for s in SIGNALS] == list(names)


@pytest.mark.parametrize("signum", SIGNALS)
def test_each_is_remembered_and_told(signum):
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert stop.signum == 0
        stop.heed()
        signal.raise_signal(signum)
        assert stop.signum == signum
        with pytest.raises(Interrupted) as caught:
            stop.heed()
        assert caught.value.signum == signum
        assert caught.value.exit_code == 128 + signum
        assert str(caught.value) == f"interrupted by {signum.name}"
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_handler_from_before_is_called_when_the_work_is_saved(signum):
    called = []

    def theirs(number, frame):
        called.append((number, frame, signal.getsignal(signum)))

    signal.signal(signum, theirs)
    with StopRequest() as stop:
        signal.raise_signal(signum)
        assert stop.signum == signum
        assert called == []
    assert called == [(signum, None, theirs)], "called once, in its own place again"
    with StopRequest():
        pass
    assert len(called) == 1, "not without a signal"


def test_a_handler_of_another_signal_is_not_called():
    called = []
    signal.signal(signal.SIGUSR1, lambda *args: called.append(args))
    with StopRequest():
        signal.raise_signal(signal.SIGUSR2)
    assert called == []


def test_pythons_own_handler_of_ctrl_c_is_not_called():
    """What is saved and told as interrupted needs no KeyboardInterrupt on top."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("signum", SIGNALS)
def test_what_is_ignored_stays_ignored(signum):
    signal.signal(signum, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signum)
        assert stop.signum == 0
        assert signal.getsignal(signum) is signal.SIG_IGN
        other = next(s for s in SIGNALS if s != signum)
        signal.raise_signal(other)
        assert stop.signum == other
    assert signal.getsignal(signum) is signal.SIG_IGN


def test_a_command_behind_an_ampersand_ignores_ctrl_c():
    """So a shell tells it, for Ctrl-C is then meant for the script that has started it."""
    hook = sys.excepthook
    try:
        begin_command()
        assert signal.getsignal(signal.SIGINT) is interrupt
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        begin_command()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        sys.excepthook = hook


@pytest.mark.parametrize("first", SIGNALS)
def test_a_ctrl_c_after_another_signal_ends_at_once(first):
    with StopRequest() as stop:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signum == first


def test_another_signal_does_not_end_at_once():
    """Schedulers repeat themselves; the last one is told."""
    with StopRequest() as stop:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(signum)
            assert stop.signum == signum


def test_handlers_are_taken_back_after_an_error():
    with pytest.raises(ValueError, match="x"), StopRequest():
        raise ValueError("x")
    assert [signal.getsignal(s) for s in SIGNALS if s != signal.SIGINT] == [signal.SIG_DFL] * 5


def test_a_thread_sets_no_handlers():
    seen: list[object] = []

    def enter() -> None:
        with StopRequest() as stop:
            seen.append((stop.signum, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(0, signal.SIG_DFL)]
