"""Repeated splits: numbers against the corrected t test of Nadeau and Bengio (2003), and which trials are repeats."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from made_up_records import IMAGES, make_sweep
from scipy import stats

from lora_vit.analysis.core import summarize
from lora_vit.errors import RecordError

TRAIN = 7200
CELLS = [{"lora__rank": 2}, {"lora__rank": 8}]
RNG = np.random.default_rng(3)
Y = np.round(IMAGES * (0.9 + np.array([0, 0.06])[:, None, None] + RNG.normal(0, 0.01, (2, 4, 2)))) / IMAGES
"""Accuracies [cells, splits, seeds]."""


def splits(folder: Path, y: np.ndarray, same_files: bool = False, **more: object) -> Path:
    for split in range(y.shape[1]):
        facts = {"train": TRAIN, "fingerprint": "f" if same_files else f"f{split}"}
        make_sweep(folder, CELLS, y[:, split], data__split_seed=split, edit=lambda r, f=facts: r.data.update(f), **more)
    return folder


def corrected(x: np.ndarray) -> float:
    """Half a 95 % interval of a mean over splits."""
    n = len(x)
    return float(stats.t.ppf(0.975, n - 1) * np.sqrt((1 / n + IMAGES / TRAIN) * x.var(ddof=1)))


def test_intervals_are_those_of_the_corrected_t_test(tmp_path):
    summary = summarize(splits(tmp_path, Y))
    assert summary.settings == ["lora.rank"]
    best, other = (summary.cells.iloc[i] for i in (0, 1))
    assert (best["label"], best["n"], other["mark"]) == ("rank 8", 4, "worse")
    assert summary.trials["split"].nunique() == 4
    ids = summary.trials.query("label == 'rank 8' and seed == 0")["trial"]
    assert summary.chosen.name == ids.min()  # not the best of the splits
    means = Y.mean(2)  # over the seeds of a split
    half = corrected(means[1] - means[0])
    apart = means.mean(1)[1] - means.mean(1)[0]
    assert [other["difference_low"], other["difference_high"]] == pytest.approx([-apart - half, -apart + half])
    effect = summary.effects.table.iloc[0]
    assert [effect["low"], effect["high"]] == pytest.approx([apart - half, apart + half])
    for cell, own in ((best, means[1]), (other, means[0])):
        ends = own.mean() - corrected(own), min(own.mean() + corrected(own), 1.0)
        assert [cell["sd"], cell["low"], cell["high"]] == pytest.approx([own.std(ddof=1), *ends])
    assert (summary.test.high - summary.test.low) / 2 == pytest.approx(corrected(means[1] - 0.01))
    assert (summary.pictures, summary.comparison.complete) == (0, True)
    assert "over 4 splits" in summary.verdict
    assert summary.warnings[0].startswith("4 splits of the data, 2 seeds in each")
    assert "worth 2.9 independent ones (val / train: 0.1)" in summary.warnings[0]
    assert not re.search("fingerprints|predictions", " ".join(summary.warnings))


def test_power_is_that_of_the_corrected_test(tmp_path):
    found, takes = summarize(splits(tmp_path, Y)).power()
    sd = np.sqrt((Y.mean(2)[1] - Y.mean(2)[0]).var(ddof=1) * (1 / 4 + IMAGES / TRAIN))
    away = float(found.split()[0]) / 100 / sd
    critical = stats.t.ppf(0.975, 3)
    assert 1 - stats.nct.cdf(critical, 3, away) == pytest.approx(0.8, abs=0.01)
    assert takes == "more than 400 splits per cell"  # half a point is below what stays with any number of splits


def test_what_is_missing_is_left_out_of_means(tmp_path):
    y = Y.copy()
    y[0, 0] = y[1, 2, 1] = np.nan  # a cell lacks the first split, the other a seed
    summary = summarize(splits(tmp_path, y))
    assert summary.cells["label"].tolist() == ["rank 8", "rank 2"]
    assert summary.cells["n"].tolist() == [4, 3]
    assert summary.warnings[0].startswith("3 to 4 splits of the data, 1 to 2 seeds in each")
    d = y[1, 1:].copy()
    d[1] = d[1, 0]
    d = d.mean(1) - y[0, 1:].mean(1)  # of the three common splits
    error = np.sqrt(d.var(ddof=1) / 2 * (2 / 3 + 2 * IMAGES / TRAIN))  # as without overlap, where one split is alone
    assert summary.cells["difference"][1] == pytest.approx(-d.mean())
    assert summary.cells["difference_seeds"][1] == pytest.approx(stats.t.ppf(0.975, 2) * error)


@pytest.mark.parametrize(
    ("hidden", "more"),
    [
        ([(0, 0), (1, 1), (1, 2), (1, 3), (0, 2), (0, 3)], {}),  # each cell has a split of its own
        ([], {"same_files": True}),  # the split seed changes nothing
        ([], {"data__val_fraction": None}),  # val is given
    ],
)
def test_other_trials_of_several_split_seeds_are_refused(tmp_path, hidden, more):
    y = Y.copy()
    for cell, split in hidden:
        y[cell, split] = np.nan
    with pytest.raises(RecordError, match=r"different data\.split_seed"):
        summarize(splits(tmp_path, y, **more))
