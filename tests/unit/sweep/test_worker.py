"""What a worker does with packs and with errors; records and claims are real, nothing trains."""

from __future__ import annotations

import errno
import tempfile
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stage import setup_of
from sweeps import leave_record, seed_trials
from worker_bench import breaks

from lora_vit.errors import ConfigError, TrialFailed, out_of_memory
from lora_vit.records import read_record
from lora_vit.sweep import pack_size
from lora_vit.sweep.claims import ENDED, FREE
from lora_vit.sweep.pack_size import take_gpu
from lora_vit.sweep.trial import Trial
from lora_vit.sweep.worker import Worker
from lora_vit.training.trial import TrialRun

# --- packs


def test_all_groups_are_trained_in_packs(bench):
    trials = [*seed_trials(3), *seed_trials(1, trainer__epochs=3)]
    bench.work(trials, pack_size="2")
    assert bench.packs == [[0, 1], [2], [0]]
    assert bench.statuses(trials) == ["completed"] * 4
    assert bench.states(trials) == [ENDED] * 4
    assert [run.name for run in bench.runs] == [trial.trial_id for trial in trials], "each in its folder"
    assert (bench.folder / trials[1].trial_id / ".hydra/overrides.yaml").read_text() == "- seed=1\n"
    completed = [line for line in bench.said if "completed" in line]
    assert len(completed) == 4
    assert all("75.00%" in line for line in completed)
    bench.work()
    assert len(bench.packs) == 3, "nothing is left for who comes later"


def test_trials_that_stand_elsewhere_in_an_epoch_train_apart(bench, monkeypatch):
    opened = TrialRun.open

    def at_another_step(config: Any, *args: Any, **kwargs: Any) -> TrialRun:
        run = opened(config, *args, **kwargs)
        run.state.step_in_epoch = 3 * (config.seed % 2)
        return run

    monkeypatch.setattr(TrialRun, "open", at_another_step)
    bench.work(seed_trials(4))
    assert bench.packs == [[0, 2], [1, 3]]


