"""Lines, bars and tables, on a terminal and where there is none."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from lora_vit import terminal
from lora_vit.terminal import Every, Progress, make_console, print_table


@pytest.fixture
def hands(monkeypatch):
    """A clock that stands at what the test sets."""
    hands = SimpleNamespace(now=100.0)
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: hands.now, perf_counter=lambda: hands.now))
    return hands


class Bar:
    """Stands for rich's progress bar."""

    made: list[Bar]

    def __init__(self, *columns, **options):
        self.columns, self.options, self.shown, self.is_on = columns, options, {}, False
        Bar.made.append(self)

    def add_task(self, text, **fields):
        self.shown = {"text": text, **fields}
        return 7

    def update(self, task, **fields):
        assert task == 7
        self.shown |= fields

    def start(self):
        self.is_on = True

    def stop(self):
        assert self.is_on, "once"
        self.is_on = False


@pytest.fixture
def screen(monkeypatch):
    """A terminal instead of a pipe; what is written to it."""
    screen = io.StringIO()
    Bar.made = []
    monkeypatch.setattr(terminal, "RichProgress", Bar)
    monkeypatch.setattr(
        terminal,
        "make_console",
        lambda quiet=False: Console(file=screen, force_terminal=True, highlight=False, quiet=quiet),
    )
    return screen


def test_every_so_many_seconds(hands):
    every = Every(2.0)
    seen = []
    for now in (100.0, 102.0, 102.5, 104.5, 104.75, 109.0, 110.0, 111.5):
        hands.now = now
        seen.append(every.due())
    assert seen == [False, False, True, False, True, True, False, True]


def test_lines_now_and_then_where_there_is_no_terminal(hands, capsys):
    progress = Progress("decoding", 4000, quiet=False, done=1000)
    for now, count in ((105.0, 500), (111.0, 600), (120.0, 100), (121.5, 725)):
        hands.now = now
        progress.advance(count)
    assert capsys.readouterr().out.splitlines() == [
        "decoding: 2,100/4,000  100 images/s  about 19 s left",
        "decoding: 2,925/4,000  90 images/s  about 12 s left",
    ]
    progress.close()
    assert capsys.readouterr().out == ""


def test_figures_take_the_place_of_the_rate(hands, capsys):
    progress = Progress("training", 2000, quiet=False, unit="steps")
    progress.figures = "loss 0.5"
    hands.now = 120.0
    progress.advance(500)
    assert capsys.readouterr().out == "training: 500/2,000  loss 0.5  about 60 s left\n"


def test_no_time_at_all_divides_by_nothing(hands, capsys):
    progress = Progress("x", 2_000_000_000, quiet=False)
    progress._plain.seconds = -1.0
    progress.advance(1)
    assert capsys.readouterr().out == "x: 1/2,000,000,000  1,000,000,000 images/s  about 2 s left\n"


def test_a_context_tells_what_was_done_in_which_time(hands, capsys):
    with Progress("decoding", 3000, quiet=False, unit="files") as progress:
        progress.advance(1500)
        hands.now = 102.25
    assert capsys.readouterr().out == "decoding: 1,500 files in 2.2 s\n"
    with pytest.raises(ValueError, match="x"), Progress("decoding", 3, quiet=False):
        raise ValueError("x")
    assert capsys.readouterr().out == ""


def test_quiet_is_quiet(hands, capsys):
    with Progress("decoding", 3, quiet=True) as progress:
        hands.now += 100
        progress.advance(3)
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal(hands, screen):
    with Progress("decoding", 4000, quiet=False, done=1000) as progress:
        (bar,) = Bar.made
        assert bar.options == {"console": progress.console, "transient": True}
        assert [type(c).__name__ for c in bar.columns] == [
            "TextColumn",
            "BarColumn",
            "MofNCompleteColumn",
            "TextColumn",
            "TimeRemainingColumn",
        ]
        task = SimpleNamespace(description="decoding", fields={"figures": "5 images/s"})
        texts = [c.render(task).plain for c in bar.columns if hasattr(c, "text_format")]
        assert texts == ["decoding", "5 images/s"]
        assert bar.is_on
        assert bar.shown == {"text": "decoding", "total": 4000, "completed": 1000, "figures": ""}
        hands.now = 120.0
        progress.advance(500)
        assert bar.shown == {"text": "decoding", "total": 4000, "completed": 1500, "figures": "25 images/s"}
        progress.figures = "loss 0.5"
        progress.advance(1)
        assert bar.shown["completed"] == 1501
        assert bar.shown["figures"] == "loss 0.5"
        assert screen.getvalue() == "", "no lines besides the bar"
        progress.close()
        assert not bar.is_on
        progress.close()
    assert screen.getvalue() == "decoding: 1,501 images in 20.0 s\n"


def test_no_bar_where_nothing_is_to_be_shown(screen):
    with Progress("decoding", 3, quiet=True) as progress:
        progress.advance(1)
    assert Bar.made == []
    assert screen.getvalue() == ""


def test_nothing_is_cut_folded_or_coloured_in_a_pipe(capsys):
    console = make_console()
    long = "x" * 1000 + " " + "y" * 1000
    console.print(long)
    console.print("step 12 of 'a' http://b.c")
    assert capsys.readouterr().out == f"{long}\nstep 12 of 'a' http://b.c\n"
    assert not console.quiet
    assert console.width == 400
    make_console(quiet=True).print("x")
    assert capsys.readouterr().out == ""


def test_a_terminal_has_its_own_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "77")
    monkeypatch.setattr(terminal.sys.stdout, "isatty", lambda: True, raising=False)
    assert make_console().width == 77
    monkeypatch.setattr(terminal.sys.stdout, "isatty", lambda: False, raising=False)
    assert make_console().width == 400


def test_numbers_are_not_coloured_on_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(terminal.sys, "stdout", io.StringIO())
    console = make_console()
    console.print("step 12")
    assert console.is_terminal
    assert console.file.getvalue() == "step 12\n"


def test_a_plain_table(capsys):
    print_table(make_console(), "Trials", ("name", "value"), [("[a]", "1"), ("bb", "[/]")])
    assert capsys.readouterr().out.splitlines() == ["Trials", "name  value", "[a]   1    ", "bb    [/]  "]
    print_table(make_console(), "", ("name",), [])
    assert capsys.readouterr().out.splitlines() == ["name"]


def test_a_tables_title_is_bold_on_a_terminal():
    screen = io.StringIO()
    print_table(Console(file=screen, force_terminal=True, color_system="standard"), "Trials", ("a",), [])
    assert screen.getvalue().startswith("\x1b[1mTrials\x1b[0m\n")
