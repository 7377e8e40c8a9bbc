"""The loop's decisions, on a pack that trains nothing: what is logged, validated, saved and told, when and of whom."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packs import new_trials
from plain_trials import BASELINE, plain_trial

from lora_vit.distributed import Process
from lora_vit.stopping import Interrupted, StopRequest
from lora_vit.training import loop
from lora_vit.training.evaluate import Predictions
from lora_vit.training.loop import adapter_card, peak_memory, stop_requested, train_trials
from lora_vit.training.pack import Pack
from lora_vit.training.trackers import HEARTBEAT_EVERY

STEPS = 4
SPLITS = {"train": 0.0, "val": 0.25, "test": 0.5, "official_val": 0.75}
SETUP = SimpleNamespace(
    process=Process(),
    device=torch.device("cpu"),
    base_weights={"name": "W", "sha256": "S"},
    data=SimpleNamespace(splits=dict.fromkeys(SPLITS), images=np.zeros((2, 3, 16, 16)), class_names=("a", "b")),
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


@pytest.fixture
def stage(monkeypatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(loop, "Pack", lambda trials, setup: Paper(trials, setup, stage))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: stage.now))
    return stage


def trials_of(stage: Stage, *seeds: int, **changes):
    changes = {"trainer.log_every": 3} | {key.replace("__", "."): value for key, value in changes.items()}
    trials = new_trials([plain_trial(changes | {"seed": seed}) for seed in seeds])
    for trial in trials:
        trial.files = Notes(stage, trial)
    return trials


def train(stage: Stage, trials, stop: StopRequest | None = None, setup=SETUP) -> None:
    train_trials(trials, setup, Notes(stage), stop or StopRequest())


def asked(stop: StopRequest, signum: int = signal.SIGHUP) -> Callable[[Pack], None]:
    return lambda pack: setattr(stop, "signum", signum)


def spoilt(k: int, step: int) -> Callable[[Pack], None]:
    return lambda pack: pack.step_state.first_bad_step_K.__setitem__(k, step)


def test_the_order_of_a_run(stage):
    """A trial of two epochs, written out: rows before the checkpoint that counts them, records after both."""
    train(stage, trials_of(stage, 7))
    kinds = ["train", "advance"]
    epoch = [*kinds * 3, "log_step", "step", *kinds, "log_step", "step", "predict", "log_epoch", "save", "record"]
    end = ["predict"] * 3 + ["write_results", "log_hparams", "say", "record", "close", "left"]
    assert [e[0] for e in stage.events] == ["record", "started", *epoch, "epoch", *epoch, "epoch", *end]
    assert stage.of("started", "epoch", "left") == [
        ("started", [7]),
        ("epoch", 7, 1, {"train_loss": pytest.approx(7.025), "val_loss": 17.25, "val_accuracy": 0.1}),
        ("epoch", 7, 2, {"train_loss": pytest.approx(7.065), "val_loss": 27.25, "val_accuracy": 0.2}),
        ("left", 7, "completed"),
    ]
    assert [e[1] for e in stage.of("advance")] == [1, 2, 3, 4] * 2
    assert [e[1:3] for e in stage.of("log_epoch")] == [(7, 4), (7, 8)]
    assert [e[3:] for e in stage.of("log_epoch")] == [e[2:] for e in stage.of("epoch")]
    assert [e[2:4] for e in stage.of("save")] == [(1, 0), (2, 0)]
    assert [e[1] for e in stage.of("predict")] == ["val", "val", "val", "test", "official_val"]


def test_the_figures_of_logging_steps(stage):
    """Every third step of an epoch and its last; the rate is that of the steps since the last row, of all trials."""
    train(stage, trials_of(stage, 1, 2, trainer__epochs=1))
    speed = 8 * 2 / 2
    assert stage.of("log_step") == [
        ("log_step", seed, step, 0, seed + step / 100, pytest.approx(10 * seed + step / 100), speed)
        for step in (3, 4)
        for seed in (1, 2)
    ]
    assert stage.of("step") == [
        ("step", [1 + i / 100, 2 + i / 100], pytest.approx([10 + i / 100, 20 + i / 100]), speed) for i in (3, 4)
    ]


def test_steps_are_counted_over_epochs_and_logged_by_their_place_in_the_epoch(stage):
    train(stage, trials_of(stage, 1, trainer__epochs=3, trainer__log_every=2))
    assert [e[2:4] for e in stage.of("log_step")] == [(2, 0), (4, 0), (6, 1), (8, 1), (10, 2), (12, 2)]


def test_the_rate_is_measured_since_the_last_row_and_from_where_an_epoch_goes_on(stage):
    trials = trials_of(stage, 1, trainer__epochs=1)
    trials[0].state.step_in_epoch = 1
    stage.after[2] = lambda pack: setattr(stage, "now", stage.now + 4)  # a slow step
    train(stage, trials)
    assert [e[-1] for e in stage.of("log_step")] == [8 * 2 / 8, 8 / 2]


def test_no_time_at_all_divides_by_nothing(stage):
    stage.after = {i: lambda pack: setattr(stage, "now", 0.0) for i in (1, 2, 3, 4)}
    (trial,) = trials_of(stage, 1, trainer__epochs=1)
    train(stage, [trial])
    assert [e[-1] for e in stage.of("log_step")] == [pytest.approx(8 * 3 / 1e-9), pytest.approx(8 / 1e-9)]
    assert trial.record.cost["seconds"] == 0
    assert trial.record.cost["images_per_second"] is None


def test_seconds_of_training_are_shared_and_evaluations_are_not_counted(stage, monkeypatch):
    monkeypatch.setattr(loop, "peak_memory", lambda device: (device, 5))
    trials = trials_of(stage, 1, 2)
    trials[0].record.cost["adapter_bytes"] = 3
    train(stage, trials)
    for trial in trials:
        assert trial.state.seconds == 2 * 2 * STEPS / 2
        expected = {
            "seconds": 8.0,
            "images_per_second": 2 * STEPS * 8 / 8,
            "peak_memory_bytes": (SETUP.device, 5),
            "pack_size": 2,
        }
        assert trial.record.cost == expected | ({"adapter_bytes": 3} if trial is trials[0] else {})


def test_writing_rows_is_part_of_training(stage):
    """Also that of the last step."""
    stage.row_takes = 0.5
    (trial,) = trials_of(stage, 1, trainer__epochs=1)
    train(stage, [trial])
    assert trial.state.seconds == 2 * STEPS + 2 * 0.5
    assert [e[-1] for e in stage.of("step")] == [8 * 3 / 6, 8 / 2.5]


def test_records_begin_with_parameters_and_the_packs_size(stage):
    trials = trials_of(stage, 1, 2)
    train(stage, trials)
    assert stage.of("record")[:2] == [("record", s, "running", {}, {"pack_size": 2}) for s in (1, 2)]
    assert [t.record.parameters for t in trials] == [{"trainable": 1}, {"trainable": 2}]


def test_records_follow_the_epochs(stage):
    train(stage, trials_of(stage, 1, 2))
    for seed in (1, 2):
        rows = [e[3] for e in stage.of("record") if e[1] == seed]
        epochs = [
            {
                "epoch": epoch,
                "step": STEPS * epoch,
                "train_loss": pytest.approx(seed + (2.5 + STEPS * (epoch - 1)) / 100),
                "val_loss": 10 * epoch + seed + 0.25,
                "val_accuracy": epoch / 10,
            }
            for epoch in (1, 2)
        ]
        end = {
            "test_accuracy": 0.2,
            "test_loss": 20 + seed + 0.5,
            "official_val_accuracy": 0.2,
            "official_val_loss": 20 + seed + 0.75,
        }
        assert rows == [{}, *epochs, epochs[-1] | end]


@pytest.mark.parametrize(
    ("correct", "best"), [([1, 5, 5, 3], (2, 0.5)), ([0, 0, 0, 0], (1, 0.0)), ([1, 2, 3, 4], (4, 0.4))]
)
def test_the_best_epoch_is_the_first_of_the_highest_accuracy(correct, best, stage):
    stage.correct = lambda seed, epoch: correct[epoch - 1]
    (trial,) = trials_of(stage, 1, trainer__epochs=4)
    train(stage, [trial])
    assert trial.record.best == trial.state.best == {"epoch": best[0], "val_accuracy": best[1]}
    assert trial.record.metrics["val_accuracy"] == correct[-1] / 10


@pytest.mark.parametrize(
    ("every", "epochs", "validated"),
    [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (2, 4, [2, 4]), (3, 5, [3, 5]), (9, 2, [2])],
)
def test_validation_every_so_many_epochs_and_after_the_last(every, epochs, validated, stage):
    train(stage, trials_of(stage, 1, trainer__epochs=epochs, trainer__validate_every=every))
    assert [e[2] for e in stage.of("epoch") if "val_loss" in e[3]] == validated
    assert [e[2] for e in stage.of("epoch") if "val_accuracy" in e[3]] == validated
    assert len([e for e in stage.of("predict") if e[1] == "val"]) == len(validated) + 1


def test_trials_in_different_epochs_are_validated_and_leave_each_in_its_own(stage):
    """One is in its last epoch, the other in its first; only one of them is validated each time."""
    trials = trials_of(stage, 1, 2, trainer__validate_every=3, trainer__epochs=3)
    trials[1].state.epoch = 1
    train(stage, trials)
    rows = [(e[1], e[2], e[3].get("val_loss")) for e in stage.of("epoch")]
    assert rows == [(1, 1, None), (2, 2, None), (1, 2, None), (2, 3, 32.25), (1, 3, 31.25)]
    assert stage.of("left") == [("left", 2, "completed"), ("left", 1, "completed")]
    assert [e[1] for e in stage.of("write_results")] == [2, 1]
    assert [e[1] for e in stage.of("train")] == [2] * 8 + [1] * 4
    assert stage.made == 2
    assert trials[1].record.cost["pack_size"] == 2
    assert trials[0].record.cost["pack_size"] == 1


def test_results_are_each_trials_own(stage):
    stage.correct = lambda seed, epoch: 3 * seed
    trials = trials_of(stage, 1, 2, 3)
    train(stage, trials)
    for seed, event in zip((1, 2, 3), stage.of("write_results"), strict=True):
        _, of, columns, tensors, card = event
        assert of == seed
        assert columns.keys() == {"val", "test", "official_val"}
        for split in columns.values():
            assert split["predicted"].sum() == 10 - 3 * seed
            assert split["true_probability"][0] == seed / 10
        assert tensors == {"w": torch.tensor([float(seed)])}
        assert card["trial_id"] == trials[seed - 1].name
        assert trials[seed - 1].record.metrics["test_accuracy"] == 3 * seed / 10
        assert trials[seed - 1].record.metrics["test_loss"] == 20 + seed + 0.5


def test_checkpoints_at_the_ends_of_epochs_where_due_and_after_the_last(stage):
    stage.save_after_epochs = False
    train(stage, trials_of(stage, 1, trainer__epochs=3))
    assert [e[2:4] for e in stage.of("save")] == [(3, 0)]


@pytest.mark.parametrize(
    ("every", "steps"), [(1.0, [1, 2, 3]), (2.0, [1, 2, 3]), (2.5, [2]), (4.0, [2]), (6.0, [3]), (8.0, [])]
)
def test_checkpoints_every_so_many_seconds_but_not_at_the_last_step(every, steps, stage):
    """They hold the time that was trained until then, though no row was due."""
    train(stage, trials_of(stage, 1, 2, trainer__epochs=1, trainer__log_every=9, trainer__checkpoint_every=every))
    saved = [e[1:6] for e in stage.of("save")]
    sums = {i: sum(n / 100 for n in range(1, i + 1)) for i in (1, 2, 3)}
    expected = [(s, 0, i, i * 2 / 2, pytest.approx(i * s + sums[i])) for i in steps for s in (1, 2)]
    assert saved == [*expected, (1, 1, 0, 4.0, 0.0), (2, 1, 0, 4.0, 0.0)]


def test_signs_of_life_of_all_that_write(stage, monkeypatch):
    """Given all the time that training lasts, by trials with files."""
    taken: list[tuple] = []

    @contextlib.contextmanager
    def repeating(action, every):
        taken.append((every, len(stage.events)))
        action()
        yield
        taken.append((every, len(stage.events)))

    monkeypatch.setattr(loop, "repeating", repeating)
    trials = trials_of(stage, 1, 2, 3)
    trials[1].files = None
    train(stage, trials)
    assert stage.of("beat") == [("beat", 1), ("beat", 3)]
    assert taken == [(HEARTBEAT_EVERY, 3), (30.0, len(stage.events))]


def test_ranks_that_write_nothing_train_all_the_same(stage):
    (trial,) = trials_of(stage, 1)
    trial.files = None
    train(stage, [trial])
    assert {e[0] for e in stage.events} == {"started", "train", "advance", "step", "predict", "epoch", "left"}
    assert trial.record.status == "completed"
    assert trial.record.metrics["test_loss"] == 21.5


def test_a_trial_whose_epochs_are_all_trained_only_leaves_its_results(stage):
    """As after a stop between the last epoch's checkpoint and the end."""
    trials = trials_of(stage, 1)
    state = trials[0].state
    state.epoch, state.seconds, state.last = 2, 5.0, {"epoch": 2, "step": 8, "val_accuracy": 0.5}
    train(stage, trials)
    kinds = ["record", "started", *["predict"] * 3, "write_results", "log_hparams", "say", "record", "close", "left"]
    assert [e[0] for e in stage.events] == kinds
    assert trials[0].record.metrics["val_accuracy"] == 0.5
    assert trials[0].record.cost["images_per_second"] == 8 * 8 / 5


