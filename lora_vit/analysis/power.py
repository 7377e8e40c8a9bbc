"""Power: the differences that a design can detect."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

import numpy as np
from scipy import optimize, special

from lora_vit.analysis.stats import MOST_SEEDS, chi_nodes, dunnett_critical, tukey_critical


def power(difference: float, sd: float, cells: int, seeds: float, df: float | None = None) -> float:
    """Probability that Tukey's test calls one given cell worse which truly lies ``difference`` below the best.

    ``P(T > q / sqrt(2))``, T noncentral t with ``df`` (default ``(cells - 1)(seeds - 1)``) degrees of freedom
    and noncentrality ``difference / (sd sqrt(2 / seeds))``, by quadrature over the estimated sd.
    """
    if cells < 2 or seeds < 2:
        return 0.0
    if sd == 0:
        return 1.0 if difference > 0 else 0.0
    df = (cells - 1) * (seeds - 1) if df is None else df
    critical = tukey_critical(cells, df) / math.sqrt(2)
    away = difference / (sd * math.sqrt(2 / seeds))
    s, weights = chi_nodes(df)
    return float(weights @ special.ndtr(away - critical * s))


def detectable(sd: float, cells: int, seeds: float, df: float | None = None, wanted: float = 0.8) -> float:
    """Smallest true difference that :func:`power` finds with probability ``wanted``; NaN below two seeds."""
    if cells < 2 or seeds < 2 or not sd > 0:
        return 0.0 if sd == 0 and cells > 1 and seeds > 1 else math.nan
    top = sd
    while power(top, sd, cells, seeds, df) < wanted:
        top *= 2
    return float(optimize.brentq(lambda x: power(x, sd, cells, seeds, df) - wanted, 0.0, top, rtol=1e-6))


def seeds_needed(difference: float, sd: float, cells: int, wanted: float = 0.8) -> int | None:
    """Fewest seeds with which :func:`power` reaches ``wanted``; None above ``MOST_SEEDS``."""
    return _fewest(lambda seeds: power(difference, sd, cells, seeds), sd, cells, wanted)


def seeds_within(margin: float, sd: float, cells: int, wanted: float = 0.8) -> int | None:
    """Fewest seeds with which Hsu's bound of a cell as good as the best lies below the margin; None above MOST_SEEDS.

    ``P(D + critical * error <= margin)``, D normal with the error ``sd sqrt(2 / seeds)``, the sd taken as it is.
    """

    def found(seeds: int) -> float:
        if seeds < 2:
            return 0.0
        critical = dunnett_critical(cells - 1, (cells - 1) * (seeds - 1))
        return float(special.ndtr(margin / (sd * math.sqrt(2 / seeds)) - critical)) if sd > 0 else 1.0

    return _fewest(found, sd, cells, wanted)


def _fewest(found: Callable[[int], float], sd: float, cells: int, wanted: float) -> int | None:
    if cells < 2 or not math.isfinite(sd):
        return None
    high = 2
    while high < MOST_SEEDS and found(high) < wanted:
        high *= 2
    counts = range(min(high, MOST_SEEDS) + 1)
    fewest = bisect.bisect_left(counts, wanted, high // 2, key=found)
    return fewest if fewest in counts else None


def expected_maximum(count: int) -> float:
    """Expectation of the largest of ``count`` independent standard normal values (0 for one)."""
    z = np.linspace(-9, 9, 2001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return float((count * z * density * special.ndtr(z) ** (count - 1)).sum() * (z[1] - z[0])) if count > 1 else 0.0


def proportion_error(p: float, n: int) -> float:
    """Half width of the 95 % interval of an accuracy ``p`` on ``n`` images: ``1.96 sqrt(p (1 - p) / n)``."""
    return 1.959964 * math.sqrt(max(p * (1 - p), 0.0) / n) if n > 0 and math.isfinite(p) else math.nan
