"""Trials and cells as DataFrames. Metrics are fractions or losses here; ``texts`` says them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lora_vit.analysis.load import COSTS
from lora_vit.analysis.stats import Comparison, t_interval
from lora_vit.analysis.summary import Metric, Raced
from lora_vit.config import nearest
from lora_vit.errors import RecordError

LR, METHOD, SCALING = "optimizer.lr", "lora.method", "lora.effective_scaling"
SECTIONS = ("model", "data", "optimizer", "lora", "trainer")
FACTS = ("data.fingerprint", "data.classes", "data.train", "data.val", "data.test", SCALING)
BASELINES = {"none": "linear probe", "full": "full fine-tuning"}
MOST_RAN = 0.75  # of the settings at the commonest learning rate, for a rate to count as shared
CELL_COSTS = ("trainable_parameters", *(c for c in COSTS if c != "pack_size"))


COMPARABLE = {
    m.name: m
    for m in (
        Metric("val_accuracy", "Val accuracy", True, 1),
        Metric("val_loss", "Val loss", False, -1),
        Metric("train_loss", "Training loss", False, -1),
    )
}


RACED_BY = COMPARABLE["val_accuracy"]
"""What decides a race."""


def metric(name: str) -> Metric:
    """The metric of that name. Raises RecordError; test metrics are refused with their reason."""
    if name in COMPARABLE:
        return COMPARABLE[name]
    if name.startswith("test"):
        raise RecordError(
            f"--metric {name}: cells are chosen on val only; the report shows test accuracy of the chosen cell"
        )
    raise RecordError(f"--metric {name} is unknown{nearest(name, list(COMPARABLE))} (one of: {', '.join(COMPARABLE)})")


def _is_setting(column: str) -> bool:
    return column.split(".")[0] in SECTIONS and "." in column and column not in FACTS


def varying(trials: pd.DataFrame) -> list[str]:
    """Settings that differ between trials. What a baseline leaves empty (its rank) does not make one differ."""
    found = []
    for c in filter(_is_setting, trials.columns):
        lora_only = c.startswith("lora.") and c != METHOD
        if trials[c].nunique(dropna=lora_only) > 1:
            found.append(c)
    found.sort(key=lambda c: (SECTIONS[::-1].index(c.split(".")[0]), c))
    return preferred(found, [METHOD, "lora.rank", "lora.alpha", "lora.scaling", "lora.dropout"])


def preferred(columns: Sequence[str], first: list[str]) -> list[str]:
    """The columns, those that ``first`` names before the others, in its order."""
    return sorted(columns, key=lambda c: first.index(c) if c in first else len(first))


def _last_part(column: str) -> str:
    return column.split(".")[0] if column.endswith(".name") else column.rsplit(".", 1)[-1]


def short_names(columns: Sequence[str]) -> dict[str, str]:
    """Dotted setting -> short name for display: the last part where it is unique, ``model`` for ``model.name``."""
    counts = Counter(map(_last_part, columns))
    return {c: _last_part(c) if counts[_last_part(c)] == 1 else c for c in columns}


def aliases(columns: Sequence[str]) -> dict[str, str]:
    """Every name by which a user may call a column: its own, and the last part where only one has it."""
    return {**{short: c for c, short in short_names(columns).items()}, **{c: c for c in columns}}


def averaged(trials: pd.DataFrame, metric: Metric) -> pd.Series:
    """Which trials count: completed ones that have the metric."""
    return (trials["status"] == "completed") & np.isfinite(trials[metric.name].astype(float))


def best_cell(cells: pd.DataFrame) -> pd.Series:
    """The cell marked best or selected; the first one where no cells could be compared."""
    marked = cells[cells["mark"].isin(["best", "selected"])]
    return marked.iloc[0] if len(marked) else cells.iloc[0]


def value_text(value: object) -> str:
    """A setting's value as a person writes it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, (float, np.floating)):
        return f"{value:.6g}"
    return str(value)


def labels(trials: pd.DataFrame, settings: list[str]) -> pd.Series:
    """A name per trial's cell: ``rank 8, dropout 0.1``; baselines by their own name."""
    first = trials.drop_duplicates("cell").set_index("cell")
    text = {str(cell): cell_text(values, settings) or f"rank {value_text(values['lora.rank'])}"
            for cell, values in first.iterrows()}  # fmt: skip
    counts = Counter(text.values())
    return trials["cell"].map({cell: t if counts[t] == 1 else f"{t} [{cell}]" for cell, t in text.items()})


