"""Searches as commands: without Optuna, and one that is killed and resumed."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import SMALL, command, run, start, wait_until

from lora_vit import api
from lora_vit.errors import ConfigError
from lora_vit.records import read_record

pytest.importorskip("optuna", minversion="4", reason="needs pip install 'lora_vit[search]'")
SPACE = ("lora.rank=choice(1,2,4)", "optimizer.lr=tag(log,interval(1e-4,1e-2))")


@pytest.mark.parametrize("version", [None, "3.6.1"])
def test_without_the_extra_one_line_says_what_to_install(version, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.delitem(sys.modules, name)
    older: Any = None if version is None else SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "optuna", older)
    with pytest.raises(ConfigError, match=r"^sweep\.trials=3 needs .*: pip install 'lora_vit\[search\]'$"):
        api.sweep([*SMALL, *SPACE, "sweep.trials=3"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_real_search_that_was_killed_resumes(tmp_path):
    line = command("-m", "lora.alpha=8", *SPACE, "sweep.trials=6", "sweep.pack_size=2", "sweep.workers=1",
                   "sweep.name=s", "trainer.epochs=3")  # fmt: skip
    folder = tmp_path / "outputs/sweeps/s"

    def finished() -> dict[str, Any]:
        records = [read_record(path.parent) for path in folder.glob("*/record.json")]
        return {record.trial_id: record.finished for record in records if record.status == "completed"}

    first = start(line, tmp_path)
    wait_until(lambda: len(finished()) >= 2, first, 240, 0.02)
    first.kill()
    first.communicate()
    before = finished()
    assert len(before) < 6
    done = run(line, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    after = finished()
    assert len(after) == 6
    assert after.items() >= before.items(), "none is trained twice"
