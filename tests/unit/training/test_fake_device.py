"""Steps and evaluation on a device other than the CPU, without one: fake tensors know shapes and devices only.

On "meta" all of a step runs, backward too; on fake "cuda", where autograd needs a real GPU, everything else does, and
the branches for a GPU are taken. A tensor on the wrong device is an error, and so is what makes the host wait.
"""

from __future__ import annotations

import traceback
import types
from pathlib import Path

import pytest
import torch
from packs import new_pack, three
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_vit
from lora_vit import build, distributed, randomness
from lora_vit.distributed import Process
from lora_vit.training.optim import FlatParameters
from lora_vit.training.pack import Pack

PACKAGE = str(Path(lora_vit.__file__).parent)
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_dim", "equal", "repeat_interleave")
"""Operations whose result, or its shape, the host has to read from the device."""


class Waits(TorchDispatchMode):
    """Collects the project's lines that make the host wait for ``device``."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.lines: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if self.reads(name, args, kwargs) or self.copies_and_waits(name, args, kwargs):
            frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
            self.lines.add(f"{frames[-1].filename.removeprefix(PACKAGE)[1:]}:{frames[-1].lineno} ({name})")
        return func(*args, **kwargs)

    def reads(self, name: str, args: tuple, kwargs: dict) -> bool:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:])
        return (name in READS or by_mask) and any(t.device.type == self.device for t in tensors)

    def copies_and_waits(self, name: str, args: tuple, kwargs: dict) -> bool:
        if name == "copy_":
            source, target, non_blocking = args[1], args[0].device, kwargs.get("non_blocking", args[2:] == (True,))
        elif name == "_to_copy":
            source, target = args[0], kwargs.get("device") or args[0].device
            non_blocking = kwargs.get("non_blocking")
        else:
            return False
        if source.device.type == target.type:
            return False
        return not non_blocking or (self.device == "cuda" and not hasattr(source, "pinned"))


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """What ``pin_memory`` gives, which fake tensors cannot."""
    copy = tensor.clone()
    copy.pinned = True
    return copy


def apply_by_exchange(module: nn.Module, change, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply``, which cannot set the data of fake parameters, by new ones."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(change(p.detach()), p.requires_grad)
        for name, b in m._buffers.items():
            m._buffers[name] = change(b)
    return module


def pretend(device: str, free_bytes: int, monkeypatch) -> None:
    """Choose a device that is not there, and leave out what looks at values while a model is built."""

    def with_values(function):
        def call(*args, **named):
            with unset_fake_temporarily():
                return function(*args, **named)

        return call

    monkeypatch.setattr(randomness, "permutation", with_values(randomness.permutation))
    monkeypatch.setattr(build, "load_data", with_values(build.load_data))
    monkeypatch.setattr(build, "choose_device", lambda accelerator, process: torch.device(device))
    monkeypatch.setattr(build, "device_name", lambda device: "none")
    monkeypatch.setattr(build, "base_of", lambda model: {})
    monkeypatch.setattr(build, "copy", types.SimpleNamespace(deepcopy=lambda trunk: trunk))
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **limits: tensor)
    monkeypatch.setattr(nn.Module, "_apply", apply_by_exchange)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, free_bytes))
    if device == "cuda":
        monkeypatch.setattr(FlatParameters, "differentiate", lambda self, loss: None)


def pack_of_three() -> Pack:
    augment = ["crop_flip", "randaugment", "random_erasing", "mixup", "cutmix"]
    configs = three({"data.augment": augment, "model.num_layers": 1, "trainer.precision": "bf16",
                     "optimizer.class_weights": [1, 2, 3, 4], "optimizer.lora_b_lr_ratio": 4.0})  # fmt: skip
    return new_pack(configs, build.build_setup(configs[0], Process()))


class Evaluated(Exception):  # noqa: N818  (not an error)
    """All batches are through; what is left reads the result."""


@pytest.mark.parametrize(
    ("device", "free_bytes"),
    [("meta", 0), ("cuda", 1 << 40), ("cuda", 0)],
    ids=["with backward", "images on the GPU", "images on the host"],
)
def test_neither_a_step_nor_evaluation_makes_the_host_wait(device, free_bytes, monkeypatch, request):
    if device == "cuda":
        request.getfixturevalue("fake_cuda")

    def stop(result):
        assert (result.device.type, len(result)) == (device, 3)
        raise Evaluated

    pretend(device, free_bytes, monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=device == "meta"):
        pack = pack_of_three()
        rates = pack.learning_rates()
        pack.step(rates[0], False)  # the first brings the seeds to the device
        with Waits(device) as waits:
            losses_K = pack.step(rates[1], False)
        assert (losses_K.device.type, losses_K.shape) == (device, (3,))
        assert not waits.lines, f"the host waits at {', '.join(sorted(waits.lines))}"

        monkeypatch.setattr(distributed, "sum_over_processes_", stop)
        with Waits(device) as waits, pytest.raises(Evaluated):
            pack.predict("val")
        assert not waits.lines, f"the host waits at {', '.join(sorted(waits.lines))}"