def test_an_epoch_whose_steps_are_all_taken_is_finished(stage):
    """As after a stop between an epoch's last step and its validation."""
    trials = trials_of(stage, 1)
    trials[0].state.step_in_epoch, trials[0].state.loss_sum = STEPS, 8.0
    train(stage, trials)
    assert stage.of("log_epoch")[0][1:4] == (1, STEPS, 1)
    assert stage.of("epoch")[0][3]["train_loss"] == 2.0
    assert len(stage.of("train")) == STEPS


# --- trials that go bad


@pytest.mark.parametrize(("clip", "remedy"), [(None, "optimizer.lr or optimizer.clip_norm=1"), (0.5, "optimizer.lr")])
def test_a_bad_trial_fails_at_the_next_row_and_the_others_go_on(clip, remedy, stage):
    """Its step is counted from 1; it leaves no row at the step at which it is found."""
    stage.after[1] = spoilt(1, 0)
    trials = trials_of(stage, 1, 2, 3, optimizer__clip_norm=clip, optimizer__lr=0.25)
    train(stage, trials)
    assert [t.record.status for t in trials] == ["completed", "failed", "completed"]
    message = f"the loss or its gradient is not finite at step 1 (optimizer.lr=0.25): try a smaller {remedy}"
    assert trials[1].record.error == {"message": message, "step": 1, "traceback": None}
    assert [e[1] for e in stage.of("train")] == [3] * 3 + [2] * 5
    assert [e[1:3] for e in stage.of("log_step")] == [(s, i) for i in (3, 4, 7, 8) for s in (1, 3)]
    assert [len(e[1]) for e in stage.of("step")] == [3, 2, 2, 2]
    assert [e[1:] for e in stage.of("left")] == [(2, "failed"), (1, "completed"), (3, "completed")]
    assert [e[1] for e in stage.of("write_results")] == [1, 3]
    assert stage.of("close")[0] == ("close", 2)
    assert stage.of("say")[0] == ("say", 2, message)
    assert trials[1].state.seconds == 2.0  # a third of three steps
    assert trials[0].state.seconds == 2.0 + 5


