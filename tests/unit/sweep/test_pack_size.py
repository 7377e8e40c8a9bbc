"""How many trials train together: what is asked, what is measured and kept, and how times and bytes are taken."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain_trials import BASELINE, plain_trial
from sweeps import seed_trials, sweep_of, trial_of

from lora_vit.config import TrialConfig, trial_id
from lora_vit.errors import ConfigError, Interrupted
from lora_vit.stopping import StopRequest
from lora_vit.sweep import pack_size as measure
from lora_vit.sweep.claims import FREE, Claims
from lora_vit.sweep.pack_size import PackSizes, attainable_memory, choose_pack_size
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Trial, make_groups
from lora_vit.training.trial import TrialRun

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ON_CPU: Any = SimpleNamespace(device=CPU)
FIGURES = {"limited_by_trials": False, "seconds_per_trial_epoch": {"1": 0.5, "4": 0.25}}


class Sizes:
    """A worker's pack sizes, where measuring a group of trials gives 4, or raises ``error``."""

    def __init__(self, folder: Path, monkeypatch, trials: list[Trial] | None = None, workers=1, size="auto"):
        self.trials, self.error = trials or seed_trials(10), None
        self.sweep, self.claims = sweep_of(folder, self.trials, workers, pack_size=size), Claims(folder)
        self.said: list[str] = []
        self.stop = StopRequest()
        self.sizes = PackSizes(self.sweep, self.claims, self.stop, self.said.append)
        (self.group,) = make_groups(self.trials)
        self.measured: list[tuple[Any, ...]] = []
        monkeypatch.setattr(PackSizes, "setup_of", lambda sizes, trial: ("setup of", trial))
        monkeypatch.setattr(measure, "choose_pack_size", self.choose)

    def choose(self, *given: Any) -> dict[str, Any]:
        self.measured.append(given)
        if self.error:
            raise self.error
        return {"size": 4, **FIGURES}

    def of(self, trials: int = 10) -> int | None:
        self.group.trials = self.trials[:trials]
        self.claims.look()
        return self.sizes.of(self.group)

    def claim(self) -> str:
        """By which others know that a size is, or was, being measured."""
        (path,) = self.claims.folder.glob("size-*.1")
        return path.stem


# --- as asked for, or measured


@pytest.mark.parametrize(
    ("workers", "planned", "asked", "size"),
    [
        *((3, planned, "4", size) for planned, size in ((10, 4), (4, 4), (3, 3), (1, 1))),
        *((1, 10, "auto", 4), (1, 3, "auto", 3), (3, 10, "auto", 4), (3, 9, "auto", 3), (6, 9, "auto", 2)),
        (1, 1, "auto", 1),
    ],
)
def test_the_size_that_is_asked_for_or_measured(workers, planned, asked, size, tmp_path, monkeypatch):
    """A measured one leaves something for each worker; one trial alone, or that needs its own pack, is not measured."""
    sizes = Sizes(tmp_path, monkeypatch, workers=workers, size=asked)
    assert sizes.of(planned) == size
    assert bool(sizes.measured) == (asked == "auto" and planned > 1)
    for changes in ({**BASELINE, "lora.method": "full"}, {"lora.bias": "all"}, {"lora.bias": "lora_only"}):
        trunks = [trial_of({**changes, "seed": seed}) for seed in range(planned)]
        alone = Sizes(tmp_path / f"{changes}", monkeypatch, trunks, workers, asked)
        assert (alone.of(planned), alone.measured) == (1, [])


