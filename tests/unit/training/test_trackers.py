"""What a trial's files hold, row by row; when a checkpoint is due."""

from __future__ import annotations

import errno
import json
import re
import struct
import time
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from plain_trials import BASELINE, plain_trial
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_vit import api, records
from lora_vit.config import trial_id
from lora_vit.data.preprocessing import Decoding
from lora_vit.errors import ConfigError
from lora_vit.files import read_rows
from lora_vit.lora.adapter import sha256_of, write_tensors
from lora_vit.metrics import Predictions
from lora_vit.records import PREDICTIONS, read_record
from lora_vit.training import trackers
from lora_vit.training import trial as trials
from lora_vit.training.trial import EPOCH_CHECKPOINT_EVERY, TrialRun, TrialState


def trial_in(folder, changes=None, **where) -> TrialRun:
    return TrialRun(plain_trial(changes), folder=folder, **where)


@pytest.fixture
def trial(tmp_path):
    trial = trial_in(tmp_path)
    yield trial
    trial.close()


def clock(monkeypatch, **now: float) -> SimpleNamespace:
    """A clock that stands at what the test sets."""
    hands = SimpleNamespace(**{"time": 1000.0, "monotonic": 0.0} | now)
    fake = SimpleNamespace(time=lambda: hands.time, monotonic=lambda: hands.monotonic, strftime=time.strftime)
    monkeypatch.setattr(trials, "time", fake)
    monkeypatch.setattr(records, "time", fake)
    return hands


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_steps_are_rows_and_curves(tmp_path, monkeypatch):
    """Speed and clock are kept out of the metric rows: these are equal for equal runs."""
    hands, trial = clock(monkeypatch), trial_in(tmp_path, tensorboard=tmp_path / "board")
    assert not (tmp_path / "board").exists()
    for step, epoch, loss, lr, speed in ((1, 0, 2.5, 0.5, 64.0), (8, 1, 1.25, 0.25, 32.0)):
        trial.log_step(step, epoch, loss, lr, speed)
        hands.time += 5
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"kind": "step", "step": 1, "epoch": 0, "loss": 2.5, "lr": 0.5},
        {"kind": "step", "step": 8, "epoch": 1, "loss": 1.25, "lr": 0.25},
    ]
    assert read_rows(tmp_path / "timing.jsonl") == [
        {"step": 1, "time": 1000.0, "images_per_second": 64.0},
        {"step": 8, "time": 1005.0, "images_per_second": 32.0},
    ]
    trial.close()
    assert [p.name.split(".")[0] for p in (tmp_path / "board").iterdir()] == ["events"]
    assert scalars(tmp_path / "board") == {
        "train/loss": [(1, 2.5), (8, 1.25)],
        "train/learning_rate": [(1, 0.5), (8, 0.25)],
        "train/images_per_second": [(1, 64.0), (8, 32.0)],
    }


def test_epochs_are_rows_curves_and_lines(trial, tmp_path):
    trial.log_epoch(7, 1, {"train_loss": 2.00004})
    trial.log_epoch(14, 2, {"train_loss": 1.5, "val_loss": 1.25, "val_accuracy": 0.5})
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"kind": "epoch", "step": 7, "epoch": 1, "train_loss": 2.00004},
        {"kind": "epoch", "step": 14, "epoch": 2, "train_loss": 1.5, "val_loss": 1.25, "val_accuracy": 0.5},
    ]
    # before it is closed: whoever looks on sees each epoch at once
    assert scalars(tmp_path / "tensorboard") == {"val/accuracy": [(14, 0.5)], "val/loss": [(14, 1.25)]}
    first, second = (tmp_path / "train.log").read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  epoch 1  train loss 2\.0000", first)
    assert second.endswith("  epoch 2  train loss 1.5000  val loss 1.2500  val accuracy 50.00%")


def test_epochs_show_the_metric_beside_the_accuracy(tmp_path):
    trial = trial_in(tmp_path, {"trainer.metric": "macro_f1"})
    trial.log_epoch(7, 1, {"train_loss": 1.5, "val_loss": 1.25, "val_accuracy": 0.5, "val_macro_f1": 0.25})
    trial.close()
    assert scalars(tmp_path / "tensorboard") == {"val/macro_f1": [(7, 0.25)], "val/accuracy": [(7, 0.5)],
                                                 "val/loss": [(7, 1.25)]}  # fmt: skip
    assert (tmp_path / "train.log").read_text().endswith("val loss 1.2500  val macro-F1 25.00%  val accuracy 50.00%\n")


