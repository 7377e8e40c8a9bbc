"""Pictures of a summary, drawn without a display. Colours: Okabe & Ito (2008), safe for the colour-blind."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_vit.analysis.load import as_float
from lora_vit.analysis.summary import Summary
from lora_vit.analysis.tables import BASELINES, LR, METHOD, preferred, short_names, value_text
from lora_vit.errors import RecordError
from lora_vit.files import read_rows
from lora_vit.records import METRICS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MARK_STYLE = {
    "best": ("#0072B2", "D"), "candidate": ("#56B4E9", "o"), "open": ("#E69F00", "^"), "worse": ("#D55E00", "v"),
    "no verdict": ("#777777", "s"), "selected": ("#0072B2", "D"), "left": ("#56B4E9", "o"), "out": ("#D55E00", "v"),
    "failed": ("#000000", "X"), "not raced": ("#777777", "s"),
}  # fmt: skip
MOST_LINES, MOST_ROWS, MOST_CURVES = 7, 30, 5
LONG_CURVE = 8  # validated epochs
LONGEST = 68  # characters of a name
PARETO = {
    "pareto_parameters": ("trainable_parameters", "Trainable parameters"),
    "pareto_seconds": ("seconds", "Seconds per trial"),
}
"""Fronts of the cells table: the cost and its name."""
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "lora_vit",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
}


def draw_all(summary: Summary) -> dict[str, Figure]:
    """Every picture that this sweep has something to show for, by file name (without ending)."""
    with matplotlib.rc_context(STYLE):
        figures: dict[str, Figure | None] = {
            "cells": cells(summary),
            "race": race(summary),
            **by_setting(summary),
            **heat_maps(summary),
        }
        figures["learning_curves"] = learning_curves(summary)
        for name, (cost, title) in PARETO.items():
            figures[name] = pareto(summary, cost, title, name)
    return {name: figure for name, figure in figures.items() if figure is not None}


def render(figure: Figure, kind: str) -> bytes:
    """The figure as ``png`` or ``svg``, the same bytes every time."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _axes(width: float = 7.0, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _scale(summary: Summary) -> float:
    return 100.0 if summary.metric.accuracy else 1.0


def _title(summary: Summary) -> str:
    return f"{summary.metric.title} (%)" if summary.metric.accuracy else summary.metric.title


def _axis_name(setting: str) -> str:
    return "Learning rate" if setting == "lr" else setting[:1].upper() + setting[1:].replace("_", " ")


def _width(labels: pd.Series) -> float:
    """Inches that a picture needs whose labels stand beside it."""
    return 7.5 + 0.08 * max(0, min(int(labels.str.len().max()), LONGEST) - 44)


def _shorten(text: str, most: int = LONGEST) -> str:
    """At most that many characters, and no formula between two dollars."""
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def _error_bars(frame: pd.DataFrame, scale: float) -> np.ndarray:
    """Distances below and above the mean [2, n]; 0 where a cell has no interval."""
    low, mean, high = frame[["low", "mean", "high"]].to_numpy(float).T
    return np.nan_to_num(scale * np.array([mean - low, high - mean]))


def cells(summary: Summary) -> Figure:
    """The best cells from top to bottom with their intervals, coloured by mark; baselines always shown."""
    frame = summary.cells
    shown, more = _best_and_baselines(frame, MOST_ROWS, 4)
    figure, axes = _axes(_width(shown["label"]), 1.3 + 0.26 * max(len(shown), 3))
    scale, y = _scale(summary), np.arange(len(shown))
    bars = _error_bars(shown, scale)
    for mark, (colour, marker) in MARK_STYLE.items():
        here = (shown["mark"] == mark).to_numpy()
        if here.any():
            axes.errorbar(
                scale * shown["mean"].to_numpy(float)[here], y[here], xerr=bars[:, here], fmt=marker,
                color=colour, ecolor=colour, elinewidth=1.4, capsize=2.5, markersize=5, label=mark,
            )  # fmt: skip
    axes.set_yticks(y, [_shorten(t) for t in shown["label"]])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"Cells{more}", loc="left")
    figure.legend(loc="outside lower center", ncols=5, fontsize=9)
    _limit(axes, summary, shown, bars)
    ends, (low, high) = scale * shown[["low", "high"]], axes.get_xlim()
    without = "\n(bars without ends are longer than shown)" if ((ends < low) | (ends > high)).any(axis=None) else ""
    axes.set_xlabel(f"{_title(summary)}, {_what_is_shown(frame)}{without}")
    return figure


