"""What a summary consists of. Everything that is computed goes in here, everything that is shown comes from here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import pandas as pd

from lora_vit.analysis.effects import Effects
from lora_vit.analysis.race import Race
from lora_vit.analysis.stats import Comparison


@dataclass
class Design:
    """What the sweep's size can show (differences of accuracies; NaN or None: cannot be said)."""

    detectable: float = math.nan
    seeds_for_half_a_point: int | None = None
    optimism: float = math.nan


@dataclass
class Within:
    """What is *good enough*: cells shown to lie at most ``margin`` (a difference of accuracies) below the best.

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


class Verdict(ABC):
    """What the results of one kind of sweep can say, and in which words.

    ``legend``: what the marks mean, in Markdown. ``same_seeds``: whether every cell was meant to get the same seeds.
    ``margin``: the difference of accuracies that this kind of sweep is about, if there is one.
    """

    legend: str
    same_seeds = True
    margin: float | None = None
    race: Race | None = None

    def counted(self, done: pd.DataFrame) -> pd.DataFrame:
        """Which completed trials make the cells."""
        return done

    def compared(self, done: pd.DataFrame) -> pd.DataFrame:
        """Which of these every cell was meant to have, whatever came out: what claims about any pair come from."""
        return done

    def judged(self, cells: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
        """The cells with this kind's marks, order and differences; ``values``: :func:`.tables.matrix`."""
        return cells

    def within(self, cells: pd.DataFrame, margin: float) -> pd.Series:
        """Which of the judged cells are shown to be at most ``margin`` below the best."""
        return cells["below"] <= margin

    def chooses(self) -> bool:
        """Whether the first cell is chosen, so that its test figure may be shown."""
        return True

    @abstractmethod
    def sentence(self, summary: Summary) -> str:
        """What is best, what is shown to be worse, and what is still open."""

    @abstractmethod
    def methods(self, summary: Summary) -> list[str]:
        """How the marks were found, in plain words."""


@dataclass
class Summary:
    """Everything that is shown. ``trials`` and ``cells`` are the tables of ``trials.csv`` and ``cells.csv``.

    ``says``: how this kind of sweep is read.
    """

    folders: list[str]
    where: str | None
    trials: pd.DataFrame
    cells: pd.DataFrame
    unfinished: pd.DataFrame
    settings: list[str]
    comparison: Comparison
    effects: Effects
    learning_rates: pd.DataFrame
    design: Design
    chosen: Chosen
    within: Within | None
    environment: pd.DataFrame
    warnings: list[str]
    problems: list[str]
    says: Verdict

    @property
    def race(self) -> Race | None:
        """The race, if the sweep was one."""
        return self.says.race

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        return self.says.sentence(self)

    @property
    def legend(self) -> str:
        """What the cells table's marks mean, in Markdown."""
        return self.says.legend
