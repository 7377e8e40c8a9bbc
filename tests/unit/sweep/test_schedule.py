"""Which pack is next, and what a worker gives back: without training anything."""

from __future__ import annotations

import pytest
from lora_vit.sweep.follow import Follower
from lora_vit.sweep.progress import View
from lora_vit.sweep.schedule import Schedule
from sweeps import LAUNCHED, Events, leave_record, plain_job, seed_jobs, sweep_run

from lora_vit.errors import ConfigError
from lora_vit.sweep.claims import ENDED, FREE, HELD, Claims, Owner
from lora_vit.sweep.plan import Job, SweepRun


def schedule_of(run: SweepRun) -> tuple[Schedule, Events]:
    events = Events()
    return Schedule(run, Claims(run.folder), events), events


def somebody(folder) -> Claims:
    """A process on another machine, alive as long as nobody has waited for it."""
    return Claims(folder, Owner(host="elsewhere", token="other"))


def states(folder, jobs: list[Job]) -> list[str]:
    claims = Claims(folder)
    claims.look()
    return [claims.state(job.trial_id) for job in jobs]


# --- packs


def test_each_group_has_its_own_packs(tmp_path):
    jobs = [*seed_jobs(3), *seed_jobs(2, trainer__epochs=3)]
    schedule, _ = schedule_of(sweep_run(tmp_path, jobs))
    first, second = schedule.groups
    assert (first.jobs, second.jobs) == (jobs[:3], jobs[3:])
    assert schedule.take_pack(second, 2) == jobs[3:]
    assert schedule.is_free(first)
    assert not schedule.is_free(second)
    assert schedule.take_pack(first, 2) == jobs[:2]
    assert schedule.is_free(first)
    assert schedule.take_pack(first, 2) == jobs[2:3]
    assert schedule.take_pack(first, 2) == []
    assert not schedule.is_free(first)


def test_packs_are_cut_from_what_was_asked_for(tmp_path):
    """A trial that has ended leaves a smaller pack: the others keep their trials."""
    jobs = seed_jobs(7)
    run = sweep_run(tmp_path, jobs)
    other = somebody(tmp_path)
    for job in (jobs[0], jobs[4]):
        assert other.take(job.trial_id)
        other.release(job.trial_id, ENDED)
    schedule, _ = schedule_of(run)
    schedule.look()
    (group,) = schedule.groups
    assert [schedule.take_pack(group, 3) for _ in range(4)] == [[jobs[1], jobs[2]], [jobs[3], jobs[5]], [jobs[6]], []]


@pytest.mark.parametrize("looked", [False, True])
def test_what_trains_together_does_not_depend_on_who_is_faster(looked, tmp_path):
    """Another process has begun to claim the first pack: it is left to it, whole, also where we have not seen it."""
    jobs = seed_jobs(6)
    schedule, _ = schedule_of(sweep_run(tmp_path, jobs))
    (group,) = schedule.groups
    other = somebody(tmp_path)
    assert other.take(jobs[0].trial_id)
    if looked:
        schedule.look()
    assert schedule.take_pack(group, 3) == jobs[3:]
    assert schedule.take_pack(group, 3) == []
    assert schedule.is_free(group), "of two trials nobody has claimed yet"
    other.release(jobs[0].trial_id)
    schedule.look()
    assert schedule.take_pack(group, 3) == jobs[:3]


def test_where_others_were_faster_ever_fewer_packs_are_tried(tmp_path):
    """They take packs in the same order, so the next are gone too; what is passed over is found at the next look."""
    jobs = seed_jobs(20)
    schedule, _ = schedule_of(sweep_run(tmp_path, jobs))
    (group,) = schedule.groups
    other = somebody(tmp_path)
    schedule.look()
    for job in jobs[:7]:
        assert other.take(job.trial_id)
    tried: list[str] = []
    take = schedule.claims.take
    schedule.claims.take = lambda trial: tried.append(trial) or take(trial)  # type: ignore[func-returns-value]
    assert schedule.take_pack(group, 1) == [jobs[7]]
    assert tried == [jobs[i].trial_id for i in (0, 1, 3, 7)]
    assert schedule.take_pack(group, 1) == [jobs[8]]
    other.release(jobs[5].trial_id)
    schedule.look()
    assert schedule.take_pack(group, 1) == [jobs[5]]


def test_a_pack_ends_before_a_trial_that_another_has(tmp_path):
    jobs = seed_jobs(5)
    schedule, _ = schedule_of(sweep_run(tmp_path, jobs))
    (group,) = schedule.groups
    assert somebody(tmp_path).take(jobs[1].trial_id)
    assert schedule.take_pack(group, 3) == [jobs[0]]
    assert schedule.take_pack(group, 3) == [jobs[3], jobs[4]]


