"""Pictures of a summary, drawn without a display: one colour for each method in all of them, one size of letters.

Colours: Okabe & Ito (2008), safe for the colour-blind. ``report.mplstyle`` has the style. What shows one cell alone has
the gid ``cell-ID-PART``, by which the page finds it.
"""

import io
import itertools
import math
import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from safetensors.numpy import load_file
from sklearn.metrics import ConfusionMatrixDisplay

from lora_vit.analysis.summary import Summary
from lora_vit.analysis.tables import averaged, best_cell, matrix
from lora_vit.analysis.texts import count, plain, points, signed
from lora_vit.config.names import BASELINES, CUT, METHOD, METHODS, short_names, value_text
from lora_vit.records import SEARCH

STYLE = Path(__file__).with_name("report.mplstyle")
COLOURS = {"lora": "#0072B2", "dora": "#CC79A7", "none": "#E69F00", "full": "#009E73"}
CUT_COLOURS = "#56B4E9", "#D55E00"  # layer by layer, by threshold
DASHES = "-", "--", "-.", ":"
INK, GREY = "#1c2430", "#8a93a0"
WIDE, WIDTH = 11.4, 5.5  # inches: of the first picture, and of all others
COLUMNS = 12, 54, 128  # of text, points to the right of the first picture
MOST_LINES, MOST_ROWS, MOST_BASELINES = 7, 30, 4
LONGEST, TICKS = 68, 60  # characters of a name, and of all ticks below a picture
MOST_STEPS, BOLD, LONGEST_TICK = 8, 3, 14  # of a search: even steps of a setting, best trials, characters of a tick
Scale = tuple[np.ndarray, list[tuple[float, str]]]  # of a setting: where each trial lies from 0 to 1, and the ticks


