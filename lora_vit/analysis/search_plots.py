"""Pictures of a search, from its records alone: how it went, and the metric against each setting that it chose."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from lora_vit.analysis.summary import Summary
from lora_vit.config.names import short_names, value_text
from lora_vit.records import SEARCH, read_record

COLUMNS, BOLD, MOST_STEPS, LONGEST = 3, 3, 8, 14  # slices in a row; best trials; _scale's values; characters of a tick
Scale = tuple[np.ndarray, list[tuple[float, str]]]  # of a setting: where each trial lies from 0 to 1, and the ticks


def draw_search(summary: Summary) -> dict[str, Figure]:
    """History with slices, and parallel coordinates, of the one search that is looked at; none without two values.

    Trials are in the order of their start. Values farther below the median than the best one is above are at the edge.
    """
    folders = summary.trials["folder"].map(lambda folder: Path(folder).parent)
    searches = [folder for folder in folders.unique() if (folder / SEARCH).is_file()]
    trials = summary.trials[folders.isin(searches[:1])]
    values = 100 * trials[f"val_{summary.metric}"].where(trials["status"] == "completed")
    if len(searches) != 1 or values.count() < 2:
        return {}
    low = 2 * values.median() - values.max() - 0.5
    metric = f"Val {summary.title} (%{f'; lower ones at {low:.1f}' if low > values.min() else ''})"
    started = [read_record(Path(folder)).started for folder in trials["folder"]]
    trials = trials.assign(value=values.clip(lower=low), started=started).sort_values(["started", "trial"])
    done = trials.assign(number=np.arange(1, len(trials) + 1)).dropna(subset="value")
    short = short_names(c for c in summary.settings if done[c].map(value_text).nunique() > 1)
    scales = {name: _scale(done[setting]) for setting, name in short.items()}
    lines = {"search_parallel": _parallel(done, scales, metric)} if len(scales) > 1 else {}
    return {"search": _history(trials, done, scales, metric), **lines}


def _history(trials: pd.DataFrame, done: pd.DataFrame, scales: dict[str, Scale], metric: str) -> Figure:
    """The values in their order, with the best so far and the trials without one, and against each setting."""
    rows = math.ceil(len(scales) / COLUMNS)
    columns = math.ceil(len(scales) / max(rows, 1)) or 1
    figure: Any = Figure(figsize=(8.0, 3.4 + 2.4 * rows), layout="constrained")
    figure.supylabel(metric, fontsize=10)
    grid, number = figure.add_gridspec(rows + 1, columns), np.arange(1, len(trials) + 1)
    points: Any = {"c": done["number"], "cmap": "viridis_r", "lw": 0}
    first = figure.add_subplot(grid[0, :], title="The search: later trials are darker", xlabel="Trial, by its start")
    best = trials["value"].cummax().ffill()
    first.step(number, best, where="post", color="C0", lw=1.6, label="best so far", zorder=0.9)
    first.scatter(done["number"], done["value"], s=26, **points)
    for status in trials.loc[trials["value"].isna(), "status"].unique():
        at = number[trials["value"].isna() & (trials["status"] == status)]
        style = "x" if status == "failed" else "|"
        first.plot(at, np.full(len(at), 0.03), style, color="C1", transform=first.get_xaxis_transform(), label=status)
    first.locator_params(axis="x", integer=True)
    for k, (name, (places, ticks)) in enumerate(scales.items()):
        axes = figure.add_subplot(grid[1 + k // columns, k % columns], sharey=first, xlabel=name)
        axes.scatter(places, done["value"], s=22, **points)
        turned = {"rotation": 30, "ha": "right"} if sum(len(text) for _, text in ticks) > 26 else {}
        axes.set_xticks(*zip(*ticks, strict=True), fontsize=8.5, **turned)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8.5)
    return figure


def _parallel(done: pd.DataFrame, scales: dict[str, Scale], metric: str) -> Figure:
    """A line for each completed trial across the settings to its value; the better, the darker and the farther up."""
    every = {**scales, metric: _scale(done["value"], 1)}
    axes: Any = Figure(figsize=(1.2 + 1.5 * len(every), 4.4), layout="constrained").add_subplot()
    axes.set_title(f"The search: each completed trial, the best {min(BOLD, len(done))} in bold")
    lines = np.column_stack([at for at, _ in every.values()])
    for left, line in zip(range(len(lines) - 1, -1, -1), lines[lines[:, -1].argsort(kind="stable")], strict=True):
        bold = {"lw": 2.4} if left < BOLD else {"lw": 1.0, "alpha": 0.7}
        axes.plot(line, color=matplotlib.colormaps["viridis_r"](line[-1]), **bold)
    for x, (_, ticks) in enumerate(every.values()):
        axes.axvline(x, color="#999999", lw=1, zorder=3)
        for y, text in ticks:
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
            axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5, bbox=box)
    axes.set_xticks(range(len(every)), every, fontsize=8.5)
    axes.yaxis.set_visible(False)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return axes.figure


def _scale(values: pd.Series, most_steps: int = MOST_STEPS) -> Scale:
    """Even steps for words and a few values; else by value, from a decade on by its logarithm, with none at the end."""
    texts, is_number = values.map(value_text), pd.api.types.is_numeric_dtype(values)
    if texts.nunique() <= most_steps or not is_number:
        words = texts.loc[(values if is_number else texts).sort_values().index].unique()
        at = dict(zip(words, np.linspace(0, 1, len(words)), strict=True))
        short = [w if len(w) <= LONGEST else f"{w[: LONGEST - 1]}…" for w in words]
        return texts.map(at).to_numpy(), [(at[w], s.replace("$", r"\$")) for w, s in zip(words, short, strict=True)]
    low, high = float(values.min()), float(values.max())
    is_log = low > 0 and high >= 10 * low
    locator: Any = LogLocator(subs=(1, 3) if high < 300 * low else (1,)) if is_log else MaxNLocator(4)
    marks = np.array([mark for mark in locator.tick_values(low, high) if low <= mark <= high])
    change: Any = np.log if is_log else np.asarray
    start, span = change(low), change(high) - change(low)
    at, ticks = ((change(v) - start) / span for v in (values.to_numpy(float), marks))
    named = [(place, value_text(float(mark))) for place, mark in zip(ticks, marks, strict=True)]
    return np.nan_to_num(at, nan=1.15), named + [(1.15, "–")] * bool(values.isna().any())