def test_parameters_are_looked_at_after_an_epochs_last_step_only(stage):
    stage.infinite = {2}
    trials = trials_of(stage, 1, 2, trainer__log_every=1)
    train(stage, trials)
    assert stage.looked == 2
    assert [t.record.status for t in trials] == ["completed", "failed"]
    assert trials[1].record.error["step"] == STEPS
    assert trials[1].record.error["message"].startswith("a parameter is not finite at step 4 (optimizer.lr=0.001): try")
    assert stage.of("left")[0] == ("left", 2, "failed")
    assert [e[1:3] for e in stage.of("epoch")] == [(1, 1), (1, 2)], "the others' epoch is finished"


def test_a_bad_step_before_a_last_update_that_overflows_is_the_one_to_blame(stage):
    stage.after[2], stage.infinite = spoilt(0, 1), {1}
    (trial,) = trials_of(stage, 1, trainer__log_every=9)
    train(stage, [trial])
    assert trial.record.error["step"] == 2
    assert trial.record.error["message"].startswith("the loss")
    assert stage.of("epoch", "save") == []
    assert len(stage.of("train")) == STEPS


def test_no_checkpoint_of_a_bad_trial(stage):
    """Neither one that is due by the clock, while the others are saved, nor one at a stop."""
    for bad in (0, 1):
        stage.events.clear()
        stage.after = {bad + 1: spoilt(0, bad)}
        trials = trials_of(stage, 1, 2, trainer__log_every=9, trainer__epochs=1, trainer__checkpoint_every=2.0)
        train(stage, trials)
        assert [(e[1], e[3]) for e in stage.of("save")] == [(1, 1), (2, 1), (2, 2), (2, 3), (2, 0)][1 - bad :]


