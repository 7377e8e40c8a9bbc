"""Main effects of the settings: a linear model of the trials with the seed as a block.

``metric = mean + seed + sum over settings of the effect of its level + error``. A setting of few levels has one
effect per level, as the difference from its first level; a numeric one of more than ``MOST_LEVELS`` has a slope
(rank, alpha, scaling and lr per doubling, others per unit). Intervals are t intervals at 95 %, each for itself.

Error: the residual mean square between repeats, with cells and seeds taken out. The intervals are thus about the
levels that were tried: where settings interact, a main effect is its average over the levels of the others, and the
test of lack of fit says so in ``notes``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import special

from lora_vit.analysis.stats import MOST_SEEDS

MOST_LEVELS = 8
DOUBLING = ("rank", "alpha", "effective_scaling", "lr")
COLUMNS = ["setting", "level", "against", "effect", "low", "high", "p", "trials"]


@dataclass
class Effects:
    """``table`` has COLUMNS (effect in units of the metric; p: F test of the whole setting)."""

    table: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS))
    notes: list[str] = field(default_factory=list)
    lack_of_fit_p: float = math.nan


def main_effects(frame: pd.DataFrame, settings: list[str], metric: str) -> Effects:
    """Fit the model to the trials of ``frame`` (columns ``cell``, ``seed``, ``metric`` and the ``settings``).

    Needs at least two cells with two seeds and a setting that varies; otherwise the table is empty. Settings that
    go along with the ones before them cannot be separated; they are left out and named in ``notes``.
    """
    frame = frame[np.isfinite(frame[metric].to_numpy(float))].reset_index(drop=True)
    counts = frame.groupby("cell")["seed"].nunique()
    if (counts >= 2).sum() < 2:
        return Effects()
    if frame["seed"].nunique() > MOST_SEEDS:
        return Effects(notes=[f"more than {MOST_SEEDS} seeds: no main effects"])
    y = frame[metric].to_numpy(float)
    design, terms, notes = _design(frame, settings, _indicators(frame["seed"]))
    error, df, lack_p = _error(y, design, *_pure_error(frame, y))
    if not terms or df < 1:
        return Effects(notes=notes)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ y
    t = float(special.stdtrit(df, 0.975))
    rows = []
    for name, columns, levels, against, shown in terms:
        b, v = coefficients[columns], inverse[np.ix_(columns, columns)]
        f = float(b @ np.linalg.solve(v, b)) / len(columns) / error if error > 0 else math.inf
        p = float(special.fdtrc(len(columns), df, f))
        for level, effect, own, trials in zip(levels, b, np.diag(v), shown, strict=True):
            half = t * math.sqrt(error * own)
            rows.append([name, level, against, effect, effect - half, effect + half, p, trials])
    if lack_p < 0.05:
        notes.append(
            f"the settings do not simply add up (lack of fit, p = {lack_p:.2g}): a main effect is an average over the "
            "levels of the others, not what each of them shows"
        )
    return Effects(pd.DataFrame(rows, columns=COLUMNS), notes, lack_p)


def _indicators(column: pd.Series) -> np.ndarray:
    """Intercept and one column per level but the first."""
    codes, levels = pd.factorize(column)
    return np.column_stack([np.ones(len(codes)), *(codes == k for k in range(1, len(levels)))]).astype(float)


def _design(frame: pd.DataFrame, settings: list[str], base: np.ndarray) -> tuple[np.ndarray, list, list[str]]:
    """Columns of the block and of every setting that can be separated from those before it."""
    design, terms, notes = base, [], []
    taken: list[str] = []
    for name in settings:
        values = frame[name]
        levels = sorted(values.dropna().unique(), key=lambda v: (isinstance(v, str), v))
        if len(levels) < 2 or values.isna().any():
            continue
        if len(levels) > MOST_LEVELS and pd.api.types.is_numeric_dtype(values):
            x = values.to_numpy(float)
            double = name.split(".")[-1] in DOUBLING and bool((x > 0).all())
            new = (np.log2(x) if double else x)[:, None]
            labels: list[object] = ["per doubling" if double else "per unit"]
            against, trials = "", [len(frame)]
        elif len(levels) > MOST_LEVELS:
            notes.append(f"{name} has {len(levels)} levels: too many for an effect each")
            continue
        else:
            against, *labels = levels
            new = np.column_stack([values == level for level in labels]).astype(float)
            trials = new.sum(0).astype(int).tolist()
        wider = np.column_stack([design, new])
        if np.linalg.matrix_rank(wider / np.linalg.norm(wider, axis=0)) < wider.shape[1]:
            notes.append(f"{name} cannot be separated from {' and '.join(taken) or 'the seeds'}: no effect is shown")
            continue
        terms.append((name, np.arange(design.shape[1], wider.shape[1]), labels, against, trials))
        design = wider
        taken.append(name)
    return design, terms, notes


def _squares(residual: np.ndarray, y: np.ndarray) -> float:
    """Sum of squares of the residuals of ``y``; 0 where they are rounding alone."""
    rounding = 1e-12 * np.abs(y).max()
    return float((residual**2).sum()) if np.abs(residual).max() > rounding else 0.0


def _pure_error(frame: pd.DataFrame, y: np.ndarray) -> tuple[float, int]:
    """Residual sum of squares and degrees of freedom of the model with every cell and seed (no settings)."""
    cells, _ = pd.factorize(frame["cell"])
    counts = np.bincount(cells)

    def centred(column: np.ndarray) -> np.ndarray:
        return column - (np.bincount(cells, column) / counts)[cells]

    seeds = np.column_stack([centred(column) for column in _indicators(frame["seed"]).T])
    left = centred(y)
    fit, _, rank, _ = np.linalg.lstsq(seeds, left, rcond=1e-10)
    return _squares(left - seeds @ fit, y), len(y) - len(counts) - int(rank)


def _error(y: np.ndarray, design: np.ndarray, pure_ss: float, pure_df: int) -> tuple[float, int, float]:
    """Error mean square, its degrees of freedom, and the p-value of lack of fit (NaN: cannot be tested).

    Without repeats that could tell (``pure_df`` below 1) the error is that around the model.
    """
    fit, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    all_ss, all_df = _squares(y - design @ fit, y), len(y) - int(rank)
    if pure_df < 1:
        return (all_ss / all_df if all_df > 0 else math.nan), all_df, math.nan
    pure, lack_df = pure_ss / pure_df, all_df - pure_df
    if lack_df < 1:
        return pure, pure_df, math.nan
    lack = max(all_ss - pure_ss, 0.0) / lack_df
    p = float(special.fdtrc(lack_df, pure_df, lack / pure)) if pure > 0 else (0.0 if lack > 0 else 1.0)
    return pure, pure_df, p