def cell_text(values: pd.Series, settings: list[str]) -> str:
    """The settings of one cell in words, without what a baseline leaves empty."""
    short = short_names(settings)
    base = BASELINES.get(str(values.get(METHOD)))
    shown = [c for c in settings if c != METHOD and not (base and c.startswith("lora.") and pd.isna(values[c]))]
    return ", ".join([*([base] if base else []), *(f"{short[c]} {value_text(values[c])}" for c in shown)])


def factors(adapted: pd.DataFrame, settings: list[str]) -> list[str]:
    """Settings for the model of main effects, the most asked-for first; scaling stands for alpha beside rank."""
    there = [c for c in settings if c != METHOD and adapted[c].nunique() > 1]
    scaled = "lora.rank" in there and SCALING in adapted and adapted[SCALING].nunique() > 1
    drop = {"lora.alpha", "lora.scaling"} if scaled else set()
    chosen = sorted([c for c in there if c not in drop] + ([SCALING] if scaled else []))
    return preferred(chosen, ["lora.rank", SCALING, "lora.alpha", "lora.dropout", "lora.targets", LR])


def matrix(done: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """The metric by cell id (rows) and seed (columns), NaN where there is no trial."""
    return done.pivot_table(index="cell", columns="seed", values=metric.name, aggfunc="last")


def cells_table(
    done: pd.DataFrame,
    values: pd.DataFrame,
    result: Comparison,
    metric: Metric,
    settings: list[str],
    resolution: float = 0.0,
) -> pd.DataFrame:
    """One row per cell, best first: settings, ``n mean sd low high`` over seeds, comparison, ``mark``, costs, fronts.

    ``values`` and ``result``: :func:`matrix` and the comparison of its rows. ``adjusted`` is the mean freed of which
    seeds are missing; cells are sorted and compared by it. ``difference`` is cell minus best;
    ``difference_low``/``_high`` its simultaneous 95 % interval. ``vs_probe``/``vs_full``: see
    :func:`_baseline_columns`. Costs are means over the cell's trials.
    """
    first = done.drop_duplicates("cell").set_index("cell").loc[values.index]
    frame = first[["label", *settings, *_scaling_shown(first, settings)]].reset_index()
    y, own = values.to_numpy(float), ["n", "mean", "sd", "low", "high"]
    frame[own] = pd.DataFrame([t_interval(row, resolution) for row in y])[own]
    frame["adjusted"] = np.where(result.compared, metric.sign * result.means, frame["mean"])
    frame["difference"] = -metric.sign * result.difference
    frame["difference_low"] = frame["difference"] - result.half
    frame["difference_high"] = frame["difference"] + result.half
    frame["p_worse"], frame["worse"] = result.p_worse, result.worse
    frame["p_candidate"], frame["candidate"] = result.p_candidate, result.candidate
    frame["mark"] = _marks(result)
    frame["below"] = result.below
    _baseline_columns(frame, y, first[METHOD].to_numpy(), metric, resolution)
    frame = frame.join(done.groupby("cell")[list(CELL_COSTS)].mean(), on="cell")
    score = metric.sign * frame["adjusted"].to_numpy(float)
    for name, cost in (("pareto_parameters", "trainable_parameters"), ("pareto_seconds", "seconds")):
        frame[name] = pareto_front(score, frame[cost].to_numpy(float))
    return frame.iloc[np.argsort(-score, kind="stable")].reset_index(drop=True)


def by_race(cells: pd.DataFrame, values: pd.DataFrame, raced: Raced) -> pd.DataFrame:
    """The cells table of a race: marks, order and differences are the race's; claims of fixed sweeps go.

    ``mark``: selected, left (in the race, or not resolved), out, failed, not raced; ``seeds_raced``: when it left.
    ``difference``: over the seeds that it shares with the first row.
    """
    race, frame = raced.race, cells.set_index("cell")
    claims = ["difference_low", "difference_high", "p_worse", "p_candidate"]
    frame = frame.drop(columns=["worse", "candidate"]).assign(adjusted=frame["mean"], **dict.fromkeys(claims, math.nan))
    frame["mark"], frame["seeds_raced"] = "not raced", 0
    for i, cell in enumerate(raced.cells):
        if cell in frame.index:
            out = race.exits.get(i)
            mark = ("selected" if i == race.selected else "left") if out is None else "out"
            frame.loc[cell, "mark"] = "failed" if out is not None and out.behind is None else mark
            frame.loc[cell, "seeds_raced"] = race.seeds_of(i)
    rank = frame["mark"].map({"selected": 0, "left": 1, "out": 2, "failed": 3, "not raced": 4})
    frame = frame.assign(rank=rank, seeds=-frame["seeds_raced"], score=-frame["mean"])
    frame = frame.sort_values(["rank", "seeds", "score"], kind="stable").drop(columns=["rank", "seeds", "score"])
    frame["difference"] = (values.loc[frame.index] - values.loc[frame.index[0]]).mean(axis=1)
    return frame.reset_index()


def _scaling_shown(first: pd.DataFrame, settings: list[str]) -> list[str]:
    moved = {"lora.rank", "lora.alpha", "lora.scaling"} & set(settings)
    return [SCALING] if moved and first[SCALING].nunique() > 1 else []


def _marks(result: Comparison) -> np.ndarray:
    """best | candidate | worse | open (neither shown worse nor a candidate) | no verdict (one seed)."""
    marks = np.where(result.worse, "worse", np.where(result.candidate, "candidate", "open"))
    marks = np.where(result.compared, marks, "no verdict").astype(object)
    if result.best is not None:
        marks[result.best] = "best"
    return marks


def _baseline_columns(
    frame: pd.DataFrame, y: np.ndarray, methods: np.ndarray, metric: Metric, resolution: float
) -> None:
    """``vs_probe`` and ``vs_full``: cell minus the best cell of that baseline, paired by seed, with its t interval."""
    for method, name in (("none", "vs_probe"), ("full", "vs_full")):
        rows = np.flatnonzero(methods == method)
        if len(rows):
            base = rows[np.argmax(metric.sign * frame["mean"].to_numpy(float)[rows])]
            paired = pd.DataFrame([t_interval(row - y[base], resolution) for row in y])[["mean", "low", "high"]]
            paired.loc[base] = math.nan
            frame[[name, f"{name}_low", f"{name}_high"]] = paired


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
    columns = ["trial", "cell", "label", *settings, *_scaling_shown(trials, settings), "seed", "status", "epoch"]
    columns += ["val_accuracy", "val_loss", "train_loss", "trainable_parameters", *COSTS, "error", "folder"]
    score = metric.sign * trials[metric.name].where(trials["status"] == "completed")
    order = trials.assign(_score=score).sort_values(["_score", "trial"], ascending=[False, True]).index
    return trials.loc[order, columns].reset_index(drop=True)


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
    number = cells.groupby(others, sort=False, dropna=False).ngroup() if others else 0
    groups = cells.assign(_group=number, _score=metric.sign * cells["mean"])
    scores = groups.pivot_table(index="_group", columns=LR, values="_score")
    tried = scores.notna().sum()
    common = scores[tried.index[tried >= MOST_RAN * tried.max()]]
    everywhere = common.dropna()
    shared = (everywhere if len(everywhere) else common).mean().idxmax()
    rows = []
    for _, group in groups.sort_values("_score", ascending=False, kind="stable").groupby("_group", sort=False):
        best, at = group.iloc[0], group[group[LR] == shared]
        rates = sorted(group[LR].unique())
        row = {"setting": cell_text(best, others) or "all", "best_lr": best[LR]}
        row.update({f"best_{k}": best[k] for k in ("mean", "low", "high", "n")})
        row.update(rates=len(rates), edge=len(rates) > 1 and best[LR] in (rates[0], rates[-1]), shared_lr=shared)
        row.update({f"shared_{k}": at.iloc[0][k] if len(at) else math.nan for k in ("mean", "low", "high", "n")})
        rows.append(row)
    return pd.DataFrame(rows)


def pivot(cells: pd.DataFrame, trials: pd.DataFrame, wanted: tuple[str, str]) -> pd.DataFrame:
    """Mean over cells of one setting (rows) against another (columns)."""
    known = aliases([c for c in trials.columns if _is_setting(c) or c == SCALING])
    for name in wanted:
        if name not in known:
            raise RecordError(f"--pivot {name}: there is no such setting{nearest(name, sorted(known))}")
    row, column = (known[name] for name in wanted)
    if row == column:
        raise RecordError(f"--pivot {' '.join(wanted)}: give two different settings")
    first = trials.drop_duplicates("cell").set_index("cell")
    frame = cells.assign(_row=cells["cell"].map(first[row]), _column=cells["cell"].map(first[column]))
    result = frame.pivot_table(index="_row", columns="_column", values="mean", aggfunc="mean")
    if result.empty:
        raise RecordError(f"--pivot {' '.join(wanted)}: no cell has both")
    return result.rename_axis(index=wanted[0], columns=wanted[1])
