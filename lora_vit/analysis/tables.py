"""Trials and cells as DataFrames. Metrics are fractions here; ``texts`` says them."""

import math
from typing import Any

import numpy as np
import pandas as pd

from lora_vit.analysis.load import COSTS, FIGURES
from lora_vit.analysis.questions import chances
from lora_vit.analysis.stats import Comparison, share_interval, t_interval
from lora_vit.config import ADAPTED, SECTIONS
from lora_vit.config.names import LR, METHOD, names, preferred, short_names, varying
from lora_vit.metrics import LOSSES

SCALING = "lora.effective_scaling"
FACTS = ("data.fingerprint", "data.classes", "data.train", "data.val", "data.test", SCALING)


def named(trials: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The trials with their cell's name as ``label``, and the settings that vary among them."""
    left_out = (*FACTS, *["data.split_seed"] * ("split" in trials))
    columns = [c for c in trials.columns if "." in c and c.split(".")[0] in SECTIONS and c not in left_out]
    rows: dict[Any, Any] = trials.drop_duplicates("cell").set_index("cell")[columns].to_dict("index")
    settings = varying(rows.values())
    return trials.assign(label=trials["cell"].map(names(rows, settings))), settings


def averaged(trials: pd.DataFrame, value: str = "val_accuracy") -> pd.Series:
    """Which trials count: completed ones that have the value that is compared, a fraction."""
    return (trials["status"] == "completed") & trials[value].astype(float).between(0, 1)


def best_cell(cells: pd.DataFrame) -> pd.Series:
    """The cell marked best or selected; the first one if no cells could be compared."""
    marked = cells[cells["mark"].isin(["best", "selected"])]
    return (marked if len(marked) else cells).iloc[0]


def factors(trials: pd.DataFrame, settings: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """The trials that settings have effects on, and these, by short names, the most asked-for first.

    Baselines have no rank, and what was cut was not trained at its. Scaling stands for alpha if that was crossed with
    rank.
    """
    adapted = trials[trials[METHOD].isin(ADAPTED)]
    there = {c for c in settings if adapted[c].nunique(dropna=False) > 1}
    if "lora.rank" in there and 1 < adapted[SCALING].nunique() < adapted["lora.alpha"].nunique():
        there = there - {"lora.alpha", "lora.scaling"} | {SCALING}
    first = [METHOD, "lora.rank", SCALING, "lora.alpha", "lora.dropout", "lora.targets", LR]
    short = short_names(preferred(sorted(there), first))
    return adapted.rename(columns=short), list(short.values())


def matrix(done: pd.DataFrame, value: str = "val_accuracy") -> pd.DataFrame:
    """A figure by cell id (rows) and seed (columns; or split, its mean), NaN where there is no trial."""
    return done.pivot_table(index="cell", columns="split" if "split" in done else "seed", values=value, aggfunc="mean")


def confused(labels: np.ndarray, predicted: np.ndarray, class_names: list[str]) -> pd.DataFrame:
    """The number of pictures by class (rows) and predicted class."""
    counts = np.zeros((len(class_names), len(class_names)), dtype=int)
    np.add.at(counts, (labels, predicted), 1)
    return pd.DataFrame(counts, class_names, class_names)


def cells_table(
    done: pd.DataFrame, values: pd.DataFrame, result: Comparison, settings: list[str], resolution: float = 0.0
) -> pd.DataFrame:
    """One row per cell, best first: settings, ``n mean sd low high`` over seeds, comparison, ``mark``, costs, fronts.

    ``mean`` is freed of what missing seeds would have changed, and the interval moves along. ``difference`` is cell
    minus best, with its simultaneous 95 % interval; ``difference_seeds`` and ``difference_pictures`` are the half
    widths of its two parts. Losses, where trials have them all, and costs are means over the cell's trials;
    ``d_brier`` and the like: that loss minus the best cell's, paired by seed, with its t interval.
    """
    first = done.drop_duplicates("cell").set_index("cell").loc[values.index]
    frame = first[[*dict.fromkeys(["label", *settings, METHOD, *_scaling_shown(first, settings)])]].reset_index()
    if (sweeps := done.groupby("cell")["sweep"].agg(lambda names: ", ".join(sorted({*names})))).nunique() > 1:
        frame["sweep"] = sweeps[values.index].to_numpy()
    y, own = values.to_numpy(float), ["n", "mean", "sd", "low", "high"]
    frame[own] = pd.DataFrame([share_interval(row, resolution, result.overlap) for row in y])[own]
    if result.blocked and not result.complete:  # all pictures and tables show one mean
        fit, ends = result.fit, ["mean", "low", "high"]
        moved = frame.loc[result.compared, ends] + (fit.means - np.nanmean(fit.y, axis=1))[:, None]
        frame.loc[result.compared, ends] = moved.clip(0, 1)
    frame["difference"] = -result.difference
    frame["difference_low"] = frame["difference"] - result.half
    frame["difference_high"] = frame["difference"] + result.half
    frame["difference_seeds"], frame["difference_pictures"] = result.half_seeds, result.half_pictures
    frame["worse"], frame["candidate"] = result.worse, result.candidate
    is_best = np.arange(len(y)) == result.best
    frame["mark"] = np.select(
        [~result.compared, is_best, result.worse, result.candidate],
        ["no verdict", "best", "worse", "candidate"], "open",
    ).astype(object)  # fmt: skip
    frame["below"], frame["p_best"] = result.below, math.nan
    if result.best is not None:
        frame.loc[result.compared, "p_best"] = chances(result)
    for name in LOSSES if done["val_brier"].notna().any() else ():
        losses = matrix(done, f"val_{name}").reindex(values.index)
        frame[f"val_{name}"] = losses.mean(axis=1).to_numpy()
        if result.best is not None:
            apart = (losses - losses.iloc[result.best]).to_numpy(float)
            paired = pd.DataFrame([t_interval(row, 0.0, result.overlap) for row in apart])
            paired.loc[result.best] = math.nan
            frame[[f"d_{name}", f"d_{name}_low", f"d_{name}_high"]] = paired[["mean", "low", "high"]]
    costs = ["trainable_parameters", *(c for c in COSTS if c != "pack_size")]
    frame = frame.join(done.groupby("cell")[costs].mean(), on="cell")
    score = np.where(result.compared, result.means, frame["mean"])
    for name, cost in (("pareto_parameters", "trainable_parameters"), ("pareto_seconds", "seconds")):
        frame[name] = pareto_front(score, frame[cost].to_numpy(float))
    return frame.iloc[np.argsort(-score, kind="stable")].reset_index(drop=True)


def _scaling_shown(first: pd.DataFrame, settings: list[str]) -> list[str]:
    moved = {"lora.rank", "lora.alpha", "lora.scaling"} & set(settings)
    return [SCALING] if moved and first[SCALING].nunique() > 1 else []


def pareto_front(score: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """True where no other cell has at least the score at no more cost, one of them strictly. NaN: never."""
    known = np.isfinite(score) & np.isfinite(cost)
    score, cost = np.where(known, score, -np.inf), np.where(known, cost, np.inf)
    no_worse = (score >= score[:, None]) & (cost <= cost[:, None])
    return known & ~(no_worse & ((score > score[:, None]) | (cost < cost[:, None]))).any(1)


def trials_table(trials: pd.DataFrame, settings: list[str], value: str = "val_accuracy") -> pd.DataFrame:
    """One row per trial, best first: what varies, status, metrics, costs. No test figures: cells are chosen on val."""
    shown = dict.fromkeys([*settings, *["sweep"] * (trials["sweep"].nunique() > 1), *_scaling_shown(trials, settings)])
    columns = ["trial", "cell", "label", *shown, *["split"] * ("split" in trials), "seed", "status", "epoch"]
    known = [name for name in FIGURES if name.startswith("val") and trials[name].notna().any()]
    columns += dict.fromkeys((value, "val_accuracy", "val_loss", "train_loss", *known))
    columns += ["trainable_parameters", *COSTS, "started", "error", "folder"]
    score = trials[value].where(trials["status"] == "completed")
    order = trials.assign(_score=score).sort_values(["_score", "trial"], ascending=[False, True]).index
    return trials.loc[order, columns].reset_index(drop=True)


def at_edges(cells: pd.DataFrame, settings: list[str]) -> list[bool]:
    """Of each setting, whether its best learning rate is the lowest or highest of several; ``cells``: best first."""
    if LR not in settings:
        return []
    others: Any = [c for c in settings if c != LR] or (lambda _: "all")
    tried = cells.groupby(others, sort=False, dropna=False)[LR].agg(["first", "min", "max"])
    return [low < high and best in (low, high) for best, low, high in tried.to_numpy()]