def test_a_size_is_measured_once_and_kept(tmp_path, monkeypatch):
    """With the trials that the run asks for, for it and the next ones."""
    sizes = Sizes(tmp_path, monkeypatch, workers=2)
    assert sizes.of(8) == 4
    configs = [trial.config for trial in sizes.trials[:8]]
    assert sizes.measured == [(configs, ("setup of", sizes.trials[0]), 2, sizes.stop)]
    assert sizes.said == [
        f"measuring the pack size for {sizes.group.title}",
        "packs of 4 (the steps of an epoch of one trial in packs of 1: 500 ms, 4: 250 ms)",
    ]
    assert sizes.of() == 4
    again = Sizes(tmp_path, monkeypatch, workers=2)
    assert again.of() == 4
    assert (len(sizes.measured), again.measured, again.said) == (1, [], [])
    kept = {"size": 4, "group": sizes.group.title, **FIGURES}
    assert again.sizes.known(again.group) == kept
    assert list(again.sweep.plan["pack_sizes"].values()) == [kept]


def test_a_size_holds_for_its_group_machine_workers_and_as_many_trials(tmp_path, monkeypatch):
    """Of fewer trials than twice the largest pack, where there were too few for a larger one."""
    Sizes(tmp_path, monkeypatch).of()
    (others,) = make_groups(seed_trials(10, trainer__epochs=3))
    same = Sizes(tmp_path, monkeypatch)
    assert same.sizes.known(same.group) is not None
    assert same.sizes.known(others) is None
    assert Sizes(tmp_path, monkeypatch, workers=2).sizes.known(same.group) is None
    for module, name in ((measure, "device_name"), (torch, "get_num_threads")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *device: 77)
            assert Sizes(tmp_path, patch).sizes.known(same.group) is None
    (kind,) = same.sweep.plan["pack_sizes"]
    for limited, trials, is_known in ((True, 7, True), (True, 8, False), (False, 10, True)):
        with same.sweep.changing() as plan:
            plan["pack_sizes"][kind]["limited_by_trials"] = limited
        same.group.trials = same.trials[:trials]
        assert (same.sizes.known(same.group) is not None) is is_known


def test_one_process_measures_and_the_others_wait(tmp_path, monkeypatch):
    mine, theirs = Sizes(tmp_path, monkeypatch), Claims(tmp_path)
    choose = mine.choose

    def watched(*given: Any):
        theirs.look()
        assert not theirs.take(mine.claim())
        return choose(*given)

    monkeypatch.setattr(measure, "choose_pack_size", watched)
    assert mine.of() == 4
    theirs.look()
    assert theirs.take(mine.claim()), "given back"
    other, their_next = Sizes(tmp_path / "next", monkeypatch), Claims(tmp_path / "next")
    assert their_next.take(mine.claim())
    assert (other.of(), other.measured) == (None, [])
    their_next.release(mine.claim())
    assert other.of() == 4


def test_what_another_measured_meanwhile_is_taken(tmp_path, monkeypatch):
    """Between our look and our claim."""
    mine, take = Sizes(tmp_path, monkeypatch), Claims.take

    def late(claims: Claims, name: str) -> bool:
        with Sweep(tmp_path).changing() as plan:
            plan["pack_sizes"][name.removeprefix("size-")] = {"size": 2, **FIGURES}
        return take(claims, name)

    monkeypatch.setattr(Claims, "take", late)
    assert (mine.of(), mine.measured) == (2, [])
    assert mine.claims.state(mine.claim()) == FREE


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        *((error, False) for error in (RuntimeError("mismatch"), OSError(errno.ECONNRESET, "reset"), ConfigError("x"))),
        *((error, True) for error in (Interrupted(2), OSError(errno.ENOSPC, "full"))),
    ],
)
def test_a_group_that_cannot_be_measured_trains_alone(error, ends, tmp_path, monkeypatch):
    """Nothing is kept: it may be mended by the next time. What is no trial's own ends the measuring."""
    sizes = Sizes(tmp_path, monkeypatch)
    sizes.error = error
    if ends:
        with pytest.raises(type(error)):
            sizes.of()
        assert len(sizes.said) == 1
    else:
        assert sizes.of() == 1
        assert f"cannot be measured ({type(error).__name__}: {error}): packs of 1" in sizes.said[-1]
        sizes.error = None
        assert sizes.of() == 1, "for this process it is settled"
    assert sizes.sweep.plan["pack_sizes"] == {}
    assert sizes.claims.state(sizes.claim()) == FREE


