"""Which pack is next: without training anything."""

from __future__ import annotations

import pytest
from sweeps import another, claimed, leave_record, seed_trials, sweep_of

from lora_vit.sweep.claims import ENDED, FREE, HELD, Claims
from lora_vit.sweep.packs import Packs
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Group, Trial


def packs_of(sweep: Sweep) -> Packs:
    packs = Packs(sweep, Claims(sweep.folder))
    packs.look()
    return packs


def taken(packs: Packs, size: int, strays: bool = False) -> list[list[Trial]]:
    return [trials for _, trials in packs.take(lambda group: size, strays)]


def test_groups_and_batches_have_their_own_packs(tmp_path):
    trials = [*seed_trials(3), *seed_trials(2, trainer__epochs=3)]
    sweep = sweep_of(tmp_path, trials)
    with sweep.changing():
        sweep.extend(later := seed_trials(5)[3:])
    packs = packs_of(sweep)
    assert taken(packs, 2) == [trials[:2], trials[2:3], trials[3:], later]
    assert packs.look() == HELD


def test_packs_are_cut_from_what_was_asked_for(tmp_path):
    """A trial that has ended leaves a smaller pack: the others keep their trials."""
    trials = seed_trials(7)
    sweep = sweep_of(tmp_path, trials)
    other = another(tmp_path, trials[0], trials[4])
    for trial in (trials[0], trials[4]):
        other.release(trial.trial_id, ENDED)
    packs = packs_of(sweep)
    assert taken(packs, 3) == [trials[1:3], [trials[3], trials[5]], trials[6:]]


@pytest.mark.parametrize("looked", [False, True])
def test_what_trains_together_does_not_depend_on_who_is_faster(looked, tmp_path):
    """Another process has begun to claim the first pack: it is left to it, whole, also if we have not seen it."""
    trials = seed_trials(6)
    packs = packs_of(sweep_of(tmp_path, trials))
    other = another(tmp_path, trials[0])
    if looked:
        assert packs.look() == FREE
    assert taken(packs, 3) == [trials[3:]]
    other.release(trials[0].trial_id)
    packs.look()
    assert taken(packs, 3) == [trials[:3]]


def test_if_others_were_faster_ever_fewer_packs_are_tried(tmp_path):
    """They take packs in the same order, so the next are gone too; what is passed over is found at the next look."""
    trials = seed_trials(10)
    packs = packs_of(sweep_of(tmp_path, trials))
    other = another(tmp_path, *trials[:7])
    tried: list[str] = []
    claim = packs.claims.take
    packs.claims.take = lambda trial: tried.append(trial) or claim(trial)  # type: ignore[func-returns-value]
    assert taken(packs, 1) == [[trial] for trial in trials[7:]]
    assert tried == [trials[i].trial_id for i in (0, 1, 3, 7, 8, 9)]
    other.release(trials[5].trial_id)
    packs.look()
    assert taken(packs, 1) == [[trials[5]]]


def test_a_pack_ends_before_a_trial_that_another_has(tmp_path):
    trials = seed_trials(5)
    packs = packs_of(sweep_of(tmp_path, trials))
    another(tmp_path, trials[1])
    assert taken(packs, 3) == [trials[:1], trials[3:]]


def test_strays_are_the_rest_of_packs_whose_first_trial_another_has(tmp_path):
    """One such pack at a look: its owner may still be about to take the others."""
    trials = seed_trials(6)
    packs = packs_of(sweep_of(tmp_path, trials))
    another(tmp_path, trials[0], trials[3], trials[4])
    packs.look()
    assert taken(packs, 3) == []
    for left in ([trials[1:3]], [trials[5:]], []):
        packs.look()
        assert taken(packs, 3, strays=True) == left


def test_what_a_record_says_has_ended_is_passed_over_and_marked(tmp_path):
    """By a single run in the trial's folder, which makes no claims."""
    trials = seed_trials(4)
    sweep = sweep_of(tmp_path, trials)
    for trial, status in zip(trials[:3], ("completed", "failed", "interrupted"), strict=True):
        leave_record(sweep, trial, status)
    packs = packs_of(sweep)
    assert taken(packs, 3) == [trials[2:3], trials[3:]]
    assert claimed(tmp_path, trials) == [ENDED, ENDED, HELD, HELD]


def test_what_cannot_be_trained_here_is_left_and_counts_for_none(tmp_path):
    trials = seed_trials(3)
    packs = packs_of(sweep_of(tmp_path, trials))
    packs.skip[trials[0].trial_id] = "no images"
    assert taken(packs, 3) == [trials[1:]]
    assert packs.look() == HELD
    for trial in trials[1:]:
        packs.claims.release(trial.trial_id, ENDED)
    assert packs.look() == ENDED
    packs.skip.clear()
    assert packs.look() == FREE


def test_a_group_whose_size_is_being_measured_is_passed_over(tmp_path):
    trials = [*seed_trials(2), *seed_trials(2, trainer__epochs=3)]
    packs = packs_of(sweep_of(tmp_path, trials))

    def size_of(group: Group) -> int | None:
        return None if group.trials[0] is packs.sweep.batches[0][0] else 2

    assert [pack for _, pack in packs.take(size_of)] == [trials[2:]]
    assert packs.look() == FREE
