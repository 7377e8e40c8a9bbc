"""Effects of the settings, each where the other settings are best.

What a setting does can depend on the others: dropout may help at a bad learning rate and do nothing at a good one. So
the levels of a setting are compared at one combination of the other settings: the one with the highest mean over the
levels, among those that were run with most of them. Where several are about as good, the mean that weights each level
by its inverse variance decides. It is uncorrelated with the differences between levels, as in generalized least
squares, and so favours none.

Each cell has an error variance of its own. Intervals of differences are t intervals at 95 %, each for itself, with
Satterthwaite's degrees of freedom (1946), and wider by the pictures' part as all others (:mod:`.stats`). Whether the
other combinations show the same is tested by Greenhouse and Geisser (1959, after Box, 1954), under any variances, for
the pictures at hand.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import special

from lora_vit.analysis.pictures import MOST_SEEDS, Pictures, Sums
from lora_vit.analysis.stats import Blocked, fit_blocks
from lora_vit.analysis.tables import matrix
from lora_vit.config.names import value_text

COLUMNS = ["setting", "level", "against", "at", "effect", "low", "high"]


@dataclass
class Factor:
    """A setting, or several that moved together, in every combination of the others.

    ``places`` [M combinations, L levels], both in words, has the positions of the cells, -1 where there is none;
    ``chosen`` is the combination at which the levels are compared, ``ids`` the cells by position.
    """

    name: str
    places: pd.DataFrame
    chosen: int
    ids: pd.Index

    @property
    def here(self) -> pd.Series:
        """The cells that are compared, by level."""
        line = self.places.iloc[self.chosen]
        return line[line >= 0]


@dataclass
class Effects:
    """``table`` has COLUMNS, effects in units of the metric; ``factors`` are for the pictures."""

    table: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS))
    notes: list[str] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)


def main_effects(
    frame: pd.DataFrame, settings: list[str], metric: str, resolution: float = 0.0, sums: Sums | None = None
) -> Effects:
    """Effects among trials (columns ``cell``, ``seed``, ``metric``, ``settings``) of cells with two or more seeds.

    ``resolution``: as in ``stats.compare``; ``sums``: over predictions of these cells, for intervals that hold on other
    pictures too. ``notes`` name what has no effect. Without repeats ``factors`` are all.
    """
    y = matrix(frame, metric)
    repeated = y.notna().sum(axis=1) >= 2
    y = (y[repeated] if repeated.sum() > 1 else y).dropna(axis=1, how="all")
    if y.shape[1] > MOST_SEEDS:
        return Effects(notes=[f"more than {MOST_SEEDS} seeds: no effects of settings"])
    fit = fit_blocks(y.to_numpy(float), overlap=0.0 if sums is None else sums.overlap)
    own, wide = _variances(fit, resolution) if fit.df > 0 else (np.ones(len(y)), np.ones(len(y)))
    pictures = None if sums is None else sums.of(list(y.index))
    rows = frame.drop_duplicates("cell").set_index("cell").loc[y.index, settings].astype(object)
    rows = rows.where(rows.notna(), None).loc[:, rows.nunique(dropna=False) > 1]
    found, table, depends, together = Effects(), list[tuple[object, ...]](), list[str](), dict[bytes, list[str]]()
    for name in rows:  # equal codes: the levels of one determine those of the other
        together.setdefault(pd.factorize(rows[name])[0].tobytes(), []).append(str(name))
    for names in together.values():
        factor = _factor(rows, names, fit.means, own)
        if len(factor.here) < 2:
            found.notes += [f"no trials differ in {factor.name} alone: no effect of it is shown"] * (fit.df > 0)
            continue
        found.factors.append(factor)
        if fit.df < 1:
            continue
        if len(names) > 1:
            found.notes.append(f"{factor.name} always move together: the effect that is shown is of them together")
        if left_out := ", ".join(factor.places.columns.difference(factor.here.index, sort=False)):
            found.notes.append(f"{factor.name}: {left_out} not compared, since not run at the same others")
        table += _differences(factor, fit, wide, pictures)
        if (p := interaction_p(fit.y, factor.places[factor.here.index].to_numpy())) < 0.05:
            depends.append(f"{factor.name} (p = {p:.2g})")
        if "rank" in names and "lr" in rows and "lr" not in names:
            here = _factor(rows, [*names, "lr"], fit.means, own).here
            found.notes += rate_by_rank(rows.iloc[here], fit.y[here])
    if depends:
        found.notes.append(f"elsewhere these have other effects, as their pictures show: {', '.join(depends)}")
    found.table = pd.DataFrame(table, columns=COLUMNS)
    return found


def _variances(fit: Blocked, resolution: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each cell's mean [m]: its variance without bias, and for tests by the residuals alone where that is larger.

    A residual holds a share of the other cells' errors, through the seeds' effects: in a complete design of m cells
    ``E[ss / dof] = ((1 - 2/m) v + mean(v) / m) / (1 - 1/m)``. None is less than rounding, of the metric or of floats.
    """
    m = len(fit.ss)
    residual = np.where(fit.dof > 0.1, fit.ss / np.maximum(fit.dof, 0.1), fit.mse)  # else it has none of its own
    own = ((1 - 1 / m) * residual - fit.mse / m) / (1 - 2 / m) if fit.blocked and m > 2 else residual
    least = max(resolution**2 / 12, (1e-12 * np.nanmax(np.abs(fit.y))) ** 2)
    return np.maximum(own, max(least, fit.mse / 100)) / fit.counts, np.maximum(own, residual).clip(least) / fit.counts


