"""What people look at: tables as text, Markdown, LaTeX, on the terminal and the page; pictures and their words."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import itertools
import json
import re
import shutil
import subprocess
from html import unescape

import numpy as np
import pandas as pd
import pytest
from made_up_records import grid, make_race, make_sweep, make_trial
from matplotlib import colors
from matplotlib.text import Text
from rich.console import Console
from sklearn.metrics import confusion_matrix

from lora_vit.analysis import export, plots
from lora_vit.analysis.core import summarize
from lora_vit.analysis.power import Design
from lora_vit.errors import ConfigError
from lora_vit.records import PREDICTIONS
from lora_vit.summarize import PICTURES

CELLS = [{"lora__rank": 1}, {"lora__rank": 2}]
Y = np.array([[0.8, 0.81], [0.9, 0.91]])


@pytest.fixture
def large(tmp_path):
    """Ranks, dropouts and learning rates with both baselines."""
    return make_sweep(tmp_path / "large", *grid(np.random.default_rng(0), (1, 16), (0.0, 0.1), (1e-3, 1e-2), 3))


def test_the_cells_as_text(tmp_path):
    cells = [*CELLS, {"lora__method": "full"}, {"lora__method": "none"}, {"lora__method": "dora", "lora__rank": 1}]
    make_sweep(tmp_path, cells, np.array([*Y, [0.75, np.nan], [0.7, 0.71], [0.77, 0.78]]))
    summary = summarize(tmp_path, margin=2.0)
    table = export.readable(summary)
    columns = ["#", "method", "rank", "val accuracy %", "n", "mark", "within 2.00", "vs best"]
    assert table[columns].to_numpy().tolist() == [
        ["1", "LoRA", "2", "90.50", "2", "best", "yes", "–"],
        ["2", "LoRA", "1", "80.50", "2", "worse", "", "-10.00"],
        ["3", "DoRA", "1", "77.50", "2", "worse", "", "-13.00"],
        ["4", "full fine-tuning", "–", "75.00", "1", "no verdict", "", "–"],
        ["5", "linear probe", "–", "70.50", "2", "worse", "", "-20.00"],
    ]
    low, high = (f"{100 * summary.cells[name][0]:.2f}" for name in ("low", "high"))
    assert list(table["95 % interval"][::3]) == [f"{low} to {high}", "–"]
    assert list(table["P(best)"]) == ["1.00", "0.00", "0.00", "–", "0.00"]
    assert list(table["parameters"]) == ["56,586 *", "28,938 *", "56,586", "1.20 M", "1,290 *"]
    assert list(table["seconds"]) == ["4.1 *", "4.1 *", "4.1", "4.0 *", "4.0"]
    assert list(table["images/s"]) == ["898", "899", "899", "900", "900"]
    assert list(table["peak memory"]) == ["200.06 MB", "200.03 MB", "200.06 MB", "201.20 MB", "200.00 MB"]
    less = export.readable(summary, wide=False)
    assert not {"sd", "images/s", "adapter", "interval of it", "scaling"} & set(less)


def test_the_rule_of_scaling_and_its_value_have_a_column_each(tmp_path):
    cells = [{"lora__rank": 4}, {"lora__rank": 4, "lora__scaling": "rslora"}]
    table = export.readable(summarize(make_sweep(tmp_path, cells, Y)))
    assert table[["scaling", "effective scaling"]].to_numpy().tolist() == [["rslora", "16"], ["standard", "8"]]


def test_the_sections_below_the_cells(large, monkeypatch):
    make_trial(large, 0.2, status="stopped", seed=3, lora__rank=1)
    summary = summarize(large)
    (_, methods, notes), (_, ranks, _), (_, settings, _), (_, effects, of_effects), (_, unfinished, _) = (
        export.sections(summary)
    )
    assert notes == [export.ASKED_NOTE, export.TEST_NOTE]
    assert list(methods["method"]) == ["LoRA", "full fine-tuning", "linear probe"]
    assert methods["LoRA is"][0] == "", "the base is the best method with adapters"
    found = summary.answers["method"].set_index("method").loc["linear probe"]
    assert list(methods.iloc[2])[3:] == [
        f"{100 * found['test'].mean:.2f}", f"{50 * (found['test'].high - found['test'].low):.2f}",
        *list(methods.iloc[2])[5:7], f"{100 * found['difference']:+.2f}",
        f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f}", "1,290",
    ]  # fmt: skip
    assert len(ranks) == 2 < len(settings) == 6, "also by dropout"
    assert export.markdown(ranks).splitlines()[1].startswith("| ---: | --- | ---: |"), "numbers stand on the right"
    assert of_effects == summary.effects.notes
    effect = summary.effects.table.iloc[0]
    assert list(effects.iloc[0]) == ["rank", "16", "1", "dropout 0, lr 0.001", f"{100 * effect['effect']:+.2f}",
                                           f"{100 * effect['low']:+.2f} to {100 * effect['high']:+.2f}"]  # fmt: skip
    assert list(unfinished.iloc[0][["status", "epoch", "last value"]]) == ["stopped", "5", "20.00 %"]
    monkeypatch.setattr(export, "PAGE_ROWS", 0)
    page = export.html_report(summary, {}, "command")
    files = re.findall(r"The first 0 of [\d,]+; all of them are in (\S+)\.csv", page)
    assert files == ["cells"] * 5 + ["trials", "trials", "cells"], "the last: the environment"


def test_notes_are_shown_even_without_their_table(tmp_path):
    summary = summarize(make_sweep(tmp_path, CELLS, Y))
    summary.effects.table, summary.effects.notes = summary.effects.table[:0], ["why there is *none*"]
    console = Console(width=100, file=io.StringIO())
    export.terminal(summary, console, 30)
    assert "note: why there is *none*" in console.file.getvalue()
    assert (
        "### Effects (points), each where the other settings are best\n\nwhy there is \\*none\\*\n"
        in export.table_md(summary)
    )
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
    assert all(line.count(" | ") == table.splitlines()[8].count(" | ") for line in table.splitlines()[8:12])
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
    make_sweep(tmp_path / "a b_1", settings, np.vstack([y, y[: len(settings) - len(y)]]), curve=False)
    table = export.table_tex(summarize(tmp_path / "a b_1", margin=2.0))
    (needs,) = re.findall(r"^% In the preamble: (.*)", table)
    body = f"\\documentclass{{article}}{needs}\\begin{{document}}\\ref{{tab:a-b-1}}{table}\\end{{document}}"
    (tmp_path / "a.tex").write_text(body)
    for _ in range(2):
        subprocess.run(["pdflatex", "-interaction=batchmode", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True)
    log = (tmp_path / "a.log").read_text(errors="replace")
    assert not any(word in log for word in ("Overfull", "Float too large", "undefined"))


def test_the_latex_table_has_what_a_paper_shows(tmp_path):
    y = np.array([[0.8, 0.81, 0.79], [0.9, 0.91, 0.9], [0.91, np.nan, np.nan]])
    summary = summarize(make_sweep(tmp_path / "s", [*CELLS, {"lora__rank": 4}], y))
    tex = export.table_tex(summary)
    low, high = (f"{100 * summary.cells[f'difference_{end}'][2]:.2f}".replace("-", "$-$") for end in ("low", "high"))
    assert "rank & val accuracy \\% & n & mark & vs best & parameters \\\\" in tex
    assert f"1 & 80.00 $\\pm$ 1.00 & 3 & worse & $-$10.33 ({low} to {high}) & 28,938 \\\\" in tex
    assert "4 & 91.00 & 1 & no verdict & -- & 111,882 \\\\" in tex
    caption = tex[tex.index("\\caption") : tex.index("\\label{tab:s}")]
    assert re.findall(r"emph{(.*?)}", caption) == ["best", "worse", "no verdict"], "the marks that are there"
    assert caption.endswith("one seed.}\n")
    race = export.table_tex(summarize(make_race(tmp_path / "r", {1: Y[0].repeat(3), 2: Y[1].repeat(3)})))
    assert "emph{selected} is the last one; \\emph{out} ones" in race


def test_a_notebook_shows_the_summary_and_its_pictures(large):
    summary = summarize(large)
    first, *_ = list(plots.draw_all(summary))
    assert summary.figure("by_rank") is summary.figures["by_rank"]
    with pytest.raises(ConfigError, match=f"figure=by_rnk is unknown.*one of: {first}, .*by_lr"):
        summary.figure("by_rnk")
    assert repr(summary) == f"<Summary: {summary.verdict}>"
    shown = {"html": summary._repr_html_, "png": summary.figure(first)._repr_png_}
    if importlib.util.find_spec("IPython"):
        from IPython.core.interactiveshell import InteractiveShell

        formats = InteractiveShell.instance().display_formatter.format
        shown = {"html": lambda: formats(summary)[0]["text/html"],
                 "png": lambda: formats(summary.figure(first))[0]["image/png"]}  # fmt: skip
    page = shown["html"]()
    (picture,) = re.findall(r'src="data:image/png;base64,(.*?)"', page)
    assert base64.b64decode(picture) == shown["png"]()
    assert page.count("<tr>") == 1 + len(summary.cells)
    assert all(line in unescape(page) for line in (summary.verdict, *summary.warnings))
    assert all(line.startswith(".lora-vit-summary ") for line in page[: page.index("</style>")].splitlines()[2:])
    assert " id=" not in page


def test_long_tables_say_what_they_leave_out(tmp_path):
    cells = [{"lora__rank": rank, "lora__dropout": p} for rank in (1, 2, 4, 8, 16, 32) for p in np.arange(7) / 10]
    summary = summarize(make_sweep(tmp_path, cells, np.linspace(0.5, 0.9, 42)[:, None], curve=False))
    tex = export.table_tex(summary)
    assert f"The first {export.LATEX_ROWS} of 42 cells." in tex
    assert tex.count("\\\\\n") == export.LATEX_ROWS + 1


TYPED = "python -m lora_vit.train -m sweep=quickstart seed=0,1,2 'sweep.name=a b'"


def test_the_page_names_what_was_asked_and_what_to_do_next(large):
    """The commands that were typed, with the seeds that settle what is open; of a run its own."""
    summary = summarize(large)
    page = html.unescape(export.html_report(summary, {}, "python -m again"))
    assert "digits: 10 classes; 100 train, 720 val, 720 test pictures" in page
    assert "method full fine-tuning, LoRA, linear probe; rank 1, 16; dropout 0, 0.1; lr 0.001, 0.01; 3 seeds" in page
    assert "test pictures; augment none" in page
    assert "<pre>python -m again</pre>\n<p>The trials ran at commit 0123abc.</p>" in page
    assert f"lora-vit predict {summary.chosen} IMAGE..." in page
    assert f"lora-vit evaluate {summary.chosen} --split val --out errors" in page
    assert "sweep.margin" not in page, "no sweep's command is known"
    (large / "sweep.json").write_text(json.dumps({"trials": [], "command": TYPED, "looks": [[4, 0, 1]]}))
    page = html.unescape(export.html_report(summary := summarize(large), {}, "python -m again"))
    assert page.count(TYPED) == 2
    c = summary.comparison
    design = Design(c.sd, int(c.compared.sum()), c.pictures, 0.05 / 8)  # at the second look
    gap = next(gap for gap in (0.005, 0.01, 0.02, 0.05) if design.seeds_needed(gap))
    seeds = design.seeds_needed(gap)
    start = "python -m lora_vit.train -m sweep=quickstart 'sweep.name=a b'"
    assert f"{start} 'seed=range(0,{seeds})'</pre>" in page
    assert f"{start} seed=0 sweep.margin={100 * gap:g}</pre>" in page
    within = design.seeds_within(0.02)
    page = html.unescape(export.html_report(summarize(large, margin=2), {}, "python -m again"))
    assert f"{start} 'seed=range(0,{within})'</pre>" in page
    summary.command = "python -m lora_vit.train seed=1,2"
    assert export.again(summary, "seed=3") == f"python -m lora_vit.train hydra.sweep.dir={large} seed=3"


def test_a_run_s_own_command_is_shown_and_no_worker_s(tmp_path):
    for name, typed in (("a", "lora-vit train experiment=quickstart"), ("b", "/x/lora_vit/sweep/__main__.py work -")):
        make_trial(tmp_path / name, edit=lambda record, typed=typed: record.environment.update(command=typed))
        page = export.html_report(summarize(tmp_path / name), {}, "again")
        assert (typed in page) == (name == "a")


@pytest.mark.parametrize("classes", [4, 30])
def test_what_the_chosen_trial_confuses(classes, tmp_path):
    folder = tmp_path / make_trial(tmp_path, 0.9).trial_id
    rng, names = np.random.default_rng(0), [f"class {k}" for k in range(classes)]
    labels = rng.integers(0, classes, 500)
    predicted = np.where(rng.random(500) < 0.7, labels, rng.integers(0, classes, 500))
    assert "confuses" not in export.html_report(summarize(tmp_path), {}, "command"), "nothing is known"
    (folder / "adapter.json").write_text(json.dumps({"class_names": names}))
    np.savez(folder / PREDICTIONS, **{"val.labels": labels, "val.predicted": predicted})
    known = confusion_matrix(labels, predicted)
    np.testing.assert_array_equal(export.confusion(folder), known)
    page = export.html_report(summarize(tmp_path), {}, "command")
    pairs = re.findall(r"<li>class (\d+) taken for class (\d+): (\d+) of (\d+)</li>", page)
    if classes == 4:
        table = re.search(r'class="confusion".*?</table>', page, re.S).group()
        assert [int(n or 0) for n in re.findall(r"<td.*?>(\d*)</td>", table)] == known.ravel().tolist()
    else:
        assert [int(n) for *_, n, _ in pairs] == sorted(known[~np.eye(classes, dtype=bool)])[:-21:-1]
        assert all((known[int(a), int(b)], known[int(a)].sum()) == (int(n), int(of)) for a, b, n, of in pairs)


@pytest.mark.parametrize("width", [40, 80, 120, 160])
def test_the_terminal_breaks_no_word_and_names_what_it_has_no_room_for(large, width):
    summary = summarize(large)
    console = Console(width=width, file=io.StringIO())
    export.terminal(summary, console, 30)
    lines = console.file.getvalue().partition("warning: ")[0].splitlines()
    assert max(map(len, lines)) <= width
    table = lines[: lines.index("")]
    assert any("too narrow for" in line for line in table) == (width < 160)
    if width > 40:  # there, nothing helps
        marks = [word for line in table for word in line.split() if word in ("best", "candidate", "open", "worse")]
        assert len([m for m in marks if m != "best"]) == len(summary.cells) - 1
        assert all("LoRA" in line or "full" in line or "linear" in line for line in table if "worse" in line)


LONG = "a_very_long_name_of_a_file_with_weights_" * 3 + "$x$"


def drawn(folder, **options):
    return plots.draw_all(summarize(folder, **options))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Rank x dropout x learning rate with baselines, one cell under a long name."""
    cells, y = grid(np.random.default_rng(3), (1, 2, 8), (0.0, 0.1), (3e-4, 1e-3), 3)
    y[-2] -= 0.2  # the linear probe, far below
    folder = make_sweep(tmp_path_factory.mktemp("quick"), cells, y)
    return make_sweep(folder, [{"lora__rank": 16, "model__weights": LONG}], np.array([[0.99, 0.995, 0.985]]))


