"""Lines, bars and tables, on a terminal and where there is none."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys

import pytest
from rich.console import Console

from lora_vit import stopping, terminal
from lora_vit.terminal import Every, Progress, from_here, make_console, print_table


@pytest.fixture
def screen(monkeypatch):
    """A terminal instead of a pipe; what is written to it."""
    screen = io.StringIO()
    console = functools.partial(Console, file=screen, force_terminal=True, highlight=False, width=100)
    monkeypatch.setattr(terminal, "make_console", lambda quiet=False: console(quiet=quiet))
    return screen


def test_every_so_many_seconds(hands):
    every, seen = Every(2.0), []
    for now in (100.0, 102.0, 102.5, 104.5, 104.75, 109.0, 110.0, 111.5):
        hands.now = now
        seen.append(every.due())
    assert seen == [False, False, True, False, True, True, False, True]


def test_lines_now_and_then_where_there_is_no_terminal(hands, capsys):
    progress = Progress("decoding", 4000, quiet=False, done=1000)
    for now, count in ((105.0, 500), (111.0, 600), (120.0, 100), (121.5, 725)):
        hands.now = now
        progress.advance(count)
    progress.figures = "loss 0.5"
    hands.now = 140.0
    progress.advance(75)
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "decoding: 2,100/4,000 images  100 images/s",  # since the first ones were done, at 105 s
        "decoding: 2,925/4,000 images  86 images/s",
        "decoding: 3,000/4,000 images  loss 0.5  about 23 s left",
    ]


def test_what_is_waited_for_is_told_now_and_then(monkeypatch, capsys):
    @contextlib.contextmanager
    def at_once(action, every):
        action()
        yield

    monkeypatch.setattr(stopping, "repeating", at_once)
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        with stopping.waiting("importing torch"):
            pass
        assert capsys.readouterr().err == "importing torch ...\n" * is_terminal


def test_a_context_says_what_was_done_in_which_time(hands, capsys):
    with Progress("decoding", 3000, quiet=False, unit="files") as progress:
        progress.advance(1500)
        hands.now = 102.25
    assert capsys.readouterr().out == "decoding: 1,500 files in 2.2 s\n"
    with Progress("training", 9, quiet=False, unit="steps") as progress:
        hands.now += 200
        progress.advance(5)
    assert "training: 5/9 steps  0.025 steps/s\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="x"), Progress("decoding", 3, quiet=False):
        raise ValueError("x")
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal(hands, screen):
    with Progress("decoding", 4000, quiet=False, done=1000) as progress:
        assert progress._bar is not None
        progress._bar.refresh()
        assert re.search(r"^\S*decoding .*1000/4000\S* *$", screen.getvalue().splitlines()[-1])
        hands.now = 120.0
        progress.advance(500)
        progress._bar.refresh()
        assert "25 images/s" in screen.getvalue()
        progress.figures = "loss 0.5"
        progress.advance(1)
        progress._bar.refresh()
    progress.close()
    drawn = screen.getvalue()
    assert "1501/4000" in drawn
    assert "loss 0.5" in drawn
    assert "about" not in drawn, "no lines besides the bar"
    assert drawn.endswith("decoding: 1,501 images in 20.0 s\n")
    assert "\x1b[2K" in drawn, "the bar is taken away"


def test_quiet_is_quiet(hands, screen, capsys):
    with Progress("decoding", 3, quiet=True) as progress:
        hands.now += 100
        progress.advance(3)
    make_console(quiet=True).print("x")
    assert screen.getvalue() == capsys.readouterr().out == ""


def test_nothing_is_cut_folded_or_coloured_in_a_pipe(capsys):
    console = make_console()
    long = "x" * 1000 + " " + "y" * 1000
    console.print(long)
    console.print("step 12 of 'a' http://b.c")
    assert capsys.readouterr().out == f"{long}\nstep 12 of 'a' http://b.c\n"


def test_a_terminal_has_its_own_width_and_no_coloured_numbers(monkeypatch):
    monkeypatch.setenv("COLUMNS", "77")
    monkeypatch.setenv("FORCE_COLOR", "1")
    for is_terminal, width in ((True, 77), (False, 400)):
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr(terminal.sys, "stdout", out)
        console = make_console()
        console.print("step 12")
        assert (console.width, console.is_terminal, out.getvalue()) == (width, True, "step 12\n")


def test_a_folder_as_a_shell_names_it_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {tmp_path / "a" / "b c": "'a/b c'", terminal.Path("a"): "a", tmp_path.parent: str(tmp_path.parent)}
    assert {folder: from_here(folder) for folder in names} == names


def test_a_plain_table(capsys):
    print_table(make_console(), "Trials", ("name", "value"), [("[a]", "1"), ("bb", "[/]"), ("c", "3")], most=2)
    lines = ["Trials", "name  value", "[a]   1    ", "bb    [/]  ", "... 1 more"]
    assert capsys.readouterr().out.splitlines() == lines
    screen = io.StringIO()
    print_table(Console(file=screen, force_terminal=True, color_system="standard"), "Trials", ("a",), [])
    assert screen.getvalue().startswith("\x1b[1mTrials\x1b[0m\n")
