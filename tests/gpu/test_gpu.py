"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import pytest
import torch
from helpers import largest_difference, run_command, train_together
from packs import three

from lora_vit.build import build_setup
from lora_vit.distributed import Process
from lora_vit.records import read_record

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

ON_GPU = {"trainer.accelerator": "gpu"}
AUGMENTED = {"data.augment": "crop_flip"}


def test_gpu_equals_cpu_in_fp64(tmp_path):
    on_gpu = train_together(three(AUGMENTED | ON_GPU), tmp_path / "gpu")
    on_cpu = train_together(three(AUGMENTED), tmp_path / "cpu")
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert largest_difference(a, b) < 1e-9  # fp64, other kernels
        assert (a.predicted == b.predicted).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pack_equals_alone_on_gpu(precision, tmp_path):
    chosen = three(AUGMENTED | ON_GPU | {"trainer.precision": precision})
    together = train_together(chosen, tmp_path / "together")
    first = train_together([chosen[0]], tmp_path / "alone")[0]
    tolerance = 1e-5 if precision == "fp32" else 3e-2  # relative; bf16 has 8 bits
    assert together[0].losses[0] == pytest.approx(first.losses[0], rel=tolerance)


def test_images_lie_on_the_device():
    samples = build_setup(three(ON_GPU)[0], Process()).samples
    images, labels = samples.gather(samples.data.splits["val"][:5])
    assert images.is_cuda
    assert labels.is_cuda
    assert (images.cpu().numpy() == samples.data.images[samples.data.splits["val"][:5]]).all()


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
