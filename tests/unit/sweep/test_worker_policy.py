"""What a worker does with packs, errors, claims and requests to stop; the trials train nothing."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_vit.sweep.measure import PackSizes
from lora_vit.sweep.schedule import Schedule
from sweeps import LAUNCHED, Events, plain_job, seed_jobs, sweep_run

from lora_vit import terminal
from lora_vit.config import TrialConfig, cell_id, to_dict
from lora_vit.errors import ConfigError, Interrupted
from lora_vit.files import locked
from lora_vit.records import TrialRecord, read_record, write_record
from lora_vit.stopping import StopRequest
from lora_vit.sweep import worker as worker_module
from lora_vit.sweep.claims import ENDED, FREE, HELD, Claims, Owner
from lora_vit.sweep.plan import Job, SweepRun
from lora_vit.sweep.setups import Setups
from lora_vit.sweep.worker import ClaimLost, PackReporter, Worker, out_of_memory
from lora_vit.training.checkpoint import TrialState
from lora_vit.training.trial import TrialRun


class Files:
    """Of a trial that trains nothing: its record."""

    def __init__(self, folder: Path, record: TrialRecord):
        self.folder, self.record, self.closed = folder, record, 0

    def say(self, text: str) -> None:
        pass

    def write_record(self) -> None:
        write_record(self.folder, self.record)

    def close(self) -> None:
        self.closed += 1


class Bench:
    """Runs a worker whose packs do what ``act`` says, and then complete."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.events, self.stop = Events(), StopRequest()
        self.act: Callable[[list[TrialRun], Any], None] = lambda trials, reporter: None
        self.built: Callable[[Job], object] = lambda job: "setup"
        self.packs: list[list[int]] = []
        self.opened: list[tuple[Any, ...]] = []
        self.files: list[Files] = []
        self.offsets: dict[int, int] = {}
        self.unusable: dict[int, Exception] = {}

    def open(self, config: TrialConfig, place: Path, *others: Any) -> TrialRun:
        self.opened.append((config.seed, place, *others))
        if config.seed in self.unusable:
            raise self.unusable[config.seed]
        record = TrialRecord(place.name, cell_id(config), "running", to_dict(config), started=LAUNCHED)
        self.files.append(Files(place, record))
        return TrialRun(config, record, TrialState(step_in_epoch=self.offsets.get(config.seed, 0)), self.files[-1])  # type: ignore[arg-type]

    def train(self, trials: list[TrialRun], setup: object, reporter: PackReporter, stop: StopRequest) -> None:
        assert setup == "setup"
        assert stop is self.stop
        self.packs.append([trial.config.seed for trial in trials])
        self.act(trials, reporter)
        for trial in trials:
            if trial.record.status == "running":
                self.complete(trial, reporter)

    def complete(self, trial: TrialRun, reporter: PackReporter) -> None:
        trial.complete()
        reporter.left(trial)

    def work(self, jobs: list[Job], **options: object) -> SweepRun:
        run = sweep_run(self.folder, jobs, **options)
        Worker(run, self.events, self.stop).work()
        return run

    def said(self) -> list[str]:
        return [fields["text"] for fields in self.events.of("say")]

    def statuses(self, jobs: list[Job]) -> list[str]:
        return [read_record(self.folder / job.trial_id).status for job in jobs]


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    made = Bench(tmp_path)
    monkeypatch.setattr(TrialRun, "open", made.open)
    monkeypatch.setattr(worker_module, "train_trials", made.train)
    monkeypatch.setattr(worker_module, "free_memory", lambda: None)  # takes long, and there is nothing to free
    monkeypatch.setattr(Setups, "of", lambda setups, job: made.built(job))
    return made


def somebody(folder: Path) -> Claims:
    """Another process, that has just looked."""
    other = Claims(folder, Owner(host="elsewhere", token="other"))
    other.look()
    return other


def states(folder: Path, jobs: list[Job]) -> list[str]:
    return [somebody(folder).state(job.trial_id) for job in jobs]