def race(folder):
    """Four cells, of which two leave at once and one with the fourth seed."""
    rng = np.random.default_rng(0)
    y = np.array([0.8, 0.82, 0.935, 0.95])[:, None] + rng.normal(0, 0.002, 8) + rng.normal(0, 0.003, (4, 8))
    return make_race(folder, dict(zip((1, 2, 4, 8), y, strict=True)), 8, first_seeds=2, most_seeds=8)


def words(figure):
    """The texts that are drawn: ticks beyond an axis' ends are there, too."""
    beyond = set()
    for axis in itertools.chain.from_iterable((axes.xaxis, axes.yaxis) for axes in figure.axes):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        beyond |= {label for t in ticks if not low <= t.get_loc() <= high for label in (t.label1, t.label2)}
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in beyond]


def test_every_word_lies_inside_its_picture_and_on_no_other(quick, tmp_path):
    rates = [{"optimizer__lr": float(f"{lr:.3g}")} for lr in np.geomspace(1e-4, 1e-2, 40)]
    make_sweep(tmp_path / "rates", rates, np.full((40, 1), 0.9), curve=False)
    race(tmp_path / "race")
    figures = {**drawn(quick), "race": drawn(tmp_path / "race")["race"], "by_lr": drawn(tmp_path / "rates")["by_lr"]}
    of_settings = {"by_rank", "by_lr", "by_dropout"}  # weights differ in one cell, and never alone
    assert set(figures) == {"difference", "race"} | of_settings
    for name, figure in figures.items():
        figure.draw_without_rendering()
        inside, picture = figure.bbox.padded(1), figure.axes[0].bbox
        assert picture.width > figure.bbox.width / 4, "the names leave room for the picture"
        assert picture.height > figure.bbox.height / 3
        boxes = [(t.get_text(), t.get_window_extent()) for t in words(figure)]
        for text, box in boxes:
            assert inside.contains(box.x0, box.y0), (name, text)
            assert inside.contains(box.x1, box.y1), (name, text)
        for (a, one), (b, other) in itertools.combinations(boxes, 2):
            assert not one.padded(-1).overlaps(other.padded(-1)), (name, a, b)


