"""What a summary consists of. Everything that is computed goes in here, everything that is shown comes from here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from lora_vit.analysis.effects import Effects
from lora_vit.analysis.power import PairedImages
from lora_vit.analysis.race import Race, Rules
from lora_vit.analysis.stats import Comparison


@dataclass(frozen=True)
class Metric:
    """What cells are compared by. ``sign`` is -1 where lower is better."""

    name: str
    title: str
    accuracy: bool
    sign: int


@dataclass
class Design:
    """What the sweep's size can show (differences in units of the metric; NaN or None: cannot be said)."""

    detectable: float = math.nan
    seeds_for_half_a_point: int | None = None
    optimism: float = math.nan


@dataclass
class Raced:
    """A race as its records say: rows of ``y`` [m, S] are ``cells`` (ids), columns the seeds from ``first`` on.

    ``one_stage``: trials that a single stage with the same guarantee would take, the spread known beforehand (None: the
    spread is not known).
    """

    rules: Rules
    race: Race
    cells: list[str]
    first: int
    y: np.ndarray
    command: str | None
    one_stage: int | None = None

    @property
    def selected(self) -> str | None:
        """The selected cell's id."""
        return None if self.race.selected is None else self.cells[self.race.selected]

    def shows(self, margin: float) -> bool:
        """Whether the race has shown the selected cell to be so close to the best."""
        return self.selected is not None and margin >= self.rules.margin - 1e-12

    @property
    def seeds_of(self) -> dict[str, int]:
        """How many of its seeds count, for each cell: until it left or the race ended, else as many as may come."""
        going_on = () if self.race.ended else self.race.survivors
        return {cell: self.rules.most_seeds if i in going_on else max(self.rules.first_seeds, self.race.seeds_of(i))
                for i, cell in enumerate(self.cells)}  # fmt: skip

    @property
    def completed(self) -> int:
        """Trials that are there, also those that were trained ahead or under other rules."""
        return int(np.isfinite(self.y).sum())

    @property
    def trials(self) -> int:
        """Trials that count."""
        return sum(int(np.isfinite(self.y[i, :n]).sum()) for i, n in enumerate(self.seeds_of.values()))


@dataclass
class Within:
    """What is *good enough*: cells shown to lie at most ``margin`` (in units of the metric) below the best.

    ``smallest`` and ``fastest``: labels of the cheapest of them by parameters and by seconds; None: there is none.
    ``seeds``: of each cell, with which a cell as good as the best would be found with 80 % (None: too many).
    """

    margin: float
    smallest: str | None = None
    parameters: float = math.nan
    fastest: str | None = None
    seconds: float = math.nan
    seeds: int | None = None


@dataclass
class Chosen:
    """The cell chosen on val, and its test figure with both errors (half widths at 95 %)."""

    label: str
    cell: str
    test: float
    between_seeds: float
    of_test_set: float
    images: int


@dataclass
class Summary:
    """Everything that is shown. ``trials`` and ``cells`` are the tables of ``trials.csv`` and ``cells.csv``."""

    metric: Metric
    folders: list[str]
    trials: pd.DataFrame
    cells: pd.DataFrame
    unfinished: pd.DataFrame
    settings: list[str]
    comparison: Comparison
    effects: Effects
    learning_rates: pd.DataFrame
    pivot: pd.DataFrame | None
    design: Design
    chosen: Chosen
    environment: pd.DataFrame
    pair: tuple[str, str, PairedImages] | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    verdict: str = ""
    where: str | None = None
    race: Raced | None = None
    within: Within | None = None
