"""Steps and evaluation on a device other than the CPU, without one: fake tensors know shapes and devices only.

On "meta" all of a step runs, backward too; on fake "cuda", where autograd needs a real GPU, everything else does, and
the branches for a GPU are taken. A tensor on the wrong device is an error, and so is what makes the host wait.
"""

from __future__ import annotations

import re
import traceback
import types
from pathlib import Path

import pytest
import torch
from packs import new_pack, take_steps, three
from plain_models import timm_config
from plain_trials import plain_trial
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_vit
from lora_vit import build, distributed, randomness
from lora_vit.data import stream
from lora_vit.distributed import Process
from lora_vit.lora import dropout
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


class AtOnce:
    """In the place of threads, which would not know of fake tensors."""

    def __init__(self, count: int):
        assert count > 1

    def submit(self, function, *args):
        value = function(*args)
        return types.SimpleNamespace(result=lambda: value)


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
    monkeypatch.setattr(build, "choose_device", lambda accelerator: torch.device(device))
    monkeypatch.setattr(build, "device_name", lambda device: "none")
    monkeypatch.setattr(build, "base_of", lambda model: {})
    monkeypatch.setattr(build.ModelFactory, "overflowing_block", lambda factory, images: None)
    monkeypatch.setattr(build, "copy", types.SimpleNamespace(deepcopy=lambda trunk: trunk))
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **limits: tensor)
    monkeypatch.setattr(nn.Module, "_apply", apply_by_exchange)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(stream, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(dropout, "_refused", ["fake tensors"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, free_bytes))
    if device == "cuda":
        monkeypatch.setattr(FlatParameters, "differentiate", lambda self, loss, add: None)


SMALL = {"trainer.precision": "fp16", "trainer.micro_batch": "3", "trainer.checkpoint_activations": True}


def pack_of_three(changes: dict[str, object]) -> Pack:
    augment = ["crop_flip", "randaugment", "color_jitter", "random_erasing", "mixup", "cutmix"]
    settings = {"data.augment": augment, "model.num_layers": 1, "trainer.precision": "bf16",
                "optimizer.class_weights": [1, 2, 3, 4], "optimizer.lora_b_lr_ratio": 4.0}  # fmt: skip
    configs = three(settings | changes)
    return new_pack(configs, build.build_setup(configs[0], Process()))


class Evaluated(Exception):  # noqa: N818  (not an error)
    """All batches are through; what is left reads the result."""


@pytest.mark.parametrize(
    ("device", "free_bytes", "changes"),
    [("meta", 0, {}), ("meta", 0, SMALL), ("cuda", 1 << 40, {}), ("cuda", 0, {})],
    ids=["with backward", "in fp16, in parts and computed again", "images on the GPU", "images on the host"],
)
def test_neither_a_step_nor_evaluation_makes_the_host_wait(device, free_bytes, changes, monkeypatch, request):
    if device == "cuda":
        request.getfixturevalue("fake_cuda")

    def stop(result):
        assert (result.device.type, len(result)) == (device, 3)
        raise Evaluated

    pretend(device, free_bytes, monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=device == "meta"):
        pack = pack_of_three(changes)
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


FAMILIES = ["small_vit", "small_dinov2", "small_beit", "small_eva02"]


@pytest.mark.parametrize("name", [*FAMILIES, "vit_small_patch16_dinov3.lvd1689m"])
def test_no_family_of_timms_makes_the_host_wait(name):
    """DINOv3's rotary embedding, for one, would be made on the host in each pass if the image size were free."""
    config, meta = timm_config("lora.dropout=0.1", name=name), torch.device("meta")
    factory = build.ModelFactory(config, 4, torch.device("cpu"), torch.bfloat16)
    factory.device, factory.original = meta, factory.original.to(meta)
    model = factory([config]).to(meta).train()
    model.head.state.set(torch.zeros(1, dtype=torch.int64, device=meta), torch.arange(2, device=meta))
    images = torch.empty(2, 3, 32, 32, dtype=torch.bfloat16, device=meta)
    with Waits("meta") as waits:
        model(images, [0]).sum().backward()
    assert not waits.lines, f"the host waits at {', '.join(sorted(waits.lines))}"


REFUSED = re.compile(
    "(avg_pool3d|adaptive_avg_pool|adaptive_max_pool|upsample|reflection_pad|grid_sampler).*_backward"
    "|fractional_max_pool|max_unpool|nll_loss2d|ctc_loss|embedding_bag|^put_?$|histc|bincount|median|kthvalue|scatter_reduce"
)
"""What has no deterministic kernel for CUDA (the list of ``torch.use_deterministic_algorithms``), and raises there."""


class Names(TorchDispatchMode):
    """Collects the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", [None, *FAMILIES])
def test_every_operation_of_a_step_can_be_deterministic(name, method):
    augmented = ["data.augment=crop_flip", "lora=full" if method == "full" else "lora.dropout=0.1"]
    config = plain_trial({"data.augment": "crop_flip"}) if name is None else timm_config(*augmented, name=name)
    with Names() as called:
        pack = new_pack([config])
        take_steps(pack, 1)
        pack.predict("val")
    assert {"bmm", "_log_softmax"} <= called.names
    assert not {name for name in called.names if REFUSED.search(name)}
