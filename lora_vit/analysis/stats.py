"""Which cells differ? Comparisons with the seed as the unit of replication and as a block.

Model: ``y[cell, seed] = mean[cell] + block[seed] + error``. Two questions, two procedures:

- *worse than the best* is a claim over all pairs, because the best cell is itself selected: Tukey's studentized
  range on the blocked residual (Tukey, 1953; Kramer, 1956 for unequal numbers of seeds), family-wise 5 %.
- *candidate for best*: Hsu's multiple comparisons with the best (Hsu, 1981; 1996, ch. 4), one-sided Dunnett
  critical values. The true best is among the candidates with 95 %.

Unequal spreads make the pooled error too small for the cells that spread most. Games & Howell (1976) replace it
by each pair's own variance, which errs far above 5 % with 2 to 5 seeds (docs/statistics.md). Here the *wide* error
is used instead: the mean variance of that half of the cells that spreads most, or the pair's own if that is larger.

These are errors over seeds. With :mod:`.pictures` each claim holds for other pictures too: a half width is the root of
the sum of two squares, each with the critical value of its own degrees of freedom (Cochran & Cox, 1950). One value by
Satterthwaite's errs in up to 14 % with two seeds.

All arrays: m cells, S seeds; a missing trial is NaN.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special

from lora_vit.analysis.pictures import MOST_SEEDS, Pictures

CONFIDENCE, ALPHA = 0.95, 0.05
Critical = Callable[[int, float, float], float]  # by cells, degrees of freedom and what may err
Z, MANY = 1.959964, 1e6  # of a normal, two-sided 95 %; degrees of freedom of what is taken as known


class Interval(NamedTuple):
    """Over seeds; sd and t interval are NaN for n < 2."""

    mean: float
    sd: float
    n: int
    low: float
    high: float


def t_interval(values: np.ndarray, resolution: float = 0.0, overlap: float = 0.0) -> Interval:
    """``mean +- t(n-1) * sd / sqrt(n)`` of the finite values; ``overlap``: as in :func:`compare`, of values of splits.

    For the interval, sd is at least ``resolution / sqrt(12)``, the rounding error of an accuracy that counts images.
    """
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    n = len(x)
    mean = float(x.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, n, math.nan, math.nan)
    sd = float(x.std(ddof=1))
    error = max(sd, resolution / math.sqrt(12)) / math.sqrt(n / (1 + n * overlap))
    half = float(special.stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * error
    return Interval(mean, sd, n, mean - half, mean + half)


def wilson(share: Any, size: Any) -> tuple[Any, Any]:
    """Wilson's interval (1927) of a share, or of each of several: within 0 and 1, and of some width at both."""
    z2 = Z**2 / size
    half = np.sqrt(z2 * share * (1 - share) + z2**2 / 4)
    return (share + z2 / 2 - half) / (1 + z2), (share + z2 / 2 + half) / (1 + z2)


def share_interval(values: np.ndarray, resolution: float, overlap: float = 0.0) -> Interval:
    """The interval of a fraction over seeds and ``1 / resolution`` pictures, within 0 and 1 and of some width at both.

    To either side the root of the sum of two squares: the t interval's width and Wilson's (Zou & Donner, 2008).
    With ``overlap`` the values are of splits, whose spread has that of the pictures in it.
    """
    mean, sd, n, low, high = t_interval(values, resolution, overlap)
    if resolution and n > 1 and not overlap:
        below, above = wilson(mean, 1 / resolution)
        low, high = mean - math.hypot(mean - low, mean - below), mean + math.hypot(high - mean, above - mean)
    return Interval(mean, sd, n, max(low, 0.0), min(high, 1.0)) if n > 1 else Interval(mean, sd, n, low, high)


@dataclass
class Blocked:
    y: np.ndarray  # [m, S], NaN where missing
    means: np.ndarray  # [m] adjusted for the seeds each cell has; equal to the plain means in a complete design
    counts: np.ndarray  # [m] seeds of each cell, or what its splits are worth (:mod:`.splits`)
    ss: np.ndarray  # [m] residual sum of squares of each cell
    dof: np.ndarray  # [m] its expectation in units of the error variance
    df: int
    blocked: bool
    shares: np.ndarray  # [m, S] weight of each seed in the cell's plain mean
    inverse: np.ndarray  # [S, S] covariance of the seed effects in units of the error variance
    overlap: float = 0.0  # n_val / n_train where the columns are splits

    @property
    def mse(self) -> float:
        return float(self.ss.sum() / self.df) if self.df > 0 else math.nan

    def difference_variance(self, rows: np.ndarray) -> np.ndarray:
        """Variance of ``means[rows] - means`` in units of the error variance: [len(rows), m]."""
        own, diagonal = 1 / self.counts, np.einsum("ms,st,mt->m", self.shares, self.inverse, self.shares)
        cross = self.shares[rows] @ self.inverse @ self.shares.T
        variance = own[rows][:, None] + own + diagonal[rows][:, None] + diagonal - 2 * cross
        variance[np.arange(len(rows)), rows] = 0.0
        return variance


