"""What a worker trains on, and how many trials together: packs of 1, 2, 4 ... are timed, the fastest is kept."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from lora_vit.build import build_setup, choose_device, device_name, hold_gpu, usable_gpus, with_features
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.errors import NO_SPACE, ConfigError, Interrupted, one_line, out_of_memory
from lora_vit.stopping import StopRequest
from lora_vit.sweep.claims import Claims
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Group, Trial, digest, setup_key
from lora_vit.training.loop import computing, peak_memory, reset_peak_memory
from lora_vit.training.pack import Pack
from lora_vit.training.trial import ALL, Setup, TrialRun

LARGEST = 64
MEMORY_SHARE = 0.8  # part of the attainable memory that a pack may be expected to take
MOST_STEPS, MOST_SECONDS = 6, 0.5  # a size is timed for so many steps, or fewer where they are slow
GAIN = 0.03  # a larger pack must be faster by this part to be preferred
MOST_MISSES, LONG = 2, 5.0  # sizes that gain nothing, which end the search; or one that takes so many seconds


def gpus_of(trials: Sequence[Trial]) -> int:
    """How many GPUs any of the trials may use; each worker then has one to itself."""
    return max((usable_gpus(trial.config.trainer.accelerator) for trial in trials), default=0)


def take_gpu(trials: Sequence[Trial], held: contextlib.ExitStack) -> None:
    """Compute on the first visible GPU that is free, and hold it; workers share a CPU. Raises ConfigError."""
    for index in range(count := gpus_of(trials)):
        if hold_gpu(index, held):
            torch.cuda.set_device(index)
            return
    if count:
        raise ConfigError(f"all {count} visible GPUs have a worker or a run: wait, or give other GPUs")


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class PackSizes:
    """How many trials of a group train together, as asked for or measured once on each kind of machine; and on what."""

    def __init__(self, sweep: Sweep, claims: Claims, stop: StopRequest, say: Callable[[str], None]):
        self.sweep, self.claims, self.stop, self.say = sweep, claims, stop, say
        self.workers = int(sweep.plan["workers"])  # that share the sweep, and on a CPU its cores
        self._sizes: dict[str, int] = {}
        self._setups: dict[str, Setup] = {}  # the last one

    def setup_of(self, trial: Trial) -> Setup:
        """Data and backbone for a trial; the last ones are kept. Raises ConfigError, Interrupted."""
        if (key := setup_key(trial.config)) not in self._setups:
            self._setups.clear()
            free_memory()
            self._setups[key] = build_setup(trial.config, Process())
        return with_features(self._setups[key], trial.config, self.stop.heed, self.workers)

    def of(self, group: Group) -> int | None:
        """The size for a group of trials, from which every worker is to have some; None while another measures it."""
        planned, wanted = len(group.trials), self.sweep.options.pack_size
        if planned == 1 or group.trials[0].config.lora.trains_trunk:
            return 1
        size = self._sizes.get(group.key) or (int(wanted) if wanted != "auto" else self._measured(group))
        if size is None:
            return None
        self._sizes[group.key] = size
        return min(size, planned if wanted != "auto" else -(-planned // self.workers))

    @contextlib.contextmanager
    def fitting(self, group: Group, trials: int, setup: Setup) -> Iterator[None]:
        """Train so many trials in it: the passes that had room are kept, or half of the trials where none had."""
        kind = self._kind(group)
        setup.most_trained = known = self.sweep.plan.get("most_trained", {}).get(kind, ALL)
        try:
            yield
        except Exception as error:
            if trials > 1 and out_of_memory(error):
                self._sizes[group.key] = trials // 2
                with self.sweep.changing() as plan:
                    plan["pack_sizes"].get(kind, {})["size"] = trials // 2  # a number that is given stays
            raise
        if setup.most_trained < known:
            with self.sweep.changing() as plan:
                plan.setdefault("most_trained", {})[kind] = setup.most_trained

    def known(self, group: Group) -> dict[str, Any] | None:
        """What was measured for the group on this kind of machine, with as many workers; not with far fewer trials."""
        found: dict[str, Any] | None = self.sweep.plan["pack_sizes"].get(self._kind(group))
        if found and found["limited_by_trials"]:
            return found if len(group.trials) < 2 * max(map(int, found["seconds_per_trial_epoch"])) else None
        return found

    def _kind(self, group: Group) -> str:
        accelerator = group.trials[0].config.trainer.accelerator  # that no GPU is there is refused where it would train
        device = choose_device("auto" if accelerator == "gpu" else accelerator)
        return digest([group.key, device_name(device), torch.get_num_threads(), self.workers])

    def _measured(self, group: Group) -> int | None:
        """The size that was measured, or is now; None while another process measures it."""
        if (figures := self.known(group)) is None:
            if not self.claims.take(claim := f"size-{self._kind(group)}"):
                return None
            try:
                self.sweep.refresh()  # another process may just have measured
                figures = self.known(group) or self._measure(group)
            finally:
                self.claims.release(claim)
        return int(figures["size"])

    def _measure(self, group: Group) -> dict[str, Any]:
        """Measure now: ``size`` and the figures behind it, which are kept; 1 where no trial can be trained here."""
        self.say(f"measuring the pack size for {group.title}")
        try:
            setup, configs = self.setup_of(group.trials[0]), [trial.config for trial in group.trials]
            figures = choose_pack_size(configs, setup, self.workers, self.stop)
        except Exception as error:  # each trial then reports its own
            if isinstance(error, Interrupted) or (isinstance(error, OSError) and error.errno in NO_SPACE):
                raise
            self.say(f"the pack size cannot be measured ({one_line(error)}): packs of 1")
            return {"size": 1}
        times = ", ".join(f"{k}: {1e3 * t:.0f} ms" for k, t in figures["seconds_per_trial_epoch"].items())
        self.say(f"packs of {figures['size']} (the steps of an epoch of one trial in packs of {times})")
        with self.sweep.changing() as plan:
            plan["pack_sizes"][self._kind(group)] = {"group": group.title, **figures}
        return figures


def choose_pack_size(configs: Sequence[TrialConfig], setup: Setup, workers: int, stop: StopRequest) -> dict[str, Any]:
    """The fastest size that fits beside the other workers (``size``), and the figures behind it.

    Sizes double until two in a row gain nothing (one, where that took long), or the trials or the memory run out.
    """
    # the costliest trials of a seed first, so that no size is measured with cheaper ones than another
    configs = sorted(configs, key=lambda c: (c.seed, not c.lora.dropout, -(c.lora.rank or 0)))
    seconds: dict[int, float] = {}
    best, size, misses, held = 1, 1, 0, 0
    images = torch.cuda.memory_allocated(setup.device) if setup.device.type == "cuda" else 0  # held once
    while size <= min(LARGEST, len(configs)) and misses < MOST_MISSES:
        if 2 * held - images > MEMORY_SHARE * attainable_memory(setup.device, workers):
            break  # twice the pack takes at most twice the memory
        began = time.perf_counter()
        try:
            with computing(setup.device, configs[0].trainer.deterministic):
                seconds[size], held = measure(configs[:size], setup, stop)
        except Exception as error:
            if size == 1 or not out_of_memory(error):
                raise
            break
        if size > 1:
            best, misses = (size, 0) if seconds[size] < (1 - GAIN) * seconds[best] else (best, misses + 1)
            if misses and time.perf_counter() - began > LONG:
                break
        size *= 2
    return {
        "size": best,
        "limited_by_trials": LARGEST >= size > len(configs) and misses < MOST_MISSES,
        "seconds_per_trial_epoch": {str(k): round(v, 5) for k, v in seconds.items()},
    }


def measure(configs: Sequence[TrialConfig], setup: Setup, stop: StopRequest) -> tuple[float, int]:
    """Seconds that the steps of one epoch of one trial take in a pack of these, most bytes held. Raises Interrupted."""
    gc.collect()  # what an earlier pack left
    reset_peak_memory(setup.device)
    pack = Pack([TrialRun(config) for config in configs], setup)
    rates = pack.learning_rates()
    times: list[float] = []  # the first one also warms up
    while len(times) < min(len(rates), MOST_STEPS) and (len(times) < 2 or sum(times) < MOST_SECONDS):
        stop.heed()
        began = time.perf_counter()
        pack.step(rates[len(times)], False)
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)
        times.append(time.perf_counter() - began)
    return min(times) * len(rates) / len(configs), peak_memory(setup.device)


def attainable_memory(device: torch.device, workers: int = 1) -> int:
    """Bytes that this process can hold in all: on its GPU, or its share of the host's within the container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    free, own = psutil.virtual_memory().available, psutil.Process().memory_info().rss
    with contextlib.suppress(OSError, ValueError):  # no such files: no limit that we know of
        if (limit := Path("/sys/fs/cgroup/memory.max").read_text().strip()) != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return int(free // workers + own)
