"""A global batch that is taken in parts: the same step, in the memory that there is."""

from __future__ import annotations

import pytest
import torch
from packs import Passes, new_pack, take_steps, three
from plain_trials import plain_trial

from lora_vit.build import build_setup
from lora_vit.distributed import Process
from lora_vit.errors import TrialFailed, out_of_memory
from lora_vit.run import train
from lora_vit.training.pack import Pack


def whole_and_in_parts(size: str, **changes: object) -> tuple[Pack, Pack]:
    configs = [three({**changes, "trainer.micro_batch": asked, "data.augment": "crop_flip"}) for asked in (None, size)]
    return new_pack(configs[0]), new_pack(configs[1])


def exact(losses: list[list[float]]) -> torch.Tensor:
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture
def passes(monkeypatch) -> Passes:
    return Passes(monkeypatch)


@pytest.mark.parametrize(("size", "images"), [("3", [3, 3, 2]), ("1", [1] * 8), ("4", [4, 4]), ("8", [8]), ("99", [8])])
def test_a_batch_in_parts_makes_the_step_of_the_whole(size, images, passes):
    """With dropout, smoothing, clipping and two streams; in fp64, where sums in another order differ by about 1e-15."""
    whole, parts = whole_and_in_parts(size)
    expected = exact(take_steps(whole, 3))
    passes.seen.clear()
    torch.testing.assert_close(exact(take_steps(parts, 3)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.flat.values_KP, whole.flat.values_KP, rtol=1e-10, atol=1e-12)
    assert passes.seen == [3 * n for n in images] * 3
    assert size in ("8", "99") or not torch.equal(parts.flat.values_KP, whole.flat.values_KP)


def test_memory_that_runs_out_halves_the_parts_and_the_next_pack_begins_so(passes, capsys):
    whole, parts = whole_and_in_parts("auto")
    expected = exact(take_steps(whole, 2))
    passes.room = 8
    passes.seen.clear()
    torch.testing.assert_close(exact(take_steps(parts, 2)), expected, rtol=1e-12, atol=1e-12)
    assert passes.seen == [24, 12, 6, 6, 6, 6, 6, 6, 6, 6]
    out = capsys.readouterr().out
    assert out.count("memory ran out: batches are now taken in parts of 4 images of each trial") == 1
    assert out.splitlines()[-1].endswith("parts of 2 images of each trial")
    passes.seen.clear()
    take_steps(new_pack([t.config for t in parts.trials][:1], parts.setup), 1)
    assert passes.seen == [6, 2], "one trial has room for the images of three"


def test_a_trial_that_resumes_takes_the_parts_that_it_took(passes):
    """So that its bits are the same."""
    _, parts = whole_and_in_parts("auto")
    passes.room = 12
    take_steps(parts, 2)
    parts.pull()
    passes.room = 1 << 62
    again = Pack(parts.trials, build_setup(parts.trials[0].config, Process()))
    lr_K1 = parts.learning_rates()[0]
    passes.seen.clear()
    assert torch.equal(again.step(lr_K1, False), parts.step(lr_K1, False))
    assert torch.equal(again.flat.values_KP, parts.flat.values_KP)
    assert passes.seen == [12, 12] * 2


@pytest.mark.parametrize(("asked", "tried"), [("auto", [24, 12, 6, 3]), (None, [24]), ("2", [6])])
def test_what_does_not_fit_in_the_smallest_parts_is_an_error(asked, tried, passes):
    _, parts = whole_and_in_parts(asked)
    passes.room = 0
    with pytest.raises(torch.OutOfMemoryError) as caught:
        take_steps(parts, 1)
    assert out_of_memory(caught.value)
    assert passes.seen == tried
    assert parts.step_in_epoch == 0


def test_another_error_is_not_taken_for_it(monkeypatch):
    _, parts = whole_and_in_parts("auto")
    monkeypatch.setattr(parts, "forward", lambda *_: [][0])
    with pytest.raises(IndexError):
        take_steps(parts, 1)


def test_a_run_says_that_its_batches_are_taken_in_parts(passes, tmp_path):
    passes.room = 5
    train(plain_trial({"trainer.epochs": 1}), tmp_path / "a", {})
    assert passes.seen == [8, 4, 4] + [4, 4] * 6
    assert "batches are now taken in parts of 4 images" in (tmp_path / "a/train.log").read_text()
    passes.room = 0
    with pytest.raises(TrialFailed, match=r"give .*trainer\.micro_batch=auto, trainer\.checkpoint_activat"):
        train(plain_trial({"trainer.micro_batch": "4", "seed": 1}), tmp_path / "b", {})
