"""The summary as a command: its figures against an independent computation, its files, and bad input."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_records import make_trial
from scipy import stats

from lora_vit.summarize import main

ACCURACY = {1: [0.900, 0.904, 0.902], 4: [0.930, 0.936, 0.930], 16: [0.931, 0.935, 0.933]}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    for rank, values in ACCURACY.items():
        for seed, accuracy in enumerate(values):
            make_trial(folder, accuracy, lora__rank=rank, seed=seed)
    return folder


@pytest.fixture
def summarize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """The command, run in ``tmp_path``; gives its ``out`` and ``err``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 0) -> Any:
        assert main([str(a) for a in arguments]) == code
        return capsys.readouterr()

    return run


def test_the_command_starts_as_a_module(sweep, tmp_path):
    command = [sys.executable, "-m", "lora_vit.summarize"]
    done = subprocess.run([*command, "sweep", "--no-plots"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rank 16 has the highest val accuracy" in done.stdout
    done = subprocess.run([*command, "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: nowhere is not a folder: give the folder of a sweep or of a run\n"


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
    out = summarize(sweep, "--no-plots", "--out", "b").out
    columns = ["lora.rank", "mean", "sd", "n", "low", "high", "mark"]
    a, b = (pd.read_csv(tmp_path / f / "cells.csv") for f in "ab")
    pd.testing.assert_frame_equal(a[columns], b[b["mean"].notna()][columns].reset_index(drop=True))
    assert "failed" in out
    assert "stopped" in out


def test_the_report_needs_nothing_from_outside(sweep, summarize):
    summarize(sweep)
    html = (sweep / "summary" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", html)
    assert "<script src" not in html
    assert html.index("rank 16") < html.index("<table")  # the verdict comes first
    for name in ("by_rank.png", "by_rank.svg", "table.tex", "table.md", "trials.csv"):
        assert (sweep / "summary" / name).stat().st_size > 0
    assert "\\toprule" in (sweep / "summary" / "table.tex").read_text()


def test_where_keeps_the_trials_asked_for(sweep, summarize):
    summarize(sweep, "--no-plots", "--where", "rank >= 4")
    assert set(pd.read_csv(sweep / "summary" / "trials.csv")["lora.rank"]) == {4, 16}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere"),
        (["SWEEP", "--metric", "val_acuracy"], "val_acuracy"),
        (["SWEEP", "--where", "ranc > 1"], "ranc"),
        (["SWEEP", "--pivot", "rank", "dropuot"], "dropuot"),
        (["SWEEP", "--out", "SWEEP/file"], "file"),
    ],
)
def test_wrong_options_are_one_line(arguments, words, sweep, summarize):
    (sweep / "file").write_text("in the way")
    done = summarize(*[a.replace("SWEEP", str(sweep)) for a in arguments], code=1)
    assert len(done.err.strip().splitlines()) == 1
    assert words in done.err


def test_an_empty_folder(tmp_path, summarize):
    (tmp_path / "empty").mkdir()
    assert "empty" in summarize("empty", code=1).err


def test_a_record_cut_in_half_is_named_and_the_rest_summarized(sweep, summarize):
    path = sorted(sweep.glob("*/record.json"))[0]
    path.write_bytes(path.read_bytes()[:200])
    done = summarize(sweep, "--no-plots")
    assert path.parent.name in done.out + done.err
    assert len(pd.read_csv(sweep / "summary" / "trials.csv")) == 8


def test_names_that_are_markup_or_templates_stay_text(tmp_path, summarize):
    folder, weights = "{{ 7*7 }}<script>alert(1)", "{% raw %}<b>&{{ 6*7 }}"
    for rank, values in ACCURACY.items():
        for seed, accuracy in enumerate(values):
            make_trial(
                tmp_path / folder, accuracy, lora__rank=rank, seed=seed, model__weights=weights if rank == 4 else "A"
            )
    summarize(folder, "--where", "rank > 1", "--metric", "val_loss")
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
    for seed in range(2):
        make_trial(tmp_path / "one", 0.9, seed=seed)
    summarize("one", "--no-plots")
    page = (tmp_path / "one" / "summary" / "report.html").read_text()
    heads = ["Cells", "What was done", "Trials", "Environment", "How to reproduce"]
    assert re.findall(r"<h[23]>(.*?)</h[23]>", page) == heads
    make_trial(tmp_path / "one", None, status="failed", seed=2)
    (tmp_path / "one" / "x").mkdir()
    (tmp_path / "one" / "x" / "record.json").write_text("{")
    summarize("one")
    page = (tmp_path / "one" / "summary" / "report.html").read_text()
    more = ["Cells", "Pictures", "Not averaged", "Problems on reading", "What was done", *heads[2:]]
    assert re.findall(r"<h[23]>(.*?)</h[23]>", page) == more
