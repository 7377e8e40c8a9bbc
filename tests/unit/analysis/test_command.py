"""The summary as a command: its figures against an independent computation, its files, and bad input."""

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
from made_up_records import make_trial
from scipy import stats

ACCURACY = {1: [0.900, 0.904, 0.902], 4: [0.930, 0.936, 0.930], 16: [0.931, 0.935, 0.933]}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    for rank, values in ACCURACY.items():
        for seed, accuracy in enumerate(values):
            make_trial(folder, accuracy, lora__rank=rank, seed=seed)
    return folder


@pytest.fixture
def summarize(call, tmp_path, monkeypatch) -> Callable[..., tuple[str, str]]:
    """The command, run in ``tmp_path``; gives its stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
        ended, out, err = call("summarize", *arguments)
        assert ended == code, err
        return out, err

    return run


@pytest.mark.parametrize("line", [["-m", "lora_vit.summarize"], ["SCRIPTS/summarize.py"]])
def test_the_command_starts_as_a_module_and_as_a_script(sweep, tmp_path, project_root, line):
    command = [sys.executable, *(word.replace("SCRIPTS", str(project_root / "scripts")) for word in line)]
    done = subprocess.run([*command, "sweep", "--no-plots"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rank 16 has the highest val accuracy" in done.stdout
    done = subprocess.run([*command, "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: nowhere is not a folder")
    assert done.stderr.count("\n") == 1


def test_cells_against_an_independent_computation(sweep, summarize):
    summarize(sweep, "--no-plots")
    cells = pd.read_csv(sweep / "summary" / "cells.csv").set_index("lora.rank")
    assert set(cells.index) == set(ACCURACY)
    for rank, values in ACCURACY.items():
        row = cells.loc[rank]
        half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
        assert row["n"] == 3
        assert row["mean"] == pytest.approx(np.mean(values))
        assert row["low"] == pytest.approx(np.mean(values) - half)
        assert row["high"] == pytest.approx(np.mean(values) + half)
    assert cells["mark"].to_dict() == {16: "best", 4: "candidate", 1: "worse"}


def test_order_of_folders_and_failed_trials_change_no_figure(sweep, summarize, tmp_path):
    summarize(sweep, "--no-plots", "--out", "a")
    make_trial(sweep, None, status="failed", lora__rank=2, seed=0)
    make_trial(sweep, None, status="stopped", lora__rank=1, seed=9)
    out, _ = summarize(sweep, "--no-plots", "--out", "b")
    columns = ["lora.rank", "mean", "sd", "n", "low", "high", "mark"]
    a, b = (pd.read_csv(tmp_path / f / "cells.csv") for f in "ab")
    pd.testing.assert_frame_equal(a[columns], b[b["mean"].notna()][columns].reset_index(drop=True))
    assert "failed" in out
    assert "stopped" in out


def test_the_report_needs_nothing_from_outside(sweep, summarize):
    summarize(sweep)
    page = (sweep / "summary" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", page)
    assert "<script src" not in page
    assert page.index("rank 16") < page.index("<table")  # the verdict comes first
    for name in ("by_rank.png", "by_rank.svg", "table.tex", "table.md", "trials.csv"):
        assert (sweep / "summary" / name).stat().st_size > 0
    assert "\\toprule" in (sweep / "summary" / "table.tex").read_text()


def test_the_page_names_the_command_that_makes_it_again(sweep, summarize, tmp_path):
    summarize(sweep, "--no-plots", "--where", "rank >= 4", "--margin", "1.5", "--out", "a b")
    trials = pd.read_csv(tmp_path / "a b" / "trials.csv")
    assert set(trials["lora.rank"]) == {4, 16}
    page = html.unescape((tmp_path / "a b" / "report.html").read_text())
    (command,) = re.findall(r"python -m lora_vit.summarize (.*)</pre>", page)
    words = shlex.split(command)
    assert words == [str(sweep), "--out", "a b", "--where", "rank >= 4", "--margin", "1.5", "--no-plots"]
    assert "within 1.50" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["empty"], "no trial in empty"),
        (["SWEEP", "--where", "ranc > 1"], "ranc"),
        (["SWEEP", "--margin", "0"], "--margin 0"),
        (["SWEEP", "--out", "SWEEP/file"], "--out"),
    ],
)
def test_wrong_options_are_one_line(arguments, said, sweep, summarize, tmp_path):
    (sweep / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    out, err = summarize(*[a.replace("SWEEP", str(sweep)) for a in arguments], code=1)
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert said in err


def test_a_record_cut_in_half_is_named_and_the_rest_summarized(sweep, summarize):
    path = sorted(sweep.glob("*/record.json"))[0]
    path.write_bytes(path.read_bytes()[:200])
    out, _ = summarize(sweep, "--no-plots")
    assert any(path.parent.name in line for line in out.splitlines() if line.startswith("problem: "))
    assert len(pd.read_csv(sweep / "summary" / "trials.csv")) == 8


def test_the_terminal_shows_the_first_rows_and_problems(sweep, summarize):
    for k in range(25):
        (sweep / f"broken{k}").mkdir()
        (sweep / f"broken{k}" / "record.json").write_text("{")
    out, _ = summarize(sweep, "--no-plots", "--top", "2")
    assert "... 1 more rows" in out
    assert out.count("problem: ") == 20
    assert "... 5 more problems" in out


def test_pictures_of_an_earlier_summary_are_removed_and_no_file_of_others(sweep, summarize):
    summary = sweep / "summary"
    summarize(sweep)
    kept = {"notes.png", "cells.csv", "cells.svg", "by_rank.svg"}
    for name in ("heat_rank_lr.png", "pareto_seconds.svg", "notes.png"):
        (summary / name).touch()
    summarize(sweep)
    found = {path.name for path in summary.iterdir()}
    assert kept <= found
    assert not {"heat_rank_lr.png", "pareto_seconds.svg"} & found
    summarize(sweep, "--no-plots")
    assert [path.name for path in summary.glob("*.*g")] == ["notes.png"]


def test_names_that_are_markup_or_templates_stay_text(tmp_path, summarize):
    folder, weights = "{{ 7*7 }}<script>alert(1)", "{% raw %}<b>&{{ 6*7 }}"
    for rank, values in ACCURACY.items():
        for seed, accuracy in enumerate(values):
            make_trial(
                tmp_path / folder, accuracy, lora__rank=rank, seed=seed, model__weights=weights if rank == 4 else "A"
            )
    summarize(folder, "--where", "rank > 1")
    page = (tmp_path / folder / "summary" / "report.html").read_text()
    for name in ("{{ 7*7 }}&lt;script&gt;alert(1)", "{% raw %}&lt;b&gt;&amp;{{ 6*7 }}", "where rank &gt; 1"):
        assert page.count(name) >= 2
    assert page.count("<script>") == 1
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) > 10
    assert len(set(ids)) == len(ids)  # each picture's own
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert used
    assert used <= set(ids)


def test_the_page_leaves_out_what_there_is_none_of(tmp_path, summarize):
    def heads(*options: str) -> list[str]:
        summarize("one", *options)
        return re.findall(r"<h[23]>(.*?)</h[23]>", (tmp_path / "one" / "summary" / "report.html").read_text())

    for seed in range(2):
        make_trial(tmp_path / "one", 0.9, seed=seed)
    last = ["What was done", "Trials", "Environment", "How to reproduce"]
    assert heads("--no-plots") == ["Cells", *last]
    make_trial(tmp_path / "one", None, status="failed", seed=2)
    (tmp_path / "one" / "x").mkdir()
    (tmp_path / "one" / "x" / "record.json").write_text("{")
    assert heads() == ["Cells", "Not averaged", "Pictures", "Problems on reading", *last]
