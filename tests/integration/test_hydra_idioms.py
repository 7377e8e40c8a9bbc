"""What Hydra's own documentation teaches works under a sweep as well, or is refused."""

from __future__ import annotations

import pytest
from helpers import run_command

pytestmark = pytest.mark.slow
EXPERIMENT = """# @package _global_
defaults:
  - override /hydra/job_logging: default
"""
CALLBACKS = """hydra:
  callbacks:
    pickles:
      _target_: hydra.experimental.callbacks.PickleJobInfoCallback
"""


def test_an_experiments_choices_win_and_its_callbacks_are_refused(tmp_path):
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text(EXPERIMENT)
    (tmp_path / "own/experiment/calls.yaml").write_text(EXPERIMENT + CALLBACKS)
    sweep = ("-m", "--config-dir=own", "sweep.name=s", "sweep.pack_size=2", "seed=0,1", "optimizer.lr=1e-3")
    refused = run_command(*sweep, "experiment=calls", cwd=tmp_path, code=1)
    assert refused.stderr.startswith("error: hydra.callbacks has no effect on packed trials: ")
    assert not (tmp_path / "outputs").exists()
    run_command(*sweep, "experiment=mine", cwd=tmp_path)
    hydra = (next((tmp_path / "outputs/sweeps/s").glob("*/.hydra")) / "hydra.yaml").read_text()
    assert "hydra/job_logging: default" in hydra
    assert "hydra/hydra_logging: none" in hydra
