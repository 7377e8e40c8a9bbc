"""What people ask: is LoRA better than a baseline, or as good, which rank, and how probably is a cell the best.

Groups of cells, such as those of a method or a rank, are compared at the best of each. With 95 % for all pairs of
groups at once ``max mu[A] - max mu[B]`` lies above

    max_a min_b (d[a, b] - c[|A|] se[a, b]),

and below the same for B and A with its sign changed: d is the difference of two cells' means, se its error (both parts
of :mod:`.stats`), c[k] Dunnett's critical value (1955) of k cells against one, its risk shared out among the pairs. It
is wrong only if an a seems too far ahead of the b that is truly best; so both choices of a best cell are inside (after
Hsu, 1984).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lora_vit.analysis.stats import Comparison, dunnett_critical
from lora_vit.analysis.texts import points
from lora_vit.config.names import ADAPTED, BASELINES, LR, METHOD, METHODS, cell_text, value_text

DRAWS, MOST = 10_000, 300  # for P(best); of the cells the highest alone


def answers(
    trials: pd.DataFrame, ids: pd.Index, compared: Comparison, settings: list[str], margin: float | None
) -> dict[str, pd.DataFrame]:
    """How each ``method``, ``rank`` and ``setting`` (all but the learning rate) does at its best, if several are there.

    ``ids``: of the cells that were ``compared``. Cut ranks take no part: they rise and fall with what they were cut
    from. ``margin`` is a fraction.
    """
    if compared.best is None:
        return {}
    cells = trials.drop_duplicates("cell").set_index("cell", drop=False)
    cells = cells.loc[ids[compared.compared]].reset_index(drop=True)
    rows: list[Any] = cells.to_dict("records")
    others, both = [c for c in settings if c != LR], "dora" in {*cells[METHOD]}
    keys = {
        "method": cells[METHOD].map(METHODS),
        "rank": cells["lora.rank"].where(cells[METHOD].isin(ADAPTED)),
        "setting": pd.Series([cell_text(row, others, both) for row in rows]).where(cells[METHOD].isin(METHODS)),
    }
    groups: dict[str, Any] = {asked: cells.groupby(key).indices for asked, key in keys.items()}
    baselines = len(groups["method"].keys() & {*BASELINES.values()})
    if LR not in settings or len(groups["setting"]) <= max(len(groups["method"]), len(groups["rank"]) + baselines):
        del groups["setting"]  # each is a cell, or the other tables say it
    return {asked: at_best(asked, g, cells, compared, margin) for asked, g in groups.items() if len(g) > 1}


def at_best(
    asked: str, groups: Mapping[Any, np.ndarray], cells: pd.DataFrame, compared: Comparison, margin: float | None
) -> pd.DataFrame:
    """A row for each group, the best one first: its best cell, and what the base ``is`` beside the group.

    The base is the best group, of methods the best one with adapters. Differences are the base's lead.
    """
    means, rows = compared.fit.means, []
    order = sorted(groups, key=lambda group: -means[groups[group]].max())
    base = next((group for group in order if group not in BASELINES.values()), order[0])
    for group in order:
        best, said = max(groups[group], key=lambda i: means[i]), ("", np.nan, np.nan, np.nan)
        if group != base:
            pair, pairs = (groups[base], groups[group]), len(groups) * (len(groups) - 1)
            low, high = least_lead(*pair, pairs, compared), -least_lead(*pair[::-1], pairs, compared)
            said = claim(low, high, margin), means[groups[base]].max() - means[best], low, high
        own = cells.loc[best, ["cell", "label", "trainable_parameters"]]
        rows.append((value_text(group), *own, means[best], *said))
    columns = ["cell", "label", "trainable_parameters", "mean", "is", "difference", "low", "high"]
    named = f"{'rank ' * (asked == 'rank')}{value_text(base)}"
    return pd.DataFrame(rows, columns=[asked, *columns]).assign(base=named)


def least_lead(a: np.ndarray, b: np.ndarray, pairs: int, compared: Comparison) -> float:
    """By how much the best of the cells ``a`` is at least ahead of the best of ``b``, among so many pairs."""
    few, many = sorted((a, b), key=len)  # rows cost more
    half = np.hypot(*compared.halves(few, many, dunnett_critical, len(a), pairs))
    lead = compared.fit.means[a][:, None] - compared.fit.means[b] - (half if few is a else half.T)
    return float(lead.min(1).max())


def claim(low: float, high: float, margin: float | None) -> str:
    """What the interval of a lead shows, in words between two names."""
    if low > 0 or high < 0:
        return "better than" if low > 0 else "worse than"
    sides = [side for side, end in (("worse", -low), ("better", high)) if margin is not None and end < margin]
    return f"at most {points(margin or 0)} {' or '.join(sides)} than" if sides else "not told apart from"


def text(tables: Mapping[str, pd.DataFrame]) -> str:
    """What may be said of methods and ranks; empty without."""
    told = []
    for asked, table in tables.items():
        others = table[table["is"] != ""].groupby("is", sort=False)[asked].agg(", ".join)
        told += [f"{table['base'][0]} is {', '.join(others.index + ' ' + others)}"] * (asked != "setting")
    return f"Each at its best cell: {'; '.join(told)}." if told else ""


def chances(compared: Comparison) -> np.ndarray:
    """P(best) of each cell under a flat prior: how often it is the highest of DRAWS from the means and their errors.

    The covariance of the means, but for what is common to all, follows from that of their differences (Gower, 1966).
    """
    means, df, rng = compared.fit.means, compared.fit.df, np.random.default_rng(DRAWS)
    top, found = np.argsort(-means, kind="stable")[:MOST], np.zeros(len(means))
    drawn, estimated = means[top], rng.chisquare(df, (DRAWS, 1)) / df
    for part, known in zip(compared.variances(top, top), (estimated, np.ones(1)), strict=True):
        values, vectors = np.linalg.eigh((part.mean(0) + part.mean(1)[:, None] - part - part.mean()) / 2)
        root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # the one root that does not depend on the vectors' signs
        drawn = drawn + rng.standard_normal((DRAWS, len(top))) @ root / np.sqrt(known)
    found[top] = np.bincount(drawn.argmax(1), minlength=len(top)) / DRAWS
    return found
