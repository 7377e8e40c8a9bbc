"""Trials and cells as DataFrames. Metrics are fractions or losses here; ``export`` turns them into text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lora_vit.analysis.load import COSTS, SummaryError, short_names
from lora_vit.analysis.stats import Comparison, t_interval
from lora_vit.config import nearest

LR, METHOD, SCALING = "optimizer.lr", "lora.method", "lora.effective_scaling"
SECTIONS = ("model", "data", "optimizer", "lora", "trainer")
FACTS = ("data.fingerprint", "data.classes", "data.train", "data.val", "data.test", SCALING)
BASELINES = {"none": "linear probe", "full": "full fine-tuning"}
MOST_RAN = 0.75  # of the settings at the commonest learning rate, for a rate to count as shared
CELL_COSTS = ("trainable_parameters", *(c for c in COSTS if c != "pack_size"))


@dataclass(frozen=True)
class Metric:
    """What cells are compared by. ``sign`` is -1 where lower is better."""

    name: str
    title: str
    accuracy: bool
    sign: int


METRICS = {
    m.name: m
    for m in (
        Metric("val_accuracy", "Val accuracy", True, 1),
        Metric("val_loss", "Val loss", False, -1),
        Metric("train_loss", "Training loss", False, -1),
    )
}


def metric(name: str) -> Metric:
    """The metric of that name. Raises SummaryError; test metrics are refused with their reason."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith("test"):
        raise SummaryError(
            f"--metric {name}: cells are chosen on val only; the report shows test accuracy of the chosen cell"
        )
    raise SummaryError(f"--metric {name} is unknown{nearest(name, list(METRICS))} (one of: {', '.join(METRICS)})")


def _is_setting(column: str) -> bool:
    return column.split(".")[0] in SECTIONS and "." in column and column not in FACTS


def varying(trials: pd.DataFrame) -> list[str]:
    """Settings that differ between trials. What a baseline leaves empty (its rank) does not make one differ."""
    order = {name: k for k, name in enumerate((METHOD, "lora.rank", "lora.alpha", "lora.scaling", "lora.dropout"))}
    found = [c for c in trials.columns if _is_setting(c) and _levels(trials, c) > 1]
    return sorted(found, key=lambda c: (order.get(c, len(order)), SECTIONS[::-1].index(c.split(".")[0]), c))


def _levels(trials: pd.DataFrame, column: str) -> int:
    lora_only = column.startswith("lora.") and column != METHOD
    return trials[column].nunique(dropna=lora_only)


def names(settings: list[str]) -> dict[str, str]:
    """Display names of settings."""
    return short_names(settings)


def aliases(columns: list[str]) -> dict[str, str]:
    """Every name by which a user may call a column: its own, and the last part where only one has it."""
    last: dict[str, list[str]] = {}
    for c in columns:
        last.setdefault(c.split(".")[0] if c.endswith(".name") else c.rsplit(".", 1)[-1], []).append(c)
    short = {k: v[0] for k, v in last.items() if len(v) == 1}
    return {**short, **{c: c for c in columns}}


def value_text(value: object) -> str:
    """A setting's value as a person writes it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, (float, np.floating)):
        return f"{value:.6g}"
    return str(value)


def labels(trials: pd.DataFrame, settings: list[str]) -> pd.Series:
    """A name per trial's cell: ``rank 8, dropout 0.1``; baselines by their own name."""
    short = names(settings)
    shown = [c for c in settings if c != METHOD] if METHOD in settings else settings
    text: dict[str, str] = {}
    for cell, first in (
        trials.groupby("cell", sort=False)[[*dict.fromkeys([METHOD, "lora.rank", *shown])]]
        .head(1)
        .join(trials["cell"])
        .set_index("cell")
        .iterrows()
    ):
        base = BASELINES.get(str(first[METHOD]), "")
        parts = [
            f"{short[c]} {value_text(first[c])}"
            for c in shown
            if not (base and c.startswith("lora.") and _empty(first[c]))
        ]
        text[str(cell)] = ", ".join([base, *parts] if base else parts) or f"rank {value_text(first['lora.rank'])}"
    twice = pd.Series(list(text.values())).value_counts()
    unique = {cell: name if twice[name] == 1 else f"{name} [{cell}]" for cell, name in text.items()}
    return trials["cell"].map(unique)


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def factors(adapted: pd.DataFrame, settings: list[str]) -> list[str]:
    """Settings for the model of main effects, the most asked-for first; scaling stands for alpha beside rank."""
    there = [c for c in settings if c != METHOD and adapted[c].nunique() > 1]
    scaled = "lora.rank" in there and SCALING in adapted and adapted[SCALING].nunique() > 1
    drop = {"lora.alpha", "lora.scaling"} if scaled else set()
    order = ["lora.rank", SCALING, "lora.alpha", "lora.dropout", "lora.targets", LR]
    chosen = [c for c in there if c not in drop] + ([SCALING] if scaled else [])
    return sorted(chosen, key=lambda c: (order.index(c) if c in order else len(order), c))


