"""What a worker does beside other workers, and when it is asked to stop; records and claims are real."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
from sweeps import another, seed_trials

from lora_vit.errors import Interrupted
from lora_vit.records import CHECKPOINT, read_record
from lora_vit.sweep import claims as claims_module
from lora_vit.sweep.claims import DEAD_AFTER, ENDED, FREE, HELD, Claims
from lora_vit.sweep.pack_size import PackSizes
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.worker import Worker
from lora_vit.training.trial import TrialRun

# --- other workers


def test_a_worker_stays_while_something_is_held(bench, monkeypatch):
    """S3: what its owner leaves is trained, also if it dies an hour later; no other may be there to do it."""
    trials = seed_trials(3)
    bench.ask(trials, pack_size="1")
    other = another(bench.folder, *trials[:2])
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            other.release(trials[0].trial_id)
        if len(naps) == 6:
            other.release(trials[1].trial_id, ENDED)

    monkeypatch.setattr(bench.stop, "sleep", sleep)
    bench.work()
    assert bench.packs == [[2], [0]]
    assert len(naps) >= 6


@pytest.mark.parametrize("its_owner_continues", [False, True])
def test_what_is_left_of_anothers_pack_is_waited_for_a_moment(its_owner_continues, bench, monkeypatch):
    """Its owner may be about to claim it; if it does not, it is taken."""
    trials = seed_trials(3)
    bench.ask(trials, pack_size="3")
    other = another(bench.folder, trials[0])
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if its_owner_continues and len(naps) == 1:
            assert all(other.take(trial.trial_id) for trial in trials[1:])
        if len(naps) == 2:
            for trial in trials:
                other.release(trial.trial_id, ENDED)

    monkeypatch.setattr(bench.stop, "sleep", sleep)
    bench.work()
    assert bench.packs == ([] if its_owner_continues else [[1, 2]])


def test_who_measures_the_pack_size_is_waited_for(bench, monkeypatch):
    sizes = [None, None, 2]
    monkeypatch.setattr(PackSizes, "_measured", lambda *args: sizes.pop(0))
    bench.work(seed_trials(3), pack_size="auto")
    assert bench.packs == [[0, 1], [2]]


def test_a_stalled_owner_gives_way_and_its_successor_trains(bench, monkeypatch):
    """S4, S5: suspended for longer than DEAD_AFTER; when it wakes up it writes nothing, and no worker gives up."""
    trials = seed_trials(2)
    sweep = bench.ask(trials)
    now = [0.0]
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(claims_module, "_born", lambda pid: "")

    def successor() -> None:
        claims = Claims(bench.folder)
        claims.look()
        assert claims.state(trials[0].trial_id) == HELD, "first seen now"
        now[0] += DEAD_AFTER + 1
        second = Worker(Sweep.existing(bench.folder), claims, bench.stop, bench.said.append)
        bench.act = lambda runs, reporter: None
        second.work()

    late: list[TrialRun] = []

    def act(runs: list[TrialRun], reporter: Worker) -> None:
        late.extend(runs)
        successor()
        for run in runs:  # awake again
            run.record.metrics["val_accuracy"] = 0.0
            run.save()
        pytest.fail("wrote where another has completed")

    bench.act = act
    bench.work()
    assert bench.packs == [[0, 1], [0, 1]]
    assert any(f"{trials[0].trial_id} was taken over" in line for line in bench.said)
    assert bench.statuses(trials) == ["completed"] * 2
    assert [read_record(sweep.folder_of(trial)).metrics["val_accuracy"] for trial in trials] == [0.75] * 2
    assert not (sweep.folder_of(trials[0]) / CHECKPOINT).exists()
    assert bench.states(trials) == [ENDED] * 2


def test_a_claim_that_is_lost_and_free_again_is_taken_again(bench):
    """What another process took over is left to it; the rest of the pack, and later the trial, are trained here."""
    trials = seed_trials(2)

    def act(runs: list[TrialRun], reporter: Worker) -> None:
        if len(bench.packs) == 1:
            for mark in ("", ".free"):
                (bench.folder / ".claims" / f"{trials[0].trial_id}.2{mark}").touch()
            runs[0].write_record()
            pytest.fail("the pack continues")

    bench.act = act
    bench.work(trials)
    assert bench.packs == [[0, 1], [0, 1]]
    assert [line for line in bench.said if "taken over" in line] == [
        f"{trials[0].trial_id} was taken over by another process"
    ]
    assert bench.statuses(trials) == ["completed"] * 2


def test_how_far_the_trials_are_goes_into_the_signs_of_life(bench):
    """A step of a pack is a part of an epoch of each of its trials."""
    trials = seed_trials(2)
    seen: list[float] = []

    def act(runs: list[TrialRun], reporter: Worker) -> None:
        runs[1].state.epoch = 3
        reporter.advance(SimpleNamespace(trials=runs, step_in_epoch=1, steps_per_epoch=4))  # type: ignore[arg-type]
        reporter.claims.beat()
        other = Claims(bench.folder)
        other.look()
        seen.extend(other.epochs(trial.trial_id) for trial in trials)

    bench.act = act
    bench.work(trials)
    assert seen == [0.25, 3.25]


# --- requests to stop


@pytest.mark.parametrize("raised", [Interrupted(signal.SIGINT), SystemExit(1), KeyboardInterrupt()])
def test_a_pack_that_was_interrupted_is_given_back(raised, bench):
    """Also by what a foreign handler raises."""
    trials = seed_trials(2)
    bench.ask(trials)

    def act(runs: list[TrialRun], reporter: Worker) -> None:
        raise raised

    bench.act = act
    with pytest.raises(type(raised)):
        bench.work()
    assert bench.packs == [[0, 1]]
    assert bench.states(trials) == [FREE] * 2


def test_a_request_to_stop_is_obeyed_before_the_next_pack(bench):
    trials = [*seed_trials(2), *seed_trials(1, trainer__epochs=3)]

    def act(runs: list[TrialRun], reporter: Worker) -> None:
        bench.stop.signum = signal.SIGTERM

    bench.act = act
    bench.ask(trials, pack_size="1")
    with pytest.raises(Interrupted) as caught:
        bench.work()
    assert caught.value.signum == signal.SIGTERM
    assert bench.packs == [[0]]
    assert bench.states(trials) == [ENDED, FREE, FREE]
