"""A race: which cells get more seeds, which are out, and which one is selected. A function of the records alone.

It looks at ``first_seeds`` seeds, then at 1.3 times as many, and so on. At look j = 0, 1, ..., with r seeds, a cell i
leaves when a survivor l has, over these seeds,

    mean_l - mean_i > max(0, hypot(t * se, z * tau) - margin):

i is then less than a margin better than l, by a one-sided bound as in Hsu (1984), so that l will do in its place. Each
bound has ``alpha / (k - 1) / ((j + 1) (j + 2))``, in sum over looks and pairs of one of k cells alpha: so the best
leaves for none that is a margin or more below it, with 1 - alpha (Bonferroni; Jennison & Turnbull, 2000, Group
Sequential Methods). ``se`` is that of :mod:`.stats`: of that half of the cells that spreads most, or the pair's own if
that is larger. Only cells that are in count: a bad one that has left costs the others nothing. While it is in, a pair
is also judged by its own variance, with a tenth of the error. ``tau^2`` is the pictures' part of the pair, from the
first seeds (:mod:`.pictures`); they are the same at all looks, so z is that of the first.

The race is replayed from its first look. Every cell that is still in must have its first r seeds, or have failed at one
of them; else the race waits for these trials. Cells that failed leave, then those that are behind by more than the bar,
all at once, until none is. No other trial decides anything (docs/race.md, *Rules*, and how often it errs).

Arrays: m cells, S seeds. Accuracies and margin are in the same unit (1 = 100 %).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from lora_vit.analysis.pictures import Pictures, Sums
from lora_vit.analysis.stats import ALPHA, pair_variance

GROWTH = 1.3  # of the seeds from look to look
OWN = 0.1  # what the pair's own variance has of the error


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

    def looks(self) -> Iterator[int]:
        """The numbers of seeds at which a race decides."""
        r = self.first_seeds
        while r < self.most_seeds:
            yield r
            r = math.ceil(GROWTH * r)
        yield self.most_seeds


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
    hidden: np.ndarray  # [m, m] z * tau: what the pictures may hide of a pair
    survivors: list[int]
    exits: dict[int, Exit] = field(default_factory=dict)
    bars: dict[int, tuple[float, float]] = field(default_factory=dict)  # by seeds: of the pairs that were in, from to
    seeds: int = 0  # the last r that was decided (0: first seeds are missing)
    selected: int | None = None  # the one that is left
    ended: bool = False  # without one selected: most_seeds came first, or all failed
    cells: list[str] = field(default_factory=list)  # ids
    first: int = 0

    @property
    def blocked(self) -> bool:
        """Whether no pair that is in can be decided by seeds, as the means stand: only by more pictures."""
        means, apart = self.y[self.survivors, : self.seeds].mean(1), ~np.eye(len(self.survivors), dtype=bool)
        floor = self.hidden[np.ix_(self.survivors, self.survivors)] - self.rules.margin
        return len(means) > 1 and bool((np.abs(np.subtract.outer(means, means)) <= floor)[apart].all())

    def seeds_of(self, cell: int) -> int:
        """Seeds of the cell that count: until it left, or as many as were decided."""
        return self.exits[cell].seeds if cell in self.exits else self.seeds


def half_width(y: np.ndarray, share: float, resolution: float = 0.0) -> np.ndarray:
    """How far above its mean the true difference of two cells may lie over seeds [m, m], but for ``share`` of cases.

    ``y`` [m, r] without NaN. ``resolution``: step of the accuracy (1 / images); its rounding variance is the least
    error variance used.
    """
    m, r = y.shape
    df, top = (m - 1) * (r - 1) / m, (m + 1) // 2 if m > 2 else 2  # two cells have one variance
    residual = y - y.mean(0)  # seeds are blocks
    each = np.square(residual - residual.mean(1, keepdims=True)).sum(1) / df
    own = np.fmax(pair_variance(y, np.arange(m), blocked=True), resolution**2 / 12)
    wide = -special.stdtrit(top * df, (1 - OWN) * share) * np.sqrt(2 / r * np.fmax(own, np.sort(each)[-top:].mean()))
    return np.minimum(wide, -special.stdtrit(r - 1, OWN * share) * np.sqrt(2 / r * own))


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
    y, failed, fewest = np.full(shape, np.nan), np.zeros(shape, dtype=bool), math.inf
    for i, n, accuracy, images in raced:
        failed[i, n] = isinstance(accuracy, bool) or not (isinstance(accuracy, (int, float)) and 0 <= accuracy <= 1)
        if not failed[i, n]:
            y[i, n] = accuracy
            fewest = min(fewest, images) if isinstance(images, (int, float)) and images > 0 else fewest
    resolution, pictures = (0.0, None) if sums is None else (sums.step, sums.of(list(row)))
    return replace(decide(y, failed, rules, max(resolution, 1 / fewest), pictures), cells=list(row), first=first)


def decide(
    y: np.ndarray, failed: np.ndarray, rules: Rules, resolution: float = 0.0, pictures: Pictures | None = None
) -> Race:
    """Replay the race over ``y`` [m, S] (NaN: no such record); ``failed`` [m, S] marks trials that failed."""
    there, m, share = np.isfinite(y), len(y), ALPHA
    race = Race(rules, y, failed, np.zeros((m, m)), list(range(m)))
    for look, r in enumerate(rules.looks()):
        known = (there | failed)[race.survivors, :r]
        if known.shape[1] < r or not known.all():
            return race
        for cell in [i for i in race.survivors if failed[i, :r].any()]:
            race.exits[cell] = Exit(int(np.argmax(failed[cell])) + 1, None)
            race.survivors.remove(cell)
        if look == 0:
            share = ALPHA / max(len(race.survivors) - 1, 1)
            if pictures is not None:
                tau = np.sqrt(pictures.of_differences(np.arange(m), np.arange(m)))
                race.hidden = -special.ndtri(share / 2) * tau
        race.seeds = r
        while _eliminate(race, share / (look + 1) / (look + 2), resolution):
            pass
        if len(race.survivors) <= 1 or race.blocked:
            break
    race.ended, race.selected = True, race.survivors[0] if len(race.survivors) == 1 else None
    return race


def _eliminate(race: Race, share: float, resolution: float) -> bool:
    """Take out who is behind by more than the bar; where it is 0 for all pairs, all but the first of the best."""
    alive = np.array(race.survivors, dtype=int)
    if len(alive) < 2:
        return False
    pairs, y, apart = np.ix_(alive, alive), race.y[alive, : race.seeds], ~np.eye(len(alive), dtype=bool)
    half = half_width(y, share, resolution)
    width = np.maximum(0.0, np.hypot(half, race.hidden[pairs]) - race.rules.margin)
    race.bars.setdefault(race.seeds, (width[apart].min(), width[apart].max()))
    room = np.where(apart, width - (y.mean(1) - y.mean(1)[:, None]), np.inf)
    out = (room < -1e-12).any(1)
    if not width[apart].any():
        out = np.arange(len(alive)) != np.argmax(y.mean(1))
    for i in np.flatnonzero(out):
        race.exits[int(alive[i])] = Exit(race.seeds, int(alive[np.argmin(room[i])]))
    race.survivors = alive[~out].tolist()
    return bool(out.any())


def wanted(race: Race, workers: int = 1) -> list[tuple[int, int]]:
    """The trials (cell, number of the seed) that the next look waits for; then more, until all workers are busy."""
    there = np.isfinite(race.y) | race.failed
    trials: list[tuple[int, int]] = []
    due = next((r for r in race.rules.looks() if r > race.seeds), 0)
    for seed in range(0 if race.ended else race.rules.most_seeds):
        if seed >= due and len(trials) >= workers:
            break
        trials += [(i, seed) for i in race.survivors if seed >= there.shape[1] or not there[i, seed]]
    return trials
