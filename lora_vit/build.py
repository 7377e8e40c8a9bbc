"""From configuration to objects: the one module that wires models, data and training together."""

import contextlib
import copy
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import cpu_count
from torch import Tensor, nn

from lora_vit import randomness
from lora_vit.config import DATASETS, DataConfig, ModelConfig, TrialConfig, file_sha256, is_weights_file
from lora_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD, Transform
from lora_vit.data.dataset import ImageData, load_data
from lora_vit.data.files import locked_in, writing_to
from lora_vit.data.stream import Samples
from lora_vit.distributed import Process, from_all, on_all
from lora_vit.errors import ConfigError
from lora_vit.files import locked, user_path
from lora_vit.lora.adapter import base_of
from lora_vit.lora.backbones import head_name, places_of
from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.inject import chosen_places, inject_adapters, mark_trained, remove_adapter, use_own_attention
from lora_vit.lora.layers import AdapterSpec, PackedHead
from lora_vit.models.vit import PackedViT, cast, shape_of, trunk_of
from lora_vit.models.weights import SHIPPED, check_beside, fetch_weights, load_weights
from lora_vit.terminal import Progress
from lora_vit.training.loop import computing
from lora_vit.training.pack import class_weights, halving
from lora_vit.training.trial import Setup

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def usable_gpus(accelerator: str) -> int:
    """How many GPUs ``trainer.accelerator`` may use here."""
    return torch.cuda.device_count() if accelerator != "cpu" and torch.cuda.is_available() else 0


def choose_device(accelerator: str) -> torch.device:
    """The device of this process: the GPU that it was given. Raises ConfigError where one is asked for and none is."""
    if accelerator == "gpu" and not usable_gpus("gpu"):
        raise ConfigError("trainer.accelerator=gpu: no GPU is visible, give trainer.accelerator=cpu or auto")
    return torch.device("cuda", torch.cuda.current_device()) if usable_gpus(accelerator) else torch.device("cpu")


def choose_world_size(config: TrialConfig, started: int) -> int:
    """The number of processes: those that torchrun has ``started``, or if none, how many to start. Or ConfigError."""
    t, batch = config.trainer, config.data.batch_size
    visible = usable_gpus(t.accelerator)
    wanted = started if t.devices == "auto" else int(t.devices)
    if started not in (0, wanted):
        raise ConfigError(f"trainer.devices={wanted}: torchrun has started {started} processes, leave it out")
    if visible and not started and wanted > visible:
        raise ConfigError(f"trainer.devices={wanted}: only {visible} GPUs are visible, give at most that")
    if wanted and batch % wanted:
        raise ConfigError(f"data.batch_size={batch}: give a multiple of {wanted} (processes), or trainer.devices=auto")
    chosen = wanted or max(n for n in range(1, max(1, visible) + 1) if batch % n == 0)
    if not wanted and chosen < visible:
        print(f"using {chosen} of {visible} GPUs: data.batch_size={batch} is not divisible by more")
    return chosen


def hold_gpu(index: int, held: contextlib.ExitStack, shared: bool = False) -> bool:
    """Add a GPU to what is held, alone or with others that share it; False where a process of this machine has it."""
    name = f"gpu-{torch.cuda.get_device_properties(index).uuid}"
    try:
        held.enter_context(locked(Path(tempfile.gettempdir(), f"lora_vit-{os.getuid()}", name), False, shared))
    except OSError as error:  # without locks, several processes may share the GPU
        return not isinstance(error, BlockingIOError)
    return True


def check_devices(accelerator: str, process: Process, held: contextlib.ExitStack) -> None:
    """Hold a GPU for each process; runs of one process share it. Raises ConfigError in all of them where one cannot."""
    device = on_all(lambda: choose_device(accelerator))
    if not all(from_all(device.type == "cpu" or hold_gpu(device.index, held, shared=process.world_size == 1))):
        raise ConfigError("a GPU has a process already: give others (CUDA_VISIBLE_DEVICES), or trainer.accelerator=cpu")


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """The precision, and why if it was ``auto``: bf16 or else fp16 where the device computes it fast, else fp32."""
    if requested != "auto":
        return requested, ""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        units = {8: ("bf16", "bf16"), 7: ("fp16", "fp16 and no bf16")}
        precision, what = units.get(min(major, 8), ("fp32", "neither bf16 nor fp16"))
        return precision, f"CUDA {major}.{minor} has units for {what}"
    # a CPU that does not multiply bf16 natively takes several times longer than for fp32
    is_fast = re.search("avx512_bf16|amx_bf16", _cpuinfo())
    return ("bf16", "the CPU has units for bf16") if is_fast else ("fp32", "the CPU has no units for bf16")


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