def _factor(rows: pd.DataFrame, names: list[str], means: np.ndarray, own: np.ndarray) -> Factor:
    """Levels in order, words and missing values last; ``own``: variances of the cells' means.

    A level's is their median over the combinations, so that one cell that spreads decides nothing.
    """
    values = list(rows[names].itertuples(index=False, name=None))
    in_order = sorted(set(values), key=lambda v: [(x is None, isinstance(x, str), x) for x in v])
    words = {v: ", ".join(map(value_text, v)) for v in in_order}
    rest = [[f"{c} {value_text(v)}" for v in rows[c]] for c in rows if c not in names]
    others = list(map(", ".join, zip(*rest, strict=True))) if rest else [""] * len(rows)
    first = pd.Series(np.arange(len(rows)), [others, [words[v] for v in values]]).groupby(level=[0, 1]).first()
    places = first.unstack(fill_value=-1)[[*dict.fromkeys(words.values())]]
    cells, there = places.to_numpy(), places.to_numpy() >= 0
    average, levels = np.where(there, means[cells], 0.0).sum(1) / there.sum(1), there.sum(1)
    best = np.where(levels == levels.max(), average, -np.inf).argmax()
    alike = np.flatnonzero((there == there[best]).all(1))
    y, v = (x[cells[alike][:, there[best]]] for x in (means, own))
    errors = v.mean(1) / levels.max()
    near = average[alike] >= average[best] - 2 * np.sqrt(errors + errors[alike == best])
    mean = np.average(y, axis=1, weights=1 / np.median(v[near], axis=0))
    return Factor(" and ".join(names), places, int(alike[np.where(near, mean, -np.inf).argmax()]), rows.index)


def _differences(factor: Factor, fit: Blocked, wide: np.ndarray, pictures: Pictures | None) -> list[tuple[object, ...]]:
    """Rows of the table: each level that was run at the chosen combination against the first one there."""
    first, *levels = factor.here.index
    a, b = factor.here[first], factor.here[levels].to_numpy()
    effect = fit.means[b] - fit.means[a]
    adjusting = fit.difference_variance(np.array([a]))[0, b] - 1 / fit.counts[a] - 1 / fit.counts[b]  # missing seeds
    variance = wide[a] + wide[b]
    df = variance**2 / (wide[a] ** 2 / fit.dof[a] + wide[b] ** 2 / fit.dof[b])
    half = special.stdtrit(df, 0.975) * np.sqrt(variance + fit.mse * np.maximum(adjusting, 0.0))
    part = 0.0 if pictures is None else pictures.of_differences(np.array([a]), b)[0]
    half = np.hypot(half, special.ndtri(0.975) * np.sqrt(part))
    at = str(factor.places.index[factor.chosen])
    return [(factor.name, level, first, at, d, d - h, d + h) for level, d, h in zip(levels, effect, half, strict=True)]


