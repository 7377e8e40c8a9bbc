"""Trials that go bad, and being asked to stop, on a pack that trains nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from paper import SETUP, STEPS, asked, spoilt, train, trials_of

from lora_vit.distributed import Process
from lora_vit.errors import Interrupted
from lora_vit.stopping import StopRequest
from lora_vit.training import loop
from lora_vit.training.loop import stop_requested

# --- trials that go bad


@pytest.mark.parametrize(("clip", "remedy"), [(None, "optimizer.lr or optimizer.clip_norm=1"), (0.5, "optimizer.lr")])
def test_a_bad_trial_fails_at_the_next_row_and_the_others_go_on(clip, remedy, stage):
    """Its step is counted from 1; it leaves no row at the step at which it is found."""
    stage.after[1] = spoilt(1, 0)
    trials = trials_of(stage, 1, 2, 3, optimizer__clip_norm=clip, optimizer__lr=0.25)
    train(stage, trials)
    assert [t.record.status for t in trials] == ["completed", "failed", "completed"]
    message = f"the loss or its gradient is not finite at step 1 (optimizer.lr=0.25): try a smaller {remedy}"
    assert trials[1].record.error == {"message": message, "step": 1, "traceback": None}
    assert [e[1] for e in stage.of("train")] == [3] * 3 + [2] * 5
    assert [e[1:3] for e in stage.of("log_step")] == [(s, i) for i in (3, 4, 7, 8) for s in (1, 3)]
    assert [len(e[1]) for e in stage.of("step")] == [3, 2, 2, 2]
    assert [e[1:] for e in stage.of("left")] == [(2, "failed"), (1, "completed"), (3, "completed")]
    assert [e[1] for e in stage.of("write_results")] == [1, 3]
    assert stage.of("close")[0] == ("close", 2)
    assert stage.of("say")[0] == ("say", 2, message)
    assert trials[1].state.seconds == 2.0  # a third of three steps
    assert trials[0].state.seconds == 2.0 + 5


def test_parameters_are_looked_at_after_an_epochs_last_step_only(stage):
    stage.infinite = {2}
    trials = trials_of(stage, 1, 2, trainer__log_every=1)
    train(stage, trials)
    assert stage.looked == 2
    assert [t.record.status for t in trials] == ["completed", "failed"]
    assert trials[1].record.error["step"] == STEPS
    assert trials[1].record.error["message"].startswith("a parameter is not finite at step 4 (optimizer.lr=0.001): try")
    assert stage.of("left")[0] == ("left", 2, "failed")
    assert [e[1:3] for e in stage.of("epoch")] == [(1, 1), (1, 2)], "the others' epoch is finished"


def test_a_bad_step_before_a_last_update_that_overflows_is_the_one_to_blame(stage):
    stage.after[2], stage.infinite = spoilt(0, 1), {1}
    (trial,) = trials_of(stage, 1, trainer__log_every=9)
    train(stage, [trial])
    assert trial.record.error["step"] == 2
    assert trial.record.error["message"].startswith("the loss")
    assert stage.of("epoch", "save") == []
    assert len(stage.of("train")) == STEPS


def test_no_checkpoint_of_a_bad_trial(stage):
    """Neither one that is due by the clock, while the others are saved, nor one at a stop."""
    for bad in (0, 1):
        stage.events.clear()
        stage.after = {bad + 1: spoilt(0, bad)}
        trials = trials_of(stage, 1, 2, trainer__log_every=9, trainer__epochs=1, trainer__checkpoint_every=2.0)
        train(stage, trials)
        assert [(e[1], e[3]) for e in stage.of("save")] == [(1, 1), (2, 1), (2, 2), (2, 3), (2, 0)][1 - bad :]


def test_a_stop_between_a_bad_step_and_the_next_row_tells_the_failure(stage):
    stop = StopRequest()
    stage.after = {1: spoilt(0, 0), 2: asked(stop)}
    trials = trials_of(stage, 1, 2, trainer__log_every=9)
    with pytest.raises(Interrupted):
        train(stage, trials, stop)
    assert [t.record.status for t in trials] == ["failed", "interrupted"]
    assert [e[1:4] for e in stage.of("save")] == [(2, 0, 2)]
    assert [e[1] for e in stage.of("close")] == [1, 2]


# --- asked to stop


def test_a_stop_is_saved_after_its_step(stage):
    stop = StopRequest()
    stage.after[6] = asked(stop)
    trials = trials_of(stage, 1, 2, trainer__log_every=9)
    with pytest.raises(Interrupted) as caught:
        train(stage, trials, stop)
    assert caught.value.signum == signal.SIGHUP
    loss = {1: 2.11, 2: 4.11}
    assert [e[1:6] for e in stage.of("save")[-2:]] == [(s, 1, 2, 6.0, pytest.approx(loss[s])) for s in (1, 2)]
    assert stage.of("save")[-1][6] == {"w": torch.tensor(6)}
    assert [t.record.status for t in trials] == ["interrupted"] * 2
    assert [e[1:] for e in stage.of("say")] == [(1, "interrupted"), (2, "interrupted")]
    assert len(stage.of("train")) == 6
    assert [e[2] for e in stage.of("log_step")] == [4, 4], "no row that an unstopped run would not have"
    assert stage.of("left") == []


def test_the_request_rides_on_the_next_step(stage):
    """Where several processes train, all learn of it by the step's sum."""
    setup = SimpleNamespace(**vars(SETUP) | {"process": Process(0, 2, 0)})
    stop = StopRequest()
    stage.after = {1: asked(stop), 3: lambda pack: pack.flat.stop.fill_(1.0)}
    with pytest.raises(Interrupted):
        train(stage, trials_of(stage, 1, trainer__log_every=9), stop, setup)
    assert [e[2] for e in stage.of("train")] == [False, True, True]


