"""Cells that collapse in some of their seeds: their values lie in two groups, as those of normal seeds hardly ever do.

Seeds' effects, medians over cells, are taken out. A cell has collapsed if the largest jump between its values in order
is too large for the rest of its range, and for that of all cells but the tenth that spread most. What is too large is
simulated: one in a hundred sweeps of normal seeds that spread alike names a cell (docs/statistics.md).

Arrays: m cells, S seeds, NaN where there is no trial.
"""

import functools

import numpy as np
import pandas as pd

from lora_vit.analysis.texts import number

LEVEL, LEAST = 0.01, 3  # of two seeds neither lies off the others


def _jumps(y: np.ndarray, resolution: float = 1e-9) -> tuple[np.ndarray, np.ndarray]:
    """The largest jump of each cell over the range that is left [..., m], and the values below it [..., m, S]."""
    there = np.isfinite(y)
    few, shared = there.sum(-1) < LEAST, there.sum(-2, keepdims=True) > 3  # a median of three would be one of them
    y = y - np.nanmedian(y, -1, keepdims=True)
    y = y - np.where(shared, np.nanmedian(y, -2, keepdims=True), 0.0)
    ordered = np.sort(y)
    jumps = np.nan_to_num(np.diff(ordered))
    largest, at = jumps.max(-1), jumps.argmax(-1)[..., None]
    rest = np.where(few, np.nan, jumps.sum(-1) - largest)
    usual = np.fmax(np.nanquantile(rest, 0.9, axis=-1, keepdims=True), resolution)
    return np.where(few, 0.0, largest / np.fmax(rest, usual)), y <= np.take_along_axis(ordered, at, -1)


@functools.cache
def _limit(pattern: bytes, m: int) -> float:
    """The ratio that normal errors exceed in ``LEVEL`` of sweeps, for one pattern of present trials."""
    there, rng = np.frombuffer(pattern, dtype=bool).reshape(m, -1), np.random.default_rng(12345)
    sweeps = range(0, int(np.clip(4e6 // there.size, 200, 2000)), 100)
    errors = (np.where(there, rng.standard_normal((100, *there.shape)), np.nan) for _ in sweeps)
    return float(np.quantile([_jumps(y)[0].max(-1) for y in errors], 1 - LEVEL))


def collapsed(y: np.ndarray, resolution: float = 0.0) -> np.ndarray:
    """Which trials of ``y`` [m, S] have collapsed; ``resolution`` as in ``stats.compare``."""
    there = np.isfinite(y)
    places, part = np.ix_(there.any(1), there.any(0)), y[there.any(1)][:, there.any(0)]
    out = np.zeros(y.shape, dtype=bool)
    if there.sum(1).max(initial=0) >= LEAST:
        ratios, below = _jumps(part, max(resolution, 1e-9))  # not the rounding of floats
        out[places] = below & (ratios > _limit(np.isfinite(part).tobytes(), len(part)))[:, None]
    return out


def named(values: pd.DataFrame, resolution: float) -> dict[str, str]:
    """The cells of a table (rows; seeds are columns) that have collapsed, each with a text of how often and where."""
    y, by, found = values.to_numpy(float), values.columns.name, dict[str, str]()
    for i, fell in enumerate(collapsed(y, resolution)):
        if fell.any():
            places = ", ".join(f"{by} {values.columns[s]}: {number(y[i, s])}" for s in np.flatnonzero(fell)[:3])
            others = y[i][np.isfinite(y[i]) & ~fell]
            often = f"{fell.sum()} of {fell.sum() + len(others)} {by}s"
            found[str(values.index[i])] = f"in {often} ({places}; others from {number(others.min())})"
    return found
