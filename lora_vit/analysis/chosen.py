"""The trial that a summary chooses: how it was asked for, what it confuses, and what would settle what is open."""

import contextlib
import json
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from lora_vit.analysis.power import seeds_needed
from lora_vit.analysis.summary import Summary
from lora_vit.records import PREDICTIONS
from lora_vit.terminal import from_here

MOST = 20  # classes of a matrix; of more, so many pairs
GAPS = (0.005, 0.01, 0.02, 0.05)  # differences that may matter, where none is given as a margin


def typed(summary: Summary) -> str:
    """The commands that asked for the trials, one a line; of a single run, what makes it again. Empty: not known."""
    if not summary.command:
        with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError):
            given = yaml.safe_load((summary.chosen / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
            return shlex.join(["python", "-m", "lora_vit.train", *given])
    return summary.command or ""


def again(summary: Summary, *settings: str) -> str:
    """The command of the sweep with other seeds and settings, into the same folder; empty where there is not one."""
    if not summary.command or "\n" in summary.command:
        return ""
    keys = {"seed", *(setting.partition("=")[0] for setting in settings)}
    words = [word for word in shlex.split(summary.command) if word.partition("=")[0] not in keys]
    if not any(word.startswith(("sweep.name=", "hydra.sweep.dir=")) for word in words):
        words += [f"hydra.sweep.dir={word}" for word in shlex.split(from_here(Path(summary.folders[0])))]
    return shlex.join([*words, *settings])


def settles(summary: Summary) -> tuple[float, int] | None:
    """The least difference that seeds can find with 80 % power, and how many of each cell; None where none can."""
    c, gaps = summary.comparison, GAPS if summary.margin is None else (summary.margin,)
    needed = ((gap, seeds_needed(gap, c.sd, int(c.compared.sum()), c.pictures)) for gap in gaps if c.best is not None)
    return next(((gap, seeds) for gap, seeds in needed if seeds is not None), None)


def confusion(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Val pictures by class (rows) and predicted class, and what is confused most; empty where nothing is known."""
    try:
        names = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))["class_names"]
        counts = np.zeros((len(names), len(names)), dtype=int)
        with np.load(folder / PREDICTIONS) as arrays:
            np.add.at(counts, (arrays["val.labels"], arrays["val.predicted"]), 1)
    except Exception:  # numpy and zipfile raise many kinds where a file is cut off; the claims say what they lack
        return pd.DataFrame(), pd.DataFrame()
    wrong = np.where(np.eye(len(names), dtype=bool), 0, counts)
    worst = np.argsort(-wrong, axis=None, kind="stable")[: min(MOST, np.count_nonzero(wrong))]
    places = [divmod(int(place), len(names)) for place in worst]
    pairs = [(names[i], names[j], str(wrong[i, j]), str(counts[i].sum())) for i, j in places]
    return pd.DataFrame(counts, names, names), pd.DataFrame(pairs, columns=["class", "taken for", "pictures", "of"])