def fit_blocks(y: np.ndarray, block: bool = True, overlap: float = 0.0) -> Blocked:
    """Fit cell means and seed effects by least squares to ``y`` [m, S] (NaN: no such trial; no row is empty).

    If cells and seeds are not connected (some cells share no seed with the others, directly or through others), the
    seeds cannot be taken out of the differences between cells: the fit then leaves the seeds out, as it does with
    ``block=False`` (``blocked`` is False), and their spread stays in the error.
    """
    there = np.isfinite(y)
    counts = there.sum(1).astype(float)
    shares, used = there / counts[:, None], there.any(0)
    information = np.diag(there.sum(0).astype(float)) - there.T @ shares
    blocked = bool(block and used.sum() > 1 and np.linalg.matrix_rank(information, tol=1e-9) == used.sum() - 1)
    inverse = np.linalg.pinv(information, rcond=1e-10, hermitian=True) if blocked else np.zeros_like(information)
    means, ss = _fitted(y, there, shares, inverse)
    centred = np.diag(inverse)[None, :] - 2 * shares @ inverse
    leverage = 1 / counts[:, None] + centred + np.einsum("ms,st,mt->m", shares, inverse, shares)[:, None]
    dof = np.where(there, 1 - leverage, 0.0).sum(1)
    df = int(there.sum()) - len(y) - (int(used.sum()) - 1 if blocked else 0)
    return Blocked(y, means, counts / (1 + overlap * counts), ss, dof, df, blocked, shares, inverse, overlap)