def test_curves_of_a_trial_that_resumes_supersede_what_came_after_its_checkpoint(tmp_path):
    """Nothing before it: the epoch that had ended, and the steps up to where it stopped in the next one, stay."""
    first = trial_in(tmp_path)
    for step in range(1, 5):
        first.log_step(step, 0, float(step), 0.5, 64.0)
    first.log_epoch(2, 1, {"train_loss": 1.5, "val_loss": 1.25, "val_accuracy": 0.5})
    first.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.rename(file.with_name("events.out.tfevents.0"))  # two files of one second have names in any order
    state = TrialState(epoch=1, step_in_epoch=1, last={"epoch": 1, "step": 2})
    second = trial_in(tmp_path, state=state)
    second.log_step(4, 1, 40.0, 0.5, 64.0)
    second.close()
    curves = scalars(tmp_path / "tensorboard")
    assert curves["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert curves["val/accuracy"] == [(2, 0.5)]


class Notes:
    """A tracker of one's own, which notes what it hears."""

    heard: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, fails: str = ""):
        self.fails = fails
        self.hear("made")

    def start(self, trial):
        self.hear("start", trial.name, trial.group, trial.step)

    def scalars(self, step, values):
        self.hear("scalars", step, values)

    def finish(self, status):
        self.hear("finish", status)

    def hear(self, method, *given):
        if method == self.fails:
            full = OSError(errno.ENOSPC, "No space left on device")
            raise SystemExit(str(full)) if method == "finish" else full
        self.heard.append((method, *given))


OURS = {"_target_": f"{__name__}.Notes"}


@pytest.fixture
def heard(monkeypatch):
    monkeypatch.setattr(Notes, "heard", [])
    monkeypatch.setattr(trackers, "OFF", {})
    return Notes.heard


@pytest.mark.parametrize(
    ("end", "finished"),
    [
        (TrialRun.complete, "completed"),
        (TrialRun.interrupt, "interrupted"),
        (lambda trial: trial.fail("no good"), "failed"),
        (TrialRun.close, "running"),
    ],
)
def test_a_tracker_hears_of_a_trial_from_its_first_row_to_its_end(end, finished, heard, tmp_path):
    board = tmp_path / f"s/tensorboard/rank=4_lr=0.1_{trial_id(plain_trial())}"
    (tmp_path / "s/t").mkdir(parents=True)
    state = TrialState(epoch=1, step_in_epoch=1, last={"epoch": 1, "step": 2})
    trial = TrialRun(plain_trial({"tracker": {"ours": OURS}}), None, state, tmp_path / "s/t", board)
    assert heard == []
    trial.log_step(4, 1, 2.5, 0.5, 64.0)
    trial.log_epoch(4, 2, {"train_loss": 1.5})  # not validated
    trial.log_epoch(6, 3, {"train_loss": 1.5, "val_loss": 1.25, "val_new": 0.5})
    end(trial)
    trial.close()
    assert heard == [
        ("made",),
        ("start", "rank=4_lr=0.1", "s", 3),
        ("scalars", 4, {"train/loss": 2.5, "train/learning_rate": 0.5, "train/images_per_second": 64.0}),
        ("scalars", 6, {"val/loss": 1.25, "val/new": 0.5}),
        ("finish", finished),
    ]


def test_a_trial_without_rows_has_no_run_unless_it_is_completed(heard, tmp_path):
    """As one that was stopped after its last epoch, and that only its results were missing of."""
    for end in (TrialRun.interrupt, TrialRun.complete):
        end(trial_in(tmp_path, {"tracker": {"ours": OURS}}))
        assert [method for method, *_ in heard] == ["made", "start", "finish"] * (end is TrialRun.complete)