class ModelFactory:
    """Builds the packed model of any trials that share model, data and places of adapters. Raises ConfigError."""

    def __init__(self, config: TrialConfig, classes: int, device: torch.device, dtype: torch.dtype):
        m = config.model
        self.classes, self.device, self.dtype = classes, device, dtype
        self.parameter_dtype = torch.promote_types(dtype, torch.float32)  # of what is trained: full also under bf16
        self.original = trunk_of(m)
        check_places(self.original, config)
        if is_weights_file(m.weights) and m.weights_sha256 not in (None, file_sha256(str(m.weights))):
            raise ConfigError(f"model.weights={m.weights} has changed since the trial was composed: give it again")
        self.inputs = inputs_of(m, self.original)
        for note in filter(None, (load_weights(self.original, m), check_beside(m, self.original, self.inputs))):
            print(note)
        self.base = {"model": m.name, "weights": m.weights, **base_of(self.original), **self.inputs}

    @functools.cached_property
    def frozen_trunk(self) -> Any:
        """The trunk that all packs share but of trials that train its parameters, in the compute precision."""
        return self._trunk(self.dtype)

    def _trunk(self, dtype: torch.dtype) -> Any:
        return cast(copy.deepcopy(self.original).to(self.device), dtype)

    def __call__(self, configs: list[TrialConfig]) -> PackedViT:
        """The model of a pack, freshly initialised from the trials' seeds."""
        lora = configs[0].lora
        trunk = self._trunk(self.parameter_dtype) if lora.trains_trunk else self.frozen_trunk
        state = DropoutState([randomness.key("dropout", c.seed) for c in configs])
        use_own_attention(remove_adapter(trunk))  # without those of an earlier pack on the shared trunk
        if lora.adapts:
            each: Any = [(c.lora, c.seed) for c in configs]
            specs = [AdapterSpec(o.columns, o.effective_scaling(), o.dropout, seed, o.method) for o, seed in each]
            for adapters in inject_adapters(trunk, specs, lora.targets or (), lora.blocks, state):
                adapters.to(self.parameter_dtype)
        seeds, dropouts = [c.seed for c in configs], [c.model.head_dropout for c in configs]
        head = PackedHead(seeds, dropouts, shape_of(configs[0].model).width, self.classes, state, head_name(trunk))
        mark_trained(trunk, lora.method, lora.bias)
        for p in trunk.parameters():
            if not p.requires_grad:
                p.data = p.data.to(self.dtype)
        recompute = configs[0].trainer.checkpoint_activations
        return PackedViT(trunk, head.to(self.device, self.parameter_dtype), len(configs), recompute)

    @torch.no_grad()
    def overflowing_block(self, images: Tensor) -> str | None:
        """The first block of the frozen trunk whose output is not finite for normalised images [B, 3, S, S], if any."""
        trunk, finite = self._trunk(self.dtype).eval(), dict[str, Tensor]()
        for name in places_of(trunk):
            look: Any = lambda _, args, out, name=name: finite.update({name: out.isfinite().all()})  # noqa: E731
            trunk.get_submodule(name).register_forward_hook(look)
        trunk(images)
        return next((name for name, is_finite in finite.items() if not is_finite), None)

    def transform(self, data: DataConfig) -> Transform:
        side, mean, std, interpolation = self.inputs.values()
        return Transform(data, side, self.device, self.dtype, mean, std, interpolation == "bicubic")