def interaction_p(y: np.ndarray, cells: np.ndarray) -> float:
    """p-value of "all combinations differ alike between the levels"; 1 where fewer than three seeds could tell.

    Of ``y`` [m, S] the seeds count that all cells [M, L] of complete combinations have. Each seed's own interaction is
    a draw with some covariance C: ``F = S |mean|^2 / tr(C)`` with ``f, f (S - 1)`` degrees of freedom, ``f = tr(C)^2 /
    tr(C C)``.
    """
    z = y[cells[(cells >= 0).all(1)]]
    z = z[..., np.isfinite(z).all((0, 1))]
    others, levels, seeds = z.shape
    if others < 2 or levels < 2 or seeds < 3:
        return 1.0
    z = z - z.mean(0) - z.mean(1, keepdims=True) + z.mean((0, 1))
    mean = z.mean(2)
    spread = (z - mean[..., None]).reshape(-1, seeds)
    gram = spread.T @ spread / (seeds - 1)  # has the trace of C, and its square that of C C
    trace = max(float(np.trace(gram)), 1e-24 * float(np.nanmax(y**2)))
    f = trace**2 / max(float((gram**2).sum()), trace**2 / ((others - 1) * (levels - 1)))
    return float(special.fdtrc(f, f * (seeds - 1), seeds * (mean**2).sum() / trace))


def rate_by_rank(rows: pd.DataFrame, y: np.ndarray) -> list[str]:
    """Whether one learning rate serves all ranks, or how the best one moves: a sentence, if there are rates to tell by.

    Of cells ``y`` [m, S]. The best rate is taken to go as ``rank^b``; the interval of b is a jackknife over the seeds
    (Tukey, 1958). One rate serves if with 95 % the best changes by less than a step of the rates from end to end.
    """
    grid = rows.assign(place=np.arange(len(y))).pivot_table(index="rank", columns="lr", values="place").dropna()
    values = y[grid.to_numpy(int)]
    values = values[..., np.isfinite(values).all((0, 1))]
    if len(grid) < 2 or grid.shape[1] < 3 or (seeds := values.shape[2]) < 3:
        return []
    ranks, rates = grid.index.to_numpy(float), grid.columns.to_numpy(float)
    b, *others = [exponent(ranks, rates, np.delete(values, s, 2).mean(2)) for s in ([], *range(seeds))]
    half = float(special.stdtrit(seeds - 1, 0.975)) * (seeds - 1) / math.sqrt(seeds) * np.std(others)
    across, span = math.log(ranks[-1] / ranks[0]), f"ranks {ranks[0]:g} to {ranks[-1]:g}"
    found = f"whether one learning rate serves {span} is open"
    if math.isnan(b + half):
        return [f"{found}: too few are best between the lowest and the highest"]
    if (abs(b) + half) * across < np.diff(np.log(rates)).min():
        found = f"one learning rate serves {span}"
    elif abs(b) > half:
        found = f"the best learning rate moves with the rank, by a factor of {math.exp(b * across):.2g} over {span}"
    return [f"{found}: it goes as rank^{b:.2f} (95 %: {b - half:.2f} to {b + half:.2f})"]


def exponent(ranks: np.ndarray, rates: np.ndarray, mean: np.ndarray) -> float:
    """Log best rate against log rank by least squares, from the means [ranks, rates].

    A rank's best rate is the peak of the parabola through its highest mean and those beside it. A rank that is best at
    the lowest or highest rate has no such peak; NaN if that leaves fewer than three (or than all, of two).
    """
    best, x = mean.argmax(1), np.log(rates)
    rank = np.flatnonzero((best > 0) & (best < len(rates) - 1))
    if len(rank) < min(3, len(ranks)):
        return math.nan
    curves = [np.polyfit(x[best[r] - 1 : best[r] + 2], mean[r, best[r] - 1 : best[r] + 2], 2) for r in rank]
    return float(np.polyfit(np.log(ranks[rank]), [-c[1] / c[0] / 2 for c in curves], 1)[0])
