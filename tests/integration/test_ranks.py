"""Lower ranks without training again: what a cut leaves works everywhere, and stands in the sweep's tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sweeps import sweep_of, trial_of

from lora_vit import api, cut, trained
from lora_vit.analysis import plots
from lora_vit.analysis.core import summarize
from lora_vit.config import from_dict, trial_id
from lora_vit.lora.adapter import read_adapter
from lora_vit.lora.inject import chosen_places
from lora_vit.records import PREDICTIONS, read_record
from lora_vit.sweep.worker import work
from lora_vit.trained import TrainedModel

RANK = 4
SMALL = {"trainer.epochs": 1, "optimizer.lr": 3e-2, "trainer.precision": "fp32"}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Two seeds of rank 4, one of them with DoRA, and one of rank 2."""
    folder = tmp_path_factory.mktemp("cut") / "sweep"
    cells = [{"lora.rank": RANK}, {"lora.rank": RANK, "seed": 1}, {"lora.rank": RANK, "lora.method": "dora"},
             {"lora.rank": 2, "lora.alpha": 16.0}]  # fmt: skip
    folder.mkdir()
    sweep_of(folder, [trial_of({**SMALL, **cell}) for cell in cells])
    work(folder)
    return folder


@pytest.fixture(scope="module")
def trials(sweep) -> dict[tuple[str, int, int], Path]:
    """Folders by method, rank and seed, before anything is cut."""
    found = {}
    for path in sorted(sweep.glob("*/record.json")):
        config = read_record(path.parent).config
        found[config["lora"]["method"], config["lora"]["rank"], config["seed"]] = path.parent
    return found


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_cut_adapter_is_bound_merged_and_exported(trials, tmp_path, method, call):
    """Merged, it is the base with torch's SVD of the dense update; each export checks its logits itself."""
    folder = trials[method, RANK, 0]
    code, said, _ = call("cut", folder, "--rank", "2", "--out", tmp_path / "small")
    assert (code, "lora_vit.evaluate" in said) == (0, True)
    whole, small = read_adapter(folder), read_adapter(tmp_path / "small")
    record = read_record(tmp_path / "small")
    assert (record.config["lora"]["rank"], record.config["lora"]["cut"]) == (2, "4")
    assert small.card["effective_scaling"] == whole.card["effective_scaling"] == from_dict(
        record.config).lora.effective_scaling()  # fmt: skip
    sizes = {name: tensor.numel() for name, tensor in small.tensors.items()}
    assert record.parameters["adapter"] == sum(size for name, size in sizes.items() if ".lora_" in name)
    assert record.parameters["trainable"] == sum(sizes.values())
    assert record.parameters["head"] == read_record(folder).parameters["head"]
    model = from_dict(record.config).model
    base, merged = TrainedModel(folder, model, "cpu").base, TrainedModel(tmp_path / "small", model, "cpu").merged
    place = next(iter(chosen_places(base, whole.card["lora"]["targets"], whole.card["lora"]["blocks"])))
    part, name = 0, next(iter(place.names.values()))
    u, values, v = torch.linalg.svd((whole.tensors[f"{name}.lora_B"] @ whole.tensors[f"{name}.lora_A"]).double())
    weight = base.get_parameter(place.weight).chunk(len(place.names))[part].double()
    expected = weight + whole.card["effective_scaling"] * (u[:, :2] * values[:2] @ v[:2])
    if method == "dora":
        expected *= whole.tensors[f"{name}.lora_magnitude"][:, None] / expected.norm(dim=1, keepdim=True)
    ours = merged.get_parameter(place.weight).chunk(len(place.names))[part]
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)  # of fp32 factors and weights
    assert (expected - weight).abs().max() > 1e-3
    api.merge(tmp_path / "small", tmp_path / "small.safetensors")
    api.export(tmp_path / "small", "peft", tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 2


def test_what_cannot_be_cut_is_refused(trials, tmp_path, call):
    folder = trials["lora", RANK, 0]
    cut.cut(folder, 1, tmp_path / "one")
    for path, rank, said in (
        (folder, RANK, "has rank 4"),
        (folder, 0, "--rank 0"),
        (tmp_path / "one", 1, "rank 1, cut from 4"),
    ):
        code, _, error = call("cut", path, "--rank", str(rank), "--out", tmp_path / "new")
        assert (code, said in error, error.count("\n")) == (1, True, 1)
    code, _, error = call("cut", folder, "--rank", "1", "--out", tmp_path / "one")
    assert (code, "--out" in error) == (1, True)
    code, _, error = call("cut", folder.parent, "--rank", "8")
    assert (code, "is 4: give lower ones" in error) == (1, True)


def test_every_rank_of_a_sweep_is_measured_once_and_compared(sweep, trials, call, monkeypatch):
    assert call("cut", sweep, "--ranks", "1", "2")[0] == 0
    found = [read_record(path.parent) for path in sweep.glob("*/record.json")]
    cuts = [record for record in found if record.config["lora"]["cut"]]
    assert sorted((r.config["lora"]["method"], r.config["lora"]["rank"], r.config["lora"]["cut"], r.config["seed"])
                  for r in cuts) == sorted(
        (method, rank, how, seed) for method, seed in (("lora", 0), ("lora", 1), ("dora", 0)) for rank in (1, 2)
        for how in ("4", "4 by threshold"))  # fmt: skip
    for record in cuts:  # a member of the pack has what it has alone
        folder = sweep / record.trial_id
        assert trial_id(from_dict(record.config)) == folder.name
        predictions, _ = api.evaluate(folder, "val")
        with np.load(folder / PREDICTIONS) as kept:
            np.testing.assert_array_equal(kept["val.predicted"], predictions.predicted)
            # fp32: products of other widths round otherwise
            np.testing.assert_allclose(kept["val.true_probability"], predictions.true_probability, rtol=1e-4)
        assert record.metrics["val_loss"] == pytest.approx(predictions.loss, rel=1e-5)
        assert record.status == "completed"
    by_threshold = next(r for r in cuts if "threshold" in r.config["lora"]["cut"])
    api.merge(sweep / by_threshold.trial_id, sweep / "merged.safetensors")
    api.export(sweep / by_threshold.trial_id, "peft", sweep / "peft")
    monkeypatch.setattr(trained, "trained_pack", None)
    assert call("cut", sweep, "--ranks", "1", "2")[0] == 0, "nothing is measured again"
    summary = summarize(sweep)
    cut_from = {f"{method} cut from 4{how}" for method in ("LoRA", "DoRA") for how in ("", " by threshold")}
    assert set(summary.cells["lora.method"]) == {"lora", "dora"} | cut_from
    assert set(summary.effects.table["setting"]) <= {"method", "rank", "scaling"}
    assert any("were cut from a higher rank" in line for line in summary.warnings)
    pictures = plots.draw_all(summary)
    assert {"spectrum", "cut_ranks"} <= set(pictures)


def test_the_chosen_rank_is_trained_and_compared(sweep, call):
    code, said, _ = call("cut", sweep, "--ranks", "1", "2", "--verify")
    assert code == 0
    assert "trained at that rank instead" in said
    found = [read_record(path.parent).config["lora"] for path in sweep.glob("*/record.json")]
    assert {(lora["rank"], lora["alpha"]) for lora in found if lora["cut"] is None} <= {(4, 32.0), (2, 16.0), (1, 8.0)}
