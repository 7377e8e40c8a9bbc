"""Workers that train: one lets go of a pack before it makes the next, and halves what does not fit."""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path

import pytest
import torch
from helpers import trial_config
from packs import Passes
from sweeps import seed_trials, sweep_of

from lora_vit.build import build_setup
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError, out_of_memory
from lora_vit.records import read_record
from lora_vit.stopping import StopRequest
from lora_vit.sweep import pack_size
from lora_vit.sweep.claims import Claims
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Trial
from lora_vit.sweep.worker import Worker
from lora_vit.training.pack import Pack


def work(folder: Path, trials: list[Trial], **changes) -> list[str]:
    """Ask for the trials and be a worker; returns what it said."""
    sweep_of(folder, trials, **{"pack_size": "2", **changes})
    said: list[str] = []
    with StopRequest() as stop, Claims(folder).living() as claims:
        Worker(Sweep.existing(folder), claims, stop, said.append).work()
    return said


def break_steps(monkeypatch, error: BaseException, broken) -> None:
    """Steps of packs for which ``broken`` raise an error."""
    whole = Pack.step

    def step(pack, *args):
        if broken(pack):
            raise type(error)(*error.args)  # a new one: its traceback holds the pack
        return whole(pack, *args)

    monkeypatch.setattr(Pack, "step", step)


@pytest.fixture
def alive(monkeypatch) -> list[int]:
    """How many earlier packs lived when each was made; the collector is off: a GPU's memory does not wait for it."""
    made: list[weakref.ref[Pack]] = []
    alive: list[int] = []
    init = Pack.__init__

    def remember(pack, trials, setup):
        alive.append(sum(ref() is not None for ref in made))
        init(pack, trials, setup)
        made.append(weakref.ref(pack))

    monkeypatch.setattr(Pack, "__init__", remember)
    gc.collect()
    gc.disable()
    yield alive
    gc.enable()


def statuses(folder: Path, trials: list[Trial]) -> list[str]:
    return [read_record(folder / trial.trial_id).status for trial in trials]


@pytest.mark.parametrize(
    ("count", "size", "broken", "packs"),
    [
        (5, "2", lambda pack: False, 3),
        (4, "4", lambda pack: pack.K > 1, 7),  # before its halves
        (2, "1", lambda pack: pack.trials[0].config.seed == 0, 2),
    ],
    ids=["completed", "a pack ended with an error", "a trial ended alone"],
)
def test_each_pack_is_freed_before_the_next(count, size, broken, packs, alive, tmp_path, monkeypatch):
    trials = seed_trials(count, trainer__epochs=1)
    break_steps(monkeypatch, RuntimeError("no"), broken)
    alone = size == "1"
    with pytest.raises(ConfigError, match="RuntimeError: no") if alone else contextlib.nullcontext():
        work(tmp_path, trials, pack_size=size)
    assert alive == [0] * packs
    assert statuses(tmp_path, trials) == ["interrupted" if alone else "completed", *["completed"] * (count - 1)]


def test_out_of_memory_halves_the_pack_and_resumes(tmp_path, monkeypatch):
    """Packs of more than two run out of memory in their second epoch; nothing is trained twice."""
    trials = seed_trials(4, trainer__checkpoint_every=0.001)
    steps: dict[str, list[int]] = {}
    whole = Pack.step

    def step(pack: Pack, *args: object) -> torch.Tensor:
        if pack.K > 2 and pack.trials[0].state.epoch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        for trial in pack.trials:
            steps.setdefault(trial.name, []).append(trial.state.epoch * pack.steps_per_epoch + pack.step_in_epoch)
        return whole(pack, *args)

    monkeypatch.setattr(Pack, "step", step)
    said = work(tmp_path, trials, pack_size="4")
    assert any("OutOfMemoryError" in line and "packs of 2" in line for line in said)
    for trial in trials:
        record = read_record(tmp_path / trial.trial_id)
        assert (record.status, record.cost["pack_size"]) == ("completed", 2)
        assert steps[trial.trial_id] == list(range(14)), "every step once: it resumed from its checkpoint"


def test_in_a_sweep_parts_shrink_before_packs_and_the_next_worker_knows(tmp_path, monkeypatch):
    """Of packs of four trials with 8 images each, where there is room for 8: then of two, where there is for 3."""
    passes = Passes(monkeypatch)
    first, second, third = (seed_trials(4, trainer__epochs=1, optimizer__lr=lr) for lr in (1e-3, 2e-3, 3e-3))
    passes.room = 8
    work(tmp_path, first, pack_size="4")
    assert passes.seen == [32, 16, 8, *[8] * 3] + [8] * 4 * 6
    assert list(Sweep(tmp_path).plan["most_trained"].values()) == [8]
    passes.seen.clear()
    work(tmp_path, second, pack_size="4")
    assert passes.seen == [8] * 4 * 7
    passes.seen.clear()
    passes.room = 3
    said = work(tmp_path, third, pack_size="4")
    assert passes.seen[:2] == [8, 4]
    assert any("a pack of 4 ended" in line for line in said)
    for trials, size in ((first, 4), (second, 4), (third, 2)):
        assert statuses(tmp_path, trials) == ["completed"] * 4
        assert {read_record(tmp_path / t.trial_id).cost["pack_size"] for t in trials} == {size}


def test_what_torch_says_of_too_much_memory_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert out_of_memory(caught.value)


def test_measured_figures_are_of_this_machine():
    config = trial_config()
    seconds, held = pack_size.measure([config, config], build_setup(config, Process()), StopRequest())
    assert 0 < seconds < 60
    assert 10 * 2**20 < held < pack_size.attainable_memory(torch.device("cpu"))
