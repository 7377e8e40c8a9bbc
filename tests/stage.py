"""Real packs of small trials that a test of the loop watches, times and disturbs."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plain_trials import plain_trial

from lora_vit import terminal
from lora_vit.build import build_setup
from lora_vit.distributed import Process
from lora_vit.stopping import StopRequest
from lora_vit.training import loop, trial
from lora_vit.training.loop import Reporter, train_trials
from lora_vit.training.pack import Pack
from lora_vit.training.trial import Setup, TrialRun

STEPS = 4
"""Of an epoch: 32 training images in batches of 8."""
SMALL = {"data.train_per_class": 8, "trainer.log_every": 3}
WRITES = ("log_step", "log_epoch", "write_results", "say", "close")


@functools.cache
def setup_of(rank: int = 0, world_size: int = 1) -> Setup:
    """What the trials share, in a process of a group whose others are not there."""
    return build_setup(plain_trial(SMALL), Process(rank, world_size))


class Stage(Reporter):
    """Notes what happens, by a clock of its own: a step takes two seconds and an evaluation a hundred.

    Every end of an epoch is worth a checkpoint.

    Attributes:
        after: what happens after a step, by the total steps of the pack's first trial.
        making: what happens before a pack is made, by its number from 1.
        row_takes: seconds that a logging step takes.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.now, self.row_takes, self.made = folder, 0.0, 0.0, 0
        self.events: list[tuple[Any, ...]] = []
        self.after: dict[int, Callable[[Pack], None]] = {}
        self.making: dict[int, Callable[[None], None]] = {}
        for module in (loop, terminal):
            hands = SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: self.now)
            monkeypatch.setattr(module, "time", hands)
        monkeypatch.setattr(trial, "EPOCH_CHECKPOINT_EVERY", 0.0)
        self._watch_packs(monkeypatch)
        self._watch_files(monkeypatch)

    def _watch_packs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        init, step, predict = Pack.__init__, Pack.step, Pack.predict

        def make(pack, trials, setup):
            self.made += 1
            self.making.get(self.made, lambda _: None)(None)
            init(pack, trials, setup)

        def take_step(pack, lr_K1, stop):
            losses_K = step(pack, lr_K1, stop)
            self.now += 2
            self.note("train", pack.K, stop, losses_K.tolist())
            self.after.get(pack.step_of(pack.trials[0]), lambda _: None)(pack)
            return losses_K

        def evaluate(pack, split):
            self.now += 100
            self.note("predict", split)
            return predict(pack, split)

        for name, watched in (("__init__", make), ("step", take_step), ("predict", evaluate)):
            monkeypatch.setattr(Pack, name, watched)

    def _watch_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def watch(name: str, noted: Callable[..., tuple[Any, ...]]) -> None:
            write = getattr(TrialRun, name)

            def watched(run, *args):
                if run.folder is not None:
                    self.note(name, run.config.seed, *noted(run, *args))
                return write(run, *args)

            monkeypatch.setattr(TrialRun, name, watched)

        for name in WRITES:
            watch(name, lambda run, *args: args)
        watch("write_record", lambda run: (run.record.status, dict(run.record.metrics), dict(run.record.cost)))
        watch("save", lambda run: (run.state.epoch, run.state.step_in_epoch, run.state.seconds, run.state.loss_sum))

    def trials(self, *seeds: int, **changes: object) -> list[TrialRun]:
        """Trials in folders that are named by their seeds; ``trainer__epochs=1`` changes a setting."""
        settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
        opened = []
        for seed in seeds:
            (self.folder / str(seed)).mkdir(exist_ok=True)
            config = plain_trial(settings | {"seed": seed})
            opened.append(TrialRun.open(config, self.folder / str(seed), setup_of(), {}))
        return opened

    def train(self, trials: list[TrialRun], stop: StopRequest | None = None, setup: Setup | None = None) -> None:
        """Train them in one pack."""
        train_trials(trials, setup or setup_of(), self, stop or StopRequest())

    def note(self, *event: object) -> None:
        self.events.append(event)

    def of(self, *kinds: str) -> list[tuple[Any, ...]]:
        """What happened of these kinds, without the kind."""
        return [e[1:] for e in self.events if e[0] in kinds]

    def started(self, pack):
        self.note("started", [t.config.seed for t in pack.trials])

    def advance(self, pack):
        self.note("advance", pack.step_in_epoch)

    def step(self, pack, losses, rates, images_per_second):
        self.note("step", losses, rates, images_per_second)
        self.now += self.row_takes

    def epoch(self, trial, row):
        self.note("epoch", trial.config.seed, trial.state.epoch, row)

    def left(self, trial):
        self.note("left", trial.config.seed, trial.record.status)


def asked(stop: StopRequest) -> Callable[[object], None]:
    """A request to stop, to come after a step."""
    return lambda _: setattr(stop, "signum", signal.SIGHUP)


def raised(error: BaseException | type[BaseException]) -> Callable[..., Any]:
    """An error, to come after a step or in place of a function."""

    def throw(*_: object) -> None:
        raise error

    return throw


def spoilt(k: int, step: int) -> Callable[[Pack], None]:
    """The k-th trial's step, counted from 0, turns out bad."""
    return lambda pack: pack.first_bad_step_K.__setitem__(k, step)