def test_another_processs_request_ends_this_one_too(stage):
    """It knows no signal of its own: SIGTERM stands for it."""
    setup = SimpleNamespace(**vars(SETUP) | {"process": Process(1, 2, 0)})
    stage.after[2] = lambda pack: pack.flat.stop.fill_(1.0)
    with pytest.raises(Interrupted) as caught:
        train(stage, trials_of(stage, 1), setup=setup)
    assert caught.value.signum == signal.SIGTERM


@pytest.mark.parametrize(("asked_at", "steps", "saved"), [(1, 3, [(0, 3)]), (4, 4, [(1, 0), (1, 0)])])
def test_gpus_look_at_the_sum_when_they_log(asked_at, steps, saved, stage, monkeypatch):
    monkeypatch.setattr(loop, "peak_memory", lambda device: 0)
    setup = SimpleNamespace(**vars(SETUP) | {"process": Process(0, 2, 0), "device": torch.device("cuda")})
    stage.after[asked_at] = lambda pack: pack.flat.stop.fill_(1.0)
    with pytest.raises(Interrupted):
        train(stage, trials_of(stage, 1), setup=setup)
    assert len(stage.of("train")) == steps
    assert [e[2:4] for e in stage.of("save")] == saved


def test_a_stop_at_an_epochs_last_step_finishes_the_epoch(stage):
    stop = StopRequest()
    stage.after[4] = asked(stop)
    trials = trials_of(stage, 1)
    with pytest.raises(Interrupted):
        train(stage, trials, stop)
    assert [e[1:4] for e in stage.of("log_epoch")] == [(1, 4, 1)]
    assert stage.of("save")[-1][2:4] == (1, 0)
    assert trials[0].record.status == "interrupted"
    assert len(stage.of("train")) == 4


def test_a_stop_at_the_very_last_step_completes(stage):
    stop = StopRequest()
    stage.after[8] = asked(stop)
    trials = trials_of(stage, 1)
    train(stage, trials, stop)
    assert trials[0].record.status == "completed"


def test_a_stop_when_one_trial_leaves_saves_those_that_stay(stage):
    stop = StopRequest()

    def both(pack):
        asked(stop)(pack)
        spoilt(1, 2)(pack)

    stage.after[3] = both
    trials = trials_of(stage, 1, 2, 3)
    with pytest.raises(Interrupted):
        train(stage, trials, stop)
    assert [t.record.status for t in trials] == ["interrupted", "failed", "interrupted"]
    assert [e[1:4] for e in stage.of("save")] == [(1, 0, 3), (3, 0, 3)]
    assert len(stage.of("train")) == 3


def test_a_stop_of_a_pack_that_was_just_made(stage):
    """Asked for while the next pack is made: its trials are saved by it, before another step."""
    stop = StopRequest()
    stage.after[3] = spoilt(0, 1)
    stage.making = lambda made: asked(stop)(None) if made == 2 else None
    trials = trials_of(stage, 1, 2)
    with pytest.raises(Interrupted) as caught:
        train(stage, trials, stop)
    assert caught.value.signum == signal.SIGHUP
    assert [e[1:4] for e in stage.of("save")] == [(2, 0, 3)]
    assert [t.record.status for t in trials] == ["failed", "interrupted"]


def raised(error: type[BaseException]) -> Callable[[object], None]:
    def throw(_: object) -> None:
        raise error

    return throw


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("updating", [False, True])
def test_what_a_foreign_handler_raises_saves_what_is_whole(error, updating, stage):
    def both(pack):
        pack.step_state.updating = updating
        raised(error)(pack)

    stage.after[2] = both
    trials = trials_of(stage, 1, 2)
    with pytest.raises(error):
        train(stage, trials)
    assert [t.record.status for t in trials] == ["interrupted"] * 2
    assert [e[1:4] for e in stage.of("save")] == ([] if updating else [(1, 0, 2), (2, 0, 2)])


def test_what_is_raised_between_two_packs_saves_those_that_stay(stage):
    stage.after[3] = spoilt(1, 1)
    stage.making = lambda made: raised(SystemExit)(None) if made == 2 else None
    trials = trials_of(stage, 1, 2, 3)
    with pytest.raises(SystemExit):
        train(stage, trials)
    assert [t.record.status for t in trials] == ["interrupted", "failed", "interrupted"]
    assert [e[1:4] for e in stage.of("save")] == [(1, 0, 3), (3, 0, 3)]


def test_an_error_is_left_to_who_called(stage):
    """Nothing is saved or recorded: a sweep tries again with fewer, a single run records the failure."""
    stage.after[2] = raised(RuntimeError)
    trials = trials_of(stage, 1)
    with pytest.raises(RuntimeError):
        train(stage, trials)
    assert trials[0].record.status == "running"
    assert stage.of("save", "close") == []


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
        (2, "cuda", False, 15, 1.0, False),
    ],
)
def test_all_processes_answer_alike(world_size, device, logging, signum, summed, stops):
    """Several decide by the sum, which a GPU reads at logging steps only."""
    setup = SimpleNamespace(process=Process(0, world_size, 0), device=torch.device(device))
    pack = SimpleNamespace(setup=setup, flat=SimpleNamespace(stop=torch.tensor([summed])))
    stop = StopRequest()
    stop.signum = signum
    assert stop_requested(pack, stop, logging) is stops
