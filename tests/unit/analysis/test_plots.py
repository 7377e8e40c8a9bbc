"""Pictures: what they show, and that every word in them can be read."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from made_up_records import grid, make_record, make_sweep, make_trial
from matplotlib.text import Text

from lora_vit.analysis import plots, summarize
from lora_vit.records import METRICS, PLAN

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
    cells = [{"lora__rank": rank} for rank in (1, 2, 4, 8)]
    rng = np.random.default_rng(0)
    y = np.array([0.8, 0.82, 0.935, 0.95])[:, None] + rng.normal(0, 0.002, 8) + rng.normal(0, 0.003, (4, 8))
    plan = {"margin": 1.0, "first_seeds": 2, "most_seeds": 8, "seed": 0,
            "cells": [make_record(**cell).cell_id for cell in cells]}  # fmt: skip
    make_sweep(folder, cells, y)
    (folder / PLAN).write_text(json.dumps({"trials": {}, "race": plan}))
    return folder


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
    assert set(figures) == {"cells", "by_rank", "by_lr", "learning_curves", "pareto_parameters", "race"}
    for name, figure in figures.items():
        figure.draw_without_rendering()
        inside, picture = figure.bbox.padded(1), figure.axes[0].bbox
        assert picture.width > figure.bbox.width / 3, "the names leave room for the picture"
        assert picture.height > figure.bbox.height / 3
        boxes = [(t.get_text(), t.get_window_extent()) for t in words(figure)]
        for text, box in boxes:
            assert inside.contains(box.x0, box.y0), (name, text)
            assert inside.contains(box.x1, box.y1), (name, text)
        for (a, one), (b, other) in itertools.combinations(boxes, 2):
            assert not one.padded(-1).overlaps(other.padded(-1)), (name, a, b)


def test_the_same_summary_gives_the_same_bytes(quick):
    a, b = (plots.render(drawn(quick)["by_rank"], "svg") for _ in range(2))
    assert a == b


def test_what_neither_axis_nor_lines_show_is_held_at_the_best_cells_values(quick):
    where = "weights == 'GLYPHS_V1' and (method != 'lora' or rank < 16)"
    cells = summarize(quick, where=where).cells
    axes = drawn(quick, where=where)["by_rank"].axes[0]
    best = cells[cells["lora.method"] == "lora"].iloc[0]
    assert f"at lr {best['optimizer.lr']:g}" in axes.get_title(loc="left")
    lines = {container.get_label(): container.lines[0].get_ydata() for container in axes.containers}
    assert set(lines) == {"dropout 0", "dropout 0.1"}
    for label, heights in lines.items():
        held = cells["optimizer.lr"] == best["optimizer.lr"]
        shown = cells[held & (cells["lora.dropout"] == float(label.split()[1]))].sort_values("lora.rank")
        np.testing.assert_allclose(heights, 100 * shown["mean"])
    low, high = axes.get_ylim()
    baselines = cells[cells["lora.method"] != "lora"]["mean"] * 100
    assert ((low < baselines) & (baselines < high)).all()


def test_one_huge_interval_is_cut_and_no_mean(tmp_path):
    y = np.array([[0.900, 0.902, 0.901], [0.910, 0.912, 0.911], [0.85, 0.95, 0.92], [0.920, 0.922, 0.921]])
    make_sweep(tmp_path, [{"lora__rank": rank} for rank in (1, 2, 4, 8)], y)
    axes = drawn(tmp_path)["cells"].axes[0]
    low, high = axes.get_xlim()
    assert low < 90
    assert high > 92.2
    assert high - low < 10, "the interval of the third is 25 points wide"
    assert "longer than shown" in axes.get_xlabel()


def test_the_race_ends_each_line_with_the_seed_that_its_cell_left_with(tmp_path):
    summary = summarize(race(tmp_path))
    lines = plots.draw_all(summary)["race"].axes[0].lines
    named = {line.get_label(): line.get_xdata()[-1] for line in lines if line.get_label().startswith("rank")}
    assert named == dict(zip(summary.cells["label"], summary.cells["seeds_raced"], strict=True))
    assert sorted(named.values()) == [2, 2, 4, 4]
    crosses = [line for line in lines if line.get_marker() == "x"]
    assert len(crosses) == 3


def test_curves_of_trials_whose_rows_can_be_read(tmp_path):
    good, bad, odd = (tmp_path / make_trial(tmp_path, 0.9, seed=seed).trial_id for seed in range(3))
    (bad / METRICS).write_text("{\n")
    with (odd / METRICS).open("a") as file:
        file.write('[1]\n{"kind": "epoch", "epoch": "six"}\n{"kind": "epoch", "epoch": 6, "val_accuracy": true}\n')
    table = plots.curves([str(good), str(bad), str(odd), str(tmp_path / "gone")])
    assert list(table.columns) == [str(good), str(odd)]
    assert list(table.index) == [1, 2, 3, 4, 5]
    assert list(table.iloc[-1]) == [0.9, 0.9]