def matrix(done: pd.DataFrame, metric: Metric) -> tuple[np.ndarray, list[str]]:
    """``y`` [cells, seeds] with NaN where there is no trial, and the cell ids of its rows."""
    wide = done.pivot_table(index="cell", columns="seed", values=metric.name, aggfunc="last", sort=True)
    return wide.to_numpy(float), [str(c) for c in wide.index]


def cells_table(
    done: pd.DataFrame,
    cell_ids: list[str],
    y: np.ndarray,
    result: Comparison,
    metric: Metric,
    settings: list[str],
    resolution: float = 0.0,
) -> pd.DataFrame:
    """One row per cell, best first: settings, ``n mean sd low high`` over seeds, comparison, ``mark``, costs, fronts.

    ``adjusted`` is the mean freed of which seeds are missing; cells are sorted and compared by it. ``difference`` is
    cell minus best; ``difference_low``/``_high`` its simultaneous 95 % interval. ``vs_probe``/``vs_full``: see
    :func:`_baseline_columns`. Costs are means over the cell's trials.
    """
    by_cell = done.groupby("cell", sort=True)
    first = by_cell.head(1).set_index("cell").loc[cell_ids]
    intervals = [t_interval(row, resolution) for row in y]
    frame = pd.DataFrame({"cell": cell_ids, "label": first["label"].to_numpy()})
    shown = [*settings, *([SCALING] if _scaling_shown(first, settings) else [])]
    for c in shown:
        frame[c] = first[c].to_numpy()
    for key in ("n", "mean", "sd", "low", "high"):
        frame[key] = [getattr(i, key) for i in intervals]
    frame["adjusted"] = np.where(result.compared, metric.sign * result.means, frame["mean"])
    frame["difference"] = -metric.sign * result.difference
    frame["difference_low"], frame["difference_high"] = (
        frame["difference"] - result.half,
        frame["difference"] + result.half,
    )
    frame["p_worse"], frame["worse"] = result.p_worse, result.worse
    frame["p_candidate"], frame["candidate"] = result.p_candidate, result.candidate
    frame["mark"] = _marks(result, frame)
    _baseline_columns(frame, y, first[METHOD].to_numpy(), metric, resolution)
    means = by_cell[list(CELL_COSTS)].mean().loc[cell_ids]
    for c in CELL_COSTS:
        frame[c] = means[c].to_numpy()
    for name, cost in (("pareto_parameters", "trainable_parameters"), ("pareto_seconds", "seconds")):
        frame[name] = pareto_front(metric.sign * frame["adjusted"].to_numpy(float), frame[cost].to_numpy(float))
    frame = frame.assign(key=metric.sign * frame["adjusted"]).sort_values(["key", "cell"], ascending=[False, True])
    return frame.drop(columns="key").reset_index(drop=True)


def _scaling_shown(first: pd.DataFrame, settings: list[str]) -> bool:
    return bool({"lora.rank", "lora.alpha", "lora.scaling"} & set(settings)) and first[SCALING].nunique() > 1


def _marks(result: Comparison, frame: pd.DataFrame) -> list[str]:
    """best | candidate | worse | open (neither shown worse nor a candidate) | no verdict (one seed)."""
    marks = np.where(result.worse, "worse", np.where(result.candidate, "candidate", "open"))
    marks = np.where(result.compared, marks, "no verdict").astype(object)
    if result.best is not None:
        marks[result.best] = "best"
    return list(marks)


def _baseline_columns(
    frame: pd.DataFrame, y: np.ndarray, methods: np.ndarray, metric: Metric, resolution: float
) -> None:
    """``vs_probe`` and ``vs_full``: cell minus the best cell of that baseline, paired by seed, with its t interval."""
    for method, name in (("none", "vs_probe"), ("full", "vs_full")):
        rows = np.flatnonzero(methods == method)
        if len(rows) == 0:
            continue
        base = rows[np.argmax(metric.sign * frame["mean"].to_numpy(float)[rows])]
        paired = [t_interval(row - y[base], resolution) for row in y]
        frame[name] = [math.nan if k == base else i.mean for k, i in enumerate(paired)]
        frame[f"{name}_low"] = [math.nan if k == base else i.low for k, i in enumerate(paired)]
        frame[f"{name}_high"] = [math.nan if k == base else i.high for k, i in enumerate(paired)]


