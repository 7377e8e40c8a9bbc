"""What of a trial is logged, validated, saved and reported, when and of whom."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import train_together
from packs import new_trials
from plain_trials import plain_trial
from safetensors import safe_open
from stage import STEPS, setup_of

from lora_vit.metrics import Predictions, figures
from lora_vit.records import PREDICTIONS, read_record
from lora_vit.training import loop
from lora_vit.training.loop import computing, peak_memory
from lora_vit.training.pack import Pack

END = ["write_results", "write_record", "say", "close", "left"]


def test_the_order_of_a_run(stage):
    """A trial of two epochs, written out: rows and records before the checkpoint that counts them."""
    stage.train(stage.trials(7))
    step = ["train", "advance"]
    rows = ["predict", "log_epoch", "say", "write_record", "save", "epoch"]
    epoch = [*step * 3, "log_step", "step", *step, "log_step", "step", *rows]
    assert [e[0] for e in stage.events] == ["write_record", "started", *epoch, *epoch, "predict", "predict", *END]
    assert stage.of("started", "left") == [([7],), (7, "completed")]
    assert [e[0] for e in stage.of("advance")] == [1, 2, 3, 4] * 2
    assert [e[1:3] for e in stage.of("log_step")] == [(3, 0), (4, 0), (7, 1), (8, 1)]
    assert [e[:3] for e in stage.of("log_epoch")] == [(7, 4, 1), (7, 8, 2)]
    assert [e[3] for e in stage.of("log_epoch")] == [e[2] for e in stage.of("epoch")]
    assert [e[1:3] for e in stage.of("save")] == [(1, 0), (2, 0)]
    assert [e[0] for e in stage.of("predict")] == ["val", "val", "val", "test"]


def test_the_figures_of_logging_steps(stage):
    """Every third step of an epoch and its last; the rate is that of the steps since the last row, of all trials."""
    stage.train(stage.trials(1, 2, trainer__epochs=1))
    losses, rates = [e[2] for e in stage.of("train")], [1e-3 * (1 - i / STEPS) for i in range(STEPS)]
    speed = 8 * 2 / 2
    assert stage.of("log_step") == [
        (seed, step, 0, losses[step - 1][seed - 1], pytest.approx(rates[step - 1]), speed)
        for step in (3, 4)
        for seed in (1, 2)
    ]
    assert stage.of("step") == [(losses[i - 1], pytest.approx([rates[i - 1]] * 2), speed) for i in (3, 4)]


def test_the_rate_is_measured_since_the_last_row_and_from_where_an_epoch_resumes(stage):
    trials = stage.trials(1, trainer__epochs=1)
    trials[0].state.step_in_epoch = 1
    stage.after[2] = lambda pack: setattr(stage, "now", stage.now + 4)  # a slow step
    stage.train(trials)
    assert [e[-1] for e in stage.of("log_step")] == [8 * 2 / 8, 8 / 2]


def test_no_time_at_all_divides_by_nothing(stage):
    stage.after = {i: lambda pack: setattr(stage, "now", 0.0) for i in (1, 2, 3, 4)}
    (trial,) = stage.trials(1, trainer__epochs=1)
    stage.train([trial])
    assert [e[-1] for e in stage.of("log_step")] == [pytest.approx(8 * 3 / 1e-9), pytest.approx(8 / 1e-9)]
    assert (trial.record.cost["seconds"], trial.record.cost["images_per_second"]) == (0, None)


def test_seconds_of_training_are_shared_and_evaluations_are_not_counted(stage, monkeypatch):
    monkeypatch.setattr(loop, "peak_memory", lambda device: 5)
    stage.row_takes = 0.5  # writing rows is part of training, also at the last step
    trials = stage.trials(1, 2)
    stage.train(trials)
    seconds = (2 * 2 * STEPS + 2 * 2 * 0.5) / 2
    for trial in trials:
        assert trial.state.seconds == seconds
        figures = {"images_per_second": 8 * 2 * STEPS / seconds, "peak_memory_bytes": 5, "pack_size": 2}
        assert trial.record.cost.items() >= {"seconds": seconds, **figures}.items()
    assert [e[-1] for e in stage.of("step")][:2] == [8 * 2 * 3 / 6, 8 * 2 / 2.5]


def test_records_follow_the_epochs(stage):
    """The first says how many parameters and trials there are; figures are those of the rows and of the predictions."""
    trials = stage.trials(1, 2, lora__rank=2)
    stage.train(trials)
    assert [e[:4] for e in stage.of("write_record")][:2] == [(s, "running", {}, {"pack_size": 2}) for s in (1, 2)]
    for k, seed in enumerate((1, 2)):
        first, *epochs, end = [e[2] for e in stage.of("write_record") if e[0] == seed]
        rows = [e[2] for e in stage.of("epoch") if e[0] == seed]
        assert (first, epochs) == ({}, [{"epoch": i, "step": STEPS * i, **row} for i, row in enumerate(rows, 1)])
        losses = [e[2][k] for e in stage.of("train")]
        assert [r["train_loss"] for r in rows] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])
        found = np.load(stage.folder / str(seed) / PREDICTIONS)
        for name, said in (("val", epochs[-1]), ("test", end)):
            right = found[f"{name}.predicted"] == found[f"{name}.labels"]
            assert said[f"{name}_accuracy"] == right.mean()
            loss = -np.log(found[f"{name}.true_probability"]).mean()
            assert said[f"{name}_loss"] == pytest.approx(loss, rel=1e-6)
            arrays = {key.partition(".")[2]: value for key, value in found.items() if key.startswith(name)}
            every = figures(name, Predictions(**arrays, loss=said[f"{name}_loss"]))
            assert {key: value for key, value in said.items() if key.startswith(name)} == every
        assert end == epochs[-1] | {key: value for key, value in end.items() if key.startswith("test_")}
        assert read_record(stage.folder / str(seed)).metrics == end
        assert trials[k].record.parameters["adapter"] == 2 * 2 * (4 * (32 + 32) + 2 * (32 + 48))
        with safe_open(stage.folder / str(seed) / "adapter.safetensors", "pt") as file:
            assert set(file.keys()) == set(trials[k].state.values)
            assert all(torch.equal(file.get_tensor(n), t) for n, t in trials[k].state.values.items())
    assert trials[0].record.metrics["test_loss"] != trials[1].record.metrics["test_loss"]


@pytest.mark.parametrize(("correct", "best"), [([1, 5, 5, 3], (2, 5)), ([0, 0, 0, 0], (1, 0))])
def test_the_best_epoch_is_the_first_of_the_highest_accuracy(correct, best, stage, monkeypatch):
    predict = Pack.predict

    def predicted(pack, split):
        p = predict(pack, split)[0]
        right = np.arange(len(p.labels)) < correct[pack.step_of(pack.trials[0]) // STEPS - 1]
        return [dataclasses.replace(p, predicted=np.where(right, p.labels, (p.labels + 1) % 4))]

    monkeypatch.setattr(Pack, "predict", predicted)
    (trial,) = stage.trials(1, trainer__epochs=4)
    stage.train([trial])
    images = len(setup_of().data.splits["val"])
    assert trial.record.best == trial.state.best == {"epoch": best[0], "val_accuracy": best[1] / images}
    assert trial.record.metrics["val_accuracy"] == correct[-1] / images


def test_the_best_epoch_is_that_of_trainer_metric(stage, monkeypatch):
    """At first three of the four classes are all right, then two images of each."""
    predict = Pack.predict

    def predicted(pack, split):
        p = predict(pack, split)[0]
        place = np.array([(p.labels[:i] == label).sum() for i, label in enumerate(p.labels)])
        right = p.labels > 0 if pack.step_of(pack.trials[0]) == STEPS else place < 2
        return [dataclasses.replace(p, predicted=np.where(right, p.labels, (p.labels + 1) % 4))]

    monkeypatch.setattr(Pack, "predict", predicted)
    for metric, best in (("accuracy", 0.75), ("worst_class_recall", 0.4)):
        (trial,) = stage.trials(1, trainer__metric=metric, trainer__resume="restart")
        stage.train([trial])
        assert trial.record.best == {"epoch": 1 if metric == "accuracy" else 2, f"val_{metric}": best}
        (stage.folder / "1" / "record.json").unlink()


@pytest.mark.parametrize(
    ("every", "epochs", "validated"),
    [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (2, 4, [2, 4]), (3, 5, [3, 5]), (9, 2, [2])],
)
def test_validation_every_so_many_epochs_and_after_the_last(every, epochs, validated, stage):
    stage.train(stage.trials(1, trainer__epochs=epochs, trainer__validate_every=every))
    for figure in ("val_loss", "val_accuracy"):
        assert [e[1] for e in stage.of("epoch") if figure in e[2]] == validated
    assert stage.of("predict").count(("val",)) == len(validated) + 1


def test_trials_in_different_epochs_are_validated_and_leave_each_in_its_own(stage):
    """One is in its last epoch, the other in its first; only one of them is validated each time."""
    trials = stage.trials(1, 2, trainer__validate_every=3, trainer__epochs=3)
    trials[1].state.epoch = 1
    stage.train(trials)
    rows = [(e[0], e[1], "val_loss" in e[2]) for e in stage.of("epoch")]
    assert rows == [(1, 1, False), (2, 2, False), (1, 2, False), (2, 3, True), (1, 3, True)]
    assert stage.of("left") == [(2, "completed"), (1, "completed")]
    assert [e[0] for e in stage.of("train")] == [2] * 8 + [1] * 4
    assert [t.record.cost["pack_size"] for t in trials] == [1, 2]


def test_checkpoints_at_the_ends_of_epochs_where_due_and_after_the_last(stage, monkeypatch):
    monkeypatch.setattr("lora_vit.training.trial.EPOCH_CHECKPOINT_EVERY", 1000.0)
    stage.train(stage.trials(1, trainer__epochs=3))
    assert [e[1:3] for e in stage.of("save")] == [(1, 0), (3, 0)], "the first is always due"


@pytest.mark.parametrize(("every", "steps"), [(1.0, [1, 2, 3]), (2.0, [2]), (3.9, [2]), (4.0, [3]), (6.0, [])])
def test_checkpoints_every_so_many_seconds_but_not_at_the_last_step(every, steps, stage):
    """They hold the time that was trained until then, though no row was due."""
    stage.train(stage.trials(1, 2, trainer__epochs=1, trainer__log_every=9, trainer__checkpoint_every=every))
    losses = [e[2] for e in stage.of("train")]
    expected = [
        (seed, 0, i, i * 2 / 2, pytest.approx(sum(row[k] for row in losses[:i])))
        for i in steps
        for k, seed in enumerate((1, 2))
    ]
    assert stage.of("save") == [*expected, (1, 1, 0, 4.0, 0.0), (2, 1, 0, 4.0, 0.0)]


def test_a_sign_of_life_is_the_records_time_while_its_trial_runs(stage, monkeypatch):
    """A slow step does not look dead; no record is rewritten, and one that has ended is let alone."""
    path, seen = stage.folder / "1/record.json", []

    def look(action) -> None:
        text = path.read_text()
        os.utime(path, (1.0, 1.0))
        action()
        assert path.read_text() == text
        seen.append(path.stat().st_mtime > 1.0)

    @contextlib.contextmanager
    def repeating(action, every):
        assert every == 30.0
        stage.after[2] = lambda _: look(action)
        yield
        look(action)

    monkeypatch.setattr(loop, "repeating", repeating)
    stage.train([*stage.trials(1), *new_trials([plain_trial({"data.train_per_class": 8, "seed": 2})])])
    assert seen == [True, False]


def test_ranks_that_write_nothing_train_all_the_same(stage):
    (trial,) = new_trials([plain_trial({"data.train_per_class": 8})])
    stage.train([trial])
    assert {e[0] for e in stage.events} == {"started", "train", "advance", "step", "predict", "epoch", "left"}
    assert trial.record.status == "completed"
    assert trial.record.metrics["test_loss"] > 0


def test_a_trial_whose_epochs_are_all_trained_only_leaves_its_results(stage):
    """As after a stop between the last epoch and the end."""
    trials = stage.trials(1)
    trials[0].state.epoch, trials[0].record.metrics = 2, {"epoch": 2, "step": 8, "val_accuracy": 0.5}
    stage.train(trials)
    assert [e[0] for e in stage.events] == ["write_record", "started", "predict", "predict", *END]
    assert trials[0].record.metrics["val_accuracy"] == 0.5


def test_an_epoch_whose_steps_are_all_taken_is_finished(stage):
    """As after a stop between an epoch's last step and its validation."""
    trials = stage.trials(1)
    trials[0].state.step_in_epoch, trials[0].state.loss_sum = STEPS, 8.0
    stage.train(trials)
    assert stage.of("log_epoch")[0][:3] == (1, STEPS, 1)
    assert stage.of("epoch")[0][2]["train_loss"] == 2.0
    assert len(stage.of("train")) == STEPS


