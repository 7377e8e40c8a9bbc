"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import command, contents, largest_difference, rows_of, run, run_command, start, train_together, wait_until
from packs import new_pack, three
from plain_models import timm_config
from plain_trials import plain_trial
from sweeps import seed_trials, sweep_of

from lora_vit.build import DTYPES, build_setup
from lora_vit.config import TrialConfig
from lora_vit.data import stream
from lora_vit.distributed import Process
from lora_vit.errors import Interrupted, out_of_memory
from lora_vit.files import read_rows
from lora_vit.lora import dropout
from lora_vit.records import read_record
from lora_vit.stopping import StopRequest
from lora_vit.sweep.claims import Claims
from lora_vit.sweep.pack_size import measure
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.worker import Worker
from lora_vit.training.loop import Reporter, computing, train_trials
from lora_vit.training.pack import Pack
from lora_vit.training.trial import TrialRun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

ON_GPU = {"trainer.accelerator": "gpu"}
AUGMENTED = {"data.augment": "crop_flip"}
FP16 = pytest.param("fp16", marks=pytest.mark.skipif("fp16" not in DTYPES, reason="trainer.precision has no fp16"))
LONG = ON_GPU | AUGMENTED | {"model.image_size": 160, "lora.dropout": 0.2, "trainer.epochs": 3}
"""401 tokens: attention's backward has more blocks of keys than two, whose sum would be the same in any order."""
FAMILIES = ["vit_tiny_patch16_224", "small_dinov2", "small_beit", "small_eva02", "vit_small_patch16_dinov3"]


def test_gpu_equals_cpu_in_fp64(tmp_path):
    on_gpu = train_together(three(AUGMENTED | ON_GPU), tmp_path / "gpu")
    on_cpu = train_together(three(AUGMENTED), tmp_path / "cpu")
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert largest_difference(a, b) < 1e-9  # fp64, other kernels
        assert (a.predicted == b.predicted).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", FP16])
