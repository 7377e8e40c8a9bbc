"""Pictures of a summary, drawn without a display. Colours: Okabe & Ito (2008), safe for the colour-blind.

``report.mplstyle`` has their style.
"""

import contextlib
import io
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from lora_vit.analysis.effects import Factor
from lora_vit.analysis.load import as_float
from lora_vit.analysis.search_plots import draw_search
from lora_vit.analysis.summary import Summary
from lora_vit.config.names import BASELINES, CUT, METHOD, METHODS, value_text
from lora_vit.errors import RecordError
from lora_vit.files import read_rows
from lora_vit.records import METRICS

STYLE = Path(__file__).with_name("report.mplstyle")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MARK_STYLE = {
    "best": ("#0072B2", "D"), "candidate": ("#56B4E9", "o"), "open": ("#E69F00", "^"), "worse": ("#D55E00", "v"),
    "no verdict": ("#777777", "s"), "selected": ("#0072B2", "D"), "in": ("#56B4E9", "o"), "out": ("#D55E00", "v"),
    "unresolved": ("#56B4E9", "o"), "failed": ("#000000", "X"), "not raced": ("#777777", "s"),
}  # fmt: skip
MOST_LINES, MOST_ROWS, MOST_CURVES, MOST_NAMES = 7, 30, 5, 12
LONGEST, TICKS = 68, 76  # characters of a name, and of all ticks below a picture