def test_peak_memory_is_counted_from_the_packs_start(tmp_path):
    """Not what the process held before."""
    before = bytearray(300 << 20)
    held = peak_memory(torch.device("cpu"))
    before.clear()
    (first,) = train_together([plain_trial()], tmp_path)
    assert first.trial.record.cost["peak_memory_bytes"] < held - (200 << 20)


def test_peak_memory_is_that_of_the_largest_part(stage, monkeypatch):
    """As of a trial that has resumed."""
    peaks = [5, 3]  # of each epoch
    monkeypatch.setattr(loop, "peak_memory", lambda device: peaks.pop(0))
    (trial,) = trials = stage.trials(7)
    stage.train(trials)
    assert trial.record.cost["peak_memory_bytes"] == 5


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_the_devices_or_the_processs(platform, unit, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device.index == 1 else 0)
    usage = {resource.RUSAGE_SELF: SimpleNamespace(ru_maxrss=3)}
    monkeypatch.setattr(resource, "getrusage", usage.__getitem__)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "read_text", lambda path: "Name: x")  # a system that does not say
    assert peak_memory(torch.device("cuda", 1)) == 7
    assert peak_memory(torch.device("cpu")) == 3 * unit


def told() -> tuple[object, ...]:
    """How torch is to compute on a GPU."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    precisions = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    return *precisions, torch.get_deterministic_debug_mode(), fill


@pytest.mark.parametrize("users", [("highest", "default"), ("high", "warn"), ("medium", "error")])
def test_a_gpu_computes_fp32_exactly_and_alike_each_time_and_then_as_before(users, monkeypatch):
    """Products and convolutions; whatever was set before, also after an error; the CPU's numbers are left alone."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    gpu, exact = torch.device("cuda"), ("ieee", "ieee")
    untouched = torch.get_float32_matmul_precision(), torch.get_deterministic_debug_mode()
    try:
        torch.set_float32_matmul_precision(users[0])
        torch.set_deterministic_debug_mode(users[1])
        before = told()
        with computing(torch.device("cpu"), True):
            assert told() == before
        with computing(gpu, False):
            assert told() == (*exact, *before[2:])
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        with contextlib.suppress(KeyError), computing(gpu, True):
            assert told() == (*exact, 2, False)
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            raise KeyError
        assert told() == before
        assert torch.get_float32_matmul_precision() == users[0]
    finally:
        torch.set_float32_matmul_precision(untouched[0])
        torch.set_deterministic_debug_mode(untouched[1])


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_step_and_evaluation_is_computed_so(deterministic, stage, monkeypatch):
    within: list[tuple[object, ...]] = []

    @contextlib.contextmanager
    def watched(*given):
        within.append(given)
        yield
        assert within.pop() == given

    seen = set()
    monkeypatch.setattr(loop, "computing", watched)
    monkeypatch.setattr(stage, "note", lambda what, *_: seen.add((what, *within)))
    stage.train(stage.trials(1, trainer__deterministic=deterministic))
    how = (torch.device("cpu"), deterministic)
    assert {call for call in seen if call[0] in ("train", "predict")} == {("train", how), ("predict", how)}
