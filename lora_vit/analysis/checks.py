"""Remarks beside the numbers: refusals, warnings, and trials that did not finish."""

import math
from collections.abc import Iterator

import pandas as pd

from lora_vit.analysis.pictures import Sums
from lora_vit.analysis.stats import Comparison
from lora_vit.analysis.tables import FACTS, SCALING, averaged
from lora_vit.config import ADAPTED
from lora_vit.config.names import CUT, LR, METHOD, value_text
from lora_vit.errors import RecordError
from lora_vit.records import NO_TEST

VAL_SET = tuple(f"data.{name}" for name in (  # what decides which images a trial is validated on
    "name", "split_seed", "val_fraction", "test_fraction", "official_val", "val", "classes", "content",
))  # fmt: skip
_SAME = {
    "environment.commit": "code versions",
    "environment.versions": "library versions",
    "environment.precision": "precisions",
    "data.train": "numbers of training images",
    "data.fingerprint": "data fingerprints",
    "trainer.epochs": "numbers of epochs (unequal budgets)",
}


def refuse(trials: pd.DataFrame) -> None:
    """Raise RecordError if the trials were not validated on the same images."""
    counted = trials[trials["status"] == "completed"]
    for column in VAL_SET:
        null = None if column in FACTS else "null"  # of a fact that is not known nothing is counted
        counts = counted[column].map(lambda v, null=null: null if pd.isna(v) else v).value_counts()
        if len(counts) > 1 and not (column == "data.split_seed" and "split" in counted):
            told = ", ".join(f"{value_text(v)}: {n} trials" for v, n in counts.items())
            usual = counts.drop("null", errors="ignore").index[0]  # no condition can name null
            quoted = f"'{usual}'" if isinstance(usual, str) else value_text(usual)
            raise RecordError(
                f"trials with different {column} ({told}) were validated on different images and cannot be compared: "
                f'choose with --where "{column} == {quoted}"'
            )
    of_training = (*FACTS, "data.batch_size", "data.augment", "data.cache_size")
    content = [c for c in counted.columns if c.startswith("data.") and c not in of_training]
    same = counted.groupby([counted[c].map(str) for c in content])["data.fingerprint"].nunique()
    if (same > 1).any():
        first = counted["data.fingerprint"].value_counts().index[0]
        raise RecordError(
            "trials of one data config have different data fingerprints: the files changed between the runs; "
            f"choose with --where \"data.fingerprint == '{first}'\""
        )


def unfinished(trials: pd.DataFrame, value: str = "val_accuracy") -> pd.DataFrame:
    """Trials that are not in the averages, each with why."""
    rows = []
    for _, r in trials[~averaged(trials, value)].iterrows():
        reason = f"no {value}" if r["status"] == "completed" else str(r["error"])
        if not math.isnan(r["error_step"]):
            reason += f" (step {int(r['error_step'])})"
        rows.append([*r[["trial", "label", "seed", "status", "epoch", value]], reason])
    table = pd.DataFrame(rows, columns=["trial", "label", "seed", "status", "epoch", "value", "reason"])
    return table.sort_values(["status", "label", "seed"], ignore_index=True)


def environment(done: pd.DataFrame) -> pd.DataFrame:
    """Each fact of the environment and data with its values and how many trials have it."""
    data = ("name", "split_seed", "fingerprint", "train", "val", "test")
    machine = ("commit", "dirty", "versions", "precision", "device", "host", "world_size")
    columns = [*(f"data.{name}" for name in data), *(f"environment.{name}" for name in machine)]
    rows = [(column, *row) for column in columns for row in done[column].map(value_text).value_counts().items()]
    return pd.DataFrame(rows, columns=["fact", "value", "trials"])


