"""Power: the differences that a design can detect. ``alpha``: what the claims may err."""

import bisect
import math
from collections.abc import Callable

import numpy as np
from scipy import optimize, special

from lora_vit.analysis.stats import ALPHA, MANY, MOST_SEEDS, chi_nodes, dunnett_critical, tukey_critical

WANTED = 0.8  # of a design that is large enough


def power(
    difference: float,
    sd: float,
    cells: int,
    seeds: float,
    df: float | None = None,
    pictures: float = 0.0,
    alpha: float = ALPHA,
) -> float:
    """Probability that Tukey's test calls one given cell worse which truly lies ``difference`` below the best.

    ``P(T > q / sqrt(2))``, T noncentral t with ``df`` (default ``(cells - 1)(seeds - 1)``) degrees of freedom
    and noncentrality ``difference / (sd sqrt(2 / seeds))``, by quadrature over the estimated sd. ``pictures``: their
    part of a difference's variance, taken as known; no number of seeds lowers it.
    """
    df = (cells - 1) * (seeds - 1) if df is None else df
    if cells < 2 or df < 1:
        return 0.0
    variance = 2 * sd**2 / seeds
    if variance + pictures == 0:
        return 1.0 if difference > 0 else 0.0
    s, weights = chi_nodes(df)
    critical, known = tukey_critical(cells, df, alpha), tukey_critical(cells, MANY, alpha)
    half = np.sqrt((critical * s) ** 2 * variance + known**2 * pictures)
    return float(weights @ special.ndtr((difference - half / math.sqrt(2)) / math.sqrt(variance + pictures)))


def detectable(sd: float, cells: int, seeds: float, df: float, pictures: float = 0.0, alpha: float = ALPHA) -> float:
    """Smallest true difference that :func:`power` finds with 80 %; NaN for one seed, which leaves no ``df``."""
    if cells < 2 or df < 1 or not sd + pictures > 0:
        return 0.0 if sd + pictures == 0 and cells > 1 and df > 0 else math.nan
    top = sd + math.sqrt(pictures)
    while power(top, sd, cells, seeds, df, pictures, alpha) < WANTED:
        top *= 2
    design = sd, cells, seeds, df, pictures, alpha
    return float(optimize.brentq(lambda x: power(x, *design) - WANTED, 0.0, top, rtol=1e-6))


def seeds_needed(difference: float, sd: float, cells: int, pictures: float = 0.0, alpha: float = ALPHA) -> int | None:
    """Fewest seeds with which :func:`power` reaches 80 %; None above ``MOST_SEEDS``."""
    return _fewest(lambda seeds: power(difference, sd, cells, seeds, None, pictures, alpha), sd, cells)


def seeds_within(margin: float, sd: float, cells: int, pictures: float = 0.0, alpha: float = ALPHA) -> int | None:
    """Fewest seeds with which Hsu's bound of a cell as good as the best lies below the margin with 80 %, or None."""

    def found(seeds: int) -> float:
        of_seeds, error = 2 * sd**2 / seeds, math.sqrt(2 * sd**2 / seeds + pictures)
        freedom = (cells - 1) * (seeds - 1), MANY
        critical = [dunnett_critical(cells - 1, df, alpha) for df in freedom]
        half = math.sqrt(critical[0] ** 2 * of_seeds + critical[1] ** 2 * pictures)
        return float(special.ndtr((margin - half) / error)) if error > 0 else 1.0

    return _fewest(found, sd, cells)


def pictures_needed(
    difference: float, cells: int, pictures: float, images: int, within: bool = False, alpha: float = ALPHA
) -> int:
    """Pictures with which any number of seeds finds the difference, or shows a cell to be within it, with 80 %.

    ``pictures``: their part of a difference's variance with so many ``images``.
    """
    of_pairs = tukey_critical(cells, MANY, alpha) / math.sqrt(2)
    critical = dunnett_critical(cells - 1, MANY, alpha) if within else of_pairs
    return math.ceil(images * pictures * ((critical + special.ndtri(WANTED)) / difference) ** 2)


def _fewest(found: Callable[[int], float], sd: float, cells: int) -> int | None:
    counts = range(2, MOST_SEEDS + 1) if cells > 1 and math.isfinite(sd) else range(0)
    place = bisect.bisect_left(counts, WANTED, key=found)
    return counts[place] if place < len(counts) else None
