"""What packs share of a backbone, and what they do not."""

import contextlib
import tempfile
from types import SimpleNamespace

import pytest
import torch
from helpers import trial_config
from plain_trials import plain_trial

from lora_vit import build
from lora_vit.build import ModelFactory, choose_world_size
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("overrides", "shared"),
    [(["lora.rank=2"], True), (["lora=none"], True), (["lora=full"], False), (["lora.bias=lora_only"], False)],
)
def test_a_trunk_that_is_trained_is_no_other_packs(overrides, shared, low):
    """What is trained is in full precision also under bf16 and fp16."""
    config = trial_config(*overrides)
    factory = ModelFactory(config, 4, torch.device("cpu"), low)
    one, two = factory([config]), factory([config])
    assert (one.trunk is two.trunk) is shared
    assert not {p.data_ptr() for p in factory.original.parameters()} & {p.data_ptr() for p in two.trunk.parameters()}
    trained = {p.dtype for p in two.parameters() if p.requires_grad}
    frozen = {p.dtype for p in two.trunk.parameters() if not p.requires_grad}
    assert (trained, frozen) == ({torch.float32}, set() if "lora=full" in overrides else {low})


@pytest.mark.parametrize(
    ("devices", "started", "gpus", "batch", "found"),
    [
        ("auto", 0, 0, 4, 1), ("auto", 0, 4, 4, 4), ("auto", 0, 4, 6, 3), ("auto", 2, 1, 4, 2), ("02", 2, 0, 4, 2),
        ("3", 0, 0, 6, 3), ("2", 0, 4, 4, 2),
        ("3", 2, 0, 6, r"devices=3: torchrun has started 2"), ("3", 0, 2, 6, r"devices=3: only 2 GPUs are visible"),
        ("3", 0, 0, 4, "batch_size=4: give a multiple of 3"), ("auto", 3, 0, 4, "batch_size=4: give a multiple of 3"),
    ],
)  # fmt: skip
def test_the_number_of_processes(devices, started, gpus, batch, found, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = plain_trial({"trainer.devices": devices, "data.batch_size": batch, "trainer.accelerator": "auto"})
    if isinstance(found, str):
        with pytest.raises(ConfigError, match=found):
            choose_world_size(config, started)
    else:
        assert choose_world_size(config, started) == found
    assert ("using 3 of 4 GPUs" in capsys.readouterr().out) == (batch == 6 and gpus == 4)


@pytest.mark.parametrize("first", ["run", "rank", "worker"])
@pytest.mark.parametrize("second", ["run", "rank", "worker"])
def test_who_may_train_on_one_gpu(first, second, tmp_path, monkeypatch):
    """Runs of one process share it; a sweep's worker, and each of several processes, has it alone until it ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))

    def takes(who: str, held: contextlib.ExitStack) -> bool:
        if who == "worker":
            return build.hold_gpu(0, held)
        try:
            build.check_devices("auto", Process(0, 2 if who == "rank" else 1), held)
        except ConfigError:
            return False
        return True

    with contextlib.ExitStack() as held, contextlib.ExitStack() as other:
        assert takes(first, held)
        assert takes(second, other) == (first == second == "run")
        held.close()
        other.close()
        assert takes(second, other)
        build.check_devices("cpu", Process(1, 2), held)
        monkeypatch.setattr(build, "from_all", lambda free: [free, False])
        with pytest.raises(ConfigError, match=r"a GPU has a process already: give others"):
            build.check_devices("cpu", Process(1, 2), held)