def test_strays_are_the_rest_of_packs_whose_first_trial_another_has(tmp_path):
    jobs = seed_jobs(6)
    schedule, _ = schedule_of(sweep_run(tmp_path, jobs))
    (group,) = schedule.groups
    other = somebody(tmp_path)
    for job in (jobs[0], jobs[3], jobs[4]):
        assert other.take(job.trial_id)
    schedule.look()
    assert schedule.take_pack(group, 3) == []
    assert schedule.take_pack(group, 3, strays=True) == jobs[1:3]
    assert schedule.take_pack(group, 3, strays=True) == [jobs[5]]
    assert schedule.take_pack(group, 3, strays=True) == []


def test_what_a_record_says_has_ended_is_passed_over_and_marked(tmp_path):
    """By a command that makes no claims."""
    jobs = seed_jobs(4)
    run = sweep_run(tmp_path, jobs)
    for job, status in zip(jobs[:3], ("completed", "failed", "interrupted"), strict=True):
        leave_record(run, job, status)
    schedule, _ = schedule_of(run)
    (group,) = schedule.groups
    assert schedule.take_pack(group, 3) == [jobs[2]]
    assert states(tmp_path, jobs) == [ENDED, ENDED, HELD, FREE]


def test_what_counts_as_ended_is_the_runs_to_say(tmp_path):
    """Failed before the command: open again with ``retry_failed``; failed since: not."""
    jobs = [plain_job({"seed": 0}), plain_job({"seed": 1})]
    run = sweep_run(tmp_path, jobs, retry_failed=True)
    leave_record(run, jobs[0], "failed", finished=LAUNCHED - 1)
    leave_record(run, jobs[1], "failed", finished=LAUNCHED + 1)
    schedule, _ = schedule_of(run)
    (group,) = schedule.groups
    assert schedule.take_pack(group, 2) == [jobs[0]]


def test_given_back_is_free_unless_it_has_ended(tmp_path):
    jobs = seed_jobs(3)
    schedule, _ = schedule_of(sweep_run(tmp_path, jobs))
    (group,) = schedule.groups
    assert schedule.take_pack(group, 2) == jobs[:2]
    schedule.claims.release(jobs[0].trial_id, ENDED)
    schedule.give_back(jobs)
    assert states(tmp_path, jobs) == [ENDED, FREE, FREE]


# --- refused


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_refused_trial_has_ended_and_is_told(on_failure, tmp_path):
    jobs = seed_jobs(2)
    run = sweep_run(tmp_path, jobs, on_failure=on_failure)
    schedule, events = schedule_of(run)
    (group,) = schedule.groups
    assert schedule.take_pack(group, 2) == jobs
    schedule.refuse(jobs[0], ConfigError("its folder is another's"))
    left = {
        "id": jobs[0].trial_id,
        "status": "refused",
        "val_accuracy": None,
        "message": "its folder is another's",
    }
    assert events == [("left", left), *([("stop", {})] if on_failure == "stop" else [])]
    assert states(tmp_path, jobs) == [ENDED, HELD]
    other = somebody(tmp_path)
    other.look()
    assert other.why(jobs[0].trial_id) == "its folder is another's"
    assert not run.folder_of(jobs[0]).exists()


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
@pytest.mark.parametrize("how", ["failed", "refused"])
def test_a_failure_elsewhere_stops_a_worker_and_whoever_follows(how, on_failure, tmp_path):
    """Where it is to: at the next look, told by the claim alone. One of an earlier run that is tried again does not."""
    jobs = seed_jobs(3)
    run = sweep_run(tmp_path, jobs, on_failure=on_failure)
    mine, theirs = Events(), Events()
    here, there = Schedule(run, Claims(tmp_path, Owner()), mine), Schedule(run, Claims(tmp_path, Owner()), theirs)
    there.look()
    assert there.claims.take(jobs[1].trial_id)
    here.look()
    assert mine == []
    there.left(jobs[1].trial_id, how, None, "why")
    here.look()
    asked = [("stop", {})] if on_failure == "stop" else []
    assert mine == asked
    assert theirs == [("left", {"id": jobs[1].trial_id, "status": how, "val_accuracy": None, "message": "why"}), *asked]
    view = View(jobs)
    Follower(run, view).look()
    assert view.stop_asked == (on_failure == "stop")
    assert here.claims.state(jobs[1].trial_id) == ENDED
    here.claims.reopen(jobs[1].trial_id)
    mine.clear()
    here.look()
    assert mine == []
    assert here.claims.state(jobs[1].trial_id) == FREE