def _fitted(y: np.ndarray, there: np.ndarray, shares: np.ndarray, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Adjusted means and residual sums of squares, both [..., m], of ``y`` [..., m, S]."""
    plain = np.where(there, y, 0.0).sum(-1) / there.sum(1)
    effects = np.where(there, y - plain[..., None], 0.0).sum(-2) @ inverse
    means = plain - effects @ shares.T
    residual = np.where(there, y - means[..., None] - effects[..., None, :], 0.0)
    return means, (residual**2).sum(-1)


def spread_statistic(ss: np.ndarray, dof: np.ndarray) -> np.ndarray:
    """Mean square of the cells' variances over their squared mean (last axis: cells). 1 for equal variances."""
    v = ss / np.maximum(dof, 1e-9)
    mean = v.mean(-1)
    return (v**2).mean(-1) / np.where(mean > 0, mean, 1.0) ** 2


@functools.cache
def _null_spread(pattern: bytes, m: int, blocked: bool) -> np.ndarray:
    """Sorted values of :func:`spread_statistic` under equal spreads, for one pattern of present trials."""
    there = np.frombuffer(pattern, dtype=bool).reshape(m, -1)
    fit = fit_blocks(np.where(there, 0.0, np.nan), blocked)
    rng = np.random.default_rng(12345)
    draws = int(np.clip(4e6 // there.size, 200, 2000))
    errors = (rng.standard_normal((200, *there.shape)) for _ in range(0, draws, 200))
    ss = (_fitted(e, there, fit.shares, fit.inverse)[1] for e in errors)
    return np.sort(np.concatenate([spread_statistic(each, fit.dof) for each in ss]))


def spread_test(fit: Blocked) -> float:
    """p-value of "all cells spread equally" by simulation under normal errors; NaN where it cannot be tested."""
    m = len(fit.counts)
    rounding = 1e-12 * np.nanmax(np.abs(fit.y))
    if m < 3 or fit.df < 1 or math.sqrt(fit.ss.sum()) <= rounding:
        return math.nan
    null = _null_spread(np.isfinite(fit.y).tobytes(), m, fit.blocked)
    observed = float(spread_statistic(fit.ss, fit.dof)) * (1 - 1e-9)
    return float((1 + len(null) - np.searchsorted(null, observed)) / (1 + len(null)))


def equal_spread_level(fit: Blocked) -> float:
    """The p-value of :func:`spread_test` above which the pooled error is used; above 1: never.

    Chosen by simulation (docs/statistics.md) so that a threefold spread of half of the cells keeps the 5 %: the
    fewer seeds and cells, the less the test sees, and the less its silence is worth.
    """
    m = len(fit.counts)
    if m < 3:
        return 0.0 if fit.blocked else 1.01  # two cells: the blocked residual is the pair's own error
    levels = (1.5, 1.01, 0.7), (2.5, 0.45, 0.25), (3.5, 0.3, 0.1), (math.inf, 0.2, 0.1)
    return next(few if m < 20 else many for below, few, many in levels if fit.df / (m - 1) < below)


def wide_variance(fit: Blocked) -> float:
    """Mean error variance of that half of the cells (rounded up) that spreads most."""
    top = np.argsort(fit.ss / np.maximum(fit.dof, 1e-9))[-((len(fit.ss) + 1) // 2) :]
    return float(fit.ss[top].sum() / max(fit.dof[top].sum(), 1e-9))


def pair_variance(y: np.ndarray, rows: np.ndarray, blocked: bool) -> np.ndarray:
    """Half the variance of the paired differences ``y[rows] - y`` over common seeds: [len(rows), m].

    NaN with fewer than two common seeds. Not blocked: the mean of the two cells' variances, each weighted by
    1 / n, as in the variance of the difference of their means.
    """
    t = np.isfinite(y).astype(float)
    x = np.where(np.isfinite(y), y - np.nanmean(y, axis=1, keepdims=True), 0.0)
    if not blocked:
        w = 1 / t.sum(1)
        v = (x**2).sum(1) / np.maximum(t.sum(1) - 1, 1) * w
        return (v[rows][:, None] + v) / (w[rows][:, None] + w)
    n = t[rows] @ t.T
    first = x[rows] @ t.T - t[rows] @ x.T
    second = (x**2)[rows] @ t.T + t[rows] @ (x**2).T - 2 * x[rows] @ x.T
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.maximum(second - first**2 / n, 0.0) / (n - 1)
    return np.where(n >= 2, variance / 2, np.nan)


@functools.cache
def tukey_critical(m: int, df: float, alpha: float = ALPHA) -> float:
    """Upper ``alpha`` point of the studentized range."""
    from scipy import stats  # slow to import

    return float(stats.studentized_range.ppf(1 - alpha, m, df))


@functools.cache
def chi_nodes(df: float) -> tuple[np.ndarray, np.ndarray]:
    """Values of s, ``df s^2 ~ chi2(df)``, and their weights, for an expectation over s as a sum of 160 terms."""
    nodes, weights = np.polynomial.legendre.leggauss(160)
    return np.sqrt(special.gammaincinv(df / 2, (nodes + 1) / 2) * 2 / df), weights / 2


def dunnett_tail(t: float, others: int, df: float) -> float:
    """P(max of ``others`` one-sided t statistics with correlation 1/2 > t), Dunnett (1955).

    ``1 - E[ integral phi(z) Phi(sqrt(2) t s + z)^others dz ]`` with ``df s^2 ~ chi2(df)``, by quadrature
    (absolute error below 1e-5).
    """
    z = np.linspace(-8.5, 8.5, 171)
    weight_z = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    s, weights = chi_nodes(df)
    log_cdf = special.log_ndtr(math.sqrt(2) * t * s[:, None] + z)
    return float(1 - weights @ (np.exp(others * log_cdf) @ weight_z))


@functools.cache
def dunnett_critical(others: int, df: float, alpha: float = ALPHA) -> float:
    """Where :func:`dunnett_tail` is ``alpha``."""
    top = 4.0
    while dunnett_tail(top, others, df) > alpha:
        top *= 2
    return float(optimize.brentq(lambda t: dunnett_tail(t, others, df) - alpha, 0.0, top, xtol=1e-7))


@dataclass
class Comparison:
    """Of m cells with the best of the k that are ``compared``, and the errors of all differences between these k.

    Arrays of length m have NaN and False for cells that are left out. ``difference``: best minus cell, never negative;
    ``half``: its simultaneous half width, the root of the sum of its parts' squares; ``below``: for all at once, no
    other true mean is more than this above (Hsu's, never negative).
    """

    compared: np.ndarray
    fit: Blocked  # of those that are compared
    variance: float  # error variance of one trial, as used
    wide: bool
    spread_p: float
    of_pictures: Pictures | None  # of all m cells
    alpha: float = ALPHA  # what half, worse, candidate and below may err, each for the whole table

    def __post_init__(self) -> None:
        keep, fit = self.compared, self.fit
        k, every, several = len(fit.means), np.arange(len(fit.means)), bool(keep.any())
        of_all = np.full((6, len(keep)), np.nan)
        self.means, self.difference, self.half_seeds, self.half_pictures, self.half, self.below = of_all
        self.worse, self.candidate = np.zeros((2, len(keep)), dtype=bool)
        self.best = int(np.flatnonzero(keep)[np.argmax(fit.means)]) if several else None
        self.sd, self.pooled_sd, self.df = math.sqrt(self.variance), math.sqrt(max(fit.mse, 0.0)), fit.df
        self.blocked, self.complete = not several or fit.blocked, not several or bool(np.isfinite(fit.y).all())
        self.seeds, self.repeats, self.overlap = fit.y.shape[1], math.nan, fit.overlap  # repeats: harmonic mean
        # their part of the variance of a difference from the best, the median of the cells; of splits what stays
        self.pictures = 0.0
        if not several:
            return
        self.repeats = float(k / (1 / fit.counts).sum())
        best = every[[np.argmax(fit.means)]]
        halves = self.halves(best, every, tukey_critical, k)[:, 0] / math.sqrt(2)
        halves[:, best] = np.nan
        known = np.nanmedian(halves[1]) / tukey_critical(k, MANY, self.alpha)
        self.pictures = 2 * float(known**2 + fit.overlap * self.variance)
        self.candidate[keep], self.below[keep] = self._against_others()
        of_all[:5, keep] = fit.means, fit.means.max() - fit.means, *halves, np.hypot(*halves)
        self.worse[keep] = (self.difference > self.half)[keep]

    def variances(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Of ``fit.means[rows] - fit.means[columns]``, the seeds' part and the pictures': [2, rows, columns]."""
        fit, cells, parts = self.fit, np.flatnonzero(self.compared), np.zeros((2, len(rows), len(columns)))
        parts[0] = self.variance
        if self.wide:
            parts[0] = np.fmax(parts[0], pair_variance(fit.y, rows, fit.blocked)[:, columns])
        parts[0] *= np.maximum(fit.difference_variance(rows)[:, columns], 0.0)
        if self.of_pictures is not None:
            parts[1] = self.of_pictures.of_differences(cells[rows], cells[columns])
        return parts

    def halves(self, rows: np.ndarray, columns: np.ndarray, critical: Critical, many: int, families: int = 1) -> Any:
        """Half widths of both parts [2, rows, columns], each with the critical value of its degrees of freedom.

        ``critical``: of ``many`` cells, each of so many ``families`` of claims having its share of alpha.
        """
        values = [critical(many, df, self.alpha / families) for df in (self.fit.df, MANY)]
        return np.sqrt(self.variances(rows, columns)) * np.reshape(values, (2, 1, 1))

    def _against_others(self) -> tuple[np.ndarray, np.ndarray]:
        """For each of the k whether no other lies above it by more than the half width, and ``below``:
        ``max(0, max_j(mean_j - mean_i + half_ij))``.
        """
        means, every = self.fit.means, np.arange(len(self.fit.means))
        near, below = list[np.ndarray](), list[np.ndarray]()
        for rows in np.split(every, every[256::256]):
            lead = means - means[rows][:, None]
            width = np.hypot(*self.halves(rows, every, dunnett_critical, len(every) - 1))
            near.append((lead <= width).all(1))
            below.append(np.maximum(lead + width, 0.0).max(1))
        return np.concatenate(near), np.concatenate(below)


def compare(
    y: np.ndarray, resolution: float = 0, spreads: str = "auto", pictures: Pictures | None = None,
    alpha: float = ALPHA, overlap: float = 0.0,
) -> Comparison:  # fmt: skip
    """Compare m cells with the best of them (higher is better); cells with fewer than two seeds take no part.

    ``y`` [m, S] has a column per seed. ``resolution``: smallest step of the metric (1 / number of images), whose
    rounding variance ``resolution**2 / 12`` is the least error variance used. ``spreads``: ``auto`` tests whether the
    cells spread equally and chooses the error; simulations, which know it, say ``equal`` (pooled error) or ``unequal``
    (wide error). ``pictures``: what the predictions say of the same cells; None: claims are about the ones at hand.
    ``overlap``: where the columns are splits, n_val / n_train (:mod:`.splits`).
    """
    keep = np.isfinite(y).sum(1) >= 2
    blocks = bool(np.isfinite(y[keep]).any(0).sum() <= MOST_SEEDS)
    # of no blocks it does not matter which seed a value comes from
    part = y[keep] if blocks else np.take_along_axis(y[keep], np.argsort(~np.isfinite(y[keep]), axis=1), axis=1)
    fit = fit_blocks(part[:, np.isfinite(part).any(0)], blocks, overlap)
    if len(part) < 2 or fit.df < 1:
        return Comparison(np.zeros(len(y), dtype=bool), fit, math.nan, False, math.nan, None, alpha)
    spread_p, level = spread_test(fit), equal_spread_level(fit)
    wide = spreads == "unequal" or (spreads == "auto" and (level > 1 or spread_p < level))
    variance = max(wide_variance(fit) if wide else fit.mse, resolution**2 / 12)
    return Comparison(keep, fit, variance, wide and (len(part) > 2 or not fit.blocked), spread_p, pictures, alpha)
