"""What of a trial is logged, validated, saved and told, when and of whom, on a pack that trains nothing."""

from __future__ import annotations

import contextlib
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packs import new_trials
from paper import SETUP, STEPS, train, trials_of
from plain_trials import BASELINE, plain_trial

from lora_vit.training import loop
from lora_vit.training.loop import adapter_card, peak_memory
from lora_vit.training.trackers import HEARTBEAT_EVERY


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
        "base": {"weights": "W", "sha256": "S"},
        "data": trial.record.data,
        "lora": trial.record.config["lora"],
        "effective_scaling": scaling,
        "decoded_size": 16,
        "value_range": (0, 4095),
        "class_names": ["a", "b"],
    }
    assert card["base"] is not SETUP.base
    data = SimpleNamespace(images=np.zeros((2, 3, 16, 24)), class_names=(), value_range=None)
    assert adapter_card(SimpleNamespace(base={}, data=data), trial)["decoded_size"] is None
