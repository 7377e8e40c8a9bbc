"""A sweep's command with a race, a search, or another metric: which trials it comes to ask for, and its verdict."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from made_up_engine import race_trials, run
from plain_trials import SMALL

from lora_vit.compose import expand, initialized
from lora_vit.errors import ConfigError, TrialFailed
from lora_vit.sweep.run import run_sweep
from lora_vit.sweep.trial import Trial


def test_a_race_selects_and_says_so(engine, tmp_path, capsys):
    engine.outcome = lambda trial: {
        "metrics": {"val_accuracy": 0.5 + 0.01 * (trial.config.lora.rank or 0) + 0.001 * (trial.config.seed % 3)},
        "data": {"val": 720},
    }
    race = {"margin": 1.0, "first_seeds": 3, "most_seeds": 4}
    outcomes = run(tmp_path, race_trials(2, 8), **race)
    assert len(outcomes) == 6
    out = capsys.readouterr().out
    assert "a race of 2 cells" in out
    assert "rank 8 selected: " in out
    assert len(run(tmp_path, race_trials(4), **race)) == 9, "cells that are added race against those that are left"
    out = capsys.readouterr().out
    assert "a race of 3 cells (6 completed)" in out
    assert run(tmp_path, race_trials(4), dry_run=True, **race) is None
    assert "a race of 3 cells takes at least 9 trials, at most 12" in capsys.readouterr().out


def test_a_restarted_race_trains_all_of_its_trials_again(engine, tmp_path):
    engine.outcome = lambda trial: {"metrics": {"val_accuracy": 0.5 + 0.1 * ((trial.config.lora.rank or 0) > 4)}}
    race = {"margin": 1.0, "first_seeds": 2, "most_seeds": 2}
    run(tmp_path, race_trials(4))  # no race, and no part of it
    assert len(run(tmp_path, race_trials(2, 8), **race)) == 4
    again = race_trials(2, 8)
    for trial in again:
        trial.config.trainer.resume = "restart"
    run(tmp_path, again, **race)
    assert len(engine.trained) == 1 + 4 + 4


def test_a_search_proposes_to_race_what_it_found(engine, tmp_path, capsys):
    """Over other seeds; the commands ask for what it says."""
    pytest.importorskip("optuna", reason="needs pip install lora_vit[search]")
    lines = [*SMALL, "lora.rank=choice(1,2,4,8)", "optimizer.lr=tag(log,interval(1e-4,1e-2))"]
    engine.outcome = lambda trial: {"metrics": {"val_accuracy": 0.5 + 0.01 * trial.config.lora.rank}}
    with initialized():
        request = expand([*lines, "sweep.trials=8", "sweep.pack_size=4", "sweep.workers=1"], tmp_path)
        found = sorted(run_sweep(request).values(), reverse=True)
        assert (len(found), engine.started) == (8, [1, 1])
        said = capsys.readouterr().out
        assert "8 cells, best first" in said
        proposed = [line for line in said.splitlines() if "lora_vit.train" in line]
        assert len(proposed) == 3
        for value, line in zip(found, proposed, strict=False):
            assert f" {100 * value:.2f} " in said
            flag, *overrides = shlex.split(line.removesuffix(" && \\"))[3:]
            race = expand(overrides)
            (trial,) = race.trials
            assert (flag, race.options.margin, trial.config.seed) == ("-m", 0.5, 1)
            assert str(race.folder) == f"{tmp_path}-best"
            assert 0.5 + 0.01 * (trial.config.lora.rank or 0) == value
        engine.outcome = lambda trial: {"status": "failed", "error": {"message": "no", "step": 1}}
        engine.folder = request.folder = tmp_path / "t"
        with pytest.raises(TrialFailed, match="8 of 8 trials did not complete"):
            run_sweep(request)
        assert "A race over other seeds" not in (out := capsys.readouterr().out)
        assert "another search" not in out
        with pytest.raises(TrialFailed):
            run_sweep(expand([*lines[:-1], "sweep.trials=2", "sweep.workers=1"], request.folder))
        assert f"note: {request.folder} has trials of another search too" in capsys.readouterr().out


# --- another metric


def by_rank(trial: Trial) -> dict[str, Any]:
    """The higher the rank, the lower the accuracy and the higher the macro-F1."""
    rank = trial.config.lora.rank or 0
    return {"metrics": {"val_accuracy": 0.9 - rank / 100, "val_macro_f1": 0.5 + rank / 100}, "data": {"val": 720}}


def by_f1(trials: list[Trial]) -> list[Trial]:
    for trial in trials:
        trial.config.trainer.metric = "macro_f1"
    return trials


def test_a_sweep_compares_by_trainer_metric(engine, tmp_path, capsys):
    engine.outcome = by_rank
    trials = by_f1(race_trials(2, 8))
    assert list(run(tmp_path, trials).values()) == pytest.approx([0.52, 0.58])
    out = capsys.readouterr().out
    assert "completed  val macro-F1 52.00%" in out
    table = out[out.index("val macro-F1 %") :]
    assert table.index("58.00") < table.index("52.00")
    assert list(run(tmp_path, race_trials(2, 8)).values()) == pytest.approx([0.88, 0.82])
    assert "val accuracy %" in capsys.readouterr().out, "the newest command's counts"
    assert engine.started == [2], "and nothing is trained again"
    with pytest.raises(ConfigError, match=r"trainer\.metric=macro_f1,accuracy: one metric"):
        run(tmp_path, [*by_f1(race_trials(2)), *race_trials(4)])


def test_what_lacks_the_metric_is_reported(engine, tmp_path, capsys):
    with pytest.raises(TrialFailed, match="1 of 1 trials did not complete"):
        run(tmp_path, by_f1(race_trials(2)))
    assert "record.json has no val_macro_f1: remove it" in capsys.readouterr().out


def test_a_race_is_decided_by_trainer_metric(engine, tmp_path, capsys):
    """Cells of an earlier command, which was about accuracy, race by it too."""
    engine.outcome = by_rank
    race = {"margin": 1.0, "first_seeds": 2, "most_seeds": 3}
    run(tmp_path, race_trials(2, 4), **race)
    assert "rank 2 selected: " in capsys.readouterr().out
    assert run(tmp_path, by_f1(race_trials(8)), dry_run=True, **race) is None
    assert "a race of 3 cells takes at least 6 trials, at most 9" in capsys.readouterr().out
    assert max(run(tmp_path, by_f1(race_trials(8)), **race).values()) == pytest.approx(0.58)
    out = capsys.readouterr().out
    assert "val macro-F1 %" in out
    assert "rank 8 selected: with 95 % no other of 3 cells" in out
