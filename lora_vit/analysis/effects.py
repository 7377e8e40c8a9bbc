"""Main effects of the settings: a linear model of the trials with the seed as a block.

``metric = mean + seed + sum over settings of the effect of its level + error``. A setting of few levels has one
effect per level, as the difference from its first level; a numeric one of more than ``MOST_LEVELS`` has a slope
(rank, alpha, scaling and lr per doubling, others per unit). Intervals are t intervals at 95 %, each for itself.

Error: the residual mean square between repeats, with cells and seeds taken out. The intervals are thus about the
levels that were tried: where settings interact, a main effect is its average over the levels of the others, and the
test of lack of fit says so in ``notes``.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import special

from lora_vit.analysis.stats import MOST_SEEDS

MOST_LEVELS = 8
DOUBLING = ("rank", "alpha", "effective_scaling", "lr")
COLUMNS = ["setting", "level", "against", "effect", "low", "high", "trials"]


@dataclass
class Effects:
    """``table`` has COLUMNS, effects in units of the metric."""

    table: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS))
    notes: list[str] = field(default_factory=list)
    lack_of_fit_p: float = math.nan


def main_effects(frame: pd.DataFrame, settings: list[str], metric: str) -> Effects:
    """Fit the model to trials (columns ``cell``, ``seed``, ``metric``, ``settings``); an empty table if that cannot be.

    Settings that go along with the ones before them cannot be separated; they are left out and named in ``notes``.
    """
    frame = frame.reset_index(drop=True)
    if (frame.groupby("cell")["seed"].nunique() >= 2).sum() < 2:
        return Effects()
    if frame["seed"].nunique() > MOST_SEEDS:
        return Effects(notes=[f"more than {MOST_SEEDS} seeds: no main effects"])
    y = frame[metric].to_numpy(float)
    design, terms, notes = _design(frame, settings)
    error, df, lack_p = _error(frame, y, design)
    if not terms or df < 1:
        return Effects(notes=notes)
    inverse = np.linalg.inv(design.T @ design)
    table = pd.DataFrame(terms, columns=["setting", "level", "against", "trials"])
    block = design.shape[1] - len(terms)
    effect = (inverse @ design.T @ y)[block:]
    half = float(special.stdtrit(df, 0.975)) * np.sqrt(error * np.diag(inverse)[block:])
    if lack_p < 0.05:
        notes.append(
            f"the settings do not simply add up (lack of fit, p = {lack_p:.2g}): a main effect is an average over the "
            "levels of the others, not what each of them shows"
        )
    return Effects(table.assign(effect=effect, low=effect - half, high=effect + half)[COLUMNS], notes, lack_p)


def _seeds(frame: pd.DataFrame) -> np.ndarray:
    """The block: an intercept and one column per seed but the first."""
    codes, levels = pd.factorize(frame["seed"])
    return np.column_stack([np.ones(len(codes)), *(codes == k for k in range(1, len(levels)))]).astype(float)


def _design(frame: pd.DataFrame, settings: list[str]) -> tuple[np.ndarray, list, list[str]]:
    """The block and a column for each level of every setting that can be separated from what is before it.

    Of each such column: setting, level, what it is against, trials.
    """
    design, terms, notes = _seeds(frame), list[list[object]](), list[str]()
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
            taken = dict.fromkeys(str(term[0]) for term in terms)
            notes.append(f"{name} cannot be separated from {' and '.join(taken) or 'the seeds'}: no effect is shown")
            continue
        terms += [[name, label, against, n] for label, n in zip(labels, trials, strict=True)]
        design = wider
    return design, terms, notes


def _fit(y: np.ndarray, design: np.ndarray, of: np.ndarray, rcond: float | None = None) -> tuple[float, int]:
    """Sum of squares around the fit to ``y``, 0 where it is rounding of the values ``of`` alone, and the fit's rank."""
    fit, _, rank, _ = np.linalg.lstsq(design, y, rcond=rcond)
    residual = y - design @ fit
    return float((residual**2).sum()) if np.abs(residual).max() > 1e-12 * np.abs(of).max() else 0.0, int(rank)


def _error(frame: pd.DataFrame, y: np.ndarray, design: np.ndarray) -> tuple[float, int, float]:
    """Error mean square, its degrees of freedom, and the p-value of lack of fit (NaN: cannot be tested).

    The error is that of the model with every cell and seed and no settings. Without repeats that could tell, it is that
    around the model.
    """
    cells, _ = pd.factorize(frame["cell"])
    counts = np.bincount(cells)
    centred = [column - (np.bincount(cells, column) / counts)[cells] for column in (y, *_seeds(frame).T)]
    pure_ss, rank = _fit(centred[0], np.column_stack(centred[1:]), y, rcond=1e-10)
    pure_df = len(y) - len(counts) - rank
    all_ss, rank = _fit(y, design, y)
    all_df = len(y) - rank
    if pure_df < 1:
        return (all_ss / all_df if all_df > 0 else math.nan), all_df, math.nan
    pure, lack_df = pure_ss / pure_df, all_df - pure_df
    if lack_df < 1:
        return pure, pure_df, math.nan
    lack = max(all_ss - pure_ss, 0.0) / lack_df
    p = float(special.fdtrc(lack_df, pure_df, lack / pure)) if pure > 0 else (0.0 if lack > 0 else 1.0)
    return pure, pure_df, p