def breaks(error: Callable[[], Exception], seeds: set[int] | None = None, more_than: int = 0):
    """Packs with one of these seeds (None: with any) and of more than so many trials raise the error."""

    def act(trials: list[TrialRun], reporter: PackReporter) -> None:
        if len(trials) > more_than and (seeds is None or seeds & {t.config.seed for t in trials}):
            raise error()

    return act


# --- packs


def test_all_groups_are_trained_in_packs(bench):
    """Each trial in its folder, with its files, and what its command is."""
    jobs = [*seed_jobs(3), *seed_jobs(1, trainer__epochs=3)]
    jobs[0].label = "seed=0"
    run = bench.work(jobs, pack_size="2")
    assert bench.packs == [[0, 1], [2], [0]]
    assert bench.statuses(jobs) == ["completed"] * 4
    board = bench.folder / "tensorboard" / f"seed=0_{jobs[0].trial_id}"
    assert bench.opened[0] == (0, run.folder_of(jobs[0]), "setup", LAUNCHED, run.hydra_files(jobs[0]), board)
    assert [fields["id"] for fields in bench.events.of("left")] == [job.trial_id for job in jobs]
    assert states(bench.folder, jobs) == [ENDED] * 4
    assert bench.said() == []


def test_a_device_for_each_worker(tmp_path):
    for index in (0, 3):
        worker = Worker(sweep_run(tmp_path, []), Events(), StopRequest(), index)
        assert worker.setups.process.local_rank == index
    assert Worker(sweep_run(tmp_path, []), Events(), StopRequest()).setups.process.local_rank == 0


def test_trials_that_stand_elsewhere_in_an_epoch_train_apart(bench):
    bench.offsets = {1: 5, 3: 5}
    bench.work(seed_jobs(4))
    assert bench.packs == [[0, 2], [1, 3]]


def test_a_folder_is_locked_while_it_trains(bench):
    """Also those of the pack's other half; one that a single run holds is refused, and the others train."""
    jobs = seed_jobs(3)
    bench.offsets = {2: 1}

    def act(trials: list[TrialRun], reporter: PackReporter) -> None:
        for job in (jobs[0], jobs[2]):
            with pytest.raises(BlockingIOError), locked(bench.folder / job.trial_id / ".lock", wait=False):
                pass

    bench.act = act
    (bench.folder / jobs[1].trial_id).mkdir()
    with locked(bench.folder / jobs[1].trial_id / ".lock"):
        bench.work(jobs)
    assert bench.packs == [[0], [2]]
    (refused,) = (fields for fields in bench.events.of("left") if fields["id"] == jobs[1].trial_id)
    assert refused["status"] == "refused"
    assert "another process is training there" in refused["message"]
    for job in jobs:
        with locked(bench.folder / job.trial_id / ".lock", wait=False):
            pass


@pytest.mark.parametrize("error", [ConfigError("other data"), ConfigError("other data")])
def test_a_trial_that_cannot_be_opened_is_refused_and_the_others_train(error, bench):
    jobs = seed_jobs(3)
    bench.unusable = {1: error}
    bench.work(jobs)
    assert bench.packs == [[0, 2]]
    assert [(f["id"], f["status"], f["message"]) for f in bench.events.of("left")] == [
        (jobs[1].trial_id, "refused", "other data"),
        (jobs[0].trial_id, "completed", ""),
        (jobs[2].trial_id, "completed", ""),
    ]


@pytest.mark.parametrize("error", [ConfigError("no such weights"), ConfigError("no such images")])
def test_what_cannot_be_built_refuses_its_group_only(error, bench):
    broken, fine = seed_jobs(3), seed_jobs(2, trainer__epochs=3)

    def built(job: Job) -> str:
        if job.config.trainer.epochs == 2:
            raise error
        return "setup"

    bench.built = built
    bench.work([*broken, *fine], pack_size="2")
    assert bench.packs == [[0, 1]]
    assert [(f["id"], f["status"]) for f in bench.events.of("left")] == [
        *((job.trial_id, "refused") for job in broken),
        *((job.trial_id, "completed") for job in fine),
    ]
    assert all(f["message"] == str(error) for f in bench.events.of("left")[:3])


# --- errors