def test_each_setting_has_a_line_for_each_combination_of_the_others(quick):
    where = "weights == 'GLYPHS_V1' and (method != 'lora' or rank < 16)"
    summary = summarize(quick, where=where)
    figures, same = (plots.draw_all(summary) for _ in range(2))
    assert plots.render(figures["by_rank"], "svg") == plots.render(same["by_rank"], "svg")
    cells, axes = summary.cells, figures["by_rank"].axes[0]
    compared = summary.effects.table.set_index("setting")["at"].loc["rank"].iloc[0]
    drawn = {f"{c.get_label()}": c.lines[0].get_ydata() for c in axes.containers}
    bars = [len(c.lines[2][0].get_segments()[0]) for c in axes.containers]
    assert bars == [2, 0, 0, 0], "the line that is compared has intervals"
    assert f"{compared}: compared here" in drawn
    assert len(drawn) == 4, "two dropouts, two rates"
    for label, heights in drawn.items():
        dropout, lr = (float(part.split(":")[0].split()[1]) for part in label.split(", "))
        held = (cells["lora.dropout"] == dropout) & (cells["optimizer.lr"] == lr)
        np.testing.assert_allclose(heights, 100 * cells[held].sort_values("lora.rank")["mean"])
    low, high = axes.get_ylim()
    baselines = cells[cells["lora.method"] != "lora"].set_index("lora.method")["mean"] * 100
    assert baselines["none"] < low < baselines["full"] < high, "a far one would squeeze the others"
    assert "go on lower" in axes.get_xlabel()
    assert f"linear probe, {baselines['none']:.2f}" in axes.get_legend_handles_labels()[1]


