"""What a summary consists of. Everything that is computed goes in here, everything that is shown comes from here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from lora_vit.analysis.effects import Effects
from lora_vit.analysis.power import PairedImages
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
