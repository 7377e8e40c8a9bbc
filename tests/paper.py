"""A pack that trains nothing, for tests of what the loop decides: when, of whom and in which order."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from packs import new_trials
from plain_trials import plain_trial

from lora_vit.distributed import Process
from lora_vit.stopping import StopRequest
from lora_vit.training.evaluate import Predictions
from lora_vit.training.loop import train_trials
from lora_vit.training.pack import Pack

STEPS = 4
SPLITS = {"train": 0.0, "val": 0.25, "test": 0.5, "official_val": 0.75}
SETUP = SimpleNamespace(
    process=Process(),
    device=torch.device("cpu"),
    base={"weights": "W", "sha256": "S"},
    data=SimpleNamespace(
        splits=dict.fromkeys(SPLITS), images=np.zeros((2, 3, 16, 16)), class_names=("a", "b"), value_range=(0, 4095)
    ),
)


class Stage:
    """What a test sees and sets: a clock, what has happened, and what is to happen after which step."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple] = []
        self.after: dict[int, Callable[[Pack], None]] = {}
        """The total steps of the pack's first trial, and what happens then."""
        self.making: Callable[[int], None] = lambda made: None
        self.made = 0
        self.infinite: set[int] = set()
        """Seeds of trials whose parameters are not finite."""
        self.looked = 0
        self.correct: Callable[[int, int], int] = lambda seed, epoch: epoch
        self.save_after_epochs = True
        self.row_takes = 0.0

    def note(self, *event: object) -> None:
        self.events.append(event)

    def of(self, *kinds: str) -> list[tuple]:
        return [e for e in self.events if e[0] in kinds]


class Paper(Pack):
    """A pack on paper: a step takes two seconds, an evaluation a hundred; figures say whose and when they are."""

    def __init__(self, trials, setup, stage: Stage):
        stage.made += 1
        stage.making(stage.made)
        self.stage, self.trials, self.setup, self.K = stage, trials, setup, len(trials)
        (self.step_in_epoch,) = {t.state.step_in_epoch for t in trials}
        self.steps_per_epoch = STEPS
        self.flat = SimpleNamespace(
            values_KP=torch.tensor([[float(t.config.seed)] for t in trials]), stop=torch.zeros(1)
        )
        self.step_state = SimpleNamespace(
            first_bad_step_K=torch.full((self.K,), -1),
            loss_sum_K=torch.tensor([t.state.loss_sum for t in trials], dtype=torch.float64),
            updating=False,
            global_batch=8,
        )

    def learning_rates(self):
        rest = range(self.step_in_epoch + 1, STEPS + 1)
        rates = [[10 * t.config.seed + (t.state.epoch * STEPS + i) / 100 for t in self.trials] for i in rest]
        return torch.tensor(rates, dtype=torch.float64).view(-1, self.K, 1)

    def step(self, lr_K1, stop):
        self.stage.now += 2
        self.step_in_epoch += 1
        losses = torch.tensor([t.config.seed + self.step_of(t) / 100 for t in self.trials], dtype=torch.float64)
        self.step_state.loss_sum_K += losses
        self.stage.note("train", self.K, stop)
        self.stage.after.get(self.step_of(self.trials[0]), lambda pack: None)(self)
        return losses

    def pull(self):
        for k, t in enumerate(self.trials):
            t.state.step_in_epoch, t.state.loss_sum = self.step_in_epoch, float(self.step_state.loss_sum_K[k])
            t.state.values = {"w": torch.tensor(self.step_of(t))}

    def predict(self, split):
        self.stage.now += 100
        self.stage.note("predict", split)
        return [self.predictions(split, t) for t in self.trials]

    def predictions(self, split, trial):
        seed, epoch = trial.config.seed, self.step_of(trial) // STEPS
        predicted = (np.arange(10) >= self.stage.correct(seed, epoch)).astype(np.int64)
        zeros = np.zeros(10, np.int64)
        return Predictions(zeros, zeros, predicted, np.full(10, seed / 10), 10 * epoch + seed + SPLITS[split])

    def finite_K(self):
        self.stage.looked += 1
        return torch.tensor([t.config.seed not in self.stage.infinite for t in self.trials])

    def padding_is_zero(self):
        return True

    def export(self, k, matrix_KP):
        return {"w": matrix_KP[k].clone()}

    def parameter_counts(self, k):
        return {"trainable": self.trials[k].config.seed}


class Notes:
    """Takes the place of a trial's files and of the reporter."""

    def __init__(self, stage: Stage, trial=None):
        self._stage, self._trial = stage, trial

    def write_record(self):
        r = self._trial.record
        self._stage.note("record", r.config["seed"], r.status, dict(r.metrics), dict(r.cost))

    def save_checkpoint(self):
        s = self._trial.state
        self._stage.note("save", self._trial.config.seed, s.epoch, s.step_in_epoch, s.seconds, s.loss_sum, s.values)

    def epoch_checkpoint_due(self):
        return self._stage.save_after_epochs

    def started(self, pack):
        self._stage.note("started", [t.config.seed for t in pack.trials])

    def advance(self, pack):
        self._stage.note("advance", pack.step_in_epoch)

    def step(self, pack, losses, rates, speed):
        assert len(pack.trials) == len(losses) == len(rates)
        self._stage.note("step", losses, rates, speed)
        self._stage.now += self._stage.row_takes

    def epoch(self, trial, row):
        self._stage.note("epoch", trial.config.seed, trial.state.epoch, row)

    def left(self, trial):
        self._stage.note("left", trial.config.seed, trial.record.status)

    def __getattr__(self, name):
        return lambda *args: self._stage.note(name, self._trial.config.seed, *args)


def trials_of(stage: Stage, *seeds: int, **changes):
    changes = {"trainer.log_every": 3} | {key.replace("__", "."): value for key, value in changes.items()}
    trials = new_trials([plain_trial(changes | {"seed": seed}) for seed in seeds])
    for trial in trials:
        trial.files = Notes(stage, trial)
    return trials


def train(stage: Stage, trials, stop: StopRequest | None = None, setup=SETUP) -> None:
    train_trials(trials, setup, Notes(stage), stop or StopRequest())


def asked(stop: StopRequest) -> Callable[[Pack], None]:
    """A request to stop, to come after a step."""
    return lambda pack: setattr(stop, "signum", signal.SIGHUP)


def spoilt(k: int, step: int) -> Callable[[Pack], None]:
    """The k-th trial's step, counted from 0, turns out bad."""
    return lambda pack: pack.step_state.first_bad_step_K.__setitem__(k, step)