def test_lines_far_below_leave_the_picture_and_the_best_of_many_are_drawn(tmp_path):
    cells = [{"lora__rank": rank, "optimizer__lr": 0.001 * k} for rank in (1, 2) for k in range(1, 11)]
    make_sweep(tmp_path, cells, np.tile([0.9, 0.91, 0.1, *[0.905] * 7], 2)[:, None], curve=False)
    axes = drawn(tmp_path)["by_rank"].axes[0]
    assert "6 of 9 other lines" in axes.get_title(loc="left")
    names = axes.get_legend_handles_labels()[1]
    assert len(names) == 7
    assert "lr 0.003" not in names, "the worst"
    axes = drawn(tmp_path)["by_lr"].axes[0]
    assert axes.get_ylim()[0] > 80
    assert "go on lower" in axes.get_xlabel()


def test_the_differences_have_their_intervals_and_the_seeds_as_dots(large):
    summary = summarize(large, margin=1.0)
    axes = plots.draw_all(summary)["difference"].axes[0]
    y = 100 * summary.trials.pivot(index="label", columns="seed", values="val_accuracy")
    low, high = axes.get_xlim()
    for row, cell in enumerate(summary.cells.to_dict("records")):
        line, thick = ([*x.get_xdata()] for x in axes.lines if list(x.get_ydata()) == [row, row])
        dots = [x.get_xdata() for x in axes.lines if len(at := x.get_ydata()) and np.allclose(at, row + 0.27)]
        texts = [t.get_text() for t in axes.texts if t.xy[1] == row and t.get_text()]
        assert texts[-3:-1] == [f"{100 * cell['mean']:.2f}", cell["mark"]]
        if row == 0:  # the best
            continue
        ends = 100 * np.array([cell["difference_low"], cell["difference_high"]])
        np.testing.assert_allclose(line, np.clip(ends, low, high))
        middle, seeds = 100 * cell["difference"], 100 * cell["difference_seeds"]
        np.testing.assert_allclose(thick, np.clip([middle - seeds, middle + seeds], low, high))
        np.testing.assert_allclose(np.sort(dots[0]), np.sort(y.loc[cell["label"]] - y.loc[summary.cells["label"][0]]))
    zero, band = axes.lines[-4], axes.patches[-1]
    assert (list(zero.get_xdata()), band.get_x(), band.get_width()) == ([0, 0], -1.0, 1.0)


