"""The summary as a command: its figures against an independent computation, its files, and bad input."""

from __future__ import annotations

import re
import subprocess
import sys
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


def summarize(*arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "lora_vit.summarize", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_cells_against_an_independent_computation(sweep, tmp_path):
    summarize(sweep, "--no-plots", cwd=tmp_path)
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


def test_order_of_folders_and_failed_trials_change_no_figure(sweep, tmp_path):
    summarize(sweep, "--no-plots", "--out", "a", cwd=tmp_path)
    make_trial(sweep, None, status="failed", lora__rank=2, seed=0)
    make_trial(sweep, None, status="stopped", lora__rank=1, seed=9)
    out = summarize(sweep, "--no-plots", "--out", "b", cwd=tmp_path).stdout
    columns = ["lora.rank", "mean", "sd", "n", "low", "high", "mark"]
    a, b = (pd.read_csv(tmp_path / f / "cells.csv") for f in "ab")
    pd.testing.assert_frame_equal(a[columns], b[b["mean"].notna()][columns].reset_index(drop=True))
    assert "failed" in out
    assert "stopped" in out


def test_the_report_needs_nothing_from_outside(sweep, tmp_path):
    summarize(sweep, cwd=tmp_path)
    html = (sweep / "summary" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", html)
    assert "<script src" not in html
    assert html.index("rank 16") < html.index("<table")  # the verdict comes first
    for name in ("by_rank.png", "by_rank.svg", "table.tex", "table.md", "trials.csv"):
        assert (sweep / "summary" / name).stat().st_size > 0
    assert "\\toprule" in (sweep / "summary" / "table.tex").read_text()


def test_where_keeps_the_trials_asked_for(sweep, tmp_path):
    summarize(sweep, "--no-plots", "--where", "rank >= 4", cwd=tmp_path)
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
def test_wrong_options_are_one_line(arguments, words, sweep, tmp_path):
    (sweep / "file").write_text("in the way")
    done = summarize(*[a.replace("SWEEP", str(sweep)) for a in arguments], cwd=tmp_path, code=1)
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in summarize("empty", cwd=tmp_path, code=1).stderr


def test_a_record_cut_in_half_is_named_and_the_rest_summarized(sweep, tmp_path):
    path = sorted(sweep.glob("*/record.json"))[0]
    path.write_bytes(path.read_bytes()[:200])
    done = summarize(sweep, "--no-plots", cwd=tmp_path)
    assert path.parent.name in done.stdout + done.stderr
    assert len(pd.read_csv(sweep / "summary" / "trials.csv")) == 8
