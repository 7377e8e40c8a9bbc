"""Pictures of a summary, drawn without a display: one colour for each method in all of them, one size of letters.

Colours: Okabe & Ito (2008), safe for the colour-blind. ``report.mplstyle`` has the style. What shows one cell alone has
the gid ``cell-ID-PART``, by which the page finds it.
"""

import contextlib
import io
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
from safetensors.numpy import load_file

from lora_vit.analysis.effects import Factor
from lora_vit.analysis.load import as_float
from lora_vit.analysis.summary import Summary
from lora_vit.analysis.tables import averaged, best_cell, matrix
from lora_vit.analysis.texts import count, plain, points, signed
from lora_vit.config.names import BASELINES, CUT, METHOD, METHODS, value_text
from lora_vit.errors import RecordError
from lora_vit.files import read_rows
from lora_vit.records import METRICS

STYLE = Path(__file__).with_name("report.mplstyle")
COLOURS = {"lora": "#0072B2", "dora": "#CC79A7", "none": "#E69F00", "full": "#009E73"}
CUT_COLOURS = "#56B4E9", "#D55E00"  # layer by layer, by threshold
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GREY = "#1c2430", "#8a93a0"
WIDE, WIDTH = 9.6, 5.5  # inches: of the first picture, and of all others
MOST_LINES, MOST_ROWS, MOST_CURVES = 7, 30, 5
LONGEST, TICKS = 68, 60  # characters of a name, and of all ticks below a picture


def draw_all(summary: Summary) -> dict[str, Figure]:
    """Every picture that this sweep has something to show for, by file name (without ending)."""
    with matplotlib.rc_context(fname=STYLE):
        figures = {
            "difference": difference(summary),
            "race": race(summary),
            **by_setting(summary),
            "learning_curves": learning_curves(summary),
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


def colour_of(method: str) -> str:
    """The one colour of a method, in all pictures."""
    return COLOURS.get(method) or CUT_COLOURS["threshold" in method]


def difference(summary: Summary) -> Figure | None:
    """Each cell minus the best: interval, seeds as dots, zero and the margin; None where there is one cell alone.

    The thick part of an interval is that of the seeds alone. What lies beyond an edge has an arrow there.
    """
    cells, best, value = _with_method(summary.cells), best_cell(summary.cells), f"val_{summary.metric}"
    if len(cells) < 2:
        return None
    shown, more = _best_and_baselines(cells, MOST_ROWS, 4)
    y = matrix(summary.trials[averaged(summary.trials, value)], value).loc[cells["cell"]]
    y = y.where(y.notna().cumsum(axis=1).le(cells.set_index("cell")["n"], axis=0))  # in a race later ones do not count
    dots = 100 * (y - (y.loc[best["cell"]] if summary.comparison.blocked else best["mean"]))
    at = 100 * shown["difference"].fillna(shown["mean"] - best["mean"]).to_numpy()
    ends = 100 * shown[["difference_low", "difference_high"]].to_numpy(float)  # NaN where nothing is claimed
    spans = np.column_stack([at, ends, *(dots.loc[shown["cell"]].agg(f, axis=1) for f in ("min", "max"))])
    low, high = _window(at, spans, 100 * (summary.margin or 0.0))
    axes = _axes(f"Difference from {_shorten(best['label'])}{more}", "", "", WIDE, 1.6 + 0.27 * len(shown))
    for row, (_, cell) in enumerate(shown.iterrows()):
        colour, is_best = colour_of(cell[METHOD]), cell["cell"] == best["cell"]
        gid, seeds = f"cell-{cell['cell']}", 100 * cell.get("difference_seeds", math.nan) * np.array([-1, 1])
        axes.axhspan(row - 0.5, row + 0.5, color=colour, alpha=0.0, lw=0, gid=f"{gid}-row")
        for x, style in ((ends[row], {"lw": 1.4}), (at[row] + seeds, {"lw": 5, "alpha": 0.35})):
            axes.plot(np.clip(x, low, high), [row, row], color=colour, solid_capstyle="butt", **style)
        if cell["n"] > 1 and not is_best:
            own = dots.loc[cell["cell"]].dropna()
            axes.plot(own, np.full(len(own), row + 0.27), "o", color=colour, ms=4, alpha=0.55, mew=0)
        axes.plot(at[row], row, "D" if is_best else "o", color=colour, ms=6, gid=f"{gid}-point")
        left, right = np.nanmin(spans[row]) < low, np.nanmax(spans[row]) > high
        for marker, edge in (("<", low),) * bool(left) + ((">", high),) * bool(right):
            axes.plot(edge, row, marker, color=colour, ms=6, clip_on=False)
        if at[row] < low:
            axes.annotate(signed(at[row] / 100), (low, row), xytext=(8, -3), textcoords="offset points", color=colour)
        cost = count(cell["trainable_parameters"]) + " *" * bool(cell["pareto_parameters"])
        _columns(axes, row, plain(cell["mean"]), cell["mark"], cost)
    _columns(axes, -1.1, "val %", "mark", "parameters")
    if summary.margin:
        axes.axvspan(-100 * summary.margin, 0, color=GREY, alpha=0.2, lw=0, label=f"within {points(summary.margin)}")
    axes.axvline(0, color=INK, lw=1.2, zorder=1)
    axes.set(xlim=(low, high), ylim=(len(shown) - 0.4, -0.6))
    axes.set_yticks(range(len(shown)), map(_shorten, shown["label"]))
    axes.grid(axis="y", visible=False)
    for method in dict.fromkeys(shown[METHOD]) if METHOD in summary.cells else ():
        axes.plot([], [], "o", color=colour_of(method), label=METHODS.get(method, method))
    lines = "lines: 95 % for all cells together, thick by seeds alone; " * bool(np.isfinite(ends).any())
    dotted = "dots: seeds" if (shown["n"] > 1).any() else "one seed"
    axes.set_xlabel(f"Points of val {summary.title}, cell minus best ({lines}{dotted})")
    return _with_legend(axes, 6)


def _columns(axes: Axes, row: float, *texts: str) -> None:
    for x, text in zip((12, 54, 128), texts, strict=True):  # points to the right of the picture
        where: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (1, row), xytext=(x, 0), annotation_clip=False, **where)


