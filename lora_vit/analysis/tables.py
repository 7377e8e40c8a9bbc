"""Trials and cells as DataFrames. Metrics are fractions here; ``texts`` says them."""

import math
from typing import Any

import numpy as np
import pandas as pd

from lora_vit.analysis.load import COSTS, FIGURES
from lora_vit.analysis.stats import Comparison, share_interval, t_interval
from lora_vit.config import SECTIONS
from lora_vit.config.names import LR, METHOD, cell_text, names, preferred, varying
from lora_vit.metrics import LOSSES

SCALING = "lora.effective_scaling"
FACTS = ("data.fingerprint", "data.classes", "data.train", "data.val", "data.test", SCALING)
MOST_RAN = 0.75  # of the settings at the commonest learning rate, for a rate to count as shared


def named(trials: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The trials with their cell's name as ``label``, and the settings that vary among them."""
    columns = [c for c in trials.columns if "." in c and c.split(".")[0] in SECTIONS and c not in FACTS]
    cells = trials.drop_duplicates("cell").set_index("cell")
    apart = ["sweep"] * bool(cells["sweep"].nunique() > 1 and cells.index.str.contains("@").any())
    rows: dict[Any, Any] = cells[[*columns, *apart]].to_dict("index")
    settings = [*varying({c: row[c] for c in columns} for row in rows.values()), *apart]
    return trials.assign(label=trials["cell"].map(names(rows, settings))), settings


def averaged(trials: pd.DataFrame, value: str = "val_accuracy") -> pd.Series:
    """Which trials count: completed ones that have the value that is compared."""
    return (trials["status"] == "completed") & np.isfinite(trials[value].astype(float))


def best_cell(cells: pd.DataFrame) -> pd.Series:
    """The cell marked best or selected; the first one if no cells could be compared."""
    marked = cells[cells["mark"].isin(["best", "selected"])]
    return (marked if len(marked) else cells).iloc[0]


def factors(adapted: pd.DataFrame, settings: list[str]) -> list[str]:
    """Settings that have effects, the most asked-for first; scaling stands for alpha if that was crossed with rank."""
    there = {c for c in settings if adapted[c].nunique(dropna=False) > 1}
    if "lora.rank" in there and 1 < adapted[SCALING].nunique() < adapted["lora.alpha"].nunique():
        there = there - {"lora.alpha", "lora.scaling"} | {SCALING}
    return preferred(sorted(there), [METHOD, "lora.rank", SCALING, "lora.alpha", "lora.dropout", "lora.targets", LR])


def matrix(done: pd.DataFrame, value: str = "val_accuracy") -> pd.DataFrame:
    """A figure by cell id (rows) and seed (columns), NaN where there is no trial."""
    return done.pivot_table(index="cell", columns="seed", values=value, aggfunc="last")


def cells_table(
    done: pd.DataFrame, values: pd.DataFrame, result: Comparison, settings: list[str], resolution: float = 0.0
) -> pd.DataFrame:
    """One row per cell, best first: settings, ``n mean sd low high`` over seeds, comparison, ``mark``, costs, fronts.

    ``adjusted`` is the mean corrected for missing seeds; cells are sorted and compared by it. ``difference`` is cell
    minus best, with its simultaneous 95 % interval; ``difference_seeds`` and ``difference_pictures`` are the half
    widths of its two parts. ``vs_probe`` and ``vs_full``: cell minus the best cell of that baseline, paired by seed.
    Losses, where trials have them all, and costs are means over the
    cell's trials; ``d_brier`` and the like: that loss minus the best cell's, paired by seed, with its t interval.
    """
    first = done.drop_duplicates("cell").set_index("cell").loc[values.index]
    frame = first[["label", *settings, *_scaling_shown(first, settings)]].reset_index()
    if (sweeps := done.groupby("cell")["sweep"].agg(lambda names: ", ".join(sorted({*names})))).nunique() > 1:
        frame["sweep"] = sweeps[values.index].to_numpy()
    y, own = values.to_numpy(float), ["n", "mean", "sd", "low", "high"]
    frame[own] = pd.DataFrame([share_interval(row, resolution) for row in y])[own]
    frame["adjusted"] = np.where(result.compared, result.means, frame["mean"])
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
    frame["below"] = result.below

    for method, name in (("none", "vs_probe"), ("full", "vs_full")):
        rows = np.flatnonzero(first[METHOD] == method)
        if len(rows):
            base = rows[np.argmax(frame["mean"].to_numpy(float)[rows])]
            frame[name] = (values - values.iloc[base]).mean(axis=1).to_numpy()
            frame.loc[base, name] = math.nan
    for name in LOSSES if done["val_brier"].notna().any() else ():
        losses = matrix(done, f"val_{name}").reindex(values.index)
        frame[f"val_{name}"] = losses.mean(axis=1).to_numpy()
        if result.best is not None:
            paired = pd.DataFrame([t_interval(row) for row in (losses - losses.iloc[result.best]).to_numpy(float)])
            paired.loc[result.best] = math.nan
            frame[[f"d_{name}", f"d_{name}_low", f"d_{name}_high"]] = paired[["mean", "low", "high"]]
    costs = ["trainable_parameters", *(c for c in COSTS if c != "pack_size")]
    frame = frame.join(done.groupby("cell")[costs].mean(), on="cell")
    score = frame["adjusted"].to_numpy(float)
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
    columns = ["trial", "cell", "label", *shown, "seed", "status", "epoch"]
    known = [name for name in FIGURES if name.startswith("val") and trials[name].notna().any()]
    columns += dict.fromkeys((value, "val_accuracy", "val_loss", "train_loss", *known))
    columns += ["trainable_parameters", *COSTS, "error", "folder"]
    score = trials[value].where(trials["status"] == "completed")
    order = trials.assign(_score=score).sort_values(["_score", "trial"], ascending=[False, True]).index
    return trials.loc[order, columns].reset_index(drop=True)


def learning_rates(cells: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Each setting at its own best learning rate and at the shared one, side by side; empty with one rate only.

    ``rates`` says how many were tried, ``edge`` whether the best is the lowest or highest of them. The shared rate is,
    of those that most settings ran at (a few may be missing), the one with the best average over the settings that ran
    at all of them.
    """
    if LR not in settings or cells[LR].nunique() < 2:
        return pd.DataFrame()
    others = [c for c in settings if c != LR]
    groups = cells.assign(_group=cells.groupby(others, sort=False, dropna=False).ngroup() if others else 0)
    scores = groups.pivot_table(index="_group", columns=LR, values="mean")
    tried = scores.notna().sum()
    common = scores[tried.index[tried >= MOST_RAN * tried.max()]]
    everywhere = common.dropna()
    shared = (everywhere if len(everywhere) else common).mean().idxmax()
    best = groups.sort_values("mean", ascending=False, kind="stable").drop_duplicates("_group").set_index("_group")
    at = groups[groups[LR] == shared].set_index("_group").reindex(best.index)
    rates = groups.groupby("_group")[LR].agg(["nunique", "min", "max"]).loc[best.index]
    edge = (rates["nunique"] > 1) & ((best[LR] == rates["min"]) | (best[LR] == rates["max"]))
    shown = ("mean", "low", "high", "n")
    names = [cell_text(dict(row), others, "dora" in {*cells.get(METHOD, ())}) or "all" for _, row in best.iterrows()]
    columns = {"setting": names, "best_lr": best[LR]}
    columns |= {f"best_{name}": best[name] for name in shown} | {"rates": rates["nunique"], "edge": edge}
    columns |= {"shared_lr": shared} | {f"shared_{name}": at[name] for name in shown}
    return pd.DataFrame(columns, best.index).reset_index(drop=True)