def pareto_front(score: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """True where no other cell has at least the score at no more cost, one of them strictly. NaN: never."""
    front = np.zeros(len(score), dtype=bool)
    known = np.flatnonzero(np.isfinite(score) & np.isfinite(cost))
    order = known[np.lexsort((-score[known], cost[known]))]
    best, best_cost = -math.inf, math.nan
    for k in order:
        front[k] = score[k] > best or (score[k] == best and cost[k] == best_cost)
        if score[k] > best:
            best, best_cost = score[k], cost[k]
    return front


def trials_table(trials: pd.DataFrame, metric: Metric, settings: list[str]) -> pd.DataFrame:
    """One row per trial, best first: what varies, status, metrics, costs. No test figures: cells are chosen on val."""
    extra = [SCALING] if _scaling_shown(trials, settings) else []
    columns = ["trial", "cell", "label", *settings, *extra, "seed", "status", "epoch", "val_accuracy", "val_loss"]
    columns += ["train_loss", "trainable_parameters", *COSTS, "error", "folder"]
    frame = trials[columns].copy()
    censored = trials["status"] != "completed"
    frame["_key"] = metric.sign * trials[metric.name].where(~censored)
    frame = frame.sort_values(["_key", "trial"], ascending=[False, True], na_position="last")
    return frame.drop(columns="_key").reset_index(drop=True)


def learning_rates(cells: pd.DataFrame, settings: list[str], metric: Metric) -> pd.DataFrame:
    """Each setting at its own best learning rate and at the shared one, side by side; empty with one rate only.

    Columns: ``setting``, ``best_lr`` (highest mean), ``best_mean``, ``best_low``, ``best_high``, ``best_n``,
    ``rates`` tried, ``edge`` (the best is the lowest or highest tried), ``shared_lr``, ``shared_mean``,
    ``shared_low``, ``shared_high``, ``shared_n``. The shared rate is, of those that most settings ran at (a few may
    be missing), the one with the best average over the settings that ran at all of them.
    """
    if LR not in settings or cells[LR].nunique() < 2:
        return pd.DataFrame()
    others = [c for c in settings if c != LR]
    short = names(settings)
    keys = cells[others].astype(object).where(cells[others].notna(), "–").apply(tuple, axis=1) if others else None
    groups = cells.assign(_k=keys if keys is not None else "all", _s=metric.sign * cells["mean"])
    scores = groups.assign(_c=pd.factorize(groups["_k"])[0]).pivot_table(
        index="_c", columns=LR, values="_s", aggfunc="mean"
    )
    tried = scores.notna().sum()
    common = scores[tried.index[tried >= MOST_RAN * tried.max()]]
    everywhere = common.dropna()
    shared = (everywhere if len(everywhere) else common).mean().idxmax()
    rows = []
    for key, group in groups.groupby("_k", sort=False):
        best = group.iloc[int(group["_s"].to_numpy().argmax())]
        at = group[group[LR] == shared]
        rates = sorted(group[LR].unique())
        row = {"setting": _setting_text(key, others, short, group), "best_lr": best[LR]}
        row.update({f"best_{k}": best[k] for k in ("mean", "low", "high", "n")})
        row.update(rates=len(rates), edge=len(rates) > 1 and best[LR] in (rates[0], rates[-1]), shared_lr=shared)
        row.update({f"shared_{k}": at.iloc[0][k] if len(at) else math.nan for k in ("mean", "low", "high", "n")})
        rows.append({**row, "_s": best["_s"]})
    return pd.DataFrame(rows).sort_values("_s", ascending=False, ignore_index=True).drop(columns="_s")


def _setting_text(key: object, others: list[str], short: dict[str, str], group: pd.DataFrame) -> str:
    if not isinstance(key, tuple):
        return "all"
    base = BASELINES.get(str(group.iloc[0].get(METHOD, "")), "")
    parts = [f"{short[c]} {value_text(v)}" for c, v in zip(others, key, strict=True) if c != METHOD and v != "–"]
    return ", ".join([base, *parts] if base else parts) or "all"


def resolve(name: str, columns: list[str], option: str) -> str:
    """The column that a user calls ``name``; SummaryError with the nearest one otherwise."""
    known = aliases([c for c in columns if _is_setting(c) or c == SCALING])
    if name not in known:
        raise SummaryError(f"{option} {name}: there is no such setting{nearest(name, sorted(known))}")
    return known[name]


def pivot(cells: pd.DataFrame, trials: pd.DataFrame, wanted: tuple[str, str]) -> pd.DataFrame:
    """Mean over cells of one setting (rows) against another (columns)."""
    row, column = (resolve(name, list(trials.columns), "--pivot") for name in wanted)
    if row == column:
        raise SummaryError(f"--pivot {' '.join(wanted)}: give two different settings")
    first = trials.groupby("cell").head(1).set_index("cell")
    frame = cells.assign(_row=cells["cell"].map(first[row]), _column=cells["cell"].map(first[column]))
    result = frame.pivot_table(index="_row", columns="_column", values="mean", aggfunc="mean")
    if result.empty:
        raise SummaryError(f"--pivot {' '.join(wanted)}: no cell has both")
    return result.rename_axis(index=wanted[0], columns=wanted[1])
