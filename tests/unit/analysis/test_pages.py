"""The tables as people read them: text, Markdown, LaTeX, terminal and page."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_records import grid, make_sweep, make_trial
from rich.console import Console

from lora_vit.analysis import export, plots, summarize

CELLS = [{"lora__rank": 1}, {"lora__rank": 2}]
Y = np.array([[0.8, 0.81], [0.9, 0.91]])


@pytest.fixture
def large(tmp_path):
    """Ranks, dropouts and learning rates with both baselines."""
    return make_sweep(tmp_path / "large", *grid(np.random.default_rng(0), (1, 16), (0.0, 0.1), (1e-3, 1e-2), 3))


def test_the_cells_as_text(tmp_path):
    cells = [*CELLS, {"lora__method": "full"}, {"lora__method": "none"}]
    make_sweep(tmp_path, cells, np.array([*Y, [0.75, np.nan], [0.7, 0.71]]))
    summary = summarize(tmp_path, margin=2.0)
    table = export.readable(summary)
    columns = ["#", "method", "rank", "val accuracy %", "n", "mark", "within 2.00", "vs best (points)"]
    assert table[columns].to_numpy().tolist() == [
        ["1", "LoRA", "2", "90.50", "2", "best", "yes", "–"],
        ["2", "LoRA", "1", "80.50", "2", "worse", "", "-10.00"],
        ["3", "full fine-tuning", "–", "75.00", "1", "no verdict", "", "–"],
        ["4", "linear probe", "–", "70.50", "2", "worse", "", "-20.00"],
    ]
    low, high = (f"{100 * summary.cells[name][0]:.2f}" for name in ("low", "high"))
    assert list(table["95 % interval"][::2]) == [f"{low} to {high}", "–"]
    assert list(table["vs linear probe"]) == ["+20.00", "+10.00", "+5.00", "–"]
    assert list(table["parameters"]) == ["56,586 *", "28,938 *", "1.20 M", "1,290 *"]
    assert list(table["seconds"]) == ["4.1 *", "4.1 *", "4.0 *", "4.0"]
    assert list(table["peak memory"]) == ["200.06 MB", "200.03 MB", "201.20 MB", "200.00 MB"]
    assert "adjusted" not in table
    less = export.readable(summary, wide=False)
    assert not {"sd", "images/s", "adapter", "interval of it", "scaling"} & set(less)


def test_adjusted_means_are_shown_if_seeds_are_missing(tmp_path):
    make_sweep(tmp_path, CELLS, np.array([[0.90, 0.92, 0.82], [0.90, 0.91, np.nan]]))
    table = export.readable(summarize(tmp_path)).set_index("rank")
    assert table.loc["2", "val accuracy %"] > table.loc["1", "val accuracy %"]
    assert table.loc["2", "adjusted"] < table.loc["1", "adjusted"]


def test_the_rule_of_scaling_and_its_value_have_a_column_each(tmp_path):
    cells = [{"lora__rank": 4}, {"lora__rank": 4, "lora__scaling": "rslora"}]
    table = export.readable(summarize(make_sweep(tmp_path, cells, Y)))
    assert table[["scaling", "effective scaling"]].to_numpy().tolist() == [["rslora", "16"], ["standard", "8"]]


def test_the_sections_below_the_cells(large, monkeypatch):
    make_trial(large, 0.2, status="stopped", seed=3, lora__rank=1)
    summary = summarize(large)
    (_, rates, notes), (_, effects, of_effects), (_, unfinished, _) = export.sections(summary)
    assert notes == [export.RATES_NOTE]
    first, found = summary.learning_rates.iloc[0], rates.iloc[0]
    assert found["best lr"].split()[0] == f"{first['best_lr']:g}"
    assert ("(edge)" in found["best lr"]) == first["edge"]
    assert found["best over lr, %"] == f"{100 * first['best_mean']:.2f}"
    shared = f"at shared lr {first['shared_lr']:g}, %"
    assert found[shared] == f"{100 * first['shared_mean']:.2f}"
    assert of_effects == summary.effects.notes != []
    effect = summary.effects.table.iloc[0]
    assert list(effects.iloc[0]) == ["rank", "16", "1", f"{100 * effect['effect']:+.2f}",
                                           f"{100 * effect['low']:+.2f} to {100 * effect['high']:+.2f}"]  # fmt: skip
    assert list(unfinished.iloc[0][["status", "epoch", "last value"]]) == ["stopped", "5", "20.00 %"]
    monkeypatch.setattr(export, "PAGE_ROWS", 0)
    page = export.html_report(summary, {}, "command")
    files = re.findall(r"The first 0 of [\d,]+; all of them are in (\S+)\.csv", page)
    assert files == ["cells", "cells", "cells", "trials", "trials", "cells"], "the last: the environment"


def test_notes_are_shown_even_without_their_table(tmp_path):
    summary = summarize(make_sweep(tmp_path, CELLS, Y))
    summary.effects.table, summary.effects.notes = summary.effects.table[:0], ["why there is *none*"]
    console = Console(width=100, file=io.StringIO())
    export.terminal(summary, console, 30)
    assert "note: why there is *none*" in console.file.getvalue()
    assert "### Main effects (points)\n\nwhy there is \\*none\\*\n" in export.table_md(summary)
    assert '<p class="note">Why there is *none*.</p>' in export.html_report(summary, {}, "command")


@pytest.mark.parametrize("name", ["a<script>&_b%#{}$", "$\\bad{$ *x* <b>\n$y$|`"])
def test_names_are_text_wherever_they_are_shown(tmp_path, name):
    make_sweep(tmp_path, [CELLS[0], {**CELLS[1], "model__weights": name}], Y)
    summary = summarize(tmp_path)
    page = export.html_report(summary, {}, "command")
    assert name not in page
    assert page.count("<script>") == 1
    assert "<b>*x*" not in page
    table = export.table_md(summary)
    assert not any(raw in table for raw in ("<script", "<b>", " *x*"))
    assert all(line.count(" | ") == table.splitlines()[6].count(" | ") for line in table.splitlines()[6:10])
    tex = export.table_tex(summary)
    comments, _, body = tex.partition("\\begin{table}")
    assert all(line.startswith("%") for line in comments.splitlines())
    assert (r"\&\_b\%\#\{\}\$" in body) == ("&" in name)
    assert (r"\$\textbackslash{}bad\{\$" in body) == ("bad" in name)
    assert all(plots.render(figure, "svg") for figure in plots.draw_all(summary).values())


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_latex_table_fits_a_page(tmp_path):
    """Nine columns of settings, two baselines, more cells than a page has lines: nothing sticks out of the text."""
    settings, y = grid(np.random.default_rng(0), (1, 2, 4, 8), (0.0, 0.1), (3e-4, 1e-3, 3e-3), 3)
    long = {"data__augment": "crop_flip", "optimizer__schedule": "cosine", "lora__targets": ["q", "v"]}
    settings += [{**cell, **long} for cell in settings if cell.get("lora__method", "lora") == "lora"]
    make_sweep(tmp_path / "sweep", settings, np.vstack([y, y[: len(settings) - len(y)]]), curve=False)
    summary = summarize(tmp_path / "sweep", margin=2.0)
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
    (tmp_path / "a.tex").write_text(head + export.table_tex(summary) + r"\end{document}")
    subprocess.run(["pdflatex", "-interaction=batchmode", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True)
    log = (tmp_path / "a.log").read_text(errors="replace")
    assert "Overfull" not in log
    assert "Float too large" not in log


def test_long_tables_say_what_they_leave_out(tmp_path, monkeypatch):
    cells = [{"lora__rank": rank, "lora__dropout": p} for rank in (1, 2, 4, 8, 16, 32) for p in np.arange(7) / 10]
    summary = summarize(make_sweep(tmp_path, cells, np.linspace(0.5, 0.9, 42)[:, None], curve=False))
    tex = export.table_tex(summary)
    assert f"The first {export.LATEX_ROWS} of 42 cells." in tex
    assert tex.count("\\\\\n") == export.LATEX_ROWS + 1
    console = Console(width=160, file=io.StringIO())
    export.terminal(summary, console, 10)
    assert "... 32 more rows" in console.file.getvalue()
    monkeypatch.setattr(export, "PAGE_ROWS", 20)
    page = export.html_report(summary, {}, "command")
    assert "The first 20 of 42; all of them are in cells.csv." in page
    assert "The first 20 of 42; all of them are in trials.csv." in page


def test_numbers_stand_on_the_right():
    table = pd.DataFrame({"number": ["–", "1,234 *", "-0.5"], "text": ["1", "rank 1", "–"]})
    assert export.markdown(table).splitlines()[1] == "| ---: | --- |"
    assert export.numeric(table) == [True, False]


def test_the_command_that_trained_the_best_cell_is_in_the_report(large):
    folder = summarize(large).trials["folder"][0]
    hydra = {"mode": "MULTIRUN", "overrides": {"hydra": [], "task": ["sweep=quickstart", "sweep.name=a b"]}}
    (place := Path(folder) / ".hydra").mkdir()
    (place / "hydra.yaml").write_text(json.dumps({"hydra": hydra}))
    page = export.html_report(summarize(large), {}, "command")
    assert "python -m lora_vit.train -m sweep=quickstart &#39;sweep.name=a b&#39;\ncommand" in page
    (place / "hydra.yaml").write_text("hydra: [")
    assert "lora_vit.train" not in export.html_report(summarize(large), {}, "command")


@pytest.mark.parametrize("width", [40, 80, 120, 160])
def test_the_terminal_breaks_no_word_and_names_what_it_has_no_room_for(large, width):
    summary = summarize(large)
    console = Console(width=width, file=io.StringIO())
    export.terminal(summary, console, 30)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    table = lines[: lines.index("")]
    assert any("too narrow for" in line for line in table) == (width < 160)
    if width > 40:  # there, nothing helps
        marks = [word for line in table for word in line.split() if word in ("best", "candidate", "open", "worse")]
        assert len([m for m in marks if m != "best"]) == len(summary.cells) - 1
        assert all("LoRA" in line or "fine-tuning" in line or "probe" in line for line in table if "worse" in line)
