"""The summary as a command: its files, what the terminal shows, and bad input."""

from __future__ import annotations

import html
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_records import make_sweep, make_trial


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    accuracies = np.array([[0.900, 0.904, 0.902], [0.930, 0.936, 0.930], [0.931, 0.935, 0.933]])
    return make_sweep(tmp_path / "sweep", [{"lora__rank": rank} for rank in (1, 4, 16)], accuracies)


@pytest.fixture
def summarize(call, tmp_path, monkeypatch) -> Callable[..., tuple[str, str]]:
    """The command, run in ``tmp_path``; gives its stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
        ended, out, err = call("summarize", *arguments)
        assert ended == code, err
        return out, err

    return run


def test_the_command_starts_as_a_module_and_as_a_script(sweep, tmp_path, project_root):
    def ended(*words):
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)

    done = ended("-m", "lora_vit.summarize", "sweep", "--no-plots")
    assert (done.returncode, done.stderr) == (0, "")
    assert "rank 16 has the highest val accuracy" in done.stdout
    done = ended(project_root / "scripts" / "summarize.py", "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: nowhere is not a folder")
    assert done.stderr.count("\n") == 1


def test_the_report_needs_nothing_from_outside(sweep, summarize):
    summarize(sweep)
    page = (sweep / "summary" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", page)
    assert "<script src" not in page
    assert page.index("rank 16") < page.index("<table")  # the verdict comes first
    for name in ("by_rank.png", "by_rank.svg", "table.tex", "table.md", "trials.csv"):
        assert (sweep / "summary" / name).stat().st_size > 0
    assert "\\toprule" in (sweep / "summary" / "table.tex").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(ids)) == len(ids) > 10, "each picture has its own"
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_the_page_names_the_command_that_makes_it_again(sweep, summarize, tmp_path):
    summarize(sweep, "--no-plots", "--where", "rank >= 4", "--margin", "1.5", "--out", "a b")
    trials = pd.read_csv(tmp_path / "a b" / "trials.csv")
    assert set(trials["lora.rank"]) == {4, 16}
    page = html.unescape((tmp_path / "a b" / "report.html").read_text())
    (command,) = re.findall(r"lora-vit summarize (.*)</pre>", page)
    words = shlex.split(command)
    assert words == [str(sweep), "--no-plots", "--where", "rank >= 4", "--margin", "1.5", "--out", "a b"]
    assert "within 1.50" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["empty"], "no trial in empty"),
        (["SWEEP", "--where", "ranc > 1"], "ranc"),
        (["SWEEP", "--no-plots", "--out", "SWEEP/file"], "file cannot be written"),
    ],
)
def test_wrong_options_are_one_line(arguments, said, sweep, summarize, tmp_path):
    (sweep / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    out, err = summarize(*[a.replace("SWEEP", str(sweep)) for a in arguments], code=1)
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert said in err


def test_the_terminal_shows_the_first_rows_and_problems(sweep, summarize):
    for k in range(25):
        (sweep / f"broken{k}").mkdir()
        (sweep / f"broken{k}" / "record.json").write_text("{")
    out, _ = summarize(sweep, "--no-plots", "--top", "2")
    assert "... 1 more" in out
    assert out.count("problem: ") == 20
    assert "... 5 more problems" in out


def test_pictures_of_an_earlier_summary_are_removed_and_no_file_of_others(sweep, summarize):
    summary = sweep / "summary"
    summary.mkdir()
    for name in ("by_lr.png", "spectrum.svg", "race.svg", "notes.png"):
        (summary / name).touch()
    summarize(sweep)
    found = {path.name for path in summary.iterdir()}
    assert {"notes.png", "cells.csv", "difference.svg", "by_rank.svg"} <= found
    assert not {"by_lr.png", "spectrum.svg", "race.svg"} & found
    summarize(sweep, "--no-plots")
    assert [path.name for path in summary.glob("*.*g")] == ["notes.png"]


def test_the_page_leaves_out_what_there_is_none_of(tmp_path, summarize):
    def heads(*options: str) -> list[str]:
        summarize("one", *options)
        return re.findall(r"<h[23]>(.*?)</h[23]>", (tmp_path / "one" / "summary" / "report.html").read_text())

    for seed in range(2):
        make_trial(tmp_path / "one", 0.9, seed=seed)
    last = ["What was done", "Trials", "Environment", "How to reproduce"]
    assert heads() == ["Cells", "What to do next", *last]
    make_trial(tmp_path / "one", None, status="failed", seed=2)
    (tmp_path / "one" / "x").mkdir()
    (tmp_path / "one" / "x" / "record.json").write_text("{")
    assert heads() == ["Cells", "Not averaged", "What to do next", "Problems on reading", *last]
