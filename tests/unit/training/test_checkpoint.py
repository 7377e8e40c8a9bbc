"""One file that is whole, of this trial, with every field; or none."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest
import torch
from stage import raised

from lora_vit.errors import ConfigError
from lora_vit.training.trial import TrialState, load_checkpoint, save_checkpoint

TENSORS = [{"a": torch.full((2, 3), float(i), dtype=torch.float64), "b": torch.tensor(i)} for i in (1, 2, 3)]
STATE = TrialState(3, 4, 5, 0.125, 6, 7.5, {"epoch": 2.0}, {"step": 8.0}, *TENSORS, 0.5, 9, 10)


def test_every_field_is_kept(tmp_path, monkeypatch):
    """Read to the host, and nothing but tensors and plain values: a pickle may run code."""
    save_checkpoint(tmp_path, "mine", STATE)
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **how: seen.append(how) or load(*args, **how))
    back = load_checkpoint(tmp_path, "mine")
    assert seen == [{"map_location": "cpu", "weights_only": True}]
    for field in dataclasses.fields(TrialState):
        before = getattr(STATE, field.name)
        assert before != getattr(TrialState(), field.name), f"{field.name} has a value of its own"
        torch.testing.assert_close(getattr(back, field.name), before, rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["cut", "no owner", "unknown field", "no dictionary"])
def test_a_damaged_file_is_one_line(damage, tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(tmp_path, "mine", STATE)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        values = {"no owner": {"epoch": 1}, "unknown field": {"trial_id": "mine", "x": 1}, "no dictionary": [1]}
        torch.save(values[damage], path)
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(tmp_path, "mine")
    text = str(caught.value)
    assert text.startswith(f"{path} is damaged (")
    assert text.endswith("): remove it, or give trainer.resume=restart")
    assert ("'x'" in text) == (damage == "unknown field"), "the reason is told"
    assert "\n" not in text


def test_no_room_leaves_the_last_good_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, "mine", STATE)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", raised(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, "mine", TrialState())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"checkpoint.pt": before}
