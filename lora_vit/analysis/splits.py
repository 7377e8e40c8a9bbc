"""Repeated splits: trials that differ in ``data.split_seed`` are repeats of one cell, on other pictures.

The seeds of a split share its pictures: it has one value, their mean, and is the block. The spread over splits holds
what other pictures change; but splits of one data set overlap, so that J are worth ``J / (1 + J n_val / n_train)``
(Nadeau & Bengio, 2003).
"""

import pandas as pd

from lora_vit.config import IDENTITY


def grouped(trials: pd.DataFrame) -> tuple[pd.DataFrame, float, list[str]]:
    """The trials with a column ``split`` and a cell's id in its first split for all of them; n_val / n_train; a remark.

    As they were, 0.0 and none where no split is repeated, val is given, or the split seed changes nothing.
    """
    cells = trials.sort_values("data.split_seed").drop_duplicates("cell").set_index("cell", drop=False)
    same = [cells[c].map(str) for c in IDENTITY if c in cells and c != "data.split_seed"]
    first = cells["cell"].groupby(same).transform("first")
    together = trials.assign(cell=trials["cell"].map(first), split=trials["data.split_seed"])
    done = together[together["status"] == "completed"]
    splits = done.groupby("cell")[["split", "data.fingerprint"]].nunique().min(axis=1)
    overlap = float((done["data.val"].astype(float) / done["data.train"].astype(float)).max())
    if done["data.val_fraction"].isna().any() or not (splits.max() > 1 and overlap > 0):
        return trials, 0.0, []
    counts = splits, done.groupby(["cell", "split"])["seed"].nunique()
    n, each = (" to ".join(map(str, sorted({x.min(), x.max()}))) for x in counts)
    text = (f"{n} splits of the data, {each} seeds in each. The seeds of a split are averaged into one value. Claims "
            "compare these values, so they hold for other splits of such data. Splits overlap: these are worth "
            f"{1 / (1 / splits.max() + overlap):.2g} independent ones (val / train: {overlap:.2g}).")  # fmt: skip
    return together, overlap, [text]
