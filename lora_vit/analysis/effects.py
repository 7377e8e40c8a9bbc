"""Effects of the settings, each where the other settings are best.

Dropout may help at a learning rate that nobody would use and do nothing at a good one. So the levels of a setting are
compared at one combination of the others: of those that were run with most of its levels, the one with the highest mean
over them. This mean weights each level by its inverse variance, as generalized least squares do, and is then
uncorrelated with the differences between the levels: choosing by it favours none of them. Settings that always move
together have one effect, which is that of all of them.

Each cell has an error variance of its own, because a setting may change the spread as well. Intervals of differences are
t intervals at 95 %, each for itself, with Satterthwaite's degrees of freedom (1946). Whether the other combinations show
the same is tested by Greenhouse and Geisser (1959, after Box, 1954), which holds under any variances.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import special

from lora_vit.analysis.stats import MOST_SEEDS, Blocked, fit_blocks
from lora_vit.analysis.tables import matrix
from lora_vit.analysis.texts import plain
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


def main_effects(frame: pd.DataFrame, settings: list[str], metric: str, resolution: float = 0.0) -> Effects:
    """Effects among trials (columns ``cell``, ``seed``, ``metric``, ``settings``) of cells with two or more seeds.

    ``resolution``: as in :func:`~lora_vit.analysis.stats.compare`. What has no effect of its own is named in ``notes``.
    Without repeats there are ``factors`` alone.
    """
    y = matrix(frame, metric)
    repeated = y.notna().sum(axis=1) >= 2
    y = (y[repeated] if repeated.sum() > 1 else y).dropna(axis=1, how="all")
    if y.shape[1] > MOST_SEEDS:
        return Effects(notes=[f"more than {MOST_SEEDS} seeds: no effects of settings"])
    fit = fit_blocks(y.to_numpy(float))
    own, wide = _variances(fit, resolution)
    rows = frame.drop_duplicates("cell").set_index("cell").loc[y.index, settings]
    found, table, depends = Effects(), list[tuple[object, ...]](), list[str]()
    for names in _moved_together(rows):
        factor = _factor(rows, names, fit.means, own)
        if len(factor.here) > 1:
            found.factors.append(factor)
        if fit.df < 1:
            continue
        if len(factor.here) < 2:
            found.notes.append(f"no trials differ in {factor.name} alone: no effect of it is shown")
            continue
        if len(names) > 1:
            found.notes.append(f"{factor.name} always move together: the effect that is shown is of them together")
        if left_out := ", ".join(factor.places.columns.difference(factor.here.index, sort=False)):
            found.notes.append(f"{factor.name}: {left_out} not compared, since not run at the same others")
        table += _differences(factor, fit, wide)
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
    """Of each cell [m]: its error variance without bias, and the larger of it and its residual mean square, for tests.

    A residual holds a share of the other cells' errors, through the seeds' effects: in a complete design of m cells
    ``E[ss / dof] = ((1 - 2/m) v + mean(v) / m) / (1 - 1/m)``. None is less than rounding, of the metric or of floats.
    All are 1 without repeats.
    """
    m = len(fit.ss)
    if fit.df < 1:
        return np.ones(m), np.ones(m)
    residual = np.where(fit.dof > 0.1, fit.ss / np.maximum(fit.dof, 0.1), fit.mse)  # else it has none of its own
    own = ((1 - 1 / m) * residual - fit.mse / m) / (1 - 2 / m) if fit.blocked and m > 2 else residual
    least = max(resolution**2 / 12, (1e-12 * np.nanmax(np.abs(fit.y))) ** 2)
    return np.maximum(own, max(least, fit.mse / 100)), np.maximum(np.maximum(own, residual), least)


def _moved_together(rows: pd.DataFrame) -> list[list[str]]:
    """The settings that vary, those whose levels determine each other in one list."""
    together: dict[bytes, list[str]] = {}
    for name in rows:
        codes, levels = pd.factorize(rows[name], use_na_sentinel=False)
        if len(levels) > 1:
            together.setdefault(codes.tobytes(), []).append(str(name))
    return list(together.values())


def _factor(rows: pd.DataFrame, names: list[str], means: np.ndarray, own: np.ndarray) -> Factor:
    """Where the cells are: levels in order, missing values and words last; ``own``: the cells' variances.

    Those of a level are summed up by their median over the combinations, so that one cell that spreads decides nothing.
    """
    values = list(rows[names].itertuples(index=False, name=None))
    levels = [", ".join(map(value_text, v)) for v in values]
    rest = [[f"{c} {value_text(v)}" for v in rows[c]] for c in rows if c not in names]
    others = list(map(", ".join, zip(*rest, strict=True))) if rest else [""] * len(rows)
    places = pd.Series(np.arange(len(rows)), [others, levels]).groupby(level=[0, 1]).first().unstack()
    in_order = sorted(
        zip(values, levels, strict=True), key=lambda v: [(x is None or x != x, isinstance(x, str), x) for x in v[0]]
    )
    places = places[[*dict.fromkeys(level for _, level in in_order)]].fillna(-1).astype(int)
    cells = places.to_numpy()
    there = cells >= 0
    weight = 1 / np.nanmedian(np.where(there, own[cells], np.nan), axis=0)
    mean = (weight * means[cells] * there).sum(1) / (weight * there).sum(1)
    chosen = int(np.where(there.sum(1) == there.sum(1).max(), mean, -np.inf).argmax())
    return Factor(" and ".join(names), places, chosen, rows.index)


def _differences(factor: Factor, fit: Blocked, wide: np.ndarray) -> list[tuple[object, ...]]:
    """Rows of the table: each level that was run at the chosen combination against the first one there."""
    first, *levels = factor.here.index
    a, b = factor.here[first], factor.here[levels].to_numpy()
    effect, own = fit.means[b] - fit.means[a], wide / fit.counts
    adjusting = fit.difference_variance(np.array([a]))[0, b] - 1 / fit.counts[a] - 1 / fit.counts[b]  # missing seeds
    variance = own[a] + own[b]
    df = variance**2 / (own[a] ** 2 / fit.dof[a] + own[b] ** 2 / fit.dof[b])
    half = special.stdtrit(df, 0.975) * np.sqrt(variance + fit.mse * np.maximum(adjusting, 0.0))
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

    The best rate is taken to go as ``rank^b``, in the cells ``y`` [m, S]; the interval of b is a jackknife over the seeds
    (Tukey, 1958). One rate serves if with 95 % the best changes by less than a step of the rates from end to end.
    """
    grid = rows.assign(place=np.arange(len(y))).pivot_table(index="rank", columns="lr", values="place").dropna()
    values = y[grid.to_numpy(int)]
    values = values[..., np.isfinite(values).all((0, 1))]
    if len(grid) < 2 or grid.shape[1] < 3 or (seeds := values.shape[2]) < 3:
        return []
    mean, ranks, rates = values.mean(2), grid.index.to_numpy(float), grid.columns.to_numpy(float)
    b, without = exponent(ranks, rates, mean), [np.delete(values, seed, 2).mean(2) for seed in range(seeds)]
    spread = np.std([exponent(ranks, rates, other) for other in without])
    half = float(special.stdtrit(seeds - 1, 0.975)) * (seeds - 1) / math.sqrt(seeds) * spread
    across, step = math.log(ranks[-1] / ranks[0]), np.diff(np.log(rates)).min()
    found, span = "whether one learning rate serves {} is open", f"ranks {ranks[0]:g} to {ranks[-1]:g}"
    if (abs(b) + half) * across < step:
        found = "one learning rate serves {}"
    elif abs(b) > half:
        found = f"the best learning rate moves with the rank, {math.exp(b * across):.2g} times from end to end of {{}}"
    moves = f"rank^{b:+.2f}, 95 % {b - half:+.2f} to {b + half:+.2f}"
    if math.isnan(half):
        moves = "too few ranks do best between the lowest and the highest rate"
    shared = int(mean.mean(0).argmax())
    at, loss = value_text(rates[shared]), plain((mean.max(1) - mean[:, shared]).max())
    return [f"{found.format(span)} ({moves}); at lr {at} their means are at most {loss} points below their best"]


def exponent(ranks: np.ndarray, rates: np.ndarray, mean: np.ndarray) -> float:
    """Log best rate against log rank by least squares, from the means [ranks, rates].

    The best rate of a rank is the peak of the parabola through its highest mean and those beside it. A rank that is best
    at the lowest or highest rate has no such peak; NaN if that leaves fewer than three (or than all, of two).
    """
    best, x = mean.argmax(1), np.log(rates)
    rank = np.flatnonzero((best > 0) & (best < len(rates) - 1))
    if len(rank) < min(3, len(ranks)):
        return math.nan
    k, at = best[rank], x[best[rank]]
    left, right = at - x[k - 1], x[k + 1] - at
    from_left, from_right = mean[rank, k] - mean[rank, k - 1], mean[rank, k] - mean[rank, k + 1]
    peak = at - (left**2 * from_right - right**2 * from_left) / (left * from_right + right * from_left) / 2
    away = np.log(ranks[rank]) - np.log(ranks[rank]).mean()
    return float(away @ peak / (away @ away))
