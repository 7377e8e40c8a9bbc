"""The worker of a sweep where memory runs out, and the measured pack size."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import trial_config
from sweeps import options

from lora_vit.build import build_setup
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.records import read_record
from lora_vit.stopping import StopRequest
from lora_vit.sweep import measure, processes
from lora_vit.sweep.claims import Claims, Owner
from lora_vit.sweep.plan import Job, SweepRun
from lora_vit.sweep.worker import Worker, out_of_memory
from lora_vit.training.pack import Pack
from lora_vit.training.setup import Setup
from lora_vit.training.trial import TrialRun


def train(folder: Path, jobs: list[Job], **changes: object) -> list[str]:
    """Run a worker in this process; returns what it said."""
    said: list[str] = []

    def emit(kind: str, **fields: object) -> None:
        if kind == "say":
            said.append(str(fields["text"]))

    with StopRequest() as stop:
        Worker(SweepRun(tuple(jobs), folder, options(**changes), time.time()), emit, stop).work()
    return said


def jobs_of(*settings: str) -> list[Job]:
    return [Job(trial_config("trainer.checkpoint_every=0.001", s), [s], label=s) for s in settings]


def test_out_of_memory_halves_the_pack_and_goes_on(tmp_path, monkeypatch):
    """Packs of more than two run out of memory in their second epoch; nothing is trained anew."""
    jobs = jobs_of("seed=0", "seed=1", "seed=2", "seed=3")
    steps: dict[str, list[int]] = {}
    whole = Pack.step

    def step(pack: Pack, *args: object) -> torch.Tensor:
        if pack.K > 2 and pack.trials[0].state.epoch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        for trial in pack.trials:
            steps.setdefault(trial.name, []).append(trial.state.epoch * pack.steps_per_epoch + pack.step_in_epoch)
        return whole(pack, *args)

    monkeypatch.setattr(Pack, "step", step)
    said = train(tmp_path, jobs)
    assert any("OutOfMemoryError" in line and "packs of 2" in line for line in said)
    for job in jobs:
        record = read_record(tmp_path / job.trial_id)
        assert record.status == "completed"
        assert record.cost["pack_size"] == 2
        assert steps[job.trial_id] == list(range(14)), "every step once: it went on from its checkpoint"


def test_an_error_of_one_trial_is_recorded_as_its_own(tmp_path, monkeypatch):
    jobs = jobs_of("seed=0", "seed=1", "seed=2")
    whole = Pack.step

    def step(pack: Pack, *args: object) -> torch.Tensor:
        if any(t.config.seed == 1 for t in pack.trials):
            raise RuntimeError("this trial cannot be trained")
        return whole(pack, *args)

    monkeypatch.setattr(Pack, "step", step)
    train(tmp_path, jobs)
    records = [read_record(tmp_path / job.trial_id) for job in jobs]
    assert [r.status for r in records] == ["completed", "failed", "completed"]
    assert records[1].error is not None
    assert "this trial cannot be trained" in records[1].error["message"]
    assert "in step" in records[1].error["traceback"]


def test_an_error_while_measuring_is_recorded_by_the_trials(tmp_path, monkeypatch):
    """The first step of every pack fails: no worker dies of it, and each trial says why."""
    jobs = jobs_of("seed=0", "seed=1")

    def step(pack: Pack, *args: object) -> torch.Tensor:
        raise RuntimeError("this model cannot be trained")

    monkeypatch.setattr(Pack, "step", step)
    said = train(tmp_path, jobs, pack_size="auto")
    assert any("cannot be measured (RuntimeError: this model cannot be trained)" in line for line in said)
    for job in jobs:
        record = read_record(tmp_path / job.trial_id)
        assert record.status == "failed"
        assert record.error is not None
        assert record.error["message"] == "RuntimeError: this model cannot be trained"


@pytest.mark.parametrize("retry", [False, True])
def test_failed_trials_are_tried_again_if_asked_for_and_anew_after_a_bad_step(retry, tmp_path, monkeypatch):
    """One that failed at a step begins anew; one that failed otherwise goes on from its checkpoint."""
    jobs = jobs_of("seed=0", "seed=1")
    run = SweepRun(tuple(jobs), tmp_path, options(), time.time())
    setup = build_setup(jobs[0].config, Process())
    for job, at in zip(jobs, (3, None), strict=True):
        run.folder_of(job).mkdir()
        trial = TrialRun.open(job.config, run.folder_of(job), setup, run.launched, {})
        pack = Pack([trial], setup)
        pack.step(pack.learning_rates()[0], False)
        pack.pull()
        trial.save()
        trial.fail("failed", at)
    begun: list[tuple[int, int]] = []
    init = Pack.__init__

    def remember(pack: Pack, trials: list[TrialRun], of: Setup) -> None:
        begun.extend((trial.config.seed, trial.state.step_in_epoch) for trial in trials)
        init(pack, trials, of)

    monkeypatch.setattr(Pack, "__init__", remember)
    train(tmp_path, jobs, retry_failed=retry)
    assert begun == ([(0, 0), (1, 1)] if retry else [])
    assert {read_record(run.folder_of(job)).status for job in jobs} == {"completed" if retry else "failed"}


def test_what_torch_says_of_too_much_memory_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert out_of_memory(caught.value)


def test_the_processes_on_a_cpu_share_threads_and_memory(monkeypatch):
    jobs = jobs_of(*(f"seed={seed}" for seed in range(20)))
    held = processes.expected_bytes(jobs[0].config)
    monkeypatch.setattr(measure, "attainable_memory", lambda device: 10 * held)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert processes.number_of_workers(jobs, options()) == 4
    assert processes.number_of_workers(jobs[:3], options()) == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert processes.number_of_workers(jobs, options()) == 8
    monkeypatch.setattr(measure, "attainable_memory", lambda device: 3 * held)
    assert processes.number_of_workers(jobs, options()) == 2
    monkeypatch.setattr(measure, "attainable_memory", lambda device: 0)
    assert processes.number_of_workers(jobs, options()) == 1


def wide_config(batch: int) -> TrialConfig:
    common = ["trainer.precision=fp32", "data.cache_size=64", "model.image_size=64", "model.patch_size=4"]
    common += ["model.num_layers=4", "model.hidden_dim=128", "model.num_heads=4", "model.mlp_dim=512"]
    return trial_config(*common, f"data.batch_size={batch}")


def held_by_a_process(batch: int) -> int:
    config = wide_config(batch)
    return measure.measure([config], build_setup(config, Process()), StopRequest())[1]


@pytest.mark.slow
def test_what_a_process_holds_is_about_what_is_measured():
    """The activations of a larger batch, within a factor of two; in new processes, which have nothing to use again."""
    new = multiprocessing.get_context("spawn")
    held = []
    for batch in (4, 60):
        with ProcessPoolExecutor(1, new) as process:
            held.append(process.submit(held_by_a_process, batch).result())
    expected = processes.expected_bytes(wide_config(60)) - processes.expected_bytes(wide_config(4))
    assert expected / 2 < held[1] - held[0] < 2 * expected


def test_measured_figures_are_of_this_machine():
    config = trial_config()
    seconds, held = measure.measure([config, config], build_setup(config, Process()), StopRequest())
    assert 0 < seconds < 60
    assert 10 * 2**20 < held < measure.attainable_memory(torch.device("cpu"))


def test_a_claim_that_was_taken_over_ends_the_pack(tmp_path, monkeypatch):
    """A process that stood still finds its trial with another, leaves it alone, and takes it when it is free again."""
    jobs = jobs_of("seed=0", "seed=1")
    whole = Pack.step
    other = Claims(tmp_path, Owner(host="elsewhere", token="other"))
    mine: list[Claims] = []
    enter = Claims.__enter__

    def remember(claims: Claims) -> Claims:
        mine.append(claims)
        return enter(claims)

    def step(pack: Pack, *args: object) -> torch.Tensor:
        if pack.K == 2 and pack.step_in_epoch == 3 and not mine[0].lost:
            assert other._link(jobs[0].trial_id, 2)
            other._held[jobs[0].trial_id] = 2
            mine[0]._beat = 0  # silent for long
            mine[0].beat()
            assert mine[0].lost == {jobs[0].trial_id}
            other.release(jobs[0].trial_id)
        return whole(pack, *args)

    monkeypatch.setattr(Claims, "__enter__", remember)
    monkeypatch.setattr(Pack, "step", step)
    said = train(tmp_path, jobs, pack_size="2")
    assert any("was taken over by another process" in line for line in said)
    assert [read_record(tmp_path / job.trial_id).status for job in jobs] == ["completed"] * 2