def test_a_stop_between_a_bad_step_and_the_next_row_tells_the_failure(stage):
    stop = StopRequest()
    stage.after = {1: spoilt(0, 0), 2: asked(stop)}
    trials = trials_of(stage, 1, 2, trainer__log_every=9)
    with pytest.raises(Interrupted):
        train(stage, trials, stop)
    assert [t.record.status for t in trials] == ["failed", "interrupted"]
    assert [e[1:4] for e in stage.of("save")] == [(2, 0, 2)]
    assert [e[1] for e in stage.of("close")] == [1, 2]


# --- asked to stop


def test_a_stop_is_saved_after_its_step(stage):
    stop = StopRequest()
    stage.after[6] = asked(stop)
    trials = trials_of(stage, 1, 2, trainer__log_every=9)
    with pytest.raises(Interrupted) as caught:
        train(stage, trials, stop)
    assert caught.value.signum == signal.SIGHUP
    loss = {1: 2.11, 2: 4.11}
    assert [e[1:6] for e in stage.of("save")[-2:]] == [(s, 1, 2, 6.0, pytest.approx(loss[s])) for s in (1, 2)]
    assert stage.of("save")[-1][6] == {"w": torch.tensor(6)}
    assert [t.record.status for t in trials] == ["interrupted"] * 2
    assert [e[1:] for e in stage.of("say")] == [(1, "interrupted"), (2, "interrupted")]
    assert len(stage.of("train")) == 6
    assert [e[2] for e in stage.of("log_step")] == [4, 4], "no row that an unstopped run would not have"
    assert stage.of("left") == []


