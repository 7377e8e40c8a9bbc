"""Pictures of a search: what is drawn where, and that nothing is drawn empty."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from made_up_records import make_trial

from lora_vit.analysis import plots
from lora_vit.analysis.core import summarize
from lora_vit.records import SEARCH


def search(folder, trials, **more):
    """A search whose trials (accuracy, status, settings) started one after another, in this order."""
    folder.mkdir()
    (folder / SEARCH).touch()
    for number, (accuracy, status, settings) in enumerate(trials):
        started = float(1000 - 7 * number if more.get("backwards") else 1000 + number)
        make_trial(folder, accuracy, status, edit=lambda r, at=started: vars(r).update(started=at), **settings)
    return plots.draw_all(summarize(folder))


def test_history_slices_and_lines(tmp_path):
    """The lowest value is at the edge, the failed trial at the bottom; the best is drawn last, in bold."""
    values = (0.80, 0.10, None, 0.90, 0.85, 0.88)
    trials = [
        (v, "completed" if v else "failed", {"optimizer__lr": 1e-4 * 4**i, "lora__rank": 2**i})
        for i, v in enumerate(values)
    ]
    figures = search(tmp_path / "s", trials)
    assert {name for name in figures if name.startswith(("search", "by_"))} == {"search", "search_parallel"}
    history, rank, rate = figures["search"].axes
    low = 2 * 85 - 90 - 0.5
    drawn = [[1, 80.0], [2, low], [4, 90.0], [5, 85.0], [6, 88.0]]
    np.testing.assert_allclose(history.collections[0].get_offsets(), drawn)
    assert f"lower ones at {low:.1f}" in figures["search"]._supylabel.get_text()
    best, failed = history.lines
    np.testing.assert_allclose(best.get_ydata(), [80, 80, 80, 90, 90, 90])
    assert (failed.get_label(), failed.get_marker(), *failed.get_xdata()) == ("failed", "x", 3)
    assert [text.get_text() for text in rank.get_xticklabels()] == ["1", "2", "8", "16", "32"]
    assert rate.get_xlabel() == "lr"
    lines = [line for line in figures["search_parallel"].axes[0].lines if len(line.get_ydata()) == 3]
    assert [line.get_linewidth() for line in lines] == [1.0, 1.0, 2.4, 2.4, 2.4]
    np.testing.assert_allclose(lines[-1].get_ydata(), [0.5, 0.5, 1.0])
    assert all(plots.render(figure, "png") for figure in figures.values())


def test_trials_are_in_the_order_of_their_start(tmp_path):
    trials = [(0.8 + 0.01 * i, "completed", {"lora__rank": 2**i}) for i in range(3)]
    figure = search(tmp_path / "s", trials, backwards=True)["search"]
    np.testing.assert_allclose(figure.axes[0].collections[0].get_offsets()[:, 1], [82, 81, 80])


@pytest.mark.parametrize(
    ("trials", "drawn"),
    [
        ([(0.9, "completed", {}), (None, "failed", {"lora__rank": 2})], {}),
        ([(0.8 + i / 100, "completed", {"lora__rank": 2**i}) for i in range(3)], {"search": 2}),
        ([(0.9, "completed", {"seed": i}) for i in range(2)], {"search": 1}),
    ],
)
def test_nothing_is_drawn_empty(trials, drawn, tmp_path):
    figures = search(tmp_path / "s", trials)
    assert {name: len(figures[name].axes) for name in figures if name.startswith("search")} == drawn


@pytest.mark.parametrize(
    ("values", "at", "ticks"),
    [
        ([1e-4 * 10 ** (i / 5) for i in range(11)], np.linspace(0, 1, 11), {"0.0001": 0, "0.001": 0.5, "0.01": 1}),
        ([float(i) for i in range(1, 10)], np.linspace(0, 1, 9), {"2": 1 / 8, "4": 3 / 8, "8": 7 / 8}),
        ([4, 64, 8], [0, 1, 0.5], {"4": 0, "8": 0.5, "64": 1}),
        (["qv", None, "$a_very_long_name"], [1, 0, 0.5][::-1], None),
        ([float(i) for i in range(1, 10)] + [np.nan], [*np.linspace(0, 1, 9), 1.15], {"–": 1.15}),
        ([np.nan, 8.0, 1.0], [1, 0.5, 0], {"1": 0, "8": 0.5, "–": 1}),
    ],
)
def test_where_values_lie_on_an_axis(values, at, ticks):
    """From a decade on numbers lie by their logarithm; words, and up to eight numbers, have even steps."""
    places, found = plots._scale(pd.Series(values))
    if ticks is None:
        assert {text for _, text in found} == {"qv", "–", r"\$a_very_long_…"}
        assert sorted(places) == [0, 0.5, 1]
        return
    np.testing.assert_allclose(places, at, atol=1e-12)
    assert {text: place for place, text in found} | ticks == pytest.approx({text: p for p, text in found})