def test_pack_equals_alone_on_gpu(precision, tmp_path):
    chosen = three(AUGMENTED | ON_GPU | {"trainer.precision": precision})
    together = train_together(chosen, tmp_path / "together")
    first = train_together([chosen[0]], tmp_path / "alone")[0]
    tolerance = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}[precision]  # relative; bf16 has 8 bits, fp16 11
    assert together[0].losses[0] == pytest.approx(first.losses[0], rel=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_timms_models_train_on_a_gpu_as_on_a_cpu(name, tmp_path):
    settings = ("trainer.precision=fp64", "lora.dropout=0.1", "data.augment=crop_flip")
    (gpu,) = train_together([timm_config(*settings, "trainer.accelerator=gpu", name=name)], tmp_path / "gpu")
    (cpu,) = train_together([timm_config(*settings, name=name)], tmp_path / "cpu")
    assert largest_difference(gpu, cpu) < 1e-8  # fp64, other kernels


class Stopping(Reporter):
    """Asks to stop after so many steps."""

    def __init__(self, stop: StopRequest, steps: int):
        self.stop, self.steps = stop, steps

    def advance(self, pack: Pack) -> None:
        self.steps -= 1
        self.stop.signum = signal.SIGTERM if self.steps == 0 else self.stop.signum


def trained(config: TrialConfig, folder: Path, stop_after: int = 0) -> dict[str, bytes]:
    """What a trial leaves that is stopped after so many steps, and resumes."""
    setup = build_setup(config, Process())
    folder.mkdir()
    for steps in (stop_after, 0) if stop_after else (0,):
        trial, stop = TrialRun.open(config, folder, setup, {}), StopRequest()
        try:
            train_trials([trial], setup, Stopping(stop, steps), stop)
        except Interrupted:
            assert steps
    assert trial.record.status == "completed"
    return contents(folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16", FP16])
def test_runs_are_equal_to_the_bit_also_one_that_resumes(precision, tmp_path):
    config = plain_trial(LONG | {"trainer.precision": precision})
    once = trained(config, tmp_path / "once")
    assert trained(config, tmp_path / "again") == once
    assert trained(config, tmp_path / "resumed", stop_after=10) == once


def test_images_lie_on_the_device():
    samples = build_setup(three(ON_GPU)[0], Process()).samples
    images, labels = samples.gather(samples.data.splits["val"][:5])
    assert images.is_cuda
    assert labels.is_cuda
    assert (images.cpu().numpy() == samples.data.images[samples.data.splits["val"][:5]]).all()


def test_images_that_do_not_fit_there_give_the_same_numbers(tmp_path, monkeypatch):
    config = plain_trial(LONG)
    there = trained(config, tmp_path / "there")
    monkeypatch.setattr(stream, "_DEVICE_SHARE", 0.0)
    assert trained(config, tmp_path / "host") == there


@pytest.mark.parametrize("share", [0.25, 0.0], ids=["images on the GPU", "images on the host"])
@pytest.mark.parametrize("name", [None, *FAMILIES])
def test_a_step_makes_the_host_wait_for_nothing(name, share, monkeypatch):
    """As torch itself sees it."""
    monkeypatch.setattr(stream, "_DEVICE_SHARE", share)
    settings = ("trainer.accelerator=gpu", "lora.dropout=0.1", "data.augment=crop_flip", "trainer.precision=bf16")
    pack = new_pack(three(ON_GPU | AUGMENTED) if name is None else [timm_config(*settings, name=name)])
    rates = pack.learning_rates()
    with computing(pack.setup.device, True):
        pack.step(rates[0], False)  # compiles, and brings the seeds to the device
        torch.cuda.set_sync_debug_mode("error")
        try:
            pack.step(rates[1], False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert pack.step_in_epoch == 2
    assert (pack.first_bad_step_K < 0).all()


def test_dropout_is_one_kernel_with_the_masks_of_a_cpu():
    cpu, gpu = (dropout.DropoutState([1, 2]) for _ in range(2))
    for state, device in ((cpu, "cpu"), (gpu, "cuda")):
        state.set(torch.tensor([3, 4], device=device), torch.arange(5, device=device))
    rows, features = cpu.rows(77, 197).flatten(), dropout.feature_keys(768)
    limits = torch.full_like(rows, dropout.threshold(0.1))
    x = torch.randn(len(rows), 768, dtype=torch.bfloat16)
    on_gpu = x.cuda()
    own_rows = gpu.rows(77, 197).flatten()
    dropout.fused(dropout.keep_by_product_, [on_gpu], own_rows, features.cuda(), limits.cuda())
    assert torch.equal(own_rows.cpu(), rows)
    assert torch.equal(on_gpu.cpu(), x * dropout.keep_mask(rows, features, limits))
    assert not dropout._refused


def test_compiled_step_equals_eager(tmp_path):
    (eager,) = train_together(three(ON_GPU)[:1], tmp_path / "eager")
    (compiled,) = train_together(three(ON_GPU | {"trainer.compile": True})[:1], tmp_path / "compiled")
    assert largest_difference(compiled, eager) < 1e-7  # fp64; fused kernels round differently


def test_a_sweep_measures_its_packs_on_the_gpu(tmp_path):
    arguments = ("-m", "lora=default,full", "lora.rank=1,2", "seed=0,1", "trainer.accelerator=gpu", "sweep.name=s")
    out = run_command(*arguments, cwd=tmp_path).stdout
    assert "6 of 6 trials ended" in out
    assert "packs of" in out
    records = [read_record(p.parent) for p in (tmp_path / "outputs/sweeps/s").glob("*/record.json")]
    assert {r.environment["device"] for r in records} == {torch.cuda.get_device_name()}
    assert all(r.cost["peak_memory_bytes"] > 0 for r in records)


@pytest.fixture
def limited():
    """Sets how many bytes of the GPU this process may take; all of them at the end."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    yield lambda size: torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_packs_that_do_not_fit_are_halved(limited, tmp_path):
    """Every trial completes; the size that failed is not tried by the next worker."""
    trials = seed_trials(4, **{key.replace(".", "__"): value for key, value in LONG.items()})
    configs = [trial.config for trial in trials]
    setup = build_setup(configs[0], Process())
    (_, one), (_, four) = (measure(configs[:count], setup, StopRequest()) for count in (1, 4))
    limited((one + four) / 2)
    sweep_of(tmp_path, trials, pack_size="4")
    said: list[str] = []
    with StopRequest() as stop, Claims(tmp_path).living() as claims:
        Worker(Sweep.existing(tmp_path), claims, stop, said.append).work()
    assert any("out of memory" in line and "packs of 2 resume" in line for line in said)
    records = [read_record(tmp_path / trial.trial_id) for trial in trials]
    assert {record.status for record in records} == {"completed"}
    assert max(record.cost["pack_size"] for record in records) < 4


def test_a_run_that_does_not_fit_says_so(limited, tmp_path):
    limited(64 << 20)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train_together([plain_trial(LONG | {"model.image_size": 320, "model.mlp_dim": 4096})], tmp_path)
    assert out_of_memory(caught.value)


GROUPS = [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU"))]
NOISY = ("trainer.accelerator=gpu", "lora.dropout=0.2", "data.augment=crop_flip", "hydra.run.dir=run")


@pytest.mark.parametrize("processes", GROUPS)
def test_processes_that_share_a_batch_by_nccl_train_as_one(processes, tmp_path):
    for folder in ("one", "group"):
        (tmp_path / folder).mkdir()
    run_command(*NOISY, "trainer.devices=1", cwd=tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = run([*torchrun, *command(*NOISY)[1:]], tmp_path / "group", env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    rows, others = (read_rows(tmp_path / folder / "run/metrics.jsonl") for folder in ("group", "one"))
    for row, other in zip(rows, others, strict=True):
        assert row.pop("kind") == other.pop("kind")
        assert row == pytest.approx(other, rel=1e-9)  # fp64; halves of a batch are summed in another order


@pytest.mark.parametrize("processes", GROUPS[1:])
def test_a_request_to_stop_reaches_all_gpus_between_logging_steps(processes, tmp_path):
    line = command(*NOISY, f"trainer.devices={processes}", "trainer.epochs=5000", "trainer.log_every=7")
    process = start(line, tmp_path)
    wait_until(lambda: rows_of(tmp_path / "run/metrics.jsonl") >= 3, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert read_record(tmp_path / "run").status == "interrupted"