def test_a_size_that_failed_is_not_taken_again(tmp_path, monkeypatch):
    """Not by this worker, nor by those that come, nor by the next command; a number that is given is the user's."""

    def runs_out(sizes: Sizes, error: Exception, trials: int) -> None:
        with pytest.raises(type(error)), sizes.sizes.fitting(sizes.group, trials, SimpleNamespace()):  # type: ignore
            raise error

    sizes = Sizes(tmp_path, monkeypatch)
    assert sizes.of() == 4
    runs_out(sizes, RuntimeError("shape mismatch"), 4)
    runs_out(sizes, MemoryError(), 1)
    assert sizes.of() == 4
    runs_out(sizes, MemoryError(), 4)
    later = Sizes(tmp_path, monkeypatch)
    assert (sizes.of(), later.of(), later.measured) == (2, 2, [])
    given = Sizes(tmp_path / "given", monkeypatch, size="4")
    runs_out(given, MemoryError(), 3)
    assert (given.of(), given.sweep.plan["pack_sizes"]) == (1, {})


# --- the fastest size

EVER_FASTER, ENOUGH = {2**i: 0.5**i for i in range(9)}, 1 << 40
LIMITED = True


def choose(
    monkeypatch, seconds: Any, trials: int = 8, memory: int = 1, attainable: int = ENOUGH, workers: int = 1
) -> tuple[int, dict[str, Any], list[int]]:
    """The choice where packs take so long (or raise) and ``memory`` bytes a trial; also the sizes tried."""
    tried: list[int] = []
    stop = StopRequest()

    def measured(configs: list[TrialConfig], *given: object) -> tuple[float, int]:
        assert given == (ON_CPU, stop)
        tried.append(len(configs))
        answer = seconds[len(configs)]
        if isinstance(answer, Exception):
            raise answer
        return answer, memory * len(configs)

    def bytes_for(device: torch.device, among: int) -> int:
        assert (device, among) == (CPU, workers)
        return attainable

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(measure, "attainable_memory", bytes_for)
    figures = choose_pack_size([plain_trial()] * trials, ON_CPU, workers, stop)
    return figures["size"], figures, tried


@pytest.mark.parametrize(
    ("seconds", "trials", "attainable", "best", "tried", "limited"),
    [
        # faster by 3 % of the best so far; two sizes in a row that gain nothing end the search
        ({1: 1.0, 2: 1.2, 4: 1.1}, 15, ENOUGH, 1, [1, 2, 4], not LIMITED),
        ({1: 1.0, 2: 1.2, 4: 0.6, 8: 0.7}, 15, ENOUGH, 4, [1, 2, 4, 8], LIMITED),
        ({1: 1.0, 2: 0.97, 4: 0.96, 8: 0.95}, 15, ENOUGH, 4, [1, 2, 4, 8], LIMITED),
        ({1: 1.0, 2: 0.9, 4: 0.89, 8: 0.88}, 15, ENOUGH, 2, [1, 2, 4, 8], not LIMITED),
        # what may not fit: twice a pack takes at most twice its memory, of which 80 % may be expected
        *((EVER_FASTER, 16, bytes_, 2**n, [1, 2, 4, 8][: n + 1], not LIMITED)
          for bytes_, n in ((4, 1), (9, 2), (10, 3), (19, 3))),
        # more than 64 trials, and more than there are
        (EVER_FASTER, 256, ENOUGH, 64, [1, 2, 4, 8, 16, 32, 64], not LIMITED),
        (EVER_FASTER, 6, ENOUGH, 4, [1, 2, 4], LIMITED),
        # memory that runs out
        ({1: 1.0, 2: 0.5, 4: MemoryError()}, 8, ENOUGH, 2, [1, 2, 4], not LIMITED),
    ],
)  # fmt: skip
def test_the_fastest_size(seconds, trials, attainable, best, tried, limited, monkeypatch):
    found, figures, sizes = choose(monkeypatch, seconds, trials, attainable=attainable)
    assert (found, sizes, figures["limited_by_trials"]) == (best, tried, limited)


