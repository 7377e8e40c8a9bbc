"""Trials that go bad, being asked to stop, and claims that are lost."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import signal
import weakref
from types import SimpleNamespace

import pytest
import torch
from packs import new_pack
from plain_trials import plain_trial
from stage import STEPS, asked, raised, setup_of, spoilt

from lora_vit.distributed import Process
from lora_vit.errors import Interrupted
from lora_vit.lora.layers import LoRAAdapters
from lora_vit.records import read_record
from lora_vit.stopping import StopRequest
from lora_vit.training import loop
from lora_vit.training.loop import stop_requested
from lora_vit.training.optim import PackedOptimizer
from lora_vit.training.pack import Pack
from lora_vit.training.trial import ClaimLost, load_checkpoint


def statuses(stage, *seeds: int) -> list[str]:
    """As the folders say."""
    return [read_record(stage.folder / str(seed)).status for seed in seeds]


def saved(stage) -> list[tuple[int, ...]]:
    """Seed, epoch and step of each checkpoint."""
    return [e[:3] for e in stage.of("save")]


@pytest.mark.parametrize(("clip", "remedy"), [(None, "optimizer.lr or optimizer.clip_norm=1"), (0.5, "optimizer.lr")])
def test_a_bad_trial_fails_at_the_next_row_and_the_others_continue(clip, remedy, stage):
    """Its step is counted from 1; it leaves no row at the step at which it is found."""
    stage.after[1] = spoilt(1, 0)
    trials = stage.trials(1, 2, 3, optimizer__clip_norm=clip, optimizer__lr=0.25)
    stage.train(trials)
    assert statuses(stage, 1, 2, 3) == ["completed", "failed", "completed"]
    error = trials[1].record.error
    assert error["message"].startswith("the loss or its gradient is not finite at step 1 (optimizer.lr=0.25)")
    assert error["message"].endswith(f"a smaller {remedy}")
    assert (error["step"], error["traceback"]) == (1, None)
    assert [e[0] for e in stage.of("train")] == [3] * 3 + [2] * 5
    assert [e[:2] for e in stage.of("log_step")] == [(s, i) for i in (3, 4, 7, 8) for s in (1, 3)]
    assert [len(e[0]) for e in stage.of("step")] == [3, 2, 2, 2]
    assert stage.of("left") == [(2, "failed"), (1, "completed"), (3, "completed")]
    assert [e[0] for e in stage.of("write_results")] == [1, 3]
    assert stage.of("close")[0] == (2,)
    assert stage.of("say")[0] == (2, error["message"])
    assert (trials[1].state.seconds, trials[0].state.seconds) == (2.0, 2.0 + 5)  # a third of three steps


def test_a_last_update_that_overflows_fails_its_trial_alone(stage):
    """No next loss will say it; the others' epoch is finished."""
    stage.after[STEPS] = lambda pack: pack.flat.values_KP[1].__setitem__(5, math.inf)
    trials = stage.trials(1, 2)
    stage.train(trials)
    assert statuses(stage, 1, 2) == ["completed", "failed"]
    assert trials[1].record.error["step"] == STEPS
    assert trials[1].record.error["message"].startswith("a parameter is not finite at step 4 (optimizer.lr=0.001)")
    assert stage.of("left")[0] == (2, "failed")
    assert [e[:2] for e in stage.of("epoch")] == [(1, 1), (1, 2)]


def test_a_bad_step_before_a_last_update_that_overflows_is_the_one_to_blame(stage):
    stage.after = {2: spoilt(0, 1), STEPS: lambda pack: pack.flat.values_KP.fill_(math.inf)}
    (trial,) = stage.trials(1, trainer__log_every=9)
    stage.train([trial])
    assert trial.record.error["step"] == 2
    assert trial.record.error["message"].startswith("the loss")
    assert stage.of("epoch", "save") == []
    assert len(stage.of("train")) == STEPS


@pytest.mark.parametrize("bad", [0, 1])
def test_no_checkpoint_hides_a_bad_step(bad, stage):
    """The one of the step before stays until the failure is found, while the others are saved."""
    stage.after = {bad + 1: spoilt(0, bad)}
    stage.train(stage.trials(1, 2, trainer__log_every=9, trainer__epochs=1, trainer__checkpoint_every=1.0))
    expected = [(1, 0, 1), (2, 0, 1), (2, 0, 2), (2, 0, 3), (2, 1, 0)]
    assert saved(stage) == expected[1 - bad :]


def test_a_pack_is_freed_when_trials_leave_it(stage):
    """Before the next one takes its memory, and without the collector: until that runs, a GPU's memory is held."""
    parts: list[weakref.ref] = []
    alive: list[set[str]] = []

    def spoil(pack: Pack) -> None:
        adapters = [m for m in pack.model.modules() if isinstance(m, LoRAAdapters)]
        tensors = (pack.flat.values_KP, pack.optimizer.exp_avg_KP)
        parts.extend(map(weakref.ref, (pack, pack.model, pack.model.head, *adapters, *tensors)))
        pack.predict("val")
        spoilt(0, 1)(pack)

    def look(_: object) -> None:
        alive.append({type(part()).__name__ for part in parts if part() is not None})

    stage.after = {3: spoil, 4: look}
    stage.making[2] = look
    trials = stage.trials(1, 2)
    gc.collect()
    gc.disable()
    try:
        stage.train(trials)
    finally:
        gc.enable()
    assert alive == [{"LoRAAdapters"}, set()], "the shared trunk carries them until the next pack"