def test_each_gpu_has_one_worker(tmp_path, monkeypatch):
    """Of all sweeps and runs of a machine; a worker too many ends with an error."""
    uuids = ["a", "b"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    trials, (first, second, third) = seed_trials(1, trainer__accelerator="auto"), (ExitStack() for _ in range(3))
    with first:
        with second:
            take_gpu(trials, first)
            take_gpu(trials, second)
            with pytest.raises(ConfigError, match="all 2 visible GPUs have a worker or a run: wait, or give other"):
                take_gpu(trials, third)
            take_gpu(seed_trials(1), third)
            assert chosen == [0, 1], "a CPU is shared"
        take_gpu(trials, third)
        assert chosen == [0, 1, 1], "free again where its worker ends"
    third.close()


# --- a worker's own trouble is never a trial's end


@pytest.mark.parametrize("size", ["2", "auto"])
def test_what_cannot_be_built_here_is_left_to_other_workers(size, bench, monkeypatch):
    """S1: images are not mounted on one machine. The rest of the sweep is trained, the worker says and fails."""
    figures = {"size": 2, "limited_by_trials": False, "seconds_per_trial_epoch": {"2": 1.0}}
    monkeypatch.setattr(pack_size, "choose_pack_size", lambda *given: figures)
    broken, fine = seed_trials(5), seed_trials(2, trainer__epochs=3)
    tried: list[int] = []

    def built(trial: Trial) -> object:
        if trial.config.trainer.epochs == 2:
            tried.append(trial.config.seed)
            raise ConfigError("data.root=/images is not there: mount it")
        return setup_of()

    bench.built = built
    bench.ask([*broken, *fine], pack_size=size)
    bench.fails(ConfigError, "5 trials cannot be trained here", broken[0].trial_id, "data.root=/images")
    assert tried == [0] * (1 + (size == "auto")), "not asked by each: measured once, trained once"
    assert bench.states([*broken, *fine]) == [FREE] * 5 + [ENDED] * 2
    bench.built = lambda trial: setup_of()
    bench.work()
    assert bench.statuses([*broken, *fine]) == ["completed"] * 7


def test_a_folder_that_cannot_be_used_is_left_alone_and_the_others_train(bench):
    """Its checkpoint is of other data here; on another machine it may be right."""
    trials = seed_trials(3)
    sweep = bench.ask(trials)
    leave_record(sweep, trials[1], "interrupted", data={"fingerprint": "others"})
    bench.fails(ConfigError, "1 trials cannot be trained here", trials[1].trial_id, "other splits")
    assert bench.packs == [[0, 2]]
    assert bench.states(trials) == [ENDED, FREE, ENDED]
    assert read_record(bench.folder / trials[1].trial_id).status == "interrupted"


@pytest.mark.parametrize("text", ["CUDA error: unspecified launch failure", "cuDNN error: X", "NCCL error in: y"])
def test_a_broken_device_ends_the_worker_and_no_trial(text, bench):
    """S2: nothing works any more in a process after such an error."""
    trials = seed_trials(6)
    bench.act = breaks(lambda: RuntimeError(text))
    bench.ask(trials, pack_size="2")
    bench.fails(TrialFailed, text, "restart")
    assert bench.packs == [[0, 1]]
    assert bench.states(trials) == [FREE] * 6
    bench.act = lambda trials, reporter: None
    bench.work()
    assert bench.statuses(trials) == ["completed"] * 6


def test_two_trials_in_a_row_with_one_error_end_the_worker(bench):
    """S2: then the process is to blame. A trial that completes in between clears it."""
    trials = seed_trials(6)
    bench.act = breaks(lambda: RuntimeError("no"), {0, 2, 3})
    bench.ask(trials, pack_size="1")
    bench.fails(TrialFailed, "two trials in a row", "RuntimeError: no")
    assert bench.packs == [[0], [1], [2], [3]]
    assert bench.states(trials) == [FREE, ENDED, FREE, FREE, FREE, FREE]
    assert bench.statuses(trials[:4]) == ["interrupted", "completed", "interrupted", "interrupted"]


@pytest.mark.parametrize("second", ["free: 7.5 MiB, process 99", "something else"])
def test_an_error_that_two_processes_have_seen_fails_the_trial(second, bench):
    trials = seed_trials(2)
    bench.act = breaks(lambda: RuntimeError("free: 12 MiB, process 7"), {0})
    bench.ask(trials, pack_size="1")
    bench.fails(ConfigError, "1 trials cannot be trained here", trials[0].trial_id, "process 7")
    bench.act = breaks(lambda: RuntimeError(second), {0})
    if "else" in second:
        bench.fails(ConfigError, second)
        assert bench.states(trials) == [FREE, ENDED]
        return
    bench.work()
    assert bench.statuses(trials) == ["failed", "completed"]
    assert bench.states(trials) == [ENDED, ENDED]
    error = read_record(bench.folder / trials[0].trial_id).error
    assert error is not None
    assert (error["message"], error["step"]) == (f"RuntimeError: {second}", None)
    assert "in act" in error["traceback"]
    assert any("failed" in line and second in line for line in bench.said)


def test_a_disk_that_cannot_be_written_ends_the_worker(bench):
    trials = seed_trials(3)
    bench.act = breaks(lambda: OSError(errno.ENOSPC, "No space left on device"))
    bench.ask(trials, pack_size="2")
    bench.fails(OSError, "No space left")
    assert bench.packs == [[0, 1]]
    assert bench.states(trials) == [FREE] * 3


# --- packs after errors


def test_an_error_is_looked_for_by_halves(bench):
    """The others resume from their checkpoints; later packs stay as large as they were."""
    trials = seed_trials(7)
    bench.act = breaks(lambda: RuntimeError("no\nmore"), {1})
    bench.ask(trials, pack_size="5")
    bench.fails(ConfigError, trials[1].trial_id, "RuntimeError: no")
    assert bench.packs == [[0, 1, 2, 3, 4], [0, 1], [0], [1], [2, 3, 4], [5, 6]]
    assert bench.statuses(trials) == ["completed", "interrupted", *["completed"] * 5]
    ended = [line for line in bench.said if line.startswith("a pack of")]
    assert [("RuntimeError: no" in line, line[-len("packs of 2 resume from its checkpoints"):]) for line in ended] == [
        (True, f"packs of {size} resume from its checkpoints") for size in (2, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("error", [lambda: torch.OutOfMemoryError("CUDA out of memory"), MemoryError])
def test_packs_stay_smaller_after_memory_ran_out(error, bench):
    """Half of the pack for which it was too little last: of 3, that is 1."""
    trials = seed_trials(7)
    bench.act = breaks(error, more_than=2)
    bench.work(trials, pack_size="5")
    assert bench.packs == [[0, 1, 2, 3, 4], [0, 1], [2, 3, 4], [2], [3, 4], [5], [6]]
    assert bench.statuses(trials) == ["completed"] * 7


def test_trials_that_left_before_the_error_are_not_trained_again(bench):
    """And one of a pack that is left alone is tried alone before it is blamed."""
    trials = seed_trials(3)

    def act(runs: list[TrialRun], reporter: Worker) -> None:
        if len(runs) == 3:
            for run in (runs[0], runs[2]):
                bench.complete(run, reporter)
            raise RuntimeError("once")

    bench.act = act
    bench.work(trials)
    assert bench.packs == [[0, 1, 2], [1]]
    assert bench.statuses(trials) == ["completed"] * 3


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