def test_an_error_is_looked_for_by_halves_and_recorded_by_its_trial(bench):
    """The others go on from their checkpoints; packs stay as large as they were."""
    jobs = seed_jobs(7)
    bench.act = breaks(lambda: RuntimeError("no\nmore"), {1})
    bench.work(jobs, pack_size="5")
    assert bench.packs == [[0, 1, 2, 3, 4], [0, 1], [0], [1], [2, 3, 4], [5, 6]]
    assert bench.statuses(jobs) == ["completed", "failed", *["completed"] * 5]
    goes_on = "go on from their last checkpoints"
    assert bench.said() == [
        f"a pack of 5 ended (RuntimeError: no): packs of 2 {goes_on}",
        f"a pack of 2 ended (RuntimeError: no): packs of 1 {goes_on}",
    ]
    error = read_record(bench.folder / jobs[1].trial_id).error
    assert error is not None
    assert (error["message"], error["step"]) == ("RuntimeError: no", None)
    assert "in act" in error["traceback"]
    (failed,) = (f for f in bench.events.of("left") if f["status"] == "failed")
    assert (failed["id"], failed["message"]) == (jobs[1].trial_id, "RuntimeError: no")
    assert bench.events.of("stop") == []
    assert [files.closed for files in bench.files] == [1] * len(bench.files), "each that was opened is closed"


def test_packs_stay_smaller_after_memory_ran_out(bench):
    """Half of the pack for which it was too little last: of 3, that is 1."""
    jobs = seed_jobs(7)
    bench.act = breaks(lambda: torch.OutOfMemoryError("CUDA out of memory"), more_than=2)
    bench.work(jobs, pack_size="5")
    assert bench.packs == [[0, 1, 2, 3, 4], [0, 1], [2, 3, 4], [2], [3, 4], [5], [6]]
    assert bench.statuses(jobs) == ["completed"] * 7


def test_memory_that_runs_out_halves_what_was_trained(bench):
    jobs = seed_jobs(8)
    bench.act = breaks(MemoryError, more_than=2)
    bench.work(jobs, pack_size="4")
    assert bench.packs == [[0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6, 7]]


def test_trials_that_left_before_the_error_are_not_trained_again(bench):
    """And one of a pack that is left alone is tried alone before it is blamed."""
    jobs = seed_jobs(3)

    def act(trials: list[TrialRun], reporter: PackReporter) -> None:
        if len(trials) == 3:
            for trial in (trials[0], trials[2]):
                bench.complete(trial, reporter)
            raise RuntimeError("once")

    bench.act = act
    bench.work(jobs)
    assert bench.packs == [[0, 1, 2], [1]]
    assert bench.statuses(jobs) == ["completed"] * 3
    assert len(bench.events.of("left")) == 3


def test_memory_is_freed_between_a_pack_and_its_halves(bench, monkeypatch):
    """The error holds no frame of the pack by then."""
    freed: list[int] = []
    monkeypatch.setattr(worker_module, "free_memory", lambda: freed.append(len(bench.packs)))
    kept: list[Exception] = []

    def act(trials: list[TrialRun], reporter: PackReporter) -> None:
        if len(trials) > 1:
            kept.append(RuntimeError("no"))
            raise kept[-1]

    bench.act = act
    bench.work(seed_jobs(2))
    assert freed == [1]
    assert kept[0].__traceback__ is None