def draw_all(summary: Summary) -> dict[str, Figure]:
    """Every picture that this sweep has something to show for, by file name (without ending)."""
    with matplotlib.rc_context(fname=STYLE):
        searched = draw_search(summary)
        figures = {
            "cells": cells(summary),
            "race": race(summary),
            **(searched or by_setting(summary)),  # a search's settings are hardly crossed
            "learning_curves": learning_curves(summary),
            "pareto_parameters": pareto(summary),
            "cut_ranks": cut_ranks(summary),
            "spectrum": spectrum(summary),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def render(figure: Figure, kind: str) -> bytes:
    """The figure as ``png`` or ``svg``, the same bytes every time."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(fname=STYLE):
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()


def cells(summary: Summary) -> Figure:
    """The best cells from top to bottom with their intervals, coloured by mark; baselines always shown."""
    shown, more = _best_and_baselines(summary.cells, MOST_ROWS, 4)
    axes = _axes(f"Cells{more}", "", "", height=1.3 + 0.26 * max(len(shown), 3), beside=shown["label"])
    for mark, (colour, marker) in MARK_STYLE.items():
        here = np.flatnonzero(shown["mark"] == mark)
        if len(here):
            _points(axes, shown.iloc[here], here, mark, colour, marker, horizontal=True)
    axes.set_yticks(range(len(shown)), [_shorten(t) for t in shown["label"]])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    low, high = axes.set_xlim(_limits(shown))
    beyond = ((100 * shown["low"] < low) | (100 * shown["high"] > high)).any()
    longer = "\n(bars without ends are longer than shown)" if beyond else ""
    axes.set_xlabel(f"Val {summary.title} (%), {_what_is_shown(shown)}{longer}")
    return _with_legend(axes, 5)


def race(summary: Summary) -> Figure | None:
    """The mean of each cell by number of seeds, until it left the race."""
    race = summary.race
    if race is None or not race.seeds:
        return None
    labels = dict(zip(summary.cells["cell"], summary.cells["label"], strict=True))
    order = [race.cells.index(cell) for cell in labels if cell in race.cells]
    more = f", {MOST_LINES} of {len(order)} cells named" if len(order) > MOST_LINES else ""
    seeds_axis = "Seeds (dotted: the first that a decision was made with; a cross: the cell left)"
    axes = _axes(f"The race: mean of each cell so far{more}", seeds_axis, f"Mean val {summary.title} (%)", 8.0, 4.6)
    for k, i in enumerate(order):
        seeds = np.arange(1, race.seeds_of(i) + 1)
        means = 100 * np.cumsum(race.y[i, : len(seeds)]) / seeds
        named = k < MOST_LINES
        colour, label = (COLOURS[k], _shorten(labels[race.cells[i]])) if named else ("#bbbbbb", None)
        width = 2.4 if i == race.selected else 1.2
        axes.plot(seeds, means, color=colour, linewidth=width, label=label, zorder=int(named))
        if i in race.exits:
            axes.plot(seeds[-1], means[-1], marker="x", color=colour, markersize=7, markeredgewidth=1.8)
    axes.axvline(race.rules.first_seeds, color="#999999", linestyle=":", linewidth=1)
    axes.locator_params(axis="x", integer=True)
    return _with_legend(axes, 2)


def by_setting(summary: Summary) -> dict[str, Figure]:
    """A picture for each setting: the metric by its levels, a line for each combination of the others.

    The line with intervals is that at which the levels are compared, a baseline a dashed one.
    """
    cells = summary.cells if METHOD in summary.cells else summary.cells.assign(**{METHOD: "lora"})  # one was tried
    baselines = cells[cells[METHOD].isin(BASELINES)].drop_duplicates(METHOD).sort_values(METHOD, ascending=False)
    figures = {}
    for factor in summary.effects.factors:
        axes = _by_levels(factor, cells.set_index("cell"), baselines.assign(low=math.nan), f"Val {summary.title}")
        for mean, method in zip(baselines["mean"], baselines[METHOD], strict=True):
            colour = "#777777" if method == "none" else "#000000"
            axes.axhline(100 * mean, color=colour, ls="--", lw=1.2, label=BASELINES[method])
        figures["by_" + re.sub(r"\W+", "_", factor.name)] = _with_legend(axes, 3)
    return figures


def _by_levels(factor: Factor, cells: pd.DataFrame, baselines: pd.DataFrame, metric: str) -> Axes:
    """The line that is compared, and the best of the others; ``cells`` by id."""
    name, levels, lines = _shorten(factor.name), factor.places.columns, list[pd.DataFrame]()
    for at, line in factor.places.iterrows():
        there = np.flatnonzero(line >= 0)
        lines.append(cells.loc[factor.ids[line.iloc[there]]].assign(place=there, at=_shorten(str(at))))
    chosen = lines.pop(factor.chosen)
    others = sorted(lines, key=lambda line: -line["mean"].mean())[: MOST_LINES - 1]
    more = f", {len(others)} of {len(lines)} other lines" if len(others) < len(lines) else ""
    axes = _axes(f"{metric} by {name}, {_what_is_shown(chosen)}{more}", name, f"{metric} (%)")
    label = f"{chosen['at'].iloc[0]}: compared here" if lines else None
    _points(axes, chosen, chosen["place"].to_numpy(), label, COLOURS[0], MARKERS[0])
    for other, colour, marker in zip(others, COLOURS[1:], MARKERS[1:], strict=False):
        style: Any = {"color": colour, "marker": marker, "ms": 3.5, "lw": 1.1, "zorder": 1}
        axes.plot(other["place"], 100 * other["mean"], label=other["at"].iloc[0], **style)
    every = math.ceil(len(levels) * (max(map(len, levels)) + 2) / TICKS)
    axes.set_xticks(range(0, len(levels), every), map(_shorten, levels[::every]))
    drawn = pd.concat([chosen, *(other.assign(low=math.nan) for other in others)])
    top = drawn["mean"].max()
    near = drawn[drawn["mean"] >= top - max(4 * (top - drawn["mean"].median()), 0.01)]
    low, _ = axes.set_ylim(_limits(pd.concat([near, baselines])))
    if 100 * drawn["mean"].min() < low:
        axes.set_xlabel(f"{name} (lines that leave the picture go on lower)")
    return axes


def curves(folders: list[str], value: str = "val_accuracy") -> pd.DataFrame:
    """The metric after each epoch, one column per trial; trials without readable rows are left out."""
    table = pd.DataFrame()
    for folder in folders:
        with contextlib.suppress(RecordError, OSError, UnicodeDecodeError):
            rows = [r for r in read_rows(Path(folder) / METRICS) if isinstance(r, dict) and r.get("kind") == "epoch"]
            values = {r["epoch"]: as_float(r.get(value)) for r in rows if isinstance(r.get("epoch"), int)}
            table = table.join(pd.Series(values, dtype=float, name=folder).dropna(), how="outer")
    return table.dropna(axis="columns", how="all")


def learning_curves(summary: Summary) -> Figure | None:
    """Mean over seeds after each epoch, band from lowest to highest seed: the best cells and the baselines."""
    shown, more = _best_and_baselines(summary.cells, MOST_CURVES, MOST_LINES - MOST_CURVES)
    done = summary.trials[summary.trials["status"] == "completed"]
    seeds = "mean and range over seeds" if (shown["n"] > 1).any() else "one seed"
    axes = _axes(f"Learning curves: {seeds}{more}", "Epoch", f"Val {summary.title} (%)")
    later = []
    for (_, cell), colour, marker in zip(shown.iterrows(), COLOURS, MARKERS, strict=False):
        table = 100 * curves(done.loc[done["cell"] == cell["cell"], "folder"].tolist(), f"val_{summary.metric}")
        if len(table):
            mean, low, high = table.mean(axis=1), table.min(axis=1), table.max(axis=1)
            label = _shorten(str(cell["label"]))
            axes.plot(mean.index, mean, label=label, color=colour, marker=marker, markersize=3.5, linewidth=1.6)
            axes.fill_between(table.index, low, high, color=colour, alpha=0.15, linewidth=0)
            later.append(low[low.index > low.index[0] + (low.index[-1] - low.index[0]) / 3])
    if not later:
        return None
    if len(later) > 1 and len(lowest := pd.concat(later)):  # after the first third curves lie close together
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, lowest.min() - 0.25 * (top - lowest.min())), top)
    axes.locator_params(axis="x", integer=True)
    return _with_legend(axes, 2)


def pareto(summary: Summary) -> Figure | None:
    """Every cell's mean against its trainable parameters; the front as a line, its cells named."""
    cost, front = "trainable_parameters", "pareto_parameters"
    frame = summary.cells[np.isfinite(summary.cells[cost].to_numpy(float))].sort_values(cost)
    if frame[cost].nunique() < 2:
        return None
    chosen, rest = frame[frame[front]], frame[~frame[front]]
    axes = _axes(f"Val {summary.title} against trainable parameters", "Trainable parameters",
                 f"Val {summary.title} (%)", height=4.6, beside=chosen["label"])  # fmt: skip
    if frame[cost].min() > 0:
        axes.set_xscale("log")
    if len(rest):
        axes.scatter(rest[cost], 100 * rest["mean"], s=22, color="#999999", alpha=0.7, label="other cells", lw=0)
    axes.plot(chosen[cost], 100 * chosen["mean"], "o-", color=COLOURS[0], markersize=6, lw=1.4, label="Pareto front")
    keys = [str(k) for k in range(1, len(chosen) + 1)]
    for (x, y), same in chosen.assign(key=keys).groupby([cost, "mean"], sort=False):
        text = ", ".join(same["key"])
        side = "right" if "," in text else "center"  # several would run into the names
        axes.annotate(text, (x, 100 * y), xytext=(0, 7), textcoords="offset points", ha=side, color=COLOURS[0])
    names = [f"{k}  {_shorten(t)}" for k, t in zip(keys, chosen["label"], strict=True)]
    named = names[:MOST_NAMES] + [f"… {len(names) - MOST_NAMES} more"] * (len(names) > MOST_NAMES)
    axes.annotate("\n".join(named), (1.02, 0.98), xycoords="axes fraction", va="top", fontsize=8)
    axes.margins(y=0.1)
    axes.legend(loc="best", fontsize=9)
    return axes.figure  # type: ignore[return-value]


def cut_ranks(summary: Summary) -> Figure | None:
    """The metric by rank of what was cut, and of what was trained at it, at the other settings of the best that was."""
    cells = summary.cells
    if not {METHOD, "lora.rank"} <= {*cells} or not (cut := cells[METHOD].str.contains(CUT)).any():
        return None
    like, frame = cells[cut].iloc[0], cells[~cells[METHOD].isin(BASELINES)]
    for c in [c for c in summary.settings if c not in (METHOD, "lora.rank", "lora.alpha")]:
        frame = frame[frame[c].map(value_text) == value_text(like[c])]
    frame = frame.drop_duplicates([METHOD, "lora.rank"]).sort_values("lora.rank")
    axes, ticks = _axes(f"Val {summary.title} by rank", "Rank", f"Val {summary.title} (%)"), frame["lora.rank"].unique()
    for k, (method, group) in enumerate(frame.groupby(METHOD)):
        places = np.searchsorted(ticks, group["lora.rank"]) + 0.05 * k
        _points(axes, group, places, METHODS.get(str(method), str(method)), COLOURS[k], MARKERS[k])
    axes.set_xticks(range(len(ticks)), map(value_text, ticks))
    axes.set_ylim(_limits(frame))
    return _with_legend(axes, 3)


def update_shares(folders: list[str]) -> dict[str, dict[int, np.ndarray]]:
    """By layer and block: the share (%) of the squared update that its first 1, 2, ... ranks hold, mean of trials."""
    found: dict[str, dict[int, list[np.ndarray]]] = {}
    files = [Path(folder) / "adapter.safetensors" for folder in folders]
    for tensors in (load_file(file) for file in files if file.is_file()):
        for name in [name for name in tensors if name.endswith(".lora_A")]:
            b, a = tensors[f"{name[:-1]}B"].astype(float), tensors[name].T.astype(float)
            square = np.linalg.svd(np.linalg.qr(b).R @ np.linalg.qr(a).R.T, compute_uv=False) ** 2
            block, layer = re.findall(r"(\d+)\.(.+)\.lora_A$", name)[0]
            found.setdefault(layer, {}).setdefault(int(block), []).append(100 * np.cumsum(square) / square.sum())
    return {layer: {block: np.mean(own, 0) for block, own in of.items()} for layer, of in found.items()}


def spectrum(summary: Summary) -> Figure | None:
    """What the first ranks hold of the updates that were cut: a picture for each layer of a block, a line for each."""
    cells, trials = summary.cells, summary.trials
    if not {METHOD, "lora.rank"} <= {*cells} or not (cuts := cells[METHOD].str.contains(CUT)).any():
        return None
    trained = cells[~cuts & (cells["lora.rank"] == cells["lora.rank"].max())].head(1)  # the best, if it is looked at
    if not (shares := update_shares(trials.loc[trials["cell"].isin(trained["cell"]), "folder"].tolist())):
        return None
    figure = Figure(figsize=(8.6, 1.2 + 2.0 * math.ceil(len(shares) / 3)), layout="constrained")
    figure.suptitle(_shorten(f"The first ranks of the squared update (%): {trained['label'].iloc[0]}"), fontsize=11)
    grid = figure.subplots(math.ceil(len(shares) / 3), 3, squeeze=False, sharex=True, sharey=True)
    for axes, (layer, blocks) in zip(grid.flat, shares.items(), strict=False):
        enough = [int(np.searchsorted(share, 99.0)) + 1 for share in blocks.values()]
        axes.set_title(f"{layer}: 99 % in {min(enough)} to {max(enough)}", fontsize=9)
        axes.axhline(99.0, color="#777777", ls="--", lw=1)
        for block, share in blocks.items():
            colour = matplotlib.colormaps["viridis"](0.9 * block / max(*blocks, 1))
            label = f"block {block}" if axes is grid[0, 0] else None
            axes.plot(range(1, len(share) + 1), share, ".-", color=colour, lw=1.2, label=label)
    return _with_legend(grid[0, 0], 6)


def _axes(title: str, x: str, y: str, width: float = 7.0, height: float = 4.2,
          beside: pd.Series | None = None) -> Axes:  # fmt: skip
    """One picture in a figure of its own (inches); ``beside``: labels that need room of their own."""
    if beside is not None:
        width = 7.5 + 0.08 * max(0, min(int(beside.str.len().max()), LONGEST) - 44)
    axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    return axes


def _points(axes: Axes, frame: pd.DataFrame, places: np.ndarray, label: str | None, colour: str, marker: str,
            horizontal: bool = False) -> None:  # fmt: skip
    """Means with their intervals, none where a cell has none; vertical ones are joined by a line."""
    mean = 100 * frame["mean"].to_numpy(float)
    bars = np.nan_to_num(np.abs(100 * frame[["low", "high"]].to_numpy(float).T - mean))
    where: Any = {"x": places, "y": mean, "yerr": bars}
    if horizontal:
        where = {"x": mean, "y": places, "xerr": bars, "ls": "none"}
    axes.errorbar(**where, label=label, color=colour, marker=marker, capsize=2.5, lw=1.6, elinewidth=1.3, ms=5)


def _limits(frame: pd.DataFrame) -> tuple[float, float]:
    """Limits of an axis (%) with every mean; an interval that would squeeze the rest (two seeds: t = 12.7) is cut."""
    mean, ends = 100 * frame["mean"].to_numpy(float), 100 * frame[["low", "high"]].to_numpy(float)
    reach = np.nan_to_num(np.abs(ends - mean[:, None]).max(1))
    spread = max(float(np.ptp(mean)), 0.5)
    room = min(float(np.median(reach[reach > 0])) if reach.any() else 0.0, 1.5 * spread)
    low, high = float(mean.min()) - 1.3 * room, float(mean.max()) + 1.3 * room
    whole = float((mean - reach).min()), float((mean + reach).max())
    if whole[1] - whole[0] < 1.5 * (high - low):  # nothing is squeezed
        low, high = whole
    edge = max(0.04 * (high - low), 0.1)
    return low - edge, min(high, 100.0) + edge


def _with_legend(axes: Axes, columns: int) -> Figure:
    """The figure, with a legend below the picture if anything has a name; fewer columns if names are long."""
    figure: Any = axes.figure
    if names := axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=min(columns, 88 // max(map(len, names))) or 1, fontsize=8.5)
    return figure


def _shorten(text: str) -> str:
    """At most LONGEST characters, and no formula between two dollars."""
    return (text if len(text) <= LONGEST else text[: LONGEST - 1] + "…").replace("$", r"\$")


def _best_and_baselines(frame: pd.DataFrame, best: int, baselines: int) -> tuple[pd.DataFrame, str]:
    """The first cells, baselines from among the others, and what a title says of the choice."""
    rest = frame.iloc[best:]
    others = rest[rest[METHOD].isin(BASELINES)].head(baselines) if METHOD in frame else rest[:0]
    more = f" (best {best} of {len(frame)}{', and baselines' if len(others) else ''})" if len(rest) else ""
    return pd.concat([frame.head(best), others]), more


def _what_is_shown(frame: pd.DataFrame) -> str:
    return "mean and 95 % interval over seeds" if (frame["n"] > 1).any() else "one seed, no intervals"