def test_what_is_far_behind_has_an_arrow_at_the_edge_with_its_value(tmp_path):
    y = np.array([0.9, 0.91, 0.905, 0.3, 0.92])[:, None] + np.array([[0, 2, 1], [0, 1, 2]] * 3)[:5] / 1e3
    summary = summarize(make_sweep(tmp_path, [{"lora__rank": rank} for rank in (1, 2, 4, 8, 16)], y))
    axes = plots.draw_all(summary)["difference"].axes[0]
    assert -90 < 4 * axes.get_xlim()[0] < -4
    texts = [t.get_text() for t in axes.texts if t.xy == (axes.get_xlim()[0], 4)]
    assert texts == [f"◀ {100 * summary.cells['difference'].iloc[-1]:+.2f}"]


def test_a_method_has_one_colour_in_all_pictures(quick):
    figures = drawn(quick)
    points = {x.get_label(): x.get_color() for x in figures["difference"].axes[0].lines}
    lines = {x.get_label(): x.get_color() for x in figures["by_rank"].axes[0].lines}
    for name in ("linear probe", "full fine-tuning"):
        assert points[name] == next(of for text, of in lines.items() if text.startswith(name)) != points["LoRA"]
    compared = figures["by_rank"].axes[0].containers[0].lines[0].get_color()
    assert colors.same_color(compared, points["LoRA"])
    sizes = {t.get_fontsize() for f in figures.values() for t in f.findobj(Text) if t.get_text()}
    assert len(sizes) == 1, "and letters one size"