def race(summary: Summary) -> Figure | None:
    """How far each cell is behind the leader by number of seeds, until it left, and the bar below which one leaves."""
    race, cells = summary.race, _with_method(summary.cells)
    if race is None or not race.seeds:
        return None
    raced = cells[cells["cell"].isin(race.cells)]
    more = f", {MOST_LINES} of {len(raced)} cells named" if len(raced) > MOST_LINES else ""
    seeds, behind_by = "Seeds (a cross: the cell left)", f"Points of val {summary.title} behind the leader"
    axes = _axes(f"The race{more}", seeds, behind_by)
    r, first = np.arange(1, race.seeds + 1), race.rules.first_seeds
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
    pairs = np.isfinite(race.bounds) & (race.bounds > 0)
    if pairs.any():
        of_pairs = race.bounds[pairs, None] / (2 * r[first - 1 :]) - race.left[pairs, None] / 2
        bar = -100 * np.maximum(0.0, of_pairs)
        axes.fill_between(r[first - 1 :], bar.min(0), bar.max(0), color=GREY, alpha=0.3, lw=0, label="the pairs' bars")
    axes.locator_params(axis="x", integer=True)
    return _with_legend(axes, 2)


def by_setting(summary: Summary) -> dict[str, Figure]:
    """A picture for each setting: the metric by its levels, a line for each combination of the others.

    The line with intervals is that at which the levels are compared; a baseline's interval is a band.
    """
    cells = _with_method(summary.cells)
    baselines = cells[cells[METHOD].isin(BASELINES)].drop_duplicates(METHOD).sort_values(METHOD, ascending=False)
    figures = {}
    for factor in summary.effects.factors:
        axes = _by_levels(factor, cells.set_index("cell"), baselines, f"Val {summary.title}")
        for mean, low, high, method in baselines[["mean", "low", "high", METHOD]].itertuples(index=False):
            axes.axhline(100 * mean, color=colour_of(method), lw=1.2, label=BASELINES[method], zorder=0)
            axes.axhspan(100 * low, 100 * high, color=colour_of(method), alpha=0.09, lw=0, zorder=0)
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
    axes = _axes(f"By {name}: {_what_is_shown(chosen)}{more}", name, f"{metric} (%)")
    label = f"{chosen['at'].iloc[0]}: compared here" if lines else None
    styles = _styles(pd.concat([line.head(1) for line in (chosen, *others)]))
    _points(axes, chosen, chosen["place"].to_numpy(), label, styles[0]["color"])
    for other, style in zip(others, styles[1:], strict=True):
        axes.plot(other["place"], 100 * other["mean"], label=other["at"].iloc[0], marker="o", ms=3, lw=1.2, **style)
    every = math.ceil(len(levels) * (max(map(len, levels)) + 2) / TICKS)
    axes.set_xticks(range(0, len(levels), every), map(_shorten, levels[::every]))
    drawn = pd.concat([chosen, *(other.assign(low=math.nan, high=math.nan) for other in others), baselines[["mean"]]])
    at, top = 100 * drawn["mean"].to_numpy(float), 100 * drawn["mean"].max()
    spans = 100 * drawn[["mean", "low", "high"]].to_numpy(float)
    low, _ = axes.set_ylim(_window(at, spans, top - 100 * baselines["mean"].min() if len(baselines) else 0.0))
    if at.min() < low:
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
    shown, more = _best_and_baselines(_with_method(summary.cells), MOST_CURVES, MOST_LINES - MOST_CURVES)
    done = summary.trials[summary.trials["status"] == "completed"]
    seeds = "mean and range over seeds" if (shown["n"] > 1).any() else "one seed"
    axes = _axes(f"Learning curves: {seeds}{more}", "Epoch", f"Val {summary.title} (%)")
    later = []
    for (_, cell), style in zip(shown.iterrows(), _styles(shown), strict=True):
        table = 100 * curves(done.loc[done["cell"] == cell["cell"], "folder"].tolist(), f"val_{summary.metric}")
        if len(table):
            mean, low, high = table.mean(axis=1), table.min(axis=1), table.max(axis=1)
            label = _shorten(str(cell["label"]))
            axes.plot(mean.index, mean, label=label, lw=1.5, gid=f"cell-{cell['cell']}-line", **style)
            axes.fill_between(table.index, low, high, color=style["color"], alpha=0.12, lw=0)
            later.append(low[low.index > low.index[0] + (low.index[-1] - low.index[0]) / 3])
    if not later:
        return None
    if len(later) > 1 and len(lowest := pd.concat(later)):  # after the first third curves lie close together
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, lowest.min() - 0.25 * (top - lowest.min())), top)
    axes.locator_params(axis="x", integer=True)
    return _with_legend(axes, 2)


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
        _points(axes, group, places, METHODS.get(str(method), str(method)), colour_of(str(method)))
    axes.set_xticks(range(len(ticks)), map(value_text, ticks))
    axes.set_ylim(_window(100 * frame["mean"].to_numpy(float), 100 * frame[["mean", "low", "high"]].to_numpy(float)))
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
    figure = Figure(figsize=(WIDTH, 1.2 + 1.7 * math.ceil(len(shares) / 3)), layout="constrained")
    figure.suptitle(_shorten(f"The first ranks of the squared update (%): {trained['label'].iloc[0]}"))
    grid = figure.subplots(math.ceil(len(shares) / 3), 3, squeeze=False, sharex=True, sharey=True)
    for axes, (layer, blocks) in zip(grid.flat, shares.items(), strict=False):
        enough = [int(np.searchsorted(share, 99.0)) + 1 for share in blocks.values()]
        axes.set_title(f"{layer}: 99 % in {min(enough)} to {max(enough)}")
        axes.axhline(99.0, color=GREY, ls="--", lw=1)
        for block, share in blocks.items():
            colour = matplotlib.colormaps["viridis"](0.9 * block / max(*blocks, 1))
            label = f"block {block}" if axes is grid[0, 0] else None
            axes.plot(range(1, len(share) + 1), share, ".-", color=colour, lw=1.2, label=label)
    return _with_legend(grid[0, 0], 6)