def draw_all(summary: Summary) -> dict[str, Figure]:
    """Every picture that this sweep has something to show for, by file name (without ending)."""
    cut = summary.cells[METHOD].str.contains(CUT)
    with matplotlib.rc_context(fname=STYLE):
        figures = {
            "difference": difference(summary),
            "race": race(summary),
            **(search(summary) or by_setting(summary)),  # a search's settings are hardly crossed
        }
        if cut.any() and "lora.rank" in summary.cells:
            figures |= {"cut_ranks": cut_ranks(summary, cut), "spectrum": spectrum(summary, cut)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def render(figure: Figure, kind: str) -> bytes:
    """The figure as ``png`` or ``svg``, the same bytes every time."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(fname=STYLE):
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()


def colour_of(method: str) -> str:
    """The one colour of a method, in all pictures."""
    return COLOURS.get(method) or CUT_COLOURS["threshold" in method]


def difference(summary: Summary) -> Figure | None:
    """Each cell minus the best: interval, seeds as dots, zero and the margin; None where there is one cell alone.

    The thick part of an interval is that of the seeds alone. What lies beyond an edge has an arrow there.
    """
    cells, best, value = summary.cells, best_cell(summary.cells), f"val_{summary.metric}"
    if len(cells) < 2:
        return None
    baselines = cells[MOST_ROWS:][cells[METHOD].isin(BASELINES)[MOST_ROWS:]].head(MOST_BASELINES)
    shown, margin = pd.concat([cells.head(MOST_ROWS), baselines]), summary.margin or 0.0
    y = matrix(summary.trials[averaged(summary.trials, value)], value).loc[cells["cell"]]
    y = y.where(y.notna().cumsum(axis=1).le(cells.set_index("cell")["n"], axis=0))  # in a race later ones do not count
    dots = 100 * (y - (y.loc[best["cell"]] if summary.comparison.blocked else best["mean"]))
    at = 100 * shown["difference"].fillna(shown["mean"] - best["mean"]).to_numpy()
    ends = 100 * shown[["difference_low", "difference_high"]].to_numpy(float)  # NaN where nothing is claimed
    spans = np.column_stack([at, ends, *(dots.loc[shown["cell"]].agg(f, axis=1) for f in ("min", "max"))])
    low, high = _window(at, spans, 100 * margin)
    more = f" (best {MOST_ROWS} of {len(cells)}{', and baselines' * bool(len(baselines))})" * (len(cells) > MOST_ROWS)
    texts = [(-1, "val %", "mark", "parameters")]
    axes = _axes(f"Difference from {_shorten(best['label'])}{more}", "", "", WIDE, 1.6 + 0.27 * len(shown))
    for row, (_, cell) in enumerate(shown.iterrows()):
        colour, is_best, own = colour_of(cell[METHOD]), cell["cell"] == best["cell"], dots.loc[cell["cell"]].dropna()
        gid, seeds = f"cell-{cell['cell']}", 100 * cell.get("difference_seeds", math.nan) * np.array([-1, 1])
        axes.axhspan(row - 0.5, row + 0.5, color=colour, alpha=0.0, lw=0, gid=f"{gid}-row")
        for x, width, alpha in ((ends[row], 1.4, 1.0), (at[row] + seeds, 5.0, 0.35)):
            style: Any = {"color": colour, "lw": width, "alpha": alpha, "gid": f"{gid}-line{width:.0f}"}
            axes.plot(np.clip(x, low, high), [row, row], solid_capstyle="butt", **style)
        if cell["n"] > 1 and not is_best:
            style = {"color": colour, "ms": 4, "alpha": 0.55, "mew": 0, "gid": f"{gid}-seeds"}
            axes.plot(own, np.full(len(own), row + 0.27), "o", **style)
        axes.plot(at[row], row, "D" if is_best else "o", color=colour, ms=6, gid=f"{gid}-point")
        arrow = f"◀ {signed(at[row] / 100) if at[row] < low else ''}" * bool(np.nanmin(spans[row]) < low)
        other = "▶" * bool(np.nanmax(spans[row]) > high)
        for x, text, side in ((low, arrow, "left"), (high, other, "right")):
            axes.annotate(text, (x, row), ha=side, va="center_baseline", color=colour)
        cost = count(cell["trainable_parameters"]) + " *" * bool(cell["pareto_parameters"])
        texts.append((row, plain(cell["mean"]), cell["mark"], cost))
    for (row, *line), x in itertools.product(texts, COLUMNS):
        where: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        axes.annotate(line[COLUMNS.index(x)], (1, row), (x, 0), annotation_clip=False, **where)
    axes.set_title(axes.get_title("left"), pad=18)  # above these
    axes.axvspan(-100 * margin, 0, color=GREY, alpha=0.2, lw=0, label=f"within {points(margin)}" if margin else None)
    axes.axvline(0, color=INK, lw=1.2, zorder=1)
    axes.set(xlim=(low, high), ylim=(len(shown) - 0.4, -0.6))
    axes.set_yticks(range(len(shown)), map(_shorten, shown["label"]))
    axes.grid(axis="y", visible=False)
    for method in dict.fromkeys(shown[METHOD]) if METHOD in summary.settings else ():
        axes.plot([], [], "o", color=colour_of(method), label=METHODS.get(method, method))
    both = f"lines: {summary.sure} for all cells together, thick by {summary.unit} alone; "
    dotted = f"dots: {summary.unit}" if (shown["n"] > 1).any() else "one seed"
    axes.set_xlabel(f"Points of val {summary.title}, cell minus best ({both * bool(np.isfinite(ends).any())}{dotted})")
    return _with_legend(axes, 6)


def race(summary: Summary) -> Figure | None:
    """How far each cell is behind the leader by number of seeds, until it left, and the bar below which one leaves."""
    race, cells = summary.race, summary.cells
    if race is None or not race.seeds:
        return None
    raced = cells[cells["cell"].isin(race.cells)]
    more = f", {MOST_LINES} of {len(raced)} cells named" if len(raced) > MOST_LINES else ""
    axes = _axes(f"The race{more}", "Seeds (a cross: the cell left)", f"Points of val {summary.title} behind the best")
    r = np.arange(1, race.seeds + 1)
    so_far = np.array([np.cumsum(y[: len(r)]) / r for y in race.y])
    for i in race.exits:
        so_far[i, race.seeds_of(i) :] = math.nan
    behind = 100 * (so_far - np.nanmax(so_far, axis=0))
    for k, ((_, cell), style) in enumerate(zip(raced.iterrows(), _styles(raced), strict=True)):
        i, gid = race.cells.index(cell["cell"]), f"cell-{cell['cell']}"
        named = {"label": _shorten(cell["label"]), "zorder": 2} if k < MOST_LINES else {"alpha": 0.3, "zorder": 1}
        axes.plot(r, behind[i], lw=2.4 if i == race.selected else 1.3, gid=f"{gid}-line", **style, **named)
        if i in race.exits:
            left = race.seeds_of(i)
            axes.plot(left, behind[i, left - 1], "x", color=style["color"], ms=7, mew=1.8, gid=f"{gid}-exit")
    if any(most for _, most in race.bars.values()):
        least, most = -100 * np.array([*race.bars.values()]).T
        axes.fill_between([*race.bars], most, least, color=GREY, alpha=0.3, lw=0, label="the pairs' bars")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylim(1.08 * np.nanmin(behind) - 0.1, 0.02 - 0.04 * np.nanmin(behind))
    return _with_legend(axes, 2)


def by_setting(summary: Summary) -> dict[str, Figure]:
    """A picture for each setting: the metric by its levels, a line for each combination of the others.

    The line with intervals is that at which the levels are compared; a baseline's interval is a band.
    """
    cells, figures = summary.cells, {}
    baselines = cells[cells[METHOD].isin(BASELINES)].drop_duplicates(METHOD).sort_values(METHOD, ascending=False)
    for factor in summary.effects.factors:
        lines: list[pd.DataFrame] = []
        for at, line in factor.places.iterrows():
            there = np.flatnonzero(line >= 0)
            rows = cells.set_index("cell").loc[factor.ids[line.iloc[there]]].assign(place=there, line=str(at))
            lines.append(rows if len(lines) == factor.chosen else rows.assign(low=math.nan, high=math.nan))
        chosen = lines.pop(factor.chosen)
        others = sorted(lines, key=lambda line: -line["mean"].mean())[: MOST_LINES - 1]
        more = f", {len(others)} of {len(lines)} other lines" if len(others) < len(lines) else ""
        chosen["line"] += ": compared here" if lines else ""
        what = "mean and 95 % interval" if (chosen["n"] > 1).any() else "one seed, no intervals"
        name, file = _shorten(factor.name), "by_" + re.sub(r"\W+", "_", factor.name)
        axes = _axes(f"By {name}: {what}{more}", name, f"Val {summary.title} (%)")
        figures[file] = _lines(axes, factor.places.columns, [chosen, *others], baselines)
    return figures


def _lines(axes: Axes, levels: Any, lines: list[pd.DataFrame], baselines: pd.DataFrame) -> Figure:
    """Means of cells by ``place`` among the levels, named by ``line``, with their intervals; baselines with bands."""
    for cells, style in zip(lines, _styles(pd.concat([cells.head(1) for cells in lines])), strict=True):
        mean, ends = 100 * cells["mean"].to_numpy(float), 100 * cells[["low", "high"]].to_numpy(float).T
        style |= {"lw": 1.8, "ms": 5} if np.isfinite(ends).any() else {"lw": 1.2, "ms": 3}
        label, bars = _shorten(cells["line"].iloc[0]) or None, np.abs(ends - mean)
        axes.errorbar(cells["place"], mean, bars, label=label, marker="o", capsize=2.5, elinewidth=1.3, **style)
    for mean, low, high, method in baselines[["mean", "low", "high", METHOD]].itertuples(index=False):
        label = f"{BASELINES[method]}, {100 * mean:.2f}"  # it may lie below the picture
        axes.axhline(100 * mean, color=colour_of(method), lw=1.2, label=label, zorder=0)
        axes.axhspan(100 * low, 100 * high, color=colour_of(method), alpha=0.09, lw=0, zorder=0)
    every = math.ceil(len(levels) * (max(map(len, levels)) + 2) / TICKS)
    axes.set_xticks(range(0, len(levels), every), map(_shorten, levels[::every]))
    drawn = 100 * pd.concat([*lines, baselines[["mean"]]])[["mean", "low", "high"]].astype(float)
    low, _ = axes.set_ylim(_window(drawn["mean"].to_numpy(), drawn.to_numpy()))
    if drawn["mean"].min() < low:
        axes.set_xlabel(f"{axes.get_xlabel()} (lines that leave the picture go on lower)")
    return _with_legend(axes, 3)


def search(summary: Summary) -> dict[str, Figure]:
    """How a search went, the metric by each setting that it chose, and all of them side by side; of two values or more.

    Trials are in the order of their start. Values farther below the median than the best one is above are at the edge.
    """
    folder, *others = map(Path, summary.folders)
    values = 100 * summary.trials[f"val_{summary.metric}"].where(summary.trials["status"] == "completed")
    if others or not (folder / SEARCH).is_file() or values.count() < 2:
        return {}
    low = 2 * values.median() - values.max() - 0.5
    metric = f"Val {summary.title} (%{f'; lower ones at {low:.1f}' * bool(low > values.min())})"
    trials = summary.trials.assign(value=values.clip(lower=low)).sort_values(["started", "trial"])
    trials["number"] = np.arange(1, len(trials) + 1)
    done = trials.dropna(subset="value")
    short = short_names(c for c in summary.settings if done[c].map(value_text).nunique() > 1)
    scales = {name: _scale(done[setting]) for setting, name in short.items()}
    lines = {"search_parallel": _parallel({**scales, metric: _scale(done["value"], 1)})} if len(scales) > 1 else {}
    return {"search": _history(trials, scales, metric), **lines}


def _history(trials: pd.DataFrame, scales: dict[str, Scale], metric: str) -> Figure:
    """The values in their order, with the best so far and the trials without one, and against each setting."""
    rows, done = math.ceil(len(scales) / 2), trials.dropna(subset="value")
    figure: Any = Figure(figsize=(WIDTH, 3.2 + 2.2 * rows), layout="constrained")
    figure.supylabel(metric)
    grid = figure.add_gridspec(rows + 1, 2)
    dots: Any = {"c": done["number"], "cmap": "viridis_r", "lw": 0, "s": 24}
    first = figure.add_subplot(grid[0, :], title="The search: later trials are darker", xlabel="Trial, by its start")
    best: Any = {"where": "post", "color": INK, "lw": 1.4, "label": "best so far", "zorder": 0.9}
    first.step(trials["number"], trials["value"].cummax().ffill(), **best)
    first.scatter(done["number"], done["value"], **dots)
    for status, group in trials[trials["value"].isna()].groupby("status"):
        style: Any = {"marker": "x" if status == "failed" else "|", "ls": "", "color": CUT_COLOURS[1]}
        bottom = np.full(len(group), 0.03)
        first.plot(group["number"], bottom, transform=first.get_xaxis_transform(), label=status, **style)
    first.locator_params(axis="x", integer=True)
    for k, (name, (places, ticks)) in enumerate(scales.items()):
        axes = figure.add_subplot(grid[1 + k // 2, k % 2], sharey=first, xlabel=name)
        axes.scatter(places, done["value"], **dots)
        turned = {"rotation": 30, "ha": "right"} if sum(len(text) for _, text in ticks) > TICKS // 2 else {}
        axes.set_xticks(*zip(*ticks, strict=True), **turned)
    return _with_legend(first, 5)


def _parallel(scales: dict[str, Scale]) -> Figure:
    """A line for each completed trial across the settings to its value; the better, the darker and the farther up."""
    lines = np.column_stack([places for places, _ in scales.values()])
    title = f"The search: each completed trial, the best {min(BOLD, len(lines))} in bold"
    axes = _axes(title, "", "", max(WIDTH, 1.1 * len(scales)))
    for left, line in zip(range(len(lines) - 1, -1, -1), lines[lines[:, -1].argsort(kind="stable")], strict=True):
        bold: Any = {"lw": 2.4} if left < BOLD else {"lw": 1.0, "alpha": 0.7}
        axes.plot(line, color=matplotlib.colormaps["viridis_r"](line[-1]), **bold)
    for x, (_, ticks) in enumerate(scales.values()):
        axes.axvline(x, color=GREY, lw=1, zorder=3)
        for y, text in ticks:
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
            axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", bbox=box)
    axes.set_xticks(range(len(scales)), ["\n".join(textwrap.wrap(name, LONGEST_TICK)) for name in scales])
    axes.set(frame_on=False)
    axes.yaxis.set_visible(False)
    axes.grid(visible=False)
    return _with_legend(axes, 1)


def _scale(values: pd.Series, most_steps: int = MOST_STEPS) -> Scale:
    """Even steps for words and a few values; else by value, from a decade on by its logarithm, with none at the end."""
    texts, is_number = values.map(value_text), pd.api.types.is_numeric_dtype(values)
    if texts.nunique() <= most_steps or not is_number:
        words = texts.loc[(values if is_number else texts).sort_values().index].unique()
        at = dict(zip(words, np.linspace(0, 1, len(words)), strict=True))
        return texts.map(at).to_numpy(), [(at[word], _shorten(word, LONGEST_TICK)) for word in words]
    low, high = float(values.min()), float(values.max())
    is_log = low > 0 and high >= 10 * low
    locator: Any = LogLocator(subs=(1, 3) if high < 300 * low else (1,)) if is_log else MaxNLocator(4)
    marks = np.array([mark for mark in locator.tick_values(low, high) if low * (1 - 1e-9) <= mark <= high * (1 + 1e-9)])
    change: Any = np.log if is_log else np.asarray
    at, ticks = (np.interp(change(v), change([low, high]), (0, 1)) for v in (values.to_numpy(float), marks))
    named = [(place, value_text(float(f"{mark:.6g}"))) for place, mark in zip(ticks, marks, strict=True)]
    return np.nan_to_num(at, nan=1.15), named + [(1.15, "–")] * bool(values.isna().any())


def cut_ranks(summary: Summary, cut: pd.Series) -> Figure:
    """The metric by rank of what was ``cut``, and of what was trained at it, at the other settings of the best cut."""
    cells = summary.cells
    like, frame = cells[cut].iloc[0], cells[~cells[METHOD].isin(BASELINES)]
    for c in [c for c in summary.settings if c not in (METHOD, "lora.rank", "lora.alpha")]:
        frame = frame[frame[c].map(value_text) == value_text(like[c])]
    frame = frame.drop_duplicates([METHOD, "lora.rank"]).sort_values("lora.rank")
    ticks, lines = frame["lora.rank"].unique(), list[pd.DataFrame]()
    for method, group in frame.groupby(METHOD):
        place = np.searchsorted(ticks, group["lora.rank"]) + len(lines) / 20
        lines.append(group.assign(line=METHODS.get(str(method), method), place=place))
    axes = _axes(f"Val {summary.title} by rank", "Rank", f"Val {summary.title} (%)")
    return _lines(axes, [*map(value_text, ticks)], lines, frame[:0])


def update_shares(folders: list[str]) -> dict[str, np.ndarray]:
    """By layer [blocks, ranks]: the share (%) of the squared update that the first ranks hold, mean of the trials."""
    found: dict[str, dict[int, list[np.ndarray]]] = {}
    files = [Path(folder) / "adapter.safetensors" for folder in folders]
    for tensors in (load_file(file) for file in files if file.is_file()):
        for name in [name for name in tensors if name.endswith(".lora_A")]:
            b, a = tensors[f"{name[:-1]}B"].astype(float), tensors[name].T.astype(float)
            square = np.linalg.svd(np.linalg.qr(b).R @ np.linalg.qr(a).R.T, compute_uv=False) ** 2
            block, layer = re.findall(r"(\d+)\.(.+)\.lora_A$", name)[0]
            found.setdefault(layer, {}).setdefault(int(block), []).append(100 * np.cumsum(square) / square.sum())
    return {layer: np.array([np.mean(own, 0) for own in of.values()]) for layer, of in found.items()}


def spectrum(summary: Summary, cut: pd.Series) -> Figure | None:
    """What the first ranks hold of the updates that were ``cut``: by layer the mean of the blocks, and their range."""
    cells, trials = summary.cells, summary.trials
    trained = cells[~cut & (cells["lora.rank"] == cells["lora.rank"].max())].head(1)  # the best, if it is looked at
    if not (shares := update_shares(trials.loc[trials["cell"].isin(trained["cell"]), "folder"].tolist())):
        return None
    axes = _axes(f"The updates of {_shorten(trained['label'].iloc[0])}", "First ranks", "Of the squared update (%)")
    for k, (layer, share) in enumerate(shares.items()):
        enough, colour = (share < 99.0).sum(1) + 1, matplotlib.colormaps["viridis"](0.9 * k / len(shares))
        ranks, label = np.arange(1, share.shape[1] + 1), f"{layer}: 99 % in {enough.min()} to {enough.max()}"
        axes.plot(ranks, share.mean(0), color=colour, lw=1.5, ls=DASHES[k % 4], label=label)
        axes.fill_between(ranks, share.min(0), share.max(0), color=colour, alpha=0.12, lw=0)
    axes.axhline(99.0, color=GREY, ls="--", lw=1)
    return _with_legend(axes, 2)


def confusion(matrix: pd.DataFrame) -> Figure:
    """The share of each class's pictures (rows) that is taken for each class (columns), in % where there is room."""
    few, shares = len(matrix) <= MOST_ROWS, 100 * matrix.div(matrix.sum(axis=1).clip(lower=1), axis=0)
    with matplotlib.rc_context({"axes.grid": False}, fname=STYLE):
        axes = _axes("What is taken for what (%)", "", "", *[2.4 + 0.36 * min(len(matrix), MOST_ROWS)] * 2)
        shown = ConfusionMatrixDisplay(shares.to_numpy(), display_labels=[_shorten(str(name), 20) for name in matrix])
        how: Any = {"cmap": "Blues", "colorbar": False, "xticks_rotation": "vertical", "values_format": ".0f"}
        shown.plot(ax=axes, include_values=few, **how)
        if not few:
            axes.set(xticks=[], yticks=[])
    return shown.figure_


def _axes(title: str, x: str, y: str, width: float = WIDTH, height: float = 3.9) -> Axes:
    """One picture in a figure of its own (inches)."""
    axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    axes.set(title="\n".join(textwrap.wrap(title, int(10.2 * WIDTH))), xlabel=x, ylabel=y)
    return axes


def _styles(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """A line for each cell in its method's colour, the second and later ones of a method paler and dashed."""
    nth = cells.groupby(METHOD).cumcount()
    paler = [(np.array(to_rgb(colour_of(m))), min(0.12 * k, 0.6)) for m, k in zip(cells[METHOD], nth, strict=True)]
    return [{"color": own + (1 - own) * share, "ls": DASHES[k % 4]} for (own, share), k in zip(paler, nth, strict=True)]


def _window(at: np.ndarray, spans: np.ndarray, below: float = 0.0) -> tuple[float, float]:
    """Limits of an axis (points) with all that is drawn and what is ``below`` the top; ends that squeeze it are cut.

    ``at`` [n] values, ``spans`` [n, k] their ends (NaN: none).
    """
    top, reach = float(at.max()), np.nanmax(np.abs(spans - at[:, None]), axis=1, initial=0.0)
    room = max(4 * float(np.median(top - at)), 2 * float(np.median(reach)), 1.5 * below, 0.5)
    low, high = float(np.nanmin([at.min(), np.nanmin(spans), top - below])), float(np.nanmax(spans))
    low, high = (low if low > top - 2 * room else top - room), (high if high < top + 2 * room else top + room)
    edge = max(0.04 * (high - low), 0.1)
    return low - edge, high + edge


def _with_legend(axes: Axes, columns: int) -> Figure:
    """The figure, with a legend below the picture if anything has a name; fewer columns if names are long."""
    figure: Any = axes.figure
    room = int(12 * figure.get_figwidth())  # characters
    if names := axes.get_legend_handles_labels()[1]:
        columns = min(columns, room // max(map(len, names))) or 1
        figure.set_figheight(figure.get_figheight() + 0.19 * max(0, len(names) // columns - 3))
        figure.legend(loc="outside lower center", ncols=columns)
    return figure


def _shorten(text: str, most: int = LONGEST) -> str:
    """At most so many characters, and no formula between two dollars."""
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")
