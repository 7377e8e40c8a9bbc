"""A summary by another metric than accuracy, and the losses beside it."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_records import FIRST, make_race, make_sweep
from scipy import stats as scipy_stats

from lora_vit.analysis import export, plots
from lora_vit.analysis.core import summarize
from lora_vit.errors import UserError
from lora_vit.metrics import LOSSES, METRICS
from lora_vit.records import PLAN, TrialRecord

RANKS = [{"lora__rank": rank} for rank in (1, 4, 16)]
Y = np.array([[0.960, 0.963, 0.961], [0.930, 0.932, 0.931], [0.900, 0.903, 0.901]])
"""The higher the accuracy, the lower the macro-F1, which :func:`with_all` makes of it."""


def with_all(record: TrialRecord) -> None:
    """All figures, as training records them; the Brier score is noise for each rank and seed."""
    rng = np.random.default_rng([record.config["lora"]["rank"], record.config["seed"]])
    for split in ("val", "test"):
        accuracy = record.metrics[f"{split}_accuracy"]
        own = dict.fromkeys(METRICS, 0.5) | {"accuracy": accuracy, "macro_f1": 1.5 - accuracy}
        own |= {"brier": rng.uniform(), "ece": 0.02, "loss": 1 - accuracy}
        record.metrics |= {f"{split}_{name}": value for name, value in own.items()}


def sweep_in(folder: Path, **more: Any) -> Path:
    return make_sweep(folder, RANKS, Y, curve=False, edit=with_all, **more)


def order(summary: Any) -> list[int]:
    return summary.cells["lora.rank"].tolist()


def test_every_figure_is_that_of_the_metric(tmp_path):
    sweep = sweep_in(tmp_path)
    assert order(summarize(sweep)) == [1, 4, 16]
    got = summarize(sweep, metric="macro_f1", margin=1.0)
    assert order(got) == [16, 4, 1]
    assert got.cells["mean"].tolist() == pytest.approx((1.5 - Y).mean(1)[::-1])
    assert got.cells["mark"].tolist() == ["best", "worse", "worse"]
    assert got.trials["val_macro_f1"][0] == got.trials["val_macro_f1"].max()
    assert got.test.mean == pytest.approx(1.5 - (Y[2].mean() - 0.01))
    assert set(got.effects.table["effect"].round(3)) == {0.03, 0.06}
    assert got.verdict.startswith("rank 16 has the highest val macro-F1, 59.87 %")
    assert got.errors_of_test().endswith("between seeds"), "Wilson's interval is that of a share of the images"
    page = export.html_report(got, {}, "command")
    for words in ("val macro-F1 of rank 16", "test macro-F1 of that cell alone", "Pareto front of val macro-F1",
                  f"Every figure is the val macro-F1 ({METRICS['macro_f1'].meaning})"):  # fmt: skip
        assert words in html.unescape(page)
    assert "val accuracy" not in page
    assert list(export.readable(got, wide=False))[2] == "val macro-F1 %"
    labels = {text for figure in plots.draw_all(got).values() for axes in figure.axes for text in
              (axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel())}  # fmt: skip
    assert any("Val macro-F1" in text for text in labels)
    assert not any("accuracy" in text for text in labels)


def test_the_trials_own_metric_counts_or_that_of_the_sweeps_newest_command(tmp_path):
    sweep = sweep_in(tmp_path, trainer__metric="macro_f1")
    assert order(summarize(sweep)) == [16, 4, 1]
    assert order(summarize(sweep, metric="accuracy")) == [1, 4, 16]
    plan = {"trials": list(summarize(sweep).trials["trial"]), "metric": "accuracy"}
    (sweep / PLAN).write_text(json.dumps(plan))
    assert order(summarize(sweep)) == [1, 4, 16]
    other = sweep_in(tmp_path / "other", trainer__metric="macro_f1", data__augment="flip")
    with pytest.raises(UserError, match=r"several trainer\.metric \(.*accuracy.*\): give --metric"):
        summarize([sweep, other])
    assert summarize([sweep, other], metric="macro_f1").metric == "macro_f1"
    with pytest.raises(UserError, match=r"--metric=macrof1 is unknown, did you mean 'macro_f1'\? \(one of: accuracy, "):
        summarize(sweep, metric="macrof1")


def test_trials_of_an_earlier_version_are_listed_where_they_lack_the_metric(tmp_path):
    sweep = sweep_in(tmp_path)
    make_sweep(sweep, [{"lora__rank": 2}], Y[:1, :2] - 0.02, curve=False)
    assert order(summarize(sweep)) == [1, 2, 4, 16]
    got = summarize(sweep, metric="macro_f1")
    assert order(got) == [16, 4, 1]
    assert got.unfinished["reason"].tolist() == ["no val_macro_f1", "no val_macro_f1"]
    assert "Not in the averages: 2 no val_macro_f1 (listed under 'Not averaged')." in got.warnings
    old = make_sweep(tmp_path / "old", RANKS, Y, curve=False)
    with pytest.raises(UserError, match="no completed trial with a val_macro_f1"):
        summarize(old, metric="macro_f1")


def test_losses_are_paired_with_the_best_cells(tmp_path):
    got = summarize(sweep_in(tmp_path))
    trials = got.trials.pivot_table(index="lora.rank", columns="seed", values="val_brier")
    for rank in (4, 16):
        cell = got.cells.set_index("lora.rank").loc[rank]
        behind = trials.loc[rank] - trials.loc[1]
        half = scipy_stats.t.ppf(0.975, 2) * behind.std() / np.sqrt(3)
        assert cell["val_brier"] == pytest.approx(trials.loc[rank].mean())
        assert cell[["d_brier", "d_brier_low", "d_brier_high"]].tolist() == (
            pytest.approx([behind.mean(), behind.mean() - half, behind.mean() + half])
        )
    table = export.readable(got)
    assert table.iloc[0][["ECE", "ECE vs best", "NLL"]].tolist() == ["0.0200", "–", f"{1 - Y[0].mean():.4f}"]
    assert table.iloc[1]["Brier vs best"].count("+") + table.iloc[1]["Brier vs best"].count("-") == 2
    assert all(f"{m.title}: {m.meaning}." in got.legend for m in LOSSES.values())
    narrow = list(export.readable(got, wide=False))
    assert not {"NLL", "Brier", "ECE"} & set(narrow)
    old = summarize(make_sweep(tmp_path / "old", RANKS, Y, curve=False))
    assert list(export.readable(old, wide=False)) == narrow
    assert not {"NLL", "Brier", "ECE"} & set(export.readable(old)), "it has no losses but the first"


def test_a_race_is_decided_and_shown_by_its_own_metric(tmp_path):
    """By another one its first seeds are a fixed sweep."""
    values = {rank: y[0] + np.linspace(0, 0.004, 6) for rank, y in zip((1, 4, 16), Y, strict=True)}
    make_race(tmp_path, values)
    for path in tmp_path.glob("*/record.json"):
        record = json.loads(path.read_text())
        record["metrics"] |= {"val_macro_f1": 1.5 - record["metrics"]["val_accuracy"], "val_brier": 0.1}
        path.write_text(json.dumps(record))
    plan = json.loads((tmp_path / PLAN).read_text())
    for metric, best in (("accuracy", 1), ("macro_f1", 16)):
        own = {"metric": metric, "trials": [path.parent.name for path in tmp_path.glob("*/record.json")]}
        (tmp_path / PLAN).write_text(json.dumps(plan | own))
        got = summarize(tmp_path)
        assert (got.metric, got.cells["mark"][0], order(got)[0]) == (metric, "selected", best)
        assert "val_brier" in got.cells
        assert "d_brier" not in got.cells, "a race claims nothing of other figures"
    other = summarize(tmp_path, metric="accuracy")
    assert (other.race, order(other)[0], set(other.cells["n"])) == (None, 1, {3})
    assert set(other.trials["seed"]) == {FIRST, FIRST + 1, FIRST + 2}
    assert any("only the first 3 seeds" in line for line in other.problems)


def test_the_command(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep_in(tmp_path / "s")
    code, out, _ = call("summarize", "s", "--metric", "macro_f1", "--no-plots")
    assert code == 0
    assert "rank 16 has the highest val macro-F1" in out
    assert "Test macro-F1 of that cell: 60.87 %" in out
    page = html.unescape((tmp_path / "s/summary/report.html").read_text())
    assert "lora-vit summarize s --metric macro_f1 --no-plots" in page
    assert {"val_macro_f1", "val_accuracy", "val_ece"} <= set(pd.read_csv(tmp_path / "s/summary/trials.csv"))
    assert call("summarize", "s", "--metric", "ece")[0] == 1