def test_the_request_rides_on_the_next_step(stage):
    """Where several processes train, all learn of it by the step's sum."""
    setup = SimpleNamespace(**vars(SETUP) | {"process": Process(0, 2, 0)})
    stop = StopRequest()
    stage.after = {1: asked(stop), 3: lambda pack: pack.flat.stop.fill_(1.0)}
    with pytest.raises(Interrupted):
        train(stage, trials_of(stage, 1, trainer__log_every=9), stop, setup)
    assert [e[2] for e in stage.of("train")] == [False, True, True]


def test_another_processs_request_ends_this_one_too(stage):
    """It knows no signal of its own: SIGTERM stands for it."""
    setup = SimpleNamespace(**vars(SETUP) | {"process": Process(1, 2, 0)})
    stage.after[2] = lambda pack: pack.flat.stop.fill_(1.0)
    with pytest.raises(Interrupted) as caught:
        train(stage, trials_of(stage, 1), setup=setup)
    assert caught.value.signum == signal.SIGTERM


@pytest.mark.parametrize(("asked_at", "steps", "saved"), [(1, 3, [(0, 3)]), (4, 4, [(1, 0), (1, 0)])])
def test_gpus_look_at_the_sum_when_they_log(asked_at, steps, saved, stage, monkeypatch):
    monkeypatch.setattr(loop, "peak_memory", lambda device: 0)
    setup = SimpleNamespace(**vars(SETUP) | {"process": Process(0, 2, 0), "device": torch.device("cuda")})
    stage.after[asked_at] = lambda pack: pack.flat.stop.fill_(1.0)
    with pytest.raises(Interrupted):
        train(stage, trials_of(stage, 1), setup=setup)
    assert len(stage.of("train")) == steps
    assert [e[2:4] for e in stage.of("save")] == saved