def warnings(
    done: pd.DataFrame, comparison: Comparison, edges: list[bool], left_out: pd.DataFrame
) -> Iterator[str]:
    """Lines for the terminal, the tables and the report, the weightiest first."""
    adapted = done[done[METHOD].isin(ADAPTED)]
    if moved := [c for c in ("lora.rank", "lora.alpha", "lora.scaling") if adapted[c].nunique() > 1]:
        yield from _learning_rate(adapted, moved, edges)
    if cuts := done.loc[done[METHOD].str.contains(CUT), "cell"].nunique():
        yield f"{cuts} cells were cut from a higher rank, not trained at theirs: they rise and fall with its seeds."
    for column, what in _SAME.items():
        counts = done[column].value_counts().sort_index().sort_values(ascending=False, kind="stable")
        if len(counts) > 1 and not (column == "data.fingerprint" and "split" in done):
            shown = ", ".join(f"{value_text(v)[:60]} ({n})" for v, n in counts.head(3).items())
            more = f" and {len(counts) - 3} more" if len(counts) > 3 else ""
            yield f"The trials have different {what}: {shown}{more}."
    yield from (f"Left out of the data: {told}." for told in done["data.left_out"].unique() if told)
    if (done["data.test"] == 0).all():
        yield f"{NO_TEST.capitalize()}."
    if (done["environment.dirty"] == True).any():  # noqa: E712  (None and missing are not True)
        yield "Some trials ran with uncommitted changes in the code."
    if (devices := done["environment.device"].nunique()) > 1:
        yield f"The trials ran on {devices} kinds of device: seconds, images/s and memory do not compare."
    elif done["pack_size"].nunique() > 1:
        sizes = ", ".join(map(value_text, sorted(done["pack_size"].dropna().unique())))
        yield (f"The trials ran in packs of different size ({sizes}): a trial's seconds are its share of its pack's, "
               "and memory is the whole pack's.")  # fmt: skip
    if (c := comparison).wide:
        p = "" if math.isnan(c.spread_p) else f" (p = {c.spread_p:.2g})"
        yield (f"{c.seeds} seeds cannot show that all cells spread equally{p}: the wider error is used. More seeds "
               "would sharpen the comparison.")  # fmt: skip
    if not c.blocked:
        yield "The cells do not share seeds: comparisons are unpaired, and the seeds' own spread blurs them."
    elif not c.complete:
        yield "Some seeds are missing in some cells: comparisons use means adjusted for the seeds that each cell has."
    if len(left_out):
        counts = left_out["status"].mask(left_out["status"] == "completed", left_out["reason"]).value_counts()
        told = ", ".join(f"{n} {why}" for why, n in counts.items())
        yield f"Not in the averages: {told} (listed under 'Not averaged')."
    tiny = done[done["data.name"] == "tiny_imagenet"]
    if tiny["model.weights"].astype(str).str.contains("IMAGENET1K").any():
        yield ("Tiny-ImageNet's classes are a subset of ImageNet-1k's, on which these weights were trained: the "
               "accuracies say little about classes that the model has never seen.")  # fmt: skip


def looked(earlier: list[list[int]], alpha: float) -> Iterator[str]:
    """A line that says which look at a growing sweep this is, and what its claims may err."""
    if earlier:
        told = ", then ".join(f"{trials} with seeds {first} to {last}" for trials, first, last in earlier)
        yield (f"This is look {len(earlier) + 1}: cells got more seeds when results were there (trials: {told}). Marks "
               f"and differences now err in {100 * alpha:.2g} %, all looks together in at most 6 %.")  # fmt: skip


def collapsed(cells: pd.DataFrame, unstable: dict[str, str]) -> Iterator[str]:
    """A line that names the cells that have collapsed, and what that means for the others."""
    for _, cell in cells[cells["cell"].isin(unstable)].iterrows():
        verdict = "it gets no verdict" if cell["mark"] == "unstable" else "the race counts it like any other"
        yield f"{cell['label']} collapsed {unstable[cell['cell']]}: {verdict}."
    if unstable:
        n = int(cells["n"].max())
        rate = f"{100 * (1 - 0.05 ** (1 / n)):.0f} %"
        yield f"Claims are about seeds that do not collapse. {n} without a collapse leave a rate of up to {rate}."


def unseen(sums: Sums, trials: int) -> Iterator[str]:
    """A line where predictions are missing: what the claims leave out."""
    if sums.without:
        cells = len({cell for cell, _ in sums.without} - {*sums.cells})
        left_out = f"differences of {cells} cells count seeds alone" if cells else "their cells' other seeds count"
        left_out = left_out if sums.cells else "all claims count seeds alone and are about these val pictures"
        yield f"Of {len(sums.without)} of {trials} trials no predictions count ({sums.without[0][1]}): {left_out}."


def _learning_rate(adapted: pd.DataFrame, moved: list[str], edges: list[bool]) -> Iterator[str]:
    """Warn of differences that the learning rate may explain instead of the settings that moved."""
    names = " and ".join(c.split(".")[1] for c in moved)
    if adapted[LR].nunique() < 2:
        yield (f"Only one learning rate ({value_text(adapted[LR].iloc[0])}) was tried: it may suit some values of "
               f"{names} better than others, so an effect may be that of the learning rate. Sweep optimizer.lr "
               "too.")  # fmt: skip
    elif adapted.groupby(moved)[LR].nunique().max() < 2:
        yield (f"Each {names} was tried at one learning rate, not all at the same: their effects cannot be told apart. "
               "Try each at several rates.")  # fmt: skip
    if any(edges):
        yield (f"For {sum(edges)} of {len(edges)} settings the best learning rate is the lowest or highest tried: "
               "rates beyond it may be better.")  # fmt: skip
    if "lora.rank" in moved and "lora.alpha" not in moved and adapted[SCALING].nunique() > 1:
        yield ("alpha is the same for every rank, so the effective scaling falls as the rank rises: the effect of rank "
               "includes that of scaling.")  # fmt: skip
