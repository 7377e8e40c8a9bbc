"""What is open, which pack is next, and what a worker gives back: without training anything."""

from __future__ import annotations

import pytest
from sweeps import LAUNCHED, Events, leave_record, plain_job, seed_jobs, sweep_run

from lora_vit.config import ConfigError
from lora_vit.records import CHECKPOINT
from lora_vit.sweep.claims import Claims, Owner
from lora_vit.sweep.plan import Job, SweepRun
from lora_vit.sweep.schedule import Schedule


def schedule_of(run: SweepRun) -> tuple[Schedule, Events]:
    events = Events()
    return Schedule(run, Claims(run.folder), events), events


def somebody(folder) -> Claims:
    """A process on another machine, alive as long as nobody has waited for it."""
    return Claims(folder, Owner(host="elsewhere", token="other"))


def leave_checkpoint(run: SweepRun, job: Job) -> None:
    run.folder_of(job).mkdir(parents=True, exist_ok=True)
    (run.folder_of(job) / CHECKPOINT).touch()


# --- open or ended


def test_ended_trials_are_told_once_and_left_out(tmp_path):
    """Those between and after an ended one are found, in order; what has ended is not read again."""
    jobs = seed_jobs(5)
    run = sweep_run(tmp_path, jobs)
    leave_record(run, jobs[1], "completed")
    leave_record(run, jobs[3], "failed")
    schedule, events = schedule_of(run)
    (group,) = schedule.groups
    assert schedule.open_jobs(group) == [jobs[0], jobs[2], jobs[4]]
    assert [kind for kind, _ in events] == ["ended", "ended"]
    assert [(e["id"], e["state"].status) for e in events.of("ended")] == [
        (jobs[1].trial_id, "completed"),
        (jobs[3].trial_id, "failed"),
    ]
    for name in (1, 3):
        (run.folder_of(jobs[name]) / "record.json").unlink()
    assert schedule.open_jobs(group) == [jobs[0], jobs[2], jobs[4]]
    leave_record(run, jobs[2], "completed")
    assert schedule.open_jobs(group) == [jobs[0], jobs[4]]
    assert events.of("ended")[2]["id"] == jobs[2].trial_id
    assert len(events) == 3


def test_each_group_plans_its_own_trials(tmp_path):
    jobs = [*seed_jobs(3), *seed_jobs(2, trainer__epochs=3)]
    run = sweep_run(tmp_path, jobs)
    leave_record(run, jobs[0], "completed")
    schedule, _ = schedule_of(run)
    first, second = schedule.groups
    assert (first.jobs, second.jobs) == (jobs[:3], jobs[3:])
    assert (schedule.planned(first), schedule.planned(second)) == (2, 2)
    leave_record(run, jobs[1], "completed")
    assert schedule.open_jobs(first) == [jobs[2]]
    assert schedule.planned(first) == 2, "as many as were open at the beginning"
    assert schedule.take_pack(second, schedule.open_jobs(second), 2) == jobs[3:]


# --- packs


def test_packs_are_cut_from_what_was_planned(tmp_path):
    """A trial that ended since leaves a smaller pack: the next ones keep their trials."""
    jobs = seed_jobs(7)
    run = sweep_run(tmp_path, jobs)
    schedule, _ = schedule_of(run)
    (group,) = schedule.groups
    leave_record(run, jobs[0], "completed")
    leave_record(run, jobs[4], "completed")
    packs = [schedule.take_pack(group, schedule.open_jobs(group), 3) for _ in range(4)]
    assert packs == [[jobs[1], jobs[2]], [jobs[3], jobs[5]], [jobs[6]], []]


def test_begun_trials_come_first(tmp_path):
    """In the grid's order among themselves, as are the others."""
    jobs = seed_jobs(5)
    run = sweep_run(tmp_path, jobs)
    for job in (jobs[1], jobs[3]):
        leave_checkpoint(run, job)
    schedule, _ = schedule_of(run)
    (group,) = schedule.groups
    open_jobs = schedule.open_jobs(group)
    assert open_jobs == jobs
    packs = [schedule.take_pack(group, open_jobs, 2) for _ in range(3)]
    assert packs == [[jobs[1], jobs[3]], [jobs[0], jobs[2]], [jobs[4]]]