def _axes(title: str, x: str, y: str, width: float = WIDTH, height: float = 3.9) -> Axes:
    """One picture in a figure of its own (inches)."""
    axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    axes.set(title="\n".join(textwrap.wrap(title, int(10 * width))), xlabel=x, ylabel=y)
    return axes


def _with_method(cells: pd.DataFrame) -> pd.DataFrame:
    return cells if METHOD in cells else cells.assign(**{METHOD: "lora"})  # one was tried


def _styles(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """A line for each cell in its method's colour, the second and later ones of a method paler and dashed."""
    dashes, nth = ("-", "--", "-.", ":"), cells.groupby(METHOD).cumcount()
    paler = [(np.array(to_rgb(colour_of(m))), min(0.12 * k, 0.6)) for m, k in zip(cells[METHOD], nth, strict=True)]
    return [{"color": own + (1 - own) * share, "ls": dashes[k % 4]} for (own, share), k in zip(paler, nth, strict=True)]


def _points(axes: Axes, frame: pd.DataFrame, places: np.ndarray, label: str | None, colour: Any) -> None:
    """Means joined by a line, with their intervals, none where a cell has none."""
    mean = 100 * frame["mean"].to_numpy(float)
    bars = np.nan_to_num(np.abs(100 * frame[["low", "high"]].to_numpy(float).T - mean))
    axes.errorbar(places, mean, bars, label=label, color=colour, marker="o", capsize=2.5, lw=1.8, elinewidth=1.3, ms=5)


def _window(at: np.ndarray, spans: np.ndarray, below: float = 0.0) -> tuple[float, float]:
    """Limits of an axis (points) with all that is drawn and what is ``below`` the top; ends that squeeze it are cut.

    ``at`` [n] values, ``spans`` [n, k] their ends (NaN: none).
    """
    top, reach = float(at.max()), np.nanmax(np.abs(spans - at[:, None]), axis=1, initial=0.0)
    room = max(4 * float(np.median(top - at)), 2 * float(np.median(reach)), 1.5 * below, 0.5)
    low, high = float(np.nanmin([at.min(), np.nanmin(spans), top - below])), float(np.nanmax(spans))
    low, high = (low if low > top - 2 * room else top - room), (high if high < top + 2 * room else top + room)
    edge = 0.04 * (high - low)
    return low - edge, high + edge


def _with_legend(axes: Axes, columns: int) -> Figure:
    """The figure, with a legend below the picture if anything has a name; fewer columns if names are long."""
    figure: Any = axes.figure
    room = int(12 * figure.get_figwidth())  # characters
    if names := axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=min(columns, room // max(map(len, names))) or 1)
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
    return "mean and 95 % interval" if (frame["n"] > 1).any() else "one seed, no intervals"
