"""Hydra's own sweeper and launchers: each trial is a single run, in a folder that the summary reads."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from helpers import SMALL, command, rows_of, run_command, start, wait_until

from lora_vit import api
from lora_vit.records import read_record

pytestmark = pytest.mark.slow


def trials(sweep: Path) -> dict[str, Path]:
    return {p.parent.name: p.parent for p in sorted(sweep.glob("*/record.json"))}


def test_it_leaves_the_same_trials_for_the_summary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ("lora=default,none", "lora.rank=1,2", "seed=3", "trainer.epochs=1", "data.cache_dir=cache")
    api.sweep([*SMALL, *settings], "packed", workers=1, pack_size=2)
    run_command("-m", "hydra/sweeper=basic", "hydra.sweep.dir=basic", *settings, cwd=tmp_path)
    one, other = trials(tmp_path / "packed"), trials(tmp_path / "basic")
    assert list(one) == list(other)
    assert len(one) == 3, "settings without effect are dropped, so two of them name one trial"
    for name in one:
        a, b = read_record(one[name]), read_record(other[name])
        assert (a.status, a.cell_id, a.metrics["step"]) == (b.status, b.cell_id, b.metrics["step"])
        assert a.metrics["val_loss"] == pytest.approx(b.metrics["val_loss"], rel=1e-9)  # fp64, other packs
        assert (other[name] / ".hydra/overrides.yaml").exists()
    assert len(api.summarize("basic").cells) == 3


def test_a_failure_is_reported_and_an_unnamed_sweep_has_a_folder(tmp_path):
    done = run_command("-m", "hydra/sweeper=basic", "optimizer.lr=1e300,1e-3", cwd=tmp_path, code=1)
    assert "not finite at step" in done.stderr
    (sweep,) = (tmp_path / "outputs/sweeps").iterdir()
    assert sweep.name != "None"
    assert sorted(read_record(folder).status for folder in trials(sweep).values()) == ["completed", "failed"]


def test_a_sweep_that_is_asked_to_stop_begins_no_other_trial(tmp_path):
    line = command("-m", "hydra/sweeper=basic", "seed=0,1", "trainer.epochs=5000", "hydra.sweep.dir=s")
    process = start(line, tmp_path)
    wait_until(lambda: rows_of(*(tmp_path / "s").glob("*/metrics.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert out.endswith("interrupted by SIGTERM: saved; the same command resumes\n")
    assert [read_record(folder).status for folder in trials(tmp_path / "s").values()] == ["interrupted"]