def test_a_pack_ends_before_a_trial_that_another_has(tmp_path):
    """The rest of that pack is the other's too, and is not claimed meanwhile."""
    jobs = seed_jobs(5)
    run = sweep_run(tmp_path, jobs)
    schedule, _ = schedule_of(run)
    (group,) = schedule.groups
    other = somebody(tmp_path)
    assert other.take(jobs[1].trial_id)
    assert schedule.take_pack(group, jobs, 3) == [jobs[0]]
    assert other.take(jobs[2].trial_id)
    assert schedule.take_pack(group, jobs, 3) == [jobs[3], jobs[4]]


def test_what_trains_together_does_not_depend_on_who_is_faster(tmp_path):
    """Another process has begun to claim the first pack: it is left to it, whole."""
    jobs = seed_jobs(6)
    schedule, _ = schedule_of(sweep_run(tmp_path, jobs))
    (group,) = schedule.groups
    other = somebody(tmp_path)
    assert other.take(jobs[0].trial_id)
    assert schedule.take_pack(group, jobs, 3) == jobs[3:]
    assert schedule.take_pack(group, jobs, 3) == []
    other.release(jobs[0].trial_id)
    assert schedule.take_pack(group, jobs, 3) == jobs[:3]


def test_trials_that_are_not_open_are_not_claimed(tmp_path):
    jobs = seed_jobs(3)
    run = sweep_run(tmp_path, jobs)
    schedule, _ = schedule_of(run)
    (group,) = schedule.groups
    assert schedule.take_pack(group, [jobs[1]], 3) == [jobs[1]]
    other = somebody(tmp_path)
    assert [other.take(job.trial_id) for job in jobs] == [True, False, True]


def test_what_ended_since_the_look_is_freed_and_passed_over(tmp_path):
    jobs = seed_jobs(4)
    run = sweep_run(tmp_path, jobs)
    schedule, _ = schedule_of(run)
    (group,) = schedule.groups
    looked_at = schedule.open_jobs(group)
    for job in (jobs[0], jobs[1], jobs[2]):
        leave_record(run, job, "completed")
    assert schedule.take_pack(group, looked_at, 2) == [jobs[3]]
    other = somebody(tmp_path)
    assert [other.take(job.trial_id) for job in jobs] == [True, True, True, False]


def test_all_taken_and_given_back(tmp_path):
    """By anybody: ourselves or another."""
    jobs = seed_jobs(3)
    schedule, _ = schedule_of(sweep_run(tmp_path, jobs))
    (group,) = schedule.groups
    other = somebody(tmp_path)
    assert not schedule.all_taken(jobs)
    assert schedule.all_taken([])
    assert other.take(jobs[0].trial_id)
    assert not schedule.all_taken(jobs)
    assert schedule.all_taken(jobs[:1])
    assert schedule.take_pack(group, jobs[1:], 3) == jobs[1:]
    assert schedule.all_taken(jobs)
    schedule.give_back(jobs[1:])
    assert [other.take(job.trial_id) for job in jobs[1:]] == [True, True]


# --- refused


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_refused_trial_is_free_told_and_not_met_again(on_failure, tmp_path):
    jobs = seed_jobs(2)
    run = sweep_run(tmp_path, jobs, on_failure=on_failure)
    schedule, events = schedule_of(run)
    (group,) = schedule.groups
    assert schedule.take_pack(group, jobs, 2) == jobs
    schedule.refuse(jobs[0], ConfigError("its folder is another's"))
    left = {
        "id": jobs[0].trial_id,
        "status": "refused",
        "val_accuracy": None,
        "message": "its folder is another's",
    }
    assert events == [("left", left), *([("stop", {})] if on_failure == "stop" else [])]
    assert somebody(tmp_path).take(jobs[0].trial_id)
    assert not somebody(tmp_path).take(jobs[1].trial_id)
    assert not run.folder_of(jobs[0]).exists()
    assert schedule.open_jobs(group) == [jobs[1]]
    assert events.of("ended") == []


def test_what_counts_as_ended_is_the_runs_to_say(tmp_path):
    """Failed before the command: open again with ``retry_failed``; failed since: not."""
    jobs = [plain_job({"seed": 0}), plain_job({"seed": 1})]
    run = sweep_run(tmp_path, jobs, retry_failed=True)
    leave_record(run, jobs[0], "failed", finished=LAUNCHED - 1)
    leave_record(run, jobs[1], "failed", finished=LAUNCHED + 1)
    schedule, _ = schedule_of(run)
    (group,) = schedule.groups
    assert schedule.open_jobs(group) == [jobs[0]]
