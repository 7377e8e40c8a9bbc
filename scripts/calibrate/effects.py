"""Effects of settings, interactions, and how the best learning rate goes with the rank."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from calibrate.designs import IMAGES, head, line
from scipy import special

from lora_vit.analysis.effects import main_effects, rate_by_rank
from lora_vit.analysis.stats import fit_blocks


@dataclass(frozen=True)
class Crossed:
    """A setting of ``levels`` levels beside ``others`` combinations of the other settings; the seeds' sd is 0.3 points.

    ``spread``: the cells that spread more, and how many times; or the last level's cells share an error of sd 3 points,
    as those at a rate that is too high may. ``apart``: sd of the combinations' means, points.
    """

    levels: int
    others: int
    seeds: int
    spread: str = "equal"
    apart: float = 0.0

    def draw(self, lead: float, rng: np.random.Generator) -> np.ndarray:
        """Accuracies [others, levels, seeds]; the last level is ahead by ``lead`` points."""
        sd, m, k = np.full((self.others, self.levels), 0.3), self.others // 2, self.levels - self.levels // 2
        wide = {"equal": sd[:0], "half of the levels 3x": sd[:, k:], "one level 10x": sd[:, -1:],
                "half of the others 3x": sd[m:], "one of the others 10x": sd[-1:],
                "one cell 10x": sd[-1:, -1:], "one level shared": sd[:0]}  # fmt: skip
        wide[self.spread] *= 10 if "10x" in self.spread else 3
        mean = rng.normal(0, self.apart, (self.others, 1)) + lead * (np.arange(self.levels) == self.levels - 1)
        error = rng.normal(0, 0.5, self.seeds) + rng.normal(size=(*sd.shape, self.seeds)) * sd[..., None]
        if self.spread == "one level shared":
            error[:, -1] += rng.normal(0, 3.0, self.seeds)
        y = 88 + mean[..., None] + error
        return np.round(y / 100 * IMAGES) / IMAGES

    def frame(self) -> pd.DataFrame:
        """The trials, in the order of :meth:`draw`."""
        place = np.indices((self.others, self.levels, self.seeds)).reshape(3, -1)
        cells = np.char.zfill((place[0] * self.levels + place[1]).astype(str), 3)
        return pd.DataFrame({"cell": cells, "seed": place[2], "level": place[1], "other": place[0]})


def simulate_effects(case: Crossed, lead: float, runs: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Shares: the last level's interval against the first excludes 0; so it does with one pooled error where the plain
    mean is highest; an interaction is reported.
    """
    found, frame = np.zeros(3), case.frame()
    for _ in range(runs):
        y = case.draw(lead, rng)
        effects = main_effects(frame.assign(y=y.ravel()), ["level", "other"], "y", 1 / IMAGES)
        row = effects.table[effects.table["setting"] == "level"].iloc[-1]
        fit = fit_blocks(y.reshape(-1, case.seeds))
        at = y.mean((1, 2)).argmax()
        t = abs(y[at, -1].mean() - y[at, 0].mean()) / math.sqrt(2 * fit.mse / case.seeds)
        told = any("other effects" in note for note in effects.notes)
        found += [row["low"] * row["high"] > 0, t > special.stdtrit(fit.df, 0.975), told]
    return tuple(found / runs)


def print_effects(runs: int, rng: np.random.Generator) -> None:
    print("With 2 / 3 / 5 seeds; no level differs, or the last one by a point.\n")
    head("spreads", "levels", "others", "others' sd", "errs %", "pooled, plain mean: errs %", "interaction errs %",
         "finds %")  # fmt: skip
    spreads = ("equal", "half of the levels 3x", "one level 10x", "half of the others 3x", "one of the others 10x",
               "one cell 10x", "one level shared")  # fmt: skip
    for spread in spreads:
        for levels, others, apart in ((4, 1, 0.0), (2, 9, 0.0), (3, 10, 0.0), (3, 10, 1.0)):
            cases = [Crossed(levels, others, n, spread, apart) for n in (2, 3, 5)]
            if others == 1 and "others" in spread:
                continue
            null = zip(*(simulate_effects(case, 0.0, runs, rng) for case in cases), strict=True)
            finds = [simulate_effects(case, 1.0, max(1, runs // 4), rng)[0] for case in cases]
            columns = [" / ".join(f"{100 * x:.1f}" for x in column) for column in (*null, finds)]
            line(spread, levels, others, str(apart), *columns)


def print_rates(runs: int, rng: np.random.Generator) -> None:
    print("Four ranks and five rates. Accuracy falls with the square of the rate's log distance")
    print("from the best, by 0.4 points at e times less, and far more steeply above e times the best.\n")
    head("rates apart", "true power", "seeds", "sd", "told %", "of these the interval covers %", "median width")
    for step, b, seeds, sd in itertools.product((2, 3), (0.0, -0.25, -0.5), (3, 5), (0.15, 0.4)):
        line(f"{step}x", f"{b:.2f}", seeds, str(sd), *simulate_rates(step, b, seeds, sd, runs, rng))


def simulate_rates(
    step: float, b: float, seeds: int, sd: float, runs: int, rng: np.random.Generator
) -> tuple[float, float, str]:
    """Shares of sweeps where the power of the rank has an interval, and of these where it holds ``b``; its width."""
    ranks, rates, widths, covers = np.array([1.0, 4, 16, 64]), step ** np.arange(5.0), list[float](), 0
    rows = pd.DataFrame(list(itertools.product(ranks, rates)), columns=["rank", "lr"])
    for _ in range(runs):
        best = np.log(rates[2]) + rng.uniform(-0.4, 0.4) * math.log(step) + b * (np.log(ranks) - np.log(ranks).mean())
        away = np.log(rates) - best[:, None]
        mean = 0.96 - (0.4 * away**2 + 12 * np.maximum(away - 1, 0) ** 2) / 100
        y = mean.reshape(-1, 1) + rng.normal(0, sd / 100, (len(rows), seeds))
        for text in rate_by_rank(rows, y):
            if "95 %" in text:
                low, high = map(float, re.findall(r"(-?[0-9.]+) to (-?[0-9.]+)\)", text)[0])
                widths.append(high - low)
                covers += low - 0.005 <= b <= high + 0.005  # the text gives two digits
    return len(widths) / runs, covers / max(len(widths), 1), f"{np.median(widths) if widths else math.nan:.2f}"
