"""What people read of a configuration: names of cells and settings, values as a person writes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from made_up_records import make_config

from lora_vit.config.names import METHOD, flat, names, short_names, value_text, varying


def name_of(*cells: dict[str, object]) -> list[str]:
    """The names of these cells together, by the settings that they change; their ids are A, B, ..."""
    rows = {"ABCDEF"[i]: flat(make_config(changes)) for i, changes in enumerate(cells)}
    return list(names(rows, varying(rows.values())).values())


@pytest.mark.parametrize(
    ("cells", "found"),
    [
        ([{"optimizer.lora_b_lr_ratio": 4.0}, {}, {"lora.method": "none"}],
         ["lora_b_lr_ratio 4", "lora_b_lr_ratio 1", "linear probe"]),
        ([{"optimizer.lora_b_lr_ratio": 4.0}, {"lora.method": "full"}], ["rank 4", "full fine-tuning"]),
        ([{"lora.rank": 8}], ["rank 8"]),
        ([{"lora.rank": 8, "optimizer.lr": 2e-3}, {"lora.rank": 8}], ["lr 0.002", "lr 0.001"]),
        ([{"lora.rank": 8, "lora.alpha": 16.0, "optimizer.lr": 2e-3}, {}],
         ["rank 8, alpha 16, lr 0.002", "rank 4, alpha 32, lr 0.001"]),
        ([{"lora.rank": 1}, {"lora.method": "none"}, {"lora.method": "full"}],
         ["rank 1", "linear probe", "full fine-tuning"]),
        ([{"lora.rank": 8, "lora.method": "dora"}, {"lora.rank": 8}, {"lora.method": "dora"}],
         ["DoRA, rank 8", "LoRA, rank 8", "DoRA, rank 4"]),
        ([{"lora.method": "dora"}, {}], ["DoRA", "LoRA"]),
        ([{"lora.method": "none", "optimizer.lr": 2e-3}, {"lora.rank": 1}, {"lora.rank": 2}],
         ["linear probe, lr 0.002", "rank 1, lr 0.001", "rank 2, lr 0.001"]),
        ([{"lora.targets": targets.split()} for targets in ("v q", "fc2 fc1", "k q o v", "fc1")] + [{}],
         ["targets q v", "targets mlp", "targets attention", "targets fc1", "targets all"]),
        ([{"model.weights": None}, {}], ["weights –", "weights GLYPHS_V1"]),
        ([{"optimizer.lr": 0.12345678}, {"optimizer.lr": 0.12345679}, {}], ["lr 0.123457 [A]", "lr 0.123457 [B]",
                                                                             "lr 0.001"]),
        ([{"data.root": "/a"}, {"data.root": "/b"}], ["rank 4 [A]", "rank 4 [B]"]),  # a folder is no setting
    ],
)  # fmt: skip
def test_cells_are_named_by_the_settings_in_which_they_differ(cells, found):
    assert name_of(*cells) == found


def test_the_most_interesting_settings_come_first():
    cells = [
        {"lora.rank": 1, "lora.dropout": 0.1, "optimizer.lr": 1e-4, "model.weights": "A", "data.batch_size": 10},
        {"lora.rank": 1, "lora.alpha": 1.0, "lora.scaling": "rslora", "trainer.epochs": 6, "optimizer.eps": 1e-6},
        {"lora.method": "none", "lora.targets": None, "optimizer.betas": [0.9, 0.99]},
    ]
    assert varying(flat(make_config(changes)) for changes in cells) == [
        METHOD, "lora.alpha", "lora.scaling", "lora.dropout", "trainer.epochs", "optimizer.betas", "optimizer.eps",
        "optimizer.lr", "data.batch_size", "model.weights",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"lora.rank": 2.0}, {"lora.rank": math.nan}, {"lora.rank": None}], []),  # what a baseline leaves empty
        ([{"lora.rank": 2}, {"lora.rank": 2.0}], []),
        ([{"model.weights": "A"}, {"model.weights": None}], ["model.weights"]),
    ],
)
def test_what_is_missing_differs_outside_of_adapters_alone(rows, found):
    assert varying(rows) == found


def test_settings_are_flat_and_readable_without_what_does_not_decide_the_numbers():
    got = flat({**make_config({"lora.blocks": [1, 2]}), "note": {"key": 1}})
    assert (got["lora.blocks"], got["optimizer.betas"]) == ("1 2", "0.9 0.999")
    assert not {"data.root", "trainer.resume", "note.key", "seed"} & set(got)
    assert flat(make_config({}))["lora.blocks"] == "all"
    assert flat(make_config({"lora.method": "full"}))["lora.blocks"] is None


def test_short_names_where_they_are_unique():
    assert short_names(["lora.rank", "model.name", "data.name", "model.image_size", "data.image_size", "seed"]) == {
        "lora.rank": "rank", "model.name": "model", "data.name": "data", "model.image_size": "model.image_size",
        "data.image_size": "data.image_size", "seed": "seed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "–"), (np.float64("nan"), "–"), (0.1, "0.1"), (np.float64(0.5), "0.5"), (1e-5, "1e-05"),
     (1 / 3, "0.333333"), (1234567, "1234567"), (32.0, "32"), ("q v", "q v"), (True, "True")],
)  # fmt: skip
def test_values_as_a_person_writes_them(value, text):
    assert value_text(value) == text