@pytest.mark.parametrize("trials", [1, 2])
def test_a_disk_that_cannot_be_written_ends_the_worker(trials, bench):
    """No trial is to blame; the claims are given back."""
    jobs = seed_jobs(trials)
    bench.act = breaks(lambda: OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        bench.work(jobs)
    assert len(bench.packs) == 1
    assert bench.events.of("left") == []
    assert states(bench.folder, jobs) == [FREE] * trials
    assert list((bench.folder / jobs[0].trial_id).iterdir()) == [], "unlocked"


@pytest.mark.parametrize("error", [OSError(errno.ECONNRESET, "reset"), ValueError(errno.ENOSPC)])
def test_any_other_error_is_a_trials_own(error, bench):
    jobs = seed_jobs(1)
    bench.act = breaks(lambda: error)
    bench.work(jobs)
    assert bench.statuses(jobs) == ["failed"]


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_failure_asks_everybody_to_stop_where_it_is_to(on_failure, bench):
    bench.act = breaks(lambda: RuntimeError("no"), {0})
    bench.work(seed_jobs(2), pack_size="1", on_failure=on_failure)
    assert bool(bench.events.of("stop")) == (on_failure == "stop")


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: Out of Memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("CUDA error: an illegal memory access"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error, ran_out):
    assert out_of_memory(error) is ran_out


# --- others, and requests to stop


def test_a_worker_ends_where_others_have_the_rest(bench, monkeypatch):
    """It does not wait idly: what they leave is the command's to see."""
    jobs = seed_jobs(2)
    assert somebody(bench.folder).take(jobs[0].trial_id)
    monkeypatch.setattr(worker_module.time, "sleep", lambda seconds: pytest.fail("there is nothing to wait for"))
    bench.work(jobs, pack_size="1")
    assert bench.packs == [[1]]
    assert states(bench.folder, jobs) == [HELD, ENDED]


@pytest.mark.parametrize("its_owner_goes_on", [False, True])
def test_what_is_left_of_anothers_pack_is_waited_for_a_moment(its_owner_goes_on, bench, monkeypatch):
    """Its owner may be about to claim it; if it does not, it is taken."""
    jobs = seed_jobs(3)
    other = somebody(bench.folder)
    assert other.take(jobs[0].trial_id)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if its_owner_goes_on:
            assert other.take(jobs[1].trial_id)
            assert other.take(jobs[2].trial_id)

    monkeypatch.setattr(worker_module.time, "sleep", sleep)
    bench.work(jobs, pack_size="3")
    assert bench.packs == ([] if its_owner_goes_on else [[1, 2]])
    assert slept == [worker_module.POLL_EVERY]


def test_what_is_freed_while_we_train_is_trained_too(bench):
    jobs = seed_jobs(2)
    other = somebody(bench.folder)
    assert other.take(jobs[0].trial_id)

    def act(trials: list[TrialRun], reporter: PackReporter) -> None:
        other.release(jobs[0].trial_id)

    bench.act = act
    bench.work(jobs, pack_size="1")
    assert bench.packs == [[1], [0]]


def test_who_measures_the_pack_size_is_waited_for(bench, monkeypatch):
    """No pack is taken meanwhile, and the trials are still somebody's to train."""
    sizes = [None, None, 2]
    slept: list[float] = []
    monkeypatch.setattr(PackSizes, "of", lambda *args: sizes.pop(0) if len(sizes) > 1 else sizes[0])
    monkeypatch.setattr(worker_module.time, "sleep", slept.append)
    bench.work(seed_jobs(3), pack_size="auto")
    assert bench.packs == [[0, 1], [2]]
    assert len(slept) == 2


def test_a_lost_claim_ends_the_pack_without_blame(bench):
    """What another process took over is left to it; the rest of the pack is taken again."""
    jobs = seed_jobs(2)

    def act(trials: list[TrialRun], reporter: PackReporter) -> None:
        if len(bench.packs) > 1:
            return
        for mark in ("", ".free"):
            (bench.folder / ".claims" / f"{jobs[0].trial_id}.2{mark}").touch()
        reporter.claims._beat = 0  # silent for long
        reporter.claims.beat()
        reporter.advance(SimpleNamespace(trials=trials, K=2, steps_per_epoch=4))  # type: ignore[arg-type]
        pytest.fail("the pack goes on")

    bench.act = act
    bench.work(jobs)
    assert bench.packs == [[0, 1], [0, 1]]
    assert bench.said() == [f"{jobs[0].trial_id} was taken over by another process"]
    assert bench.statuses(jobs) == ["completed"] * 2
    assert [files.closed for files in bench.files] == [1] * 4
    assert bench.events.of("advance")[0] == {"epochs": 0.5}, "what was trained is reported"


def test_a_request_to_stop_is_obeyed_before_the_next_pack(bench):
    jobs = [*seed_jobs(2), *seed_jobs(1, trainer__epochs=3)]

    def act(trials: list[TrialRun], reporter: PackReporter) -> None:
        bench.stop.signum = signal.SIGTERM

    bench.act = act
    with pytest.raises(Interrupted) as caught:
        bench.work(jobs, pack_size="1")
    assert caught.value.signum == signal.SIGTERM
    assert bench.packs == [[0]]


def test_a_pack_that_was_interrupted_is_given_back(bench):
    jobs = seed_jobs(2)
    bench.act = breaks(lambda: Interrupted(signal.SIGINT))
    with pytest.raises(Interrupted):
        bench.work(jobs)
    assert bench.packs == [[0, 1]]
    assert bench.events.of("left") == []
    assert states(bench.folder, jobs) == [FREE] * 2


def test_who_is_asked_to_stop_begins_nothing(bench):
    bench.stop.signum = signal.SIGINT
    with pytest.raises(Interrupted):
        bench.work(seed_jobs(1))
    assert bench.packs == []


# --- what the view is told


def reporter_of(folder: Path, stop_on_failure: bool = False) -> tuple[PackReporter, Events, Claims]:
    events, claims = Events(), Claims(folder)
    run = sweep_run(folder, seed_jobs(2), on_failure="stop" if stop_on_failure else "continue")
    return PackReporter(Schedule(run, claims, events)), events, claims


def some_trial(job: Job, **record: Any) -> TrialRun:
    return TrialRun(job.config, TrialRecord(job.trial_id, "cell", "running", {}, **record), TrialState())


def test_a_pack_is_reported_now_and_then_and_whole(tmp_path, monkeypatch):
    """Epochs of trials: a step of a pack of two is two parts of an epoch."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    reporter, events, claims = reporter_of(tmp_path)
    trials = [some_trial(job) for job in seed_jobs(2)]
    pack: Any = SimpleNamespace(trials=trials, K=2, steps_per_epoch=8)
    reporter.started(pack)
    assert events == [("pack", {"ids": [trial.name for trial in trials]})]
    reporter.step(pack, [0.0], [0.0], 1.0)
    claims.lost.add("a trial of no concern")
    for _ in range(3):
        reporter.advance(pack)
    assert len(events) == 1
    now[0] += 0.26
    reporter.advance(pack)
    assert events[1:] == [("advance", {"epochs": 1.0})]
    reporter.advance(pack)
    reporter.flush()
    assert events[2:] == [("advance", {"epochs": 0.25})]
    claims.lost.update(trial.name for trial in trials)
    with pytest.raises(ClaimLost) as caught:
        reporter.advance(pack)
    assert str(caught.value) == f"{trials[0].name}, {trials[1].name}"


def test_an_epoch_is_reported_with_its_accuracy_if_it_has_one(tmp_path):
    reporter, events, _ = reporter_of(tmp_path)
    trial = some_trial(plain_job())
    trial.state.epoch = 3
    reporter.epoch(trial, {"val_accuracy": 0.5, "val_loss": 1.0})
    reporter.epoch(trial, {"train_loss": 1.0})
    assert events.of("epoch") == [
        {"id": trial.name, "epoch": 3, "val_accuracy": 0.5},
        {"id": trial.name, "epoch": 3, "val_accuracy": None},
    ]


@pytest.mark.parametrize("stop_on_failure", [False, True])
def test_a_trial_that_left_is_reported_and_has_ended(stop_on_failure, tmp_path):
    reporter, events, claims = reporter_of(tmp_path, stop_on_failure)
    completed = some_trial(plain_job(), metrics={"val_accuracy": 0.75})
    failed = some_trial(plain_job({"seed": 1}))
    for trial in (completed, failed):
        assert claims.take(trial.name)
    completed.complete()
    reporter.left(completed)
    failed.fail("why")
    reporter.left(failed)
    flushed = ("advance", {"epochs": 0.0})
    assert events == [
        flushed,
        ("left", {"id": completed.name, "status": "completed", "val_accuracy": 0.75, "message": ""}),
        flushed,
        ("left", {"id": failed.name, "status": "failed", "val_accuracy": None, "message": "why"}),
        *([("stop", {})] if stop_on_failure else []),
    ]
    assert states(tmp_path, [plain_job(), plain_job({"seed": 1})]) == [ENDED, ENDED]