def test_a_stop_at_an_epochs_last_step_finishes_the_epoch(stage):
    stop = StopRequest()
    stage.after[4] = asked(stop)
    trials = trials_of(stage, 1)
    with pytest.raises(Interrupted):
        train(stage, trials, stop)
    assert [e[1:4] for e in stage.of("log_epoch")] == [(1, 4, 1)]
    assert stage.of("save")[-1][2:4] == (1, 0)
    assert trials[0].record.status == "interrupted"
    assert len(stage.of("train")) == 4


def test_a_stop_at_the_very_last_step_completes(stage):
    stop = StopRequest()
    stage.after[8] = asked(stop)
    trials = trials_of(stage, 1)
    train(stage, trials, stop)
    assert trials[0].record.status == "completed"


def test_a_stop_when_one_trial_leaves_saves_those_that_stay(stage):
    stop = StopRequest()

    def both(pack):
        asked(stop)(pack)
        spoilt(1, 2)(pack)

    stage.after[3] = both
    trials = trials_of(stage, 1, 2, 3)
    with pytest.raises(Interrupted):
        train(stage, trials, stop)
    assert [t.record.status for t in trials] == ["interrupted", "failed", "interrupted"]
    assert [e[1:4] for e in stage.of("save")] == [(1, 0, 3), (3, 0, 3)]
    assert len(stage.of("train")) == 3


def test_a_stop_of_a_pack_that_was_just_made(stage):
    """Asked for while the next pack is made: its trials are saved by it, before another step."""
    stop = StopRequest()
    stage.after[3] = spoilt(0, 1)
    stage.making = lambda made: asked(stop)(None) if made == 2 else None
    trials = trials_of(stage, 1, 2)
    with pytest.raises(Interrupted) as caught:
        train(stage, trials, stop)
    assert caught.value.signum == signal.SIGHUP
    assert [e[1:4] for e in stage.of("save")] == [(2, 0, 3)]
    assert [t.record.status for t in trials] == ["failed", "interrupted"]


