"""Tables, loading, warnings and text of a summary, on made-up sweeps with known answers."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_records import grid, make_sweep, make_trial
from rich.console import Console

from lora_vit.analysis import export, report, tables, texts
from lora_vit.analysis.core import select, summarize
from lora_vit.analysis.load import load_trials
from lora_vit.errors import RecordError

RATES = (1e-4, 1e-3, 1e-2)


@pytest.fixture
def by_rate(tmp_path):
    """Ranks 1 and 8 at three learning rates: rank 1 is best at 1e-3, rank 8 at 1e-2; a probe at 1e-3 only."""
    means = {
        (1, 1e-4): 0.80, (1, 1e-3): 0.90, (1, 1e-2): 0.85,
        (8, 1e-4): 0.70, (8, 1e-3): 0.88, (8, 1e-2): 0.95,
    }  # fmt: skip
    cells = [{"lora__rank": rank, "optimizer__lr": lr} for rank, lr in means]
    noise = np.array([[-0.01, 0.0, 0.01]])
    make_sweep(tmp_path, cells, np.array([*means.values()])[:, None] + noise)
    for seed in range(3):
        make_trial(tmp_path, 0.75 + 0.01 * seed, seed=seed, lora__method="none")
    return tmp_path


def test_best_over_lr_and_at_the_shared_lr(by_rate):
    rates = summarize(by_rate).learning_rates.set_index("setting")
    assert list(rates.index) == ["rank 8", "rank 1", "linear probe"]
    assert rates.loc["rank 8", "best_lr"] == 1e-2
    assert rates.loc["rank 8", "best_mean"] == pytest.approx(0.95)
    assert bool(rates.loc["rank 8", "edge"])
    assert rates.loc["rank 1", "best_lr"] == 1e-3
    assert not bool(rates.loc["rank 1", "edge"])
    assert (rates["shared_lr"] == 1e-3).all()  # the one rate at which all three ran
    assert list(rates["shared_mean"]) == pytest.approx([0.88, 0.90, 0.76])
    assert list(rates["rates"]) == [3, 3, 1]


def test_the_difference_to_a_baseline_is_paired_by_seed(by_rate):
    cells = summarize(by_rate).cells.set_index("label")
    best = cells.loc["rank 8, lr 0.01"]
    differences = np.array([0.94, 0.95, 0.96]) - np.array([0.75, 0.76, 0.77])
    assert best["vs_probe"] == pytest.approx(differences.mean())
    assert best["vs_probe_high"] - best["vs_probe_low"] == pytest.approx(0, abs=0.01)  # the seeds' luck cancels
    assert np.isnan(cells.loc["linear probe, lr 0.001", "vs_probe"])


def test_pareto_front_against_brute_force():
    rng = np.random.default_rng(5)
    for _ in range(50):
        score, cost = rng.integers(0, 5, 12).astype(float), rng.integers(0, 5, 12).astype(float)
        score[rng.integers(12)] = np.nan
        found = tables.pareto_front(score, cost)
        for k, front in enumerate(found):
            better = (score >= score[k]) & (cost <= cost[k]) & ((score > score[k]) | (cost < cost[k]))
            assert front == (not better.any() and np.isfinite(score[k])), (score, cost, k)


def test_a_pivot_holds_means(by_rate):
    table = summarize(by_rate, pivot=("rank", "lr")).pivot
    assert table is not None
    assert table.loc[1, 1e-2] == pytest.approx(0.85)
    assert table.loc[8, 1e-4] == pytest.approx(0.70)
    with pytest.raises(RecordError, match="no such setting"):
        summarize(by_rate, pivot=("rank", "lrr"))


def test_only_what_varies_gets_a_column(by_rate):
    summary = summarize(by_rate)
    assert summary.settings == ["lora.method", "lora.rank", "optimizer.lr"]


def test_a_rerun_replaces_the_older_one_in_any_order(tmp_path):
    def started(at: float):
        def edit(record):
            record.started = record.heartbeat = at

        return edit

    old = make_trial(tmp_path / "old", 0.5, edit=started(1.0))
    make_trial(tmp_path / "new", 0.9, edit=started(2.0))
    for order in itertools.permutations([tmp_path / "old", tmp_path / "new"]):
        loaded = load_trials(order)
        assert list(loaded.trials["val_accuracy"]) == [0.9]
        assert old.trial_id in loaded.problems[0]
        assert "is newer and counts" in loaded.problems[0]


@pytest.mark.parametrize("value", [None, float("nan"), 123, "0.9", True, -0.1])
def test_a_missing_metric_is_missing_and_never_a_number(tmp_path, value):
    make_sweep(tmp_path, [{"lora__rank": 1}, {"lora__rank": 2}], np.array([[0.8, 0.81], [0.9, 0.91]]))
    clean = summarize(tmp_path)
    record = make_trial(tmp_path, 0.99, seed=2, lora__rank=1)
    path = tmp_path / record.trial_id / "record.json"
    values = json.loads(path.read_text())
    values["metrics"]["val_accuracy"] = value
    path.write_text(json.dumps(values))
    summary = summarize(tmp_path)
    pd.testing.assert_frame_equal(
        summary.cells[["label", "mean", "sd", "n"]], clean.cells[["label", "mean", "sd", "n"]]
    )
    assert record.trial_id in list(summary.unfinished["trial"])
    assert any(record.trial_id in line for line in summary.problems)


def test_stopped_trials_are_listed_and_never_averaged(tmp_path):
    make_sweep(tmp_path, [{"lora__rank": 1}, {"lora__rank": 2}], np.array([[0.8, 0.81], [0.9, 0.91]]))
    clean = summarize(tmp_path)
    for seed, status in ((2, "stopped"), (3, "failed"), (4, "interrupted"), (5, "running")):
        make_trial(tmp_path, 0.2, seed=seed, lora__rank=1, status=status)
    summary = summarize(tmp_path)
    pd.testing.assert_frame_equal(summary.cells[["label", "mean", "n"]], clean.cells[["label", "mean", "n"]])
    listed = summary.unfinished[summary.unfinished["status"] != "missing"]
    assert sorted(listed["status"]) == ["failed", "interrupted", "running", "stopped"]
    assert any("1 failed" in line for line in summary.warnings)


def test_one_trial_alone(tmp_path):
    make_trial(tmp_path, 0.9)
    summary = summarize(tmp_path)
    assert list(summary.cells["mark"]) == ["no verdict"]
    assert np.isnan(summary.cells["low"][0])
    assert "one trial" in summary.verdict.lower() or "one seed" in summary.verdict.lower(), summary.verdict


def edited(path, **changes):
    values = json.loads(path.read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"environment__commit": "fedcba9"}, "different code versions"),
        ({"environment__precision": "bf16"}, "different precisions"),
        ({"environment__dirty": True}, "uncommitted changes"),
        ({"data__train": 50}, "numbers of training images"),
        ({"cost__pack_size": 1}, "packs of different size (1, 4)"),
        ({"environment__device": "H100"}, "2 kinds of device: seconds, images/s and memory do not compare"),
        ({"environment__versions": {"torch": "2.6.0"}}, "different library versions"),
    ],
)
def test_what_is_not_the_same_is_told(tmp_path, change, words):
    make_sweep(tmp_path, [{"lora__rank": 1}, {"lora__rank": 2}], np.array([[0.8, 0.81], [0.9, 0.91]]))
    assert not any(words in line for line in summarize(tmp_path).warnings)
    edited(sorted(tmp_path.glob("*/record.json"))[0], **change)
    assert any(words in line for line in summarize(tmp_path).warnings)


@pytest.mark.parametrize("change", [{"data__name": "cifar10"}, {"data__split_seed": 1}])
def test_other_images_are_refused(tmp_path, change):
    make_sweep(tmp_path, [{"lora__rank": 1}], np.array([[0.8, 0.81]]))
    make_trial(tmp_path, 0.9, lora__rank=2, **change)
    with pytest.raises(RecordError, match=r"--where"):
        summarize(tmp_path)
    key = next(iter(change)).replace("__", ".")
    value = change[next(iter(change))]
    other = f"{key} != '{value}'" if isinstance(value, str) else f"{key} != {value}"
    assert len(summarize(tmp_path, where=other).cells) == 1


def test_one_learning_rate_is_warned_of(tmp_path):
    make_sweep(tmp_path, [{"lora__rank": 1}, {"lora__rank": 2}], np.array([[0.8, 0.81], [0.9, 0.91]]))
    warnings = " ".join(summarize(tmp_path).warnings)
    assert "Only one learning rate (0.001) was tried" in warnings
    assert "effective scaling falls as the rank rises" in warnings


def test_names_are_escaped(tmp_path):
    name = "a<script>&_b%#{}$"
    cells = [{"lora__rank": 1}, {"lora__rank": 2, "model__weights": name}]
    make_sweep(tmp_path, cells, np.array([[0.8, 0.81], [0.9, 0.91]]))
    summary = summarize(tmp_path)
    html = report.html_report(summary, {}, "command")
    assert "a&lt;script&gt;&amp;_b%#{}$" in html
    assert name not in html
    tex = export.table_tex(summary)
    assert r"a<script>\&\_b\%\#\{\}\$" in tex.replace(r"\textless{}", "<").replace(r"\textgreater{}", ">")
    markdown = export.table_md(summary)
    assert "|" in markdown
    assert export.latex_escape("50 % of a_b & c\\d") == r"50 \% of a\_b \& c\textbackslash{}d"


def test_names_in_markdown_and_formulas_in_pictures(tmp_path):
    from lora_vit.analysis.plots import draw_all, render

    name = "$\\bad{$ *x* <b>\n$y$"
    cells = [{"lora__rank": 1}, {"lora__rank": 2, "model__weights": name}]
    make_sweep(tmp_path, cells, np.array([[0.8, 0.81], [0.9, 0.91]]))
    summary = summarize(tmp_path)
    assert "<b>" not in export.table_md(summary)
    assert "*x*" not in export.table_md(summary)
    assert all(line.startswith("%") for line in export.table_tex(summary).split("\\begin")[0].splitlines())
    assert all(render(figure, "svg") for figure in draw_all(summary).values())


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_latex_tables_fit_a_page(tmp_path):
    """Nine columns of settings, two baselines, more cells than a page has lines: nothing sticks out of the text."""
    rng = np.random.default_rng(0)
    settings, y = grid(rng, (1, 2, 4, 8), (0.0, 0.1), RATES, 3)
    long = {"data__augment": "crop_flip", "optimizer__schedule": "cosine", "lora__targets": ["q", "v"]}
    settings += [{**cell, **long} for cell in settings if cell.get("lora__method", "lora") == "lora"]
    make_sweep(tmp_path / "sweep", settings, np.vstack([y, y[: len(settings) - len(y)]]), curve=False)
    summary = summarize(tmp_path / "sweep", margin=2.0)
    assert len(summary.cells) > export.LATEX_ROWS
    text = export.table_tex(summary)
    assert text.count("The first 40 of ") == 2
    assert "adapter" not in text[: text.index("The same cells")]
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
    (tmp_path / "a.tex").write_text(head + text + r"\end{document}")
    subprocess.run(["pdflatex", "-interaction=batchmode", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True)
    log = (tmp_path / "a.log").read_text(errors="replace")
    assert "Overfull" not in log
    assert "Float too large" not in log


@pytest.mark.parametrize(
    ("where", "ranks"),
    [
        ("total_parameters > 1E6 and rank > 1", {8}),
        ("lr <= 1e-3", {1, 8}),
        ("targets == 'all' and `lora.rank` != 8", {1}),
        ("method == 'none'", set()),
    ],
)
def test_conditions(by_rate, where, ranks):
    assert set(select(load_trials([by_rate]).trials, where)["lora.rank"].dropna()) == ranks


@pytest.mark.parametrize("where", ["rank.shape", "@pd", "__import__('os')", "rank", "rank >= ", "[x for x in rank]"])
def test_conditions_that_are_none_are_one_line(by_rate, where):
    with pytest.raises(RecordError) as caught:
        summarize(by_rate, where=where)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_each_rank_at_a_rate_of_its_own_is_warned_of(tmp_path):
    cells = [{"lora__rank": 1, "optimizer__lr": 1e-3}, {"lora__rank": 2, "optimizer__lr": 1e-2}]
    make_sweep(tmp_path, cells, np.array([[0.8, 0.81], [0.9, 0.91]]))
    assert any("cannot be told apart" in line for line in summarize(tmp_path).warnings)


def test_unequal_budgets_are_told(tmp_path):
    make_sweep(tmp_path, [{"lora__rank": 1}], np.array([[0.8, 0.81]]))
    make_sweep(tmp_path, [{"lora__rank": 2, "trainer__epochs": 4}], np.array([[0.9, 0.91]]))
    assert any("budgets are unequal: 4 (2), 5 (2)" in line for line in summarize(tmp_path).warnings)


def test_the_chosen_cell_is_the_one_that_the_verdict_names(tmp_path):
    y = np.array([[0.80, 0.81, 0.80], [0.90, 0.91, 0.90], [0.99, np.nan, np.nan]])
    make_sweep(tmp_path, [{"lora__rank": 1}, {"lora__rank": 2}, {"lora__rank": 4}], y)
    summary = summarize(tmp_path)
    assert summary.cells["mark"].tolist() == ["no verdict", "best", "worse"]
    assert summary.chosen.label == "rank 2"
    assert "rank 2 has the highest val accuracy among the cells with two or more seeds" in summary.verdict


def test_adjusted_means_are_shown_where_seeds_are_missing(tmp_path):
    y = np.array([[0.90, 0.92, 0.82], [0.90, 0.91, np.nan]])
    make_sweep(tmp_path, [{"lora__rank": 1}, {"lora__rank": 2}], y)
    summary = summarize(tmp_path)
    table = export.readable(summary).set_index("rank")
    assert table.loc["2", "val accuracy %"] > table.loc["1", "val accuracy %"]
    assert table.loc["2", "adjusted"] < table.loc["1", "adjusted"]
    assert "rank 1 has the highest val accuracy adjusted for missing seeds" in summary.verdict


def test_a_difference_of_nothing_has_no_sign(by_rate):
    summary = summarize(by_rate)
    assert [texts.signed(summary.metric, v) for v in (-0.0, -1e-6, 1e-6, -0.01)] == ["0.00", "0.00", "0.00", "-1.00"]


def test_the_command_that_trained_the_best_cell_is_in_the_report(by_rate):
    folder = summarize(by_rate).trials["folder"][0]
    hydra = {"mode": "MULTIRUN", "overrides": {"hydra": [], "task": ["sweep=quickstart", "sweep.name=a b"]}}
    (place := Path(folder) / ".hydra").mkdir()
    (place / "hydra.yaml").write_text(json.dumps({"hydra": hydra}))
    html = report.html_report(summarize(by_rate), {}, "command")
    assert "python -m lora_vit.train -m sweep=quickstart &#39;sweep.name=a b&#39;\ncommand" in html
    (place / "hydra.yaml").write_text("hydra: [")
    assert "lora_vit.train" not in report.html_report(summarize(by_rate), {}, "command")


def test_one_missing_setting_does_not_move_the_shared_rate(tmp_path):
    cells = [{"lora__rank": rank, "optimizer__lr": lr} for rank in (1, 2, 4, 8, 16) for lr in (1e-4, 1e-3)]
    y = np.array([[0.7, 0.71], [0.9, 0.91]] * 5)
    y[-1] = np.nan  # rank 16 failed at the better rate
    make_sweep(tmp_path, cells, y)
    rates = summarize(tmp_path).learning_rates
    assert (rates["shared_lr"] == 1e-3).all()
    assert rates["shared_mean"].notna().sum() == 4


@pytest.mark.parametrize("width", [80, 120, 160])
def test_the_terminal_breaks_no_word_and_names_what_it_has_no_room_for(tmp_path, width):
    cells, y = grid(np.random.default_rng(0), (1, 16), (0.0, 0.1), (1e-3, 1e-2), 3)
    summary = summarize(make_sweep(tmp_path, cells, y))
    console = Console(width=width, file=io.StringIO())
    export.terminal(summary, console, 30)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    table = lines[: lines.index("")]
    marks = [word for line in table for word in line.split() if word in ("best", "candidate", "open", "worse")]
    assert len([m for m in marks if m != "best"]) == len(summary.cells) - 1
    assert all("LoRA" in line or "fine-tuning" in line or "probe" in line for line in table if "worse" in line)
    assert any("too narrow for" in line for line in table) == (width < 160)