@pytest.mark.parametrize("seconds", [{1: MemoryError()}, {1: 1.0, 2: RuntimeError("shape mismatch")}])
def test_memory_that_runs_out_for_one_trial_or_another_error_is_raised(seconds, monkeypatch):
    with pytest.raises((MemoryError, RuntimeError)):
        choose(monkeypatch, seconds)


def test_the_figures_behind_a_choice_and_how_packs_are_computed(monkeypatch):
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(measure, "computing", lambda *how: told.append(how) or contextlib.nullcontext())
    best, figures, _ = choose(monkeypatch, {1: 1.0, 2: 0.1234567}, trials=3, memory=7, workers=2)
    assert best == 2
    assert figures == {
        "size": 2,
        "limited_by_trials": True,
        "seconds_per_trial_epoch": {"1": 1.0, "2": 0.12346},
    }
    assert told == [(CPU, True)] * 2, "as packs will train"


def test_images_on_a_gpu_are_held_once_however_many_train(monkeypatch):
    """40 of the 50 bytes that a pack of one holds are images: two hold 60, four 80."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    monkeypatch.setattr(measure, "attainable_memory", lambda device, workers: 100)
    monkeypatch.setattr(measure, "measure", lambda configs, *_: (1 / len(configs), 40 + 10 * len(configs)))
    figures = choose_pack_size([plain_trial()] * 8, SimpleNamespace(device=GPU), 1, StopRequest())  # type: ignore
    assert list(figures["seconds_per_trial_epoch"]) == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("long", "gain", "tried"), [(5.1, 1.0, [1, 2]), (4.9, 1.0, [1, 2, 4]), (100.0, 0.5, [1, 2, 4, 8])]
)
def test_one_miss_is_enough_if_measuring_takes_long(long, gain, tried, monkeypatch):
    """The first size may take long, and one that gains: they are no misses."""
    now = [0.0]

    class Slow(dict[int, float]):
        def __getitem__(self, size: int) -> float:
            now[0] += long
            return 1.0 if gain == 1.0 else gain / size

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert choose(monkeypatch, Slow())[2] == tried


def test_the_costliest_trials_of_the_first_seed_are_measured(monkeypatch):
    """Dropout costs more than rank; without adapters neither is set."""
    asked: list[list[tuple[Any, ...]]] = []

    def measured(configs: list[TrialConfig], *given: object) -> tuple[float, int]:
        asked.append([(c.seed, c.lora.dropout, c.lora.rank) for c in configs])
        return 1.0 / len(configs), 1

    monkeypatch.setattr(measure, "measure", measured)
    grid = [(1, 0.1, 8), (0, 0.0, 8), (0, 0.1, 2), (0, 0.2, 4)]
    configs = [plain_trial({"seed": s, "lora.dropout": d, "lora.rank": r}) for s, d, r in grid]
    probes = [plain_trial({**BASELINE, "lora.method": "none", "seed": seed}) for seed in (1, 0)]
    in_order = [(0, 0.2, 4), (0, 0.1, 2), (0, 0.0, 8), (1, 0.1, 8)], [(0, None, None), (1, None, None)]
    for trials, expected in zip((configs, probes), in_order, strict=True):
        choose_pack_size(trials, ON_CPU, 1, StopRequest())
        assert asked[-1] == expected


# --- times and bytes


class Stage:
    """A pack that trains nothing, on a clock of its own: an epoch of some steps; the first takes longer."""

    def __init__(self, monkeypatch, steps=10, first=0.1, step=0.05, device=CPU):
        self.steps, self.seconds, self.now = steps, [first, *[step] * 99], 0.0
        self.stop, self.rates = StopRequest(), list[str]()
        self.setup: Any = SimpleNamespace(device=device)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure, "Pack", self.pack)
        monkeypatch.setattr(measure.gc, "collect", lambda: None)  # takes long, and there is nothing to free

    def pack(self, trials: list[TrialRun], setup: object) -> Any:
        assert setup is self.setup
        assert [trial.record.trial_id for trial in trials] == [trial_id(trial.config) for trial in trials]
        return SimpleNamespace(step=self.step, learning_rates=lambda: [f"rate {i}" for i in range(self.steps)])

    def step(self, rate: str, logging: bool) -> None:
        assert logging is False
        self.now += self.seconds[len(self.rates)]
        self.rates.append(rate)

    def measure(self, trials: int = 1) -> tuple[float, int]:
        return measure.measure([plain_trial({"seed": s}) for s in range(trials)], self.setup, self.stop)


@pytest.mark.parametrize(
    ("stage", "steps", "seconds"),
    [({}, 6, 0.5), ({"step": 0.09}, 6, 0.9), ({"step": 0.1}, 5, 1.0), ({"first": 9.0}, 2, 0.5), ({"steps": 1}, 1, 0.1)],
)
def test_steps_are_timed_until_it_takes_long_and_between_stops(stage, steps, seconds, monkeypatch):
    """Six of them or half a second, at least two: the first one also warms up. The quickest counts."""
    there = Stage(monkeypatch, **stage)
    assert there.measure(2)[0] == pytest.approx(seconds / 2), "of one trial"
    assert there.rates == [f"rate {i}" for i in range(steps)]
    there.stop.signum = 2
    with pytest.raises(Interrupted):
        there.measure()
    assert len(there.rates) == steps


@pytest.mark.parametrize(
    ("limit", "used", "workers", "attainable"),
    [
        (None, None, 1, 5200),
        (None, None, 3, 5000 // 3 + 200),
        ("max\n", "1000", 1, 5200),
        ("3000\n", "1000\n", 1, 2200),
        ("3000", "1000", 2, 1200),
        ("999999", "1000", 1, 5200),
        ("3000", "?", 1, 5200),
    ],
)
def test_the_memory_that_a_process_can_have(limit, used, workers, attainable, monkeypatch):
    """What it holds, and its share of what is free on the host and in its container."""
    files = {"/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": used}

    def read(path: Path) -> str:
        text = files[str(path)]
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    held = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=200))
    free = SimpleNamespace(available=5000)
    monkeypatch.setattr(measure, "psutil", SimpleNamespace(virtual_memory=lambda: free, Process=lambda: held))
    assert attainable_memory(CPU, workers) == attainable


@pytest.mark.parametrize("can_reset", [True, False])
def test_the_most_that_a_process_held_is_counted_from_the_start_of_the_measurement(can_reset, monkeypatch):
    """Where the system can, elsewhere from the start of the process."""
    written: list[tuple[str, str]] = []

    def write(path: Path, text: str) -> None:
        written.append((str(path), text))
        if not can_reset:
            raise PermissionError

    monkeypatch.setattr(measure, "peak_memory", lambda device: 300)
    monkeypatch.setattr(Path, "write_text", write)
    assert Stage(monkeypatch).measure()[1] == 300
    assert written == [("/proc/self/clear_refs", "5")]


def test_memory_and_time_on_a_gpu(monkeypatch):
    """What is reserved can be used again; a time is taken when the device is done."""
    calls: list[str] = []
    there = Stage(monkeypatch, steps=2, device=GPU)
    answers = {"synchronize": None, "mem_get_info": (100, 1000), "memory_reserved": 11, "max_memory_allocated": 77}

    def answer(name: str, device: torch.device) -> Any:
        assert device == GPU
        calls.append(name)
        there.now += name == "synchronize"
        return answers.get(name)

    for name in (*answers, "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: answer(name, device))
    assert attainable_memory(GPU, 3) == 111
    calls.clear()
    seconds, held = there.measure()
    assert (seconds, held) == (pytest.approx(2 * 1.05), 77)
    assert calls == ["reset_peak_memory_stats", "synchronize", "synchronize", "max_memory_allocated"]