def inputs_of(m: ModelConfig, trunk: Any) -> dict[str, Any]:
    """How images are prepared: image_size, mean, std and interpolation (in this order), as set or the model's own."""
    of_torchvision = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear"}
    own = {**getattr(trunk, "pretrained_cfg", of_torchvision), "image_size": shape_of(m).image_size}
    given = {key: getattr(m, key) for key in ("image_size", "mean", "std", "interpolation")}
    found = {key: own[key] if value is None else value for key, value in given.items()}
    if found["interpolation"] not in ("bilinear", "bicubic"):
        raise ConfigError(f"{m.name} wants interpolation={found['interpolation']}: give model.interpolation=bicubic")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def check_places(trunk: nn.Module, config: TrialConfig) -> None:
    """Raise ConfigError where the model has no such blocks, or layers too narrow for the rank."""
    lora = config.lora
    try:
        if lora.adapts:
            chosen_places(trunk, lora.targets or (), lora.blocks, lora.rank or 1)
    except ValueError as error:
        raise ConfigError(f"lora.{error} (in {config.model.name})") from None


def build_setup(config: TrialConfig, process: Process, data: ImageData | None = None) -> Setup:
    """Load data, unless given, and weights for trials that share a structure. Raises ConfigError where one cannot."""
    device = choose_device(config.trainer.accelerator)
    precision, why = choose_precision(config.trainer.precision, device)
    fetch_weights(config.model, download=False)  # before data is fetched or decoded
    data = data or load_data(config.data)
    class_weights([config], data)  # refused before weights are read
    factory = ModelFactory(config, len(data.class_names), device, DTYPES[precision])
    samples, transform = Samples(data, device), factory.transform(config.data)
    if precision == "fp16":
        some = data.splits["train"][:: -(-len(data.splits["train"]) // 8)]  # 8 of all classes, by which they are sorted
        if block := factory.overflowing_block(transform.eval(samples.gather(some)[0])):
            what = f"{config.model.name} has activations beyond fp16's 65,504 in {block}"
            if config.trainer.precision == "fp16":
                raise ConfigError(f"trainer.precision=fp16: {what}: give fp32, or bf16 where the device has it")
            precision, why, factory.dtype = "fp32", what, torch.float32
            transform = factory.transform(config.data)
    if why:
        print(f"trainer.precision=auto: {precision}, as {why}")
    packages = ("lora-vit", "torch", "torchvision", "numpy", "hydra-core")
    environment: dict[str, object] = {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        **_git_state(),
        "host": platform.node(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "world_size": process.world_size,
        "command": " ".join(sys.argv),
    }
    return Setup(factory, samples, transform, device, process, environment, factory.base)


def with_features(setup: Setup, config: TrialConfig, heed: Callable[[], None], workers: int = 1) -> Setup:
    """The setup with features for images, where a trial needs no more of them; else the setup itself.

    What no run has computed is computed now, while others that need it wait: with the threads of all ``workers``, if
    there are so many cores. ``heed`` is called often, and may raise. Where features cannot be kept, a line says so.
    """
    if config.lora.method != "none" or not {*config.data.augmentations()} <= {"none", "flip"}:
        return setup
    if setup.of_probes is None:
        start, threads = time.perf_counter(), torch.get_num_threads()
        torch.set_num_threads(max(threads, min(cpu_count(), threads * workers * setup.process.world_size)))
        try:
            samples = Samples(setup.data, setup.device, _features(setup, config, heed))
            setup.of_probes = replace(setup, samples=samples, cost={"features_seconds": time.perf_counter() - start})
        except ConfigError as error:
            print(f"note: no features are kept, every epoch computes its own ({error})")
            setup.of_probes = setup
        finally:
            torch.set_num_threads(threads)
    return setup.of_probes


@torch.no_grad()
def _features(setup: Setup, config: TrialConfig, heed: Callable[[], None]) -> np.ndarray:
    """What the frozen trunk makes of all images that are used, mapped. Raises ConfigError where there is no place.

    [N, 1, W, V]: a sample's W features, and those of its mirror image, are laid out as a picture of one channel that
    shows them side by side, which mirroring exchanges. The file grows in place and holds the bits of floats: a vector
    ends with a checksum, without which it is absent or damaged. Shape legend: B sample of a part of them.
    """
    data, V, cache_dir = setup.data, 1 + ("flip" in config.data.augmentations()), user_path(config.data.cache_dir)
    how = setup.environment["precision"], setup.environment["device"], torch.__version__, V, 1  # of the file's format
    identity = json.dumps([*how, {**setup.base, "weights": None}, data.content, vars(data.decoding)], sort_keys=True)
    path, real = cache_dir / f"features-{randomness.key(identity):016x}.npy", setup.transform.work_dtype
    bar = Progress("features", sum(map(len, data.splits.values())))
    with locked_in(cache_dir, path.name), computing(setup.device, config.trainer.deterministic), bar:
        with writing_to(cache_dir):
            try:
                kept: Any = np.load(path, mmap_mode="r+")
            except (OSError, ValueError):  # absent or damaged
                shape = len(data.labels), 1, shape_of(config.model).width + 1, V
                kept = np.lib.format.open_memmap(path, "w+", f"i{real.itemsize}", shape)
            free = shutil.disk_usage(cache_dir).free + 512 * path.stat().st_blocks
            if (lacking := kept[0].nbytes * bar.total - free) > 0:
                raise ConfigError(f"{cache_dir} lacks {lacking:,} bytes for features: give another data.cache_dir")
        trunk, total = setup.build_model([config]).trunk.eval(), functools.partial(np.sum, axis=1, dtype=kept.dtype)
        for name, left in data.splits.items():
            K = 4 if name == "train" else 1  # parts that a CPU's caches hold; else evaluation's, and no mirror images
            while len(left):
                heed()
                some = left[: max(1, setup.most_evaluated // K)]
                with halving(setup, "most_evaluated", len(some), K):
                    lacks_BV = (total(kept[some, 0, :-1]) != ~kept[some, 0, -1])[:, :K]
                    images: Any = setup.samples.gather(some)[0] if lacks_BV.any() else None
                    for v in np.flatnonzero(lacks_BV.any(0)):
                        found = trunk(setup.transform.eval(images.flip(-1) if v else images))
                        new_B = lacks_BV[:, v]  # others may be reading the rest
                        new_BW = found.to(real).cpu().numpy().view(kept.dtype)[new_B]
                        kept[some[new_B], 0, :, v] = np.c_[new_BW, ~total(new_BW)]
                    bar.advance(len(some))
                    left = left[len(some) :]
        kept.flush()
    return kept[:, :, :-1].view(f"f{real.itemsize}")


def prepare(configs: Sequence[TrialConfig]) -> None:
    """Fetch and decode what trials will need. Raises ConfigError for what the first that cannot run lacks."""
    ready: list[object] = []
    for config in configs:
        m, data, lora = config.model, config.data, config.lora
        if m not in ready:
            fetch_weights(m, download=True)
        needs = (m, lora.method, lora.targets, lora.blocks, lora.rank)
        if m.library == "timm" and needs not in ready:
            with torch.device("meta"):
                check_places(trunk_of(m), config)
        if config.optimizer.class_weights:
            class_weights([config], load_data(data))
        line = load_data(data).line(shape_of(m).image_size, config.trainer.metric) if data not in ready else ""
        if line and m.weights in SHIPPED.get(m.name, ()) and not DATASETS[data.name].in_package:
            line += f"\nnote: {m.name} saw drawn glyphs alone: for photographs give model=vit_b_16 model.image_size=224"
        if line and line not in ready:
            print(line)
        ready += [what for what in (m, needs, data, line) if what not in ready]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*: (.+)$", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine() or "cpu"


def _git_state() -> dict[str, str | bool | None]:
    """Commit of the package's own checkout and whether it has changes; None for an installed package."""
    lines, folder = [], Path(__file__).resolve().parent.parent
    command = ["git", "-C", os.fspath(folder), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    if (folder / ".git").exists():
        with contextlib.suppress(OSError):
            lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    dirty = not all(line.startswith("#") for line in lines) if lines else None
    return {"commit": lines[0].removeprefix("# branch.oid ") if lines else None, "dirty": dirty}
