"""What Hydra's own documentation teaches works under a sweep as well."""

from __future__ import annotations

import pytest
from helpers import run_command

pytestmark = pytest.mark.slow
CALLBACK = """
from hydra.experimental.callback import Callback
class Notes(Callback):
    def on_job_start(self, config, **others):
        print("START", config.seed)
    def on_job_end(self, config, job_return, **others):
        print("END", config.seed, job_return.status.name)
        print("RETURNED", job_return.return_value)
    def on_multirun_end(self, config, **others):
        print("ALL")
"""
EXPERIMENT = """# @package _global_
defaults:
  - override /hydra/job_logging: default
hydra:
  callbacks:
    notes:
      _target_: notes.Notes
    pickles:
      _target_: hydra.experimental.callbacks.PickleJobInfoCallback
"""


def test_callbacks_are_called_for_each_trial_and_an_experiments_choices_win(tmp_path):
    (tmp_path / "notes.py").write_text(CALLBACK)
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text(EXPERIMENT)
    mine = ("-m", "--config-dir=own", "experiment=mine", "sweep.name=s", "sweep.pack_size=2")
    path = {"PYTHONPATH": str(tmp_path)}
    done = run_command(*mine, "seed=0,1", "optimizer.lr=1e-3", cwd=tmp_path, env=path)
    for seed in (0, 1):
        assert done.stdout.count(f"START {seed}\nEND {seed} COMPLETED\nRETURNED 0.") == 1
    assert done.stdout.rstrip().endswith("ALL")
    assert len(list((tmp_path / "outputs/sweeps/s").glob("*/.hydra/job_return.pickle"))) == 2
    hydra = (next((tmp_path / "outputs/sweeps/s").glob("*/.hydra")) / "hydra.yaml").read_text()
    assert "hydra/job_logging: default" in hydra
    assert "hydra/hydra_logging: none" in hydra
    failed = run_command(*mine, "seed=2", "optimizer.lr=1e300", cwd=tmp_path, env=path, code=1)
    assert "END 2 FAILED" in failed.stdout
    assert "not finite" in failed.stderr  # what failed is raised when it is asked for, as by Hydra itself
