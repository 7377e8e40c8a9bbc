"""A trial in a pack equals the trial alone, and the check notices when it does not."""

from __future__ import annotations

import pytest
import torch
from helpers import largest_difference, train_together, trial_config
from packs import new_pack, three
from sabotages import SABOTAGES

from lora_vit.build import ModelFactory

TOLERANCE = 1e-9
"""fp64 arithmetic agrees to about 1e-15; a batched product may sum in another order, over 14 steps."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return [train_together([c], tmp_path_factory.mktemp("alone"))[0] for c in three()]


def worst_difference(together, alone):
    return max(largest_difference(a, b) for a, b in zip(together, alone, strict=True))


def test_pack_equals_alone(alone, tmp_path):
    together = train_together(three(), tmp_path)
    assert worst_difference(together, alone) < TOLERANCE
    for a, b in zip(together, alone, strict=True):
        assert len(a.losses) == 14
        assert (a.predicted == b.predicted).all()
        assert a.trial.record.metrics == pytest.approx(b.trial.record.metrics, rel=TOLERANCE)
        assert (a.trial.record.cost["pack_size"], b.trial.record.cost["pack_size"]) == (3, 1)


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_sabotage_is_noticed(sabotage, alone, tmp_path, monkeypatch):
    SABOTAGES[sabotage](monkeypatch)
    together = train_together(three(), tmp_path)
    assert worst_difference(together, alone) > 1e-3


def test_a_trial_that_diverges_leaves_and_the_others_never_notice(alone, tmp_path):
    wild = trial_config("seed=3", "optimizer.lr=1e200", "lora.rank=3")
    together = train_together([three()[0], wild, three()[1]], tmp_path)
    assert worst_difference([together[0], together[2]], alone[:2]) < TOLERANCE
    record = together[1].trial.record
    assert record.status == "failed"
    assert record.error is not None
    assert record.error["step"] in (2, 3)
    assert "optimizer.lr=1e+200" in record.error["message"]
    assert not (tmp_path / "1" / "adapter.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("lora=none", lambda n: False),
        ("lora=full", lambda n: True),
        ("lora.bias=all", lambda n: n.endswith("bias")),
        ("lora.bias=lora_only", lambda n: n.endswith("bias") and ("mlp" in n or "proj" in n) and "conv" not in n),
    ],
)
def test_baselines_train_through_the_same_loop(overrides, expected, tmp_path):
    (done,) = train_together([trial_config(overrides)], tmp_path)
    names = set(done.tensors)
    assert done.trial.record.status == "completed"
    assert {"heads.head.weight", "heads.head.bias"} <= names
    trunk = {n for n in names if "lora_" not in n and not n.startswith("heads.")}
    every = ModelFactory(done.trial.config, 4, torch.device("cpu"), torch.float64).original.state_dict()
    assert trunk == {n for n in every if expected(n)}
    for name in trunk - {"conv_proj.bias"}:
        assert not torch.equal(done.tensors[name].float(), every[name]), name


def test_a_pack_with_magnitudes_equals_each_alone(alone, tmp_path):
    """Those of DoRA, which are trained, and written beside the other tensors."""
    configs = three({"lora.method": "dora"})
    together = train_together(configs, tmp_path / "together")
    for i, config in enumerate(configs):
        (one,) = train_together([config], tmp_path / f"alone{i}")
        assert largest_difference(together[i], one) < TOLERANCE
        moved = {name for name in one.tensors if name.endswith("lora_magnitude")}
        assert one.tensors.keys() - moved == alone[i].tensors.keys()
        assert len(moved) == 12
        pack = new_pack([config])
        start = pack.export(0, pack.flat.values_KP)
        for name in moved:
            assert 1e-4 < float((one.tensors[name] - start[name]).abs().max()) < 0.2, name


def test_a_pack_of_probes_equals_each_alone(tmp_path):
    probes = [trial_config("lora=none", f"seed={s}", f"optimizer.lr={lr}") for s, lr in ((0, 0.1), (1, 0.01))]
    together = train_together(probes, tmp_path / "together")
    for i, config in enumerate(probes):
        (one,) = train_together([config], tmp_path / f"alone{i}")
        assert largest_difference(together[i], one) < TOLERANCE