def race(summary: Summary) -> Figure | None:
    """The mean of each cell by number of seeds, until it left the race."""
    raced = summary.race
    if raced is None or not raced.race.seeds:
        return None
    labels = dict(zip(summary.cells["cell"], summary.cells["label"], strict=True))
    order = [raced.cells.index(c) for c in summary.cells["cell"] if c in raced.cells]
    figure, axes = _axes(8.0, 4.6)
    for k, i in enumerate(order):
        out = raced.race.exits.get(i)
        n = raced.race.seeds_of(i)
        values = raced.y[i, :n]
        means = 100 * np.cumsum(values) / np.arange(1, n + 1)
        named = k < MOST_LINES
        colour = COLOURS[k % 7] if named else "#bbbbbb"
        axes.plot(np.arange(1, n + 1), means, color=colour, linewidth=2.4 if i == raced.race.selected else 1.2,
                  label=_shorten(labels[raced.cells[i]]) if named else None, zorder=1 if named else 0)  # fmt: skip
        if out is not None:
            axes.plot(n, means[-1], marker="x", color=colour, markersize=7, markeredgewidth=1.8)
    axes.axvline(raced.rules.first_seeds, color="#999999", linestyle=":", linewidth=1)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("Seeds (dotted: the first that a decision was made with; a cross: the cell left)")
    axes.set_ylabel(f"Mean {_title(summary).lower()}")
    more = f", {MOST_LINES} of {len(order)} cells named" if len(order) > MOST_LINES else ""
    axes.set_title(f"The race: mean of each cell so far{more}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _best_and_baselines(frame: pd.DataFrame, best: int, baselines: int) -> tuple[pd.DataFrame, str]:
    """The first cells, baselines from among the others, and what a title says of the choice."""
    shown, rest = frame.head(best), frame.iloc[best:]
    if rest.empty:
        return shown, ""
    others = rest[rest[METHOD] != "lora"].head(baselines) if METHOD in frame else rest[:0]
    return pd.concat([shown, others]), f" (best {best} of {len(frame)}{', and baselines' if len(others) else ''})"


def _what_is_shown(frame: pd.DataFrame) -> str:
    return "mean and 95 % interval over seeds" if (frame["n"] > 1).any() else "one seed, no intervals"


def _limit(axes: Axes, summary: Summary, shown: pd.DataFrame, bars: np.ndarray) -> None:
    """Keep one huge interval (two seeds: t = 12.7) from squeezing everything else: cut it at the axis."""
    mean = _scale(summary) * shown["mean"].to_numpy(float)
    below, above = bars
    reach = bars.max(0)
    if len(mean) < 2 or not reach.any():
        return
    spread = max(float(np.ptp(mean)), 1e-9)
    typical = min(float(np.median(reach[reach > 0])), 1.5 * spread)
    low, high = float(mean.min()) - 1.3 * typical, float(mean.max()) + 1.3 * typical
    whole = float((mean - below).min()), float((mean + above).max())
    if whole[1] - whole[0] < 1.5 * (high - low):  # nothing is squeezed
        margin = 0.03 * (whole[1] - whole[0])
        low, high = whole[0] - margin, whole[1] + margin
    if summary.metric.accuracy:
        high = min(high, 100 + 0.03 * (high - low))
    if low < high:
        axes.set_xlim(low, high)


def _numeric_settings(summary: Summary) -> list[str]:
    """Varying numeric settings, rank first, lr and dropout next."""
    adapted = _adapted(summary)
    found = [c for c in summary.settings if pd.api.types.is_numeric_dtype(adapted[c]) and adapted[c].nunique() > 1]
    return preferred(found, ["lora.rank", LR, "lora.dropout", "lora.alpha"])


def _adapted(summary: Summary) -> pd.DataFrame:
    cells = summary.cells
    frame = cells[cells[METHOD] == "lora"] if METHOD in cells else cells
    return frame.infer_objects()


def by_setting(summary: Summary) -> dict[str, Figure]:
    """The metric by rank (or the first numeric setting) with a line for each value of one other setting.

    Means with seed intervals; what neither axis nor lines show is held at the best cell's values.
    """
    numeric = _numeric_settings(summary)
    if not numeric:
        return {}
    x, short, frame, scale = numeric[0], short_names(summary.settings), _adapted(summary), _scale(summary)
    others = [c for c in summary.settings if c not in (x, METHOD) and frame[c].nunique() > 1]
    others = [c for c in others if frame.groupby(x)[c].nunique().max() > 1]  # not alpha, where it is tied to the rank
    lines = [c for c in others if 2 <= frame[c].nunique() <= MOST_LINES]
    line = next(iter(preferred(lines, ["lora.alpha", "lora.dropout", LR])), None)
    best, held = frame.iloc[0], []
    for c in others:
        if c != line:
            frame = frame[frame[c] == best[c]]
            held.append(f"{short[c]} {value_text(best[c])}")
    ticks = sorted(frame[x].unique())
    place = {v: k for k, v in enumerate(ticks)}
    groups = [(None, frame)] if line is None else list(frame.groupby(line))
    figure, axes = _axes()
    for k, (value, group) in enumerate(groups):
        group = group.sort_values(x)
        at = np.array([place[v] for v in group[x]]) + 0.05 * (k - (len(groups) - 1) / 2)
        axes.errorbar(
            at, scale * group["mean"], yerr=_error_bars(group, scale), color=COLOURS[k % 7],
            marker=MARKERS[k % 7], capsize=3, linewidth=1.6, elinewidth=1.1, markersize=5,
            label=None if line is None else _shorten(f"{short[line]} {value_text(value)}"),
        )  # fmt: skip
    _baseline_lines(axes, summary)
    _name_ticks(axes.set_xticks, ticks, 14)
    axes.set_xlabel(_axis_name(short[x]))
    axes.set_ylabel(_title(summary))
    _robust_y(axes, summary, frame)
    title = f"{summary.metric.title} by {short[x]}, {_what_is_shown(frame)}"
    axes.set_title(title + (f"\n{_shorten('at ' + ', '.join(held), 72)}" if held else ""))
    if line is not None or METHOD in summary.settings:
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return {f"by_{short[x].replace('.', '_')}": figure}


def _name_ticks(set_ticks: Callable[..., object], values: Sequence[object], most: int) -> None:
    """Name the values at 0, 1, ..., or each second, third, ... where they are more than ``most``."""
    step = math.ceil(len(values) / most)
    set_ticks(range(0, len(values), step), [value_text(v) for v in values[::step]])


def _robust_y(axes: Axes, summary: Summary, frame: pd.DataFrame) -> None:
    low, high = axes.get_ylim()
    mean = _scale(summary) * frame["mean"].to_numpy(float)
    lines = [float(np.asarray(line.get_ydata())[0]) for line in axes.lines if line.get_linestyle() == "--"]
    known = np.concatenate([mean, lines])
    room = max(2.5 * float(np.ptp(known)), 0.5 if summary.metric.accuracy else 0.0)
    top = float(known.max()) + room
    if summary.metric.accuracy:
        top = min(top, 100.3)
    if room > 0:
        axes.set_ylim(max(low, float(known.min()) - room), min(high, top))


def _baseline_lines(axes: Axes, summary: Summary) -> None:
    if METHOD not in summary.cells:
        return
    for method, colour in (("none", "#777777"), ("full", "#000000")):
        rows = summary.cells[summary.cells[METHOD] == method]
        if len(rows):
            height, name = _scale(summary) * rows.iloc[0]["mean"], BASELINES[method]
            axes.axhline(height, color=colour, linestyle="--", linewidth=1.2, label=name)


def heat_maps(summary: Summary) -> dict[str, Figure]:
    """rank x dropout and rank x lr, else the first two numeric settings."""
    numeric = _numeric_settings(summary)
    pairs = [pair for pair in (["lora.rank", "lora.dropout"], ["lora.rank", LR]) if set(pair) <= set(numeric)]
    if not pairs and len(numeric) > 1:
        pairs = [numeric[:2]]
    short = short_names(summary.settings)
    return {f"heat_{short[a]}_{short[b]}".replace(".", "_"): heat_map(summary, a, b) for a, b in pairs}


def heat_map(summary: Summary, row: str, column: str) -> Figure:
    """Mean of the cells with each pair of values; a number in each field while there is room."""
    short = short_names(summary.settings)
    pairs = _adapted(summary).groupby([row, column])["mean"]
    table, most = pairs.mean().unstack() * _scale(summary), int(pairs.count().max())
    rows, columns = table.shape
    figure, axes = _axes(min(2.6 + 0.75 * columns, 10), min(2.0 + 0.42 * rows, 9))
    image = axes.imshow(table.to_numpy(float), aspect="auto", cmap="cividis")
    axes.grid(visible=False)
    _name_ticks(axes.set_yticks, list(table.index), 16)
    _name_ticks(axes.set_xticks, list(table.columns), 16)
    axes.set_ylabel(_axis_name(short[row]))
    axes.set_xlabel(_axis_name(short[column]))
    if rows * columns <= 120 and columns <= 10:
        middle = float(np.nanmean(image.get_clim()))
        for (i, j), value in np.ndenumerate(table.to_numpy(float)):
            if math.isfinite(value):
                text = f"{value:.1f}" if summary.metric.accuracy else f"{value:.3f}"
                axes.text(
                    j, i, text, ha="center", va="center", fontsize=9, color="white" if value < middle else "black"
                )
    figure.colorbar(image, ax=axes, label=_title(summary))
    over = "seeds" if most == 1 else f"up to {most} cells"
    title = f"{summary.metric.title} by {short[row]} and {short[column]}\n(mean over {over})"
    axes.set_title(title, loc="left", fontsize=10)
    return figure


def curves(folders: list[str], metric: str) -> pd.DataFrame:
    """The metric after each epoch, one column per trial; trials without readable rows are left out."""
    columns = {}
    for folder in folders:
        try:
            rows = [r for r in read_rows(Path(folder) / METRICS) if isinstance(r, dict) and r.get("kind") == "epoch"]
        except (RecordError, OSError, UnicodeDecodeError):
            continue
        values = {r["epoch"]: as_float(r.get(metric)) for r in rows if isinstance(r.get("epoch"), int)}
        known = pd.Series(values, dtype=float).dropna()
        if len(known):
            columns[folder] = known
    return pd.DataFrame(columns).sort_index()


def learning_curves(summary: Summary) -> Figure | None:
    """Mean over seeds after each epoch, band from lowest to highest seed: the best cells and the baselines."""
    shown, more = _best_and_baselines(summary.cells, MOST_CURVES, MOST_LINES - MOST_CURVES)
    done = summary.trials[summary.trials["status"] == "completed"]
    figure, axes = _axes()
    scale, drawn = _scale(summary), 0
    for k, (_, cell) in enumerate(shown.iterrows()):
        table = curves(done.loc[done["cell"] == cell["cell"], "folder"].tolist(), summary.metric.name) * scale
        if table.empty:
            continue
        drawn += 1
        axes.plot(table.index, table.mean(axis=1), color=COLOURS[k % 7], marker=MARKERS[k % 7], markersize=3.5,
                  linewidth=1.6, label=_shorten(str(cell["label"])))  # fmt: skip
        axes.fill_between(
            table.index, table.min(axis=1), table.max(axis=1), color=COLOURS[k % 7], alpha=0.15, linewidth=0
        )
    if drawn == 0:
        return None
    _from_later_epochs(axes, summary)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("Epoch")
    axes.set_ylabel(_title(summary))
    seeds = "mean and range over seeds" if (shown["n"] > 1).any() else "one seed"
    axes.set_title(f"Learning curves: {seeds}{more}")
    figure.legend(loc="outside lower center", ncols=1 if shown["label"].str.len().max() > 44 else 2, fontsize=8)
    return figure


def _from_later_epochs(axes: Axes, summary: Summary) -> None:
    """Let the epochs after the first third set the range of long curves, where they lie close together."""
    if max(len(line.get_xdata()) for line in axes.lines) < LONG_CURVE:  # type: ignore[arg-type]
        return
    points = np.concatenate([line.get_xydata() for line in axes.lines])
    later = points[points[:, 0] > points[:, 0].min() + np.ptp(points[:, 0]) / 3, 1]
    if len(later) == 0 or len(axes.lines) < 2:
        return
    room = 0.25 * max(float(np.ptp(later)), 1e-9)
    low, high = axes.get_ylim()
    if summary.metric.sign > 0:
        axes.set_ylim(max(low, float(later.min()) - room), high)
    else:
        axes.set_ylim(low, min(high, float(later.max()) + room))


def pareto(summary: Summary, cost: str, title: str, front: str) -> Figure | None:
    """Every cell's metric against a cost; the front as a line, its cells named."""
    frame = summary.cells[np.isfinite(summary.cells[cost].to_numpy(float))]
    if frame[cost].nunique() < 2:
        return None
    scale = _scale(summary)
    figure, axes = _axes(_width(frame.loc[frame[front], "label"]), 4.6)
    if frame[cost].max() > 8 * max(frame[cost].min(), 1e-9) and frame[cost].min() > 0:
        axes.set_xscale("log")
    chosen = frame[frame[front]].sort_values(cost)
    rest = frame[~frame[front]]
    if len(rest):
        axes.scatter(
            rest[cost], scale * rest["mean"], s=22, color="#999999", alpha=0.7, label="other cells", linewidths=0
        )
    axes.plot(
        chosen[cost], scale * chosen["mean"], "o-", color=COLOURS[0], markersize=6, linewidth=1.4, label="Pareto front"
    )
    keys = [str(k) for k in range(1, len(chosen) + 1)]
    for (x, y), same in chosen.assign(key=keys).groupby([cost, "mean"], sort=False):
        text = ", ".join(same["key"])
        side = "right" if "," in text else "center"  # several would run into the names
        axes.annotate(text, (x, scale * y), xytext=(0, 7), textcoords="offset points", ha=side, color=COLOURS[0])
    named = "\n".join(f"{k}  {_shorten(t)}" for k, t in list(zip(keys, chosen["label"], strict=True))[:12])
    more = f"\n… {len(chosen) - 12} more" if len(chosen) > 12 else ""
    axes.annotate(named + more, (1.02, 0.98), xycoords="axes fraction", va="top", fontsize=8, annotation_clip=False)
    if axes.get_xscale() == "linear":
        axes.locator_params(axis="x", nbins=6)
    axes.margins(y=0.1)
    axes.set_xlabel(title)
    axes.set_ylabel(_title(summary))
    axes.set_title(f"{summary.metric.title} against {title.lower()}")
    axes.legend(loc="best", fontsize=9)
    return figure