def test_the_race_ends_each_line_with_the_seed_that_its_cell_left_with(tmp_path):
    summary = summarize(race(tmp_path))
    axes = plots.draw_all(summary)["race"].axes[0]
    lines, ends = axes.lines, lambda line: np.isfinite(line.get_ydata()).sum()
    named = {line.get_label(): ends(line) for line in lines if line.get_label().startswith("rank")}
    assert named == dict(zip(summary.cells["label"], summary.cells["seeds_raced"], strict=True))
    assert sorted(named.values()) == [2, 2, 4, 4]
    crosses = [line for line in lines if line.get_marker() == "x"]
    assert len(crosses) == 3


def test_cuts_of_records_alone_are_named_and_compared(tmp_path):
    """What was cut is another method; without the adapters there is no picture of their updates."""
    cells = [{"lora__rank": 8}, {"lora__rank": 2, "lora__cut": "8"}, {"lora__rank": 2, "lora__cut": "8 by threshold"}]
    summary = summarize(make_sweep(tmp_path, cells, np.array([[0.9, 0.91], [0.88, 0.89], [0.87, 0.885]])))
    names = ["rank 8", "LoRA cut from 8, rank 2", "LoRA cut from 8 by threshold, rank 2"]
    assert list(summary.cells["label"]) == names
    assert list(export.readable(summary)["method"]) == ["LoRA", "LoRA cut from 8", "LoRA cut from 8 by threshold"]
    pictures = plots.draw_all(summary)
    assert "spectrum" not in pictures
    assert all(name.startswith(PICTURES) for name in pictures), "an earlier one is removed by its name"
    (legend,) = pictures["cut_ranks"].legends
    assert {text.get_text() for text in legend.get_texts()} == {"LoRA", *export.readable(summary)["method"]}
    for where in ("rank == 2", "method != 'lora'"):
        assert plots.draw_all(summarize(tmp_path, where=where))
    make_sweep(tmp_path, [{"lora__rank": 4}], np.array([[0.895, 0.9]]))
    effects = summarize(tmp_path).effects.table
    assert len(effects) == 1, "of the ranks that were trained"
    pd.testing.assert_frame_equal(effects, summarize(tmp_path, where="method == 'lora'").effects.table)