@pytest.mark.parametrize("method", ["made", "start", "scalars", "finish"])
def test_a_tracker_that_fails_is_told_once_and_the_others_and_the_training_go_on(method, heard, tmp_path, capsys):
    """A full disk as well: the trial's own files say so, if they are on it."""
    settings = {"bad": {**OURS, "fails": method}, "good": OURS}
    folders = tmp_path / "1", tmp_path / "2"
    for folder in folders:
        folder.mkdir()
    trials = [trial_in(folder, {"tracker": settings}) for folder in folders]
    for trial in trials:
        for step in (1, 2):
            trial.log_step(step, 0, 2.5, 0.5, 64.0)
        trial.complete()
        assert len(read_rows(trial.folder / "metrics.jsonl")) == 2
        assert re.fullmatch(r"\w+: \[Errno 28\] No space left .*", read_record(trial.folder).untracked.pop("bad"))
    told = 1 if method in ("made", "start") else 2  # what cannot be started is not tried again for each other trial
    assert capsys.readouterr().out.count("the tracker bad has failed") == told
    good = ["made", "start", "scalars", "scalars", "finish"]
    assert sorted(given[0] for given in heard) == sorted([*2 * good, *told * good[: good.index(method)]])


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("mine", {}, ["tracker.mine._target_=null cannot", "module.Class"]),
        ("mine", {"_target_": "Notes"}, ["tracker.mine._target_=Notes cannot", "'Notes'", "module.Class"]),
        ("mine", {"_target_": f"{__name__}.Note"}, ["has no attribute 'Note'", "module.Class"]),
        ("mine", {"_target_": "collections.Counter"}, ["Counter has no finish", "start, scalars and finish"]),
        ("mine", {**OURS, "fail": "start"}, ["tracker.mine={'fail': 'start'}", "'fail'", "tracker.mine.KEY"]),
        ("mlflow", {"_target_": "lora_vit.training.trackers.MLflow"}, ["'uri'", "tracker.mlflow.KEY"]),
        ("wb", {"_target_": "lora_vit.training.trackers.WandB"}, ["needs wandb: pip install 'lora_vit[wandb]'"]),
    ],
)
def test_what_no_tracker_can_be_made_of_is_refused(name, settings, said, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", {"mlflow": "there"}.get)
    with pytest.raises(ConfigError) as error:
        trackers.maker(name, settings)
    assert all(text in str(error.value) for text in said), error.value
    assert "\n" not in str(error.value)


def test_a_tracker_is_looked_at_but_not_made_when_a_trial_is_composed(heard):
    trial = api.compose(["experiment=quickstart", "tracker=[]", f"+tracker.ours._target_={OURS['_target_']}"])
    assert trial.tracker == {"ours": OURS}
    assert heard == []


@pytest.mark.parametrize(("every", "seconds"), [(300.0, EPOCH_CHECKPOINT_EVERY), (5.5, 5.0), (2.0, 2.0)])
def test_a_checkpoint_at_an_epochs_end_is_due_by_the_clock(every, seconds, tmp_path, monkeypatch):
    """The first and last always; then not more often than writing is worth, nor less often than asked for."""
    hands = clock(monkeypatch, monotonic=0.5)
    trial = trial_in(tmp_path, {"trainer.checkpoint_every": every})
    assert trial.epoch_checkpoint_due()
    trial.save()
    for waited, due in ((0.0, False), (seconds - 0.25, False), (seconds, True), (seconds + 0.25, True)):
        hands.monotonic = 0.5 + waited
        assert trial.epoch_checkpoint_due() is due
    hands.monotonic, trial.state.epoch = 0.5, 2
    assert trial.epoch_checkpoint_due()
    trial.close()


INPUTS = {"image_size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "interpolation": "bicubic"}


def some_predictions(count: int) -> Predictions:
    n = np.arange(count)
    p = np.linspace(0, 1, count, dtype=np.float32)
    return Predictions(n, n % 3, n % 2, p, p / 2, p > 0.5, p / 3, loss=1.0)


@pytest.mark.parametrize(
    ("changes", "scaling", "size"),
    [
        ({}, 8.0, 16),
        ({"lora.scaling": "rslora"}, 16.0, None),
        (BASELINE | {"lora.method": "none"}, None, 16),
    ],
)
def test_results_and_the_adapters_card(changes, scaling, size, tmp_path):
    trial = trial_in(tmp_path, changes)
    data = SimpleNamespace(class_names=["a", "b"], decoding=Decoding(size, (0, 4095)), fingerprint="F", root=None)
    setup = SimpleNamespace(base={"weights": "W", "sha256": "S", **INPUTS}, data=data)
    trial.record.data, trial.record.metrics = {"fingerprint": "F"}, {"val_accuracy": 0.5}
    splits, tensors = {"val": some_predictions(5), "test": some_predictions(3)}, {"b": torch.ones(2, 3)}
    trial.write_results(splits, tensors, setup)
    trial.close()
    with np.load(tmp_path / PREDICTIONS) as arrays:
        assert {f"{split}.{name}" for split in splits for name in vars(splits["val"]) if name != "loss"} == {*arrays}
        for name, values in arrays.items():
            split, _, column = name.partition(".")
            np.testing.assert_array_equal(getattr(splits[split], column), values, strict=True)
        no_clock = {member.date_time for member in arrays.zip.infolist()}
    assert no_clock == {(1980, 1, 1, 0, 0, 0)}, "equal predictions give equal bytes"
    assert trial.record.cost == {"adapter_bytes": (tmp_path / "adapter.safetensors").stat().st_size}
    assert json.loads((tmp_path / "adapter.json").read_text()) == {
        "schema": trial.record.schema,
        "trial_id": trial.name,
        "base": {"weights": "W", "sha256": "S", **INPUTS},
        "data": {"fingerprint": "F"},
        "lora": trial.record.config["lora"],
        "effective_scaling": scaling,
        "preprocessing": {
            **INPUTS,
            **{"orientation": "exif", "background": [255, 255, 255], "value_range": [0, 4095]},
            **{"decoded_size": size, "crop": "centre" if size else "squash"},
        },
        "class_names": ["a", "b"],
        "sha256": sha256_of(tensors),
    }


def test_a_file_of_tensors_is_the_same_bytes_whatever_the_order(tmp_path):
    """Names and card sorted, the card in the file's one metadata entry; tensors that are views become whole."""
    table = torch.arange(6.0).view(2, 3)
    write_tensors(tmp_path / "a", {"b": table.t(), "a": table[:, 1]}, {"y": 1, "x": {"d": 2, "c": [3]}})
    write_tensors(tmp_path / "b", {"a": table[:, 1], "b": table.t()}, {"x": {"c": [3], "d": 2}, "y": 1})
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["__metadata__"] == {"lora_vit": '{"x": {"c": [3], "d": 2}, "y": 1}'}
    with safe_open(tmp_path / "a", "pt") as file:
        assert sorted(file.keys()) == ["a", "b"]
        assert torch.equal(file.get_tensor("b"), table.t())
        assert torch.equal(file.get_tensor("a"), table[:, 1])


LORA = {"alpha": 32.0, "dropout": 0.25, "method": "lora", "rank": 4, "seed": 3, "targets": "q v"}
PROBE = {"alpha": 0.0, "dropout": 0.0, "method": "none", "rank": 0, "seed": 0, "targets": ""}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora.dropout": 0.25, "lora.targets": ["q", "v"], "seed": 3}, LORA),
        (BASELINE | {"lora.method": "none", "trainer.metric": "macro_f1"}, PROBE),
    ],
)
def test_tensorboards_hparams(changes, expected, tmp_path, monkeypatch):
    """They lie beside the curves; the view shows five columns by itself, the first of the alphabet."""
    from torch.utils.tensorboard import SummaryWriter

    seen, write = [], SummaryWriter.add_hparams
    monkeypatch.setattr(SummaryWriter, "add_hparams", lambda *a, **how: seen.append(a[1:]) or write(*a, **how))
    trial = trial_in(tmp_path, changes)
    metric = f"val_{trial.config.trainer.metric}"
    trial.record.metrics = {"val_accuracy": 0.75, "test_accuracy": 0.25} | {metric: 0.5}
    trial.complete()
    expected = {**expected, "lr": 1e-3, "weight_decay": 0.03}
    assert seen == [(expected, {f"final/{metric}": 0.5})]
    assert sorted(expected)[:5] == ["alpha", "dropout", "lr", "method", "rank"]
    assert scalars(tmp_path / "tensorboard") == {f"final/{metric}": [(0, 0.5)]}