def test_a_stop_is_saved_after_its_step(stage):
    stop = StopRequest()
    stage.after[6] = asked(stop)
    with pytest.raises(Interrupted) as caught:
        stage.train(stage.trials(1, 2, trainer__log_every=9), stop)
    assert caught.value.signum == signal.SIGHUP
    losses = [e[2] for e in stage.of("train")]
    assert stage.of("save")[-2:] == [
        (seed, 1, 2, 6.0, pytest.approx(losses[4][k] + losses[5][k])) for k, seed in enumerate((1, 2))
    ]
    assert statuses(stage, 1, 2) == ["interrupted"] * 2
    assert stage.of("say")[-2:] == [(1, "interrupted"), (2, "interrupted")]
    assert len(losses) == 6
    assert [e[1] for e in stage.of("log_step")] == [4, 4], "no row that an unstopped run would not have"
    assert stage.of("left") == []


def test_a_stop_between_a_bad_step_and_the_next_row_reports_the_failure(stage):
    stop = StopRequest()
    stage.after = {1: spoilt(0, 0), 2: asked(stop)}
    with pytest.raises(Interrupted):
        stage.train(stage.trials(1, 2, trainer__log_every=9), stop)
    assert statuses(stage, 1, 2) == ["failed", "interrupted"]
    assert saved(stage) == [(2, 0, 2)]
    assert stage.of("close") == [(1,), (2,)]