def raised(error: type[BaseException]) -> Callable[[object], None]:
    def throw(_: object) -> None:
        raise error

    return throw


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("updating", [False, True])
def test_what_a_foreign_handler_raises_saves_what_is_whole(error, updating, stage):
    def both(pack):
        pack.step_state.updating = updating
        raised(error)(pack)

    stage.after[2] = both
    trials = trials_of(stage, 1, 2)
    with pytest.raises(error):
        train(stage, trials)
    assert [t.record.status for t in trials] == ["interrupted"] * 2
    assert [e[1:4] for e in stage.of("save")] == ([] if updating else [(1, 0, 2), (2, 0, 2)])


def test_what_is_raised_between_two_packs_saves_those_that_stay(stage):
    stage.after[3] = spoilt(1, 1)
    stage.making = lambda made: raised(SystemExit)(None) if made == 2 else None
    trials = trials_of(stage, 1, 2, 3)
    with pytest.raises(SystemExit):
        train(stage, trials)
    assert [t.record.status for t in trials] == ["interrupted", "failed", "interrupted"]
    assert [e[1:4] for e in stage.of("save")] == [(1, 0, 3), (3, 0, 3)]


def test_an_error_is_left_to_who_called(stage):
    """Nothing is saved or recorded: a sweep tries again with fewer, a single run records the failure."""
    stage.after[2] = raised(RuntimeError)
    trials = trials_of(stage, 1)
    with pytest.raises(RuntimeError):
        train(stage, trials)
    assert trials[0].record.status == "running"
    assert stage.of("save", "close") == []


@pytest.mark.parametrize(
    ("world_size", "device", "logging", "signum", "summed", "stops"),
    [
        (1, "cpu", True, 0, 1.0, False),
        (1, "cpu", False, 15, 0.0, True),
        (1, "cuda", False, 15, 0.0, True),
        (2, "cpu", False, 15, 0.0, False),
        (2, "cpu", False, 0, 1.0, True),
        (2, "cpu", True, 0, 2.0, True),
        (2, "cuda", True, 0, 1.0, True),
        (2, "cuda", True, 15, 0.0, False),
        (2, "cuda", False, 15, 1.0, False),
    ],
)
def test_all_processes_answer_alike(world_size, device, logging, signum, summed, stops):
    """Several decide by the sum, which a GPU reads at logging steps only."""
    setup = SimpleNamespace(process=Process(0, world_size, 0), device=torch.device(device))
    pack = SimpleNamespace(setup=setup, flat=SimpleNamespace(stop=torch.tensor([summed])))
    stop = StopRequest()
    stop.signum = signum
    assert stop_requested(pack, stop, logging) is stops


# --- what is told of a trial


def test_peak_memory_is_the_devices_or_the_processs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device.index == 1 else 0)
    monkeypatch.setattr(
        loop,
        "resource",
        SimpleNamespace(
            RUSAGE_SELF=resource.RUSAGE_SELF, getrusage=lambda who: SimpleNamespace(ru_maxrss=3 + 100 * abs(who))
        ),
    )
    assert peak_memory(torch.device("cuda", 1)) == 7
    assert peak_memory(torch.device("cpu")) == 3 * 1024


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [({}, 8.0), ({"lora.scaling": "rslora"}, 16.0), (BASELINE | {"lora.method": "none"}, None)],
)
def test_the_adapters_card(changes, scaling):
    (trial,) = new_trials([plain_trial(changes)])
    card = adapter_card(SETUP, trial)
    assert card == {
        "schema": trial.record.schema,
        "trial_id": trial.name,
        "base": {"name": "W", "sha256": "S"},
        "model": trial.record.config["model"],
        "lora": trial.record.config["lora"],
        "effective_scaling": scaling,
        "decoded_size": 16,
        "class_names": ["a", "b"],
    }
    assert card["base"] is not SETUP.base_weights
    data = SimpleNamespace(images=np.zeros((2, 3, 16, 24)), class_names=())
    assert adapter_card(SimpleNamespace(base_weights={}, data=data), trial)["decoded_size"] is None
