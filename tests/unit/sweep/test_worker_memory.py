"""A worker lets go of a pack before it makes the next; and what ends a worker leaves trials that go on."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
from plain_trials import plain_trial
from sweeps import options

from lora_vit.records import read_record
from lora_vit.stopping import StopRequest
from lora_vit.sweep.plan import Job, SweepRun
from lora_vit.sweep.worker import Worker
from lora_vit.training.pack import Pack


def jobs_of(*seeds, **changes):
    return [Job(plain_trial({"trainer.epochs": 1} | changes | {"seed": s}), [], label=str(s)) for s in seeds]


def work(folder, jobs, **changes) -> None:
    run = SweepRun(tuple(jobs), folder, options(**{"pack_size": "2", **changes}), time.time())
    with StopRequest() as stop:
        Worker(run, lambda kind, **fields: None, stop).work()


def break_steps(monkeypatch, error: type[BaseException], broken) -> None:
    """Steps of packs for which ``broken`` raise an error."""
    whole = Pack.step

    def step(pack, *args):
        if broken(pack):
            raise error("no")  # a new one: its traceback holds the pack
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


def statuses(folder, jobs) -> list[str]:
    return [read_record(folder / job.trial_id).status for job in jobs]


def test_each_pack_is_freed_before_the_next(alive, tmp_path):
    jobs = jobs_of(1, 2, 3, 4, 5)
    work(tmp_path, jobs)
    assert alive == [0, 0, 0]
    assert statuses(tmp_path, jobs) == ["completed"] * 5


def test_a_pack_that_ended_with_an_error_is_freed_before_its_halves(alive, tmp_path, monkeypatch):
    jobs = jobs_of(1, 2, 3, 4)
    break_steps(monkeypatch, RuntimeError, lambda pack: pack.K > 1)
    work(tmp_path, jobs, pack_size="4")
    assert alive == [0] * 7
    assert statuses(tmp_path, jobs) == ["completed"] * 4


def test_a_trial_that_failed_alone_is_freed_before_the_next(alive, tmp_path, monkeypatch):
    jobs = jobs_of(1, 2, 3)
    break_steps(monkeypatch, RuntimeError, lambda pack: pack.trials[0].config.seed < 3)
    work(tmp_path, jobs, pack_size="1")
    assert alive == [0] * 3
    assert statuses(tmp_path, jobs) == ["failed", "failed", "completed"]


@pytest.mark.parametrize("size", ["1", "2"])
@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt])
def test_what_a_foreign_handler_raises_is_an_interruption(raised, size, tmp_path, monkeypatch):
    """Not a failure of the trials: the same command goes on with them."""
    jobs = jobs_of(1, 2)
    once = iter([True])
    with monkeypatch.context() as patch:
        break_steps(patch, raised, lambda pack: pack.step_in_epoch == 2 and next(once, False))
        with pytest.raises(raised):
            work(tmp_path, jobs, pack_size=size)
    assert statuses(tmp_path, jobs[: int(size)]) == ["interrupted"] * int(size)
    work(tmp_path, jobs)
    assert statuses(tmp_path, jobs) == ["completed"] * 2