@pytest.mark.parametrize(
    ("at", "status", "checkpoint"), [(STEPS, "interrupted", (1, 1, 0)), (2 * STEPS, "completed", (1, 2, 0))]
)
def test_a_stop_at_an_epochs_last_step_finishes_the_epoch_or_the_trial(at, status, checkpoint, stage):
    stop = StopRequest()
    stage.after[at] = asked(stop)
    trials = stage.trials(1)
    if status == "completed":
        stage.train(trials, stop)
    else:
        with pytest.raises(Interrupted):
            stage.train(trials, stop)
    assert statuses(stage, 1) == [status]
    assert stage.of("log_epoch")[-1][:3] == (1, at, at // STEPS)
    assert saved(stage)[-1] == checkpoint
    assert len(stage.of("train")) == at


@pytest.mark.parametrize("how", ["signal with the failure", "signal", "SystemExit"])
def test_a_stop_when_one_trial_leaves_saves_those_that_stay(how, stage):
    """Also between two packs, when the state is in the trials alone."""
    stop = StopRequest()
    stage.after[3] = spoilt(1, 2)
    stage.making[2] = raised(SystemExit) if how == "SystemExit" else asked(stop)
    if how == "signal with the failure":
        stage.after[3] = lambda pack: (spoilt(1, 2)(pack), asked(stop)(pack))
    with pytest.raises(SystemExit if how == "SystemExit" else Interrupted):
        stage.train(stage.trials(1, 2, 3), stop)
    assert statuses(stage, 1, 2, 3) == ["interrupted", "failed", "interrupted"]
    assert saved(stage) == [(1, 0, 3), (3, 0, 3)]
    assert len(stage.of("train")) == 3


def test_what_a_foreign_handler_raises_saves_what_is_whole(stage):
    """And the trial then ends as if it had never been stopped."""
    stage.train(stage.trials(1))
    whole = {name: (stage.folder / "1" / name).read_bytes() for name in ("metrics.jsonl", "adapter.safetensors")}
    stage.folder = stage.folder / "again"
    stage.folder.mkdir()
    stage.after[6] = raised(SystemExit)
    with pytest.raises(SystemExit):
        stage.train(stage.trials(1))
    assert statuses(stage, 1) == ["interrupted"]
    stage.after.clear()
    (again,) = stage.trials(1)
    assert (again.state.epoch, again.state.step_in_epoch) == (1, 2)
    stage.train([again])
    assert {name: (stage.folder / "1" / name).read_bytes() for name in whole} == whole


def test_what_is_half_changed_is_not_saved(stage, monkeypatch):
    """An exception in the midst of an update: the last checkpoint counts."""
    update = PackedOptimizer.step

    def torn(optimizer, *args):
        update(optimizer, *args)
        if int(optimizer.updates_K1[0]) == 6:
            raise SystemExit

    monkeypatch.setattr(PackedOptimizer, "step", torn)
    (trial,) = stage.trials(1)
    with pytest.raises(SystemExit):
        stage.train([trial])
    state = load_checkpoint(stage.folder / "1", trial.name)
    assert (state.epoch, state.step_in_epoch, state.updates) == (1, 0, 4)
    assert statuses(stage, 1) == ["interrupted"]


def test_what_was_trained_is_kept_where_validation_fails(stage, monkeypatch):
    trials = stage.trials(1, 2)
    monkeypatch.setattr(Pack, "predict", raised(MemoryError))
    with pytest.raises(MemoryError):
        stage.train(trials)
    for trial in trials:
        trial.close()
    assert saved(stage) == [(1, 0, STEPS), (2, 0, STEPS)]


def test_an_error_is_left_to_the_caller(stage):
    """Nothing is saved or recorded: a sweep tries again with fewer, a single run records the failure."""
    stage.after[2] = raised(RuntimeError)
    (trial,) = stage.trials(1)
    with pytest.raises(RuntimeError):
        stage.train([trial])
    assert statuses(stage, 1) == ["running"]
    assert stage.of("save", "close") == []
    trial.close()


def test_the_request_rides_on_the_next_step(stage):
    """All processes learn of it by the step's sum."""
    stop = StopRequest()
    stage.after[1] = asked(stop)
    with pytest.raises(Interrupted):
        stage.train(stage.trials(1, trainer__log_every=9), stop, setup_of(0, 2))
    assert [e[1] for e in stage.of("train")] == [False, True]


def test_another_processs_request_ends_this_one_too(stage):
    """It knows no signal of its own: SIGTERM stands for it."""
    stage.after[2] = lambda pack: pack.flat.stop.fill_(1.0)
    with pytest.raises(Interrupted) as caught:
        stage.train(stage.trials(1), setup=setup_of(1, 2))
    assert caught.value.signum == signal.SIGTERM


def test_who_looks_at_the_sum_knows_of_logging_steps(stage, monkeypatch):
    """And when an epoch has ended: a GPU is read then only."""
    seen = []
    monkeypatch.setattr(loop, "stop_requested", lambda pack, stop, logging: seen.append(logging))
    stage.train(stage.trials(1, trainer__epochs=2))
    assert seen == [False, False, True, True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("world_size", "device", "logging", "signum", "summed", "stops"),
    [
        (1, "cpu", True, 0, 1.0, False),
        (1, "cpu", False, 15, 0.0, True),
        (1, "cuda", False, 15, 0.0, True),
        (2, "cpu", False, 15, 0.0, False),
        (2, "cpu", False, 0, 1.0, True),
        (2, "cpu", True, 0, 2.0, True),
        (2, "cuda", True, 0, 1.0, True),
        (2, "cuda", True, 15, 0.0, False),
    ],
)
def test_all_processes_answer_alike(world_size, device, logging, signum, summed, stops):
    """Several decide by the sum, for which a GPU is waited for at logging steps only."""
    setup = dataclasses.replace(setup_of(), process=Process(0, world_size), device=torch.device(device))
    pack = SimpleNamespace(setup=setup, flat=SimpleNamespace(stop=torch.tensor([summed])))
    stop = StopRequest()
    stop.signum = signum
    assert stop_requested(pack, stop, logging) is stops


def test_between_logging_steps_a_gpu_answers_for_the_step_before(monkeypatch):
    """The host waits for the copy of that step and never for the present one (but for the first)."""
    recorded, waited = itertools.count(), []

    def record_event():
        number = next(recorded)
        return SimpleNamespace(synchronize=lambda: waited.append(number))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=record_event))
    flat = new_pack([plain_trial()], setup_of()).flat
    setup = dataclasses.replace(setup_of(), process=Process(0, 2), device=torch.device("cuda"))
    answers = []
    for summed in (0.0, 0.0, 1.0, 2.0, 2.0):
        flat.stop.fill_(summed)
        answers.append(stop_requested(SimpleNamespace(setup=setup, flat=flat), StopRequest(), False))
    assert answers == [False, False, False, True, True]
    assert waited == [0, 0, 1, 2, 3]


def test_a_trial_that_another_process_took_is_written_no_more(stage):
    """Asked to stop, the others are saved all the same."""
    stop, held = StopRequest(), [True]
    trials = stage.trials(1, 2)
    trials[0]._mine = lambda: held[0]
    before = {}

    def lose(pack: Pack) -> None:
        held[0] = False
        before.update({p: p.read_bytes() for p in (stage.folder / "1").iterdir() if p.is_file()})
        asked(stop)(pack)

    stage.after[2] = lose
    with pytest.raises(Interrupted):
        stage.train(trials, stop)
    assert {p: p.read_bytes() for p in before} == before
    assert statuses(stage, 1, 2) == ["running", "interrupted"]
    assert load_checkpoint(stage.folder / "2", trials[1].name).step_in_epoch == 2


def test_a_lost_claim_ends_the_pack(stage):
    trials = stage.trials(1, 2)
    trials[1]._mine = lambda: not stage.of("epoch")
    with pytest.raises(ClaimLost, match=trials[1].name):
        stage.train(trials)
    assert statuses(stage, 1, 2) == ["running", "running"]
    assert [e[0] for e in stage.of("epoch")] == [1]
    for trial in trials:
        trial.close()
