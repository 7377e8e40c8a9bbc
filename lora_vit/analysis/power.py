"""Power: the differences that a design can detect."""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from lora_vit.analysis.pictures import MOST_SEEDS
from lora_vit.analysis.stats import ALPHA, MANY, chi_nodes, dunnett_critical, tukey_critical

WANTED = 0.8  # of a design that is large enough


@dataclass(frozen=True)
class Design:
    """``sd``: of one trial's error; ``pictures``: their part of a difference's variance, taken as known: no number of
    seeds lowers it; ``alpha``: what the claims may err.
    """

    sd: float
    cells: int
    pictures: float = 0.0
    alpha: float = ALPHA

    def power(self, difference: float, seeds: float, df: float | None = None) -> float:
        """Probability that Tukey's test calls one given cell worse which truly lies ``difference`` below the best.

        ``P(T > q / sqrt(2))``, T noncentral t with ``df`` (default ``(cells - 1)(seeds - 1)``) degrees of freedom
        and noncentrality ``difference / (sd sqrt(2 / seeds))``, by quadrature over the estimated sd.
        """
        variance, df = 2 * self.sd**2 / seeds, (self.cells - 1) * (seeds - 1) if df is None else df
        if self.cells < 2 or df < 1 or variance + self.pictures == 0:
            return float(self.cells > 1 and df > 0 and difference > 0)
        s, weights = chi_nodes(df)
        critical, known = (tukey_critical(self.cells, freedom, self.alpha) for freedom in (df, MANY))
        half = np.sqrt((critical * s) ** 2 * variance + known**2 * self.pictures)
        return float(weights @ special.ndtr((difference - half / math.sqrt(2)) / math.sqrt(variance + self.pictures)))

    def detectable(self, seeds: float, df: float) -> float:
        """Smallest true difference that is found with 80 %; NaN for one seed, which leaves no ``df``."""
        top = self.sd + math.sqrt(self.pictures)
        if self.cells < 2 or df < 1 or not top > 0:
            return 0.0 if top == 0 and self.cells > 1 and df > 0 else math.nan
        while self.power(top, seeds, df) < WANTED:
            top *= 2
        return float(optimize.brentq(lambda x: self.power(x, seeds, df) - WANTED, 0.0, top, rtol=1e-6))

    def seeds_needed(self, difference: float) -> int | None:
        """Fewest seeds with which :meth:`power` reaches 80 %; None above ``MOST_SEEDS``."""
        return self._fewest(lambda seeds: self.power(difference, seeds))

    def seeds_within(self, margin: float) -> int | None:
        """Fewest seeds with which Hsu's bound of a cell as good as the best lies below the margin with 80 %."""

        def found(seeds: int) -> float:
            variance, df = 2 * self.sd**2 / seeds, (self.cells - 1) * (seeds - 1)
            critical, known = (dunnett_critical(self.cells - 1, freedom, self.alpha) for freedom in (df, MANY))
            error, half = (math.sqrt(a * variance + b * self.pictures) for a, b in ((1, 1), (critical**2, known**2)))
            return float(special.ndtr((margin - half) / error)) if error > 0 else 1.0

        return self._fewest(found)

    def pictures_needed(self, difference: float, images: int, within: bool = False) -> int:
        """Pictures with which any number of seeds finds the difference, or shows a cell to be within it, with 80 %.

        ``images``: as many have the design's ``pictures`` as their part.
        """
        of_pairs = tukey_critical(self.cells, MANY, self.alpha) / math.sqrt(2)
        critical = dunnett_critical(self.cells - 1, MANY, self.alpha) if within else of_pairs
        return math.ceil(images * self.pictures * ((critical + special.ndtri(WANTED)) / difference) ** 2)

    def _fewest(self, found: Callable[[int], float]) -> int | None:
        counts = range(2, MOST_SEEDS + 1) if self.cells > 1 and math.isfinite(self.sd) else range(0)
        place = bisect.bisect_left(counts, WANTED, key=found)
        return counts[place] if place < len(counts) else None
