"""A race: which cells get more seeds, which are out, and which one is selected. A function of the records alone.

Fully sequential elimination (Paulson, 1964; Kim & Nelson, 2001, ACM TOMACS 11:251-273, with c = 1). With r seeds a
cell i leaves when a survivor l has ``mean_l - mean_i > W(r)``,

    W(r) = max(0, margin / (2 r) * (h2 * S2 / margin^2 - r)),    h2 = 2 * eta * df,
    eta = ((2 * alpha / (k - 1))^(-2 / df) - 1) / 2,

S2 the variance of the paired differences in the first seeds, df its degrees of freedom, k the cells that have them.
A cell within ``margin`` of the best is then selected with probability 1 - alpha, on these pictures. For others of the
kind half of alpha goes to what pictures may hide of a pair, Dunnett's critical value times the root of their part
(:mod:`.pictures`, from the first seeds); W(r) gets the other half, and what that leaves of the margin. Where it leaves
nothing, no number of seeds decides. Kim and Nelson take each pair's own
variance, which costs many trials, or a common one, which fails if spreads differ. Here S2 is twice the variance of
that half of the cells that spreads most, or the pair's own if that is larger, as :mod:`.stats` does for fixed
sweeps; docs/race.md says how often it errs.

The race is replayed from its first seeds. At r = first_seeds, first_seeds + 1, ... every cell that is still in must
have its first r seeds, or have failed at one of them; else the race waits for these trials. Cells that failed leave,
then those that are behind by more than W(r), all at once. No other trial decides anything (docs/race.md, *Rules*).

Arrays: m cells, S seeds. Accuracies and margin are in the same unit (1 = 100 %).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from lora_vit.analysis.pictures import Pictures, Sums
from lora_vit.analysis.stats import ALPHA, MANY, dunnett_critical, fit_blocks, pair_variance, wide_variance


@dataclass(frozen=True)
class Rules:
    """``margin``: what difference matters. Every cell gets ``first_seeds`` (>= 2), none more than ``most_seeds``."""

    margin: float
    first_seeds: int
    most_seeds: int
    margins: int = 1  # so many were tried in turn, and each spends ALPHA

    @classmethod
    def of(cls, plan: Mapping[str, Any]) -> "Rules":
        """The rules of a race as ``sweep.json`` has them, where ``margin`` is in points."""
        return cls(plan["margin"] / 100, plan["first_seeds"], plan["most_seeds"], len(plan.get("margins", "1")))

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise ValueError(f"a race's margin must be above 0, not {self.margin}")
        if not 2 <= self.first_seeds <= self.most_seeds:
            raise ValueError(f"a race needs 2 <= first_seeds <= most_seeds, not {self.first_seeds}, {self.most_seeds}")


class Exit(NamedTuple):
    """Why a cell left: with how many seeds, and behind which cell (None: its trial of that seed failed)."""

    seeds: int
    behind: int | None


@dataclass
class Race:
    """Where a race stands (see the module's rule), and what it was decided from."""

    rules: Rules
    y: np.ndarray  # [m, S] accuracies (NaN: none): row i is the cell cells[i], column n the seed first + n
    failed: np.ndarray  # [m, S] trials that failed
    means: np.ndarray  # [m] over its seeds when last judged
    room: np.ndarray  # [m] by how much a mean may still fall before the cell leaves (NaN: has left, or undecided)
    bounds: np.ndarray  # [m, m] of boundary()
    left: np.ndarray  # [m, m] what the pictures leave of the margin for the seeds of a pair
    survivors: list[int]
    exits: dict[int, Exit] = field(default_factory=dict)
    seeds: int = 0  # the last r that was decided (0: first seeds are missing)
    selected: int | None = None  # the one that is left
    ended: bool = False  # without one selected: most_seeds came first, or all failed
    cells: list[str] = field(default_factory=list)  # ids
    first: int = 0

    @property
    def blocked(self) -> bool:
        """Whether no pair that is in it can be decided by seeds: only more pictures help."""
        apart = ~np.eye(len(self.survivors), dtype=bool)
        return len(self.survivors) > 1 and bool((self.left[np.ix_(self.survivors, self.survivors)] <= 0)[apart].all())

    def seeds_of(self, cell: int) -> int:
        """Seeds of the cell that count: until it left, or as many as were decided."""
        return self.exits[cell].seeds if cell in self.exits else self.seeds


def boundary(first: np.ndarray, rules: Rules, resolution: float = 0.0, left: np.ndarray | None = None) -> np.ndarray:
    """``h2 * S2 / left`` [m, m], so that ``W(r) = max(0, boundary / (2 r) - left / 2)``; ``first`` [m, n], no NaN.

    ``resolution``: step of the accuracy (1 / images); its rounding variance is the least error variance used. ``left``:
    what pictures leave of the margin (None: they do not count); infinite where that is nothing.
    """
    m, n = first.shape
    fit = fit_blocks(first)
    if m == 2:
        variance, df = fit.mse, float(n - 1)
    else:
        variance, df = wide_variance(fit), (m - 1) * (n - 1) / m * ((m + 1) // 2)
    floor = max(variance, resolution**2 / 12)
    s2 = 2 * np.fmax(floor, pair_variance(first, np.arange(m), blocked=True))
    eta = ((2 * (ALPHA if left is None else ALPHA / 2) / (m - 1)) ** (-2 / df) - 1) / 2
    width = 2 * eta * df * s2 / (rules.margin if left is None else np.where(left > 0, left, 1.0))
    return width if left is None else np.where(left > 0, width, np.inf)


def standing(
    plan: Mapping[str, Any], trials: Iterable[tuple[str, int, object, object]], sums: Sums | None = None
) -> Race:
    """Where a race, as ``sweep.json`` has it, stands by its trials that have ended.

    ``trials``: cell id, seed, metric as the record says it (None, or no fraction in [0, 1]: the trial failed), and
    number of val images (None: not known). Other cells and seeds do not matter. ``sums``: of the first seeds'
    predictions.
    """
    rules, first, row = Rules.of(plan), plan["seed"], {cell: i for i, cell in enumerate(plan["cells"])}
    raced = [(row[cell], seed - first, accuracy, images) for cell, seed, accuracy, images in trials
             if cell in row and first <= seed < first + rules.most_seeds]  # fmt: skip
    shape = len(row), 1 + max((n for _, n, _, _ in raced), default=-1)
    y, failed, resolution = np.full(shape, np.nan), np.zeros(shape, dtype=bool), 0.0
    for i, n, accuracy, images in raced:
        if isinstance(accuracy, (int, float)) and not isinstance(accuracy, bool) and 0 <= accuracy <= 1:
            y[i, n] = accuracy
            if isinstance(images, (int, float)) and images > 0:
                resolution = max(resolution, 1 / images)
        else:
            failed[i, n] = True
    pictures = None if sums is None else sums.of(list(row))
    resolution = resolution if sums is None else max(resolution, sums.step)
    return replace(decide(y, failed, rules, resolution, pictures), cells=list(row), first=first)


def decide(
    y: np.ndarray, failed: np.ndarray, rules: Rules, resolution: float = 0.0, pictures: Pictures | None = None
) -> Race:
    """Replay the race over ``y`` [m, S] (NaN: no such record); ``failed`` [m, S] marks trials that failed."""
    there, m, nan = np.isfinite(y), len(y), np.full(len(y), np.nan)
    bounds, left = np.zeros((m, m)), np.full((m, m), rules.margin)
    race = Race(rules, y, failed, nan.copy(), nan.copy(), bounds, left, list(range(m)))
    sums = np.where(there, y, 0.0).cumsum(1)
    for r in range(rules.first_seeds, rules.most_seeds + 1):
        known = (there | failed)[race.survivors, :r]
        if known.shape[1] < r or not known.all():
            return race
        for cell in [i for i in race.survivors if failed[i, :r].any()]:
            race.exits[cell] = Exit(int(np.argmax(failed[cell])) + 1, None)
        alive = np.array([i for i in race.survivors if i not in race.exits], dtype=int)
        if r == rules.first_seeds and len(alive) > 1:
            pairs = np.ix_(alive, alive)
            if pictures is not None:
                hidden = dunnett_critical(len(alive) - 1, MANY, ALPHA / 2)
                left[pairs] -= hidden * np.sqrt(pictures.of_differences(alive, alive))
            bounds[pairs] = boundary(y[alive, :r], rules, resolution, None if pictures is None else left[pairs])
        race.means[alive], race.seeds = sums[alive, r - 1] / r, r
        _eliminate(race, alive, r)
        if len(race.survivors) <= 1 or race.blocked:
            break
    race.ended = True
    race.selected = race.survivors[0] if len(race.survivors) == 1 else None
    return race


def _eliminate(race: Race, alive: np.ndarray, r: int) -> None:
    """Take out who is behind by more than W(r); where that is 0 for all pairs, all but the first of the best."""
    pairs = np.ix_(alive, alive)
    width = np.maximum(0.0, race.bounds[pairs] / (2 * r) - race.left[pairs] / 2)
    means = race.means[alive]
    room = width - (means[None, :] - means[:, None])
    np.fill_diagonal(room, np.inf)
    out = (room < -1e-12).any(1)
    if len(alive) > 1 and not width.any():
        out = np.arange(len(alive)) != np.argmax(means)
    for i in np.flatnonzero(out):
        race.exits[int(alive[i])] = Exit(race.seeds, int(alive[np.argmin(room[i])]))
    race.room[:] = np.nan
    if len(alive) > 1:
        race.room[alive[~out]] = room.min(1)[~out]
    race.survivors = alive[~out].tolist()


def wanted(race: Race, workers: int = 1) -> list[tuple[int, int]]:
    """The trials (cell, number of the seed) that the race waits for; then next seeds, until all workers are busy."""
    there = np.isfinite(race.y) | race.failed
    trials: list[tuple[int, int]] = []
    first = max(race.seeds + 1, race.rules.first_seeds)
    for seed in range(0 if race.ended else race.rules.most_seeds):
        if seed >= first and len(trials) >= workers:
            break
        trials += [(i, seed) for i in race.survivors if seed >= there.shape[1] or not there[i, seed]]
    return trials
