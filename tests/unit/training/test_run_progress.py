"""What the user sees of a single run, line by line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from packs import new_trials
from plain_trials import BASELINE, plain_trial

from lora_vit import terminal
from lora_vit.training.loop import RunReporter


def pack_of(changes=None, epoch=0):
    (trial,) = new_trials([plain_trial({"trainer.epochs": 5} | (changes or {}))])
    trial.record.parameters = {"adapter": 12000, "head": 500, "trainable": 12500, "total": 1_000_000}
    trial.state.epoch = epoch
    setup = SimpleNamespace(
        data=SimpleNamespace(line=lambda size, metric: f"data: at [{size}] px, {metric}"),
        transform=SimpleNamespace(image_size=16),
        environment={"device": "cpu", "precision": "fp64", "world_size": 2},
    )
    return SimpleNamespace(trials=[trial], steps_per_epoch=7, step_of=lambda t: 7 * t.state.epoch + 2, setup=setup)


def test_a_run_line_by_line(hands, capsys, monkeypatch):
    pack = pack_of(epoch=1)
    reporter = RunReporter()
    assert reporter._progress.console.quiet, "no bar before there is a pack"
    reporter.close()  # as where the first pack cannot be made
    assert capsys.readouterr().out == ""
    reporter.started(pack)
    assert reporter.console is reporter._progress.console, "lines go above the bar"
    assert capsys.readouterr().out.splitlines() == [
        "data: at [16] px, accuracy",
        f"trial {pack.trials[0].name} on cpu, fp64, 2 process(es)",
        "       12,000    1.200%  adapter parameters",
        "          500    0.050%  head parameters",
        "       12,500    1.250%  trainable parameters",
        "    1,000,000  100.000%  total parameters",
        "LoRA rank 4, alpha 32: effective scaling 8",
    ]
    hands.now = 110.5
    reporter.advance(pack)
    assert capsys.readouterr().out == "training: 10/35 steps  0.095 steps/s\n"
    reporter.step(pack, [0.123456, 9.0], [0.00123456, 9.0], 1234.56)
    hands.now = 131.0  # 20.5 s after the first step, which includes the start
    for _ in range(2):
        reporter.advance(pack)
    figures = "loss 0.1235  lr 1.23e-03  1,235 images/s"
    assert capsys.readouterr().out == f"training: 11/35 steps  {figures}  about 492 s left\n"
    reporter.epoch(pack.trials[0], {"train_loss": 1.0, "val_loss": 0.5, "val_accuracy": 0.75})
    line = "epoch 1/5  train loss 1.0000  val loss 0.5000  val accuracy 75.00%\n"
    assert capsys.readouterr().out == line
    reporter.left(pack.trials[0])
    monkeypatch.setattr(terminal.Progress, "close", lambda bar: print(f"{bar.what} is over"))
    reporter.close()
    assert capsys.readouterr().out == "training is over\n"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (BASELINE | {"lora.method": "none"}, None),
        ({"lora.scaling": "rslora", "lora.alpha": 2.5}, "LoRA rank 4, alpha 2.5: effective scaling 1.25"),
    ],
)
def test_the_scaling_of_adapters_is_told_where_there_are_any(changes, line, capsys):
    reporter = RunReporter()
    reporter.started(pack_of(changes))
    lines = capsys.readouterr().out.splitlines()
    assert lines[6:] == ([line] if line else [])
