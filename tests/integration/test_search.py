"""Search by Optuna: it resumes where it was stopped, counts each trial once, and finds what a grid finds."""

from __future__ import annotations

import itertools
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import command, run_command, start, wait_until
from plain_trials import SMALL
from sweeps import leave_record

from lora_vit import api, compose
from lora_vit.config import TrialConfig
from lora_vit.errors import ConfigError
from lora_vit.records import read_record
from lora_vit.sweep import run
from lora_vit.sweep.claims import ENDED, Claims
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Trial

pytest.importorskip("optuna", minversion="4", reason="needs pip install 'lora_vit[search]'")
RANKS, RATES = (1, 2, 4, 8, 16), (1e-4, 2.5e-4, 6.3e-4, 1.6e-3, 4e-3, 1e-2)
SPACE = ("lora.rank=choice(1,2,4,8,16)", "optimizer.lr=tag(log,interval(1e-4,1e-2))")
FIXED = ("lora.alpha=8", "lora.dropout=0.0")


def asked(*overrides: str, n: int = 30, name: str = "s") -> list[str]:
    """The arguments of a search's command; later ones replace earlier ones."""
    given = [*SMALL, *FIXED, *SPACE, "sweep.pack_size=6", f"sweep.trials={n}", f"sweep.name={name}", *overrides]
    return list({line.partition("=")[0]: line for line in given}.values())


def accuracy(rank: int, lr: float) -> float:
    """Best at rank 4 and lr 2.2e-3, which is between the grid's points."""
    return 0.9 - 0.05 * abs(math.log2(rank / 4)) - 0.2 * abs(math.log10(lr / 2.2e-3))


class MadeUp:
    """Commands, and an engine whose trials come to a figure at once. ``batches``: what was started together."""

    outlives_us, poll_every = False, 0.0

    def __init__(self) -> None:
        self.folder = Path()
        self.batches: list[dict[str, Trial]] = []
        self.stops_after = math.inf
        self.failing: dict[int | None, str] = {}

    def __call__(self, *overrides: str) -> Any:
        """What the command returns."""
        with compose.initialized():
            request = compose.expand(overrides)
        self.folder = request.folder
        return run.run_sweep(request)

    def number_of_workers(self, asked: str, trials: list[Any]) -> int:
        return 1 if asked == "auto" else int(asked)

    def start(self, count: int) -> str:
        if len(self.batches) >= self.stops_after:
            raise KeyboardInterrupt
        sweep, claims = Sweep(self.folder), Claims(self.folder)
        claims.look()
        planned = (trial for batch in sweep.batches for trial in batch)
        self.batches.append({trial.trial_id: trial for trial in planned if claims.take(trial.trial_id)})
        for name, trial in self.batches[-1].items():
            lora = trial.config.lora
            if lora.rank in self.failing:
                leave_record(sweep, trial, "failed", error={"message": self.failing[lora.rank], "step": 1})
            else:
                metrics = {"val_accuracy": accuracy(lora.rank or 1, trial.config.optimizer.lr)}
                leave_record(sweep, trial, "completed", metrics=metrics)
            claims.release(name, ENDED)
        return ""

    def look(self) -> tuple[int, list[str]]:
        return 0, []

    def stop(self, now: bool = False) -> None: ...

    def withdraw(self) -> None: ...

    def ids(self) -> list[str]:
        """The trials, in the order in which they were first started."""
        return list(dict.fromkeys(trial_id for batch in self.batches for trial_id in batch))

    def configs(self) -> list[TrialConfig]:
        return [trial.config for batch in self.batches for trial in batch.values()]


@pytest.fixture
def bench(monkeypatch, tmp_path) -> MadeUp:
    monkeypatch.chdir(tmp_path)
    bench = MadeUp()
    monkeypatch.setattr(run, "start_engine", lambda options, folder: bench)
    return bench


def commands_in(output: str) -> list[list[str]]:
    """The arguments of the commands that a search's report proposes."""
    lines = output.partition("to within 0.5 points (each command joins it):\n")[2].splitlines()
    return [shlex.split(line.removesuffix(" && \\"))[3:] for line in lines if "lora_vit.train" in line]


def test_it_finds_at_least_what_a_grid_of_its_size_finds_and_proposes_a_race(bench, capsys):
    bench(*asked())
    assert len(bench.ids()) == sum(map(len, bench.batches)) == 30
    assert list(map(len, bench.batches)) == [6] * 5
    found = sorted((accuracy(c.lora.rank, c.optimizer.lr) for c in bench.configs()), reverse=True)
    assert found[0] > max(itertools.starmap(accuracy, itertools.product(RANKS, RATES)))
    said = capsys.readouterr().out
    assert "30 trials completed, one seed each" in said
    proposed = commands_in(said)
    assert len(proposed) == 3
    for value, (flag, *line) in zip(found, proposed, strict=False):
        assert f"  {value:.2%}  rank=" in said
        with compose.initialized():
            request = compose.expand(line)
        (trial,) = request.trials
        assert (flag, request.options.margin, trial.config.seed) == ("-m", 0.5, 1)
        assert str(request.folder) == "outputs/sweeps/s-best"
        assert accuracy(trial.config.lora.rank, trial.config.optimizer.lr) == pytest.approx(value)


def test_failed_trials_are_tried_again_when_asked(bench):
    bench.failing = {4: "the loss is not finite", 2: "another reason"}
    bench(*asked(n=12))
    failed = [c for c in bench.configs() if c.lora.rank in bench.failing]
    bench.failing = {}
    bench(*asked("sweep.retry_failed=true", n=12))
    assert [len(batch) for batch in bench.batches] == [6, 6, len(failed)]
    bench.failing = dict.fromkeys(RANKS, "no")
    with pytest.raises(ConfigError, match=r"no trial completed: python -m lora_vit\.sweep outputs/sweeps/t says why"):
        bench(*asked(n=6, name="t"))


def test_a_search_that_was_stopped_continues_as_if_never_stopped(bench, monkeypatch):
    bench(*asked(n=18, name="whole"))
    whole = [set(batch) for batch in bench.batches]
    bench.batches, bench.stops_after = [], 1
    with pytest.raises(KeyboardInterrupt):
        bench(*asked(n=18))
    bench.stops_after = math.inf
    bench(*asked(n=18))
    assert [set(batch) for batch in bench.batches] == whole
    assert list(map(len, whole)) == [6, 6, 6]
    bench(*asked(n=18))
    assert len(bench.batches) == 3, "a finished search has nothing to train"
    bench(*asked("sweep.pack_size=4", n=20))
    assert len(bench.ids()) == sum(map(len, bench.batches)) == 20, "more trials go on with the study"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("sweep.dry_run=true", "sweep.dry_run=true cannot say what a search will suggest"),
        ("sweep.workers=1,2", "sweep.workers is the sweep's own"),
        ("lora.rnk=choice(1,2)", "unknown key 'lora.rnk'"),
        ("sweep.trials=0", "sweep.trials=0"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_trained(given, why, bench, tmp_path):
    with pytest.raises(ConfigError, match=why):
        bench(*asked(given))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("version", [None, "3.6.1"])
def test_without_the_extra_one_line_says_what_to_install(version, tmp_path):
    module = "raise ModuleNotFoundError(\"No module named 'optuna'\", name='optuna')"
    (tmp_path / "optuna.py").write_text(module if version is None else f"__version__ = {version!r}")
    (place := tmp_path / "place").mkdir()
    done = run_command("-m", *SPACE, "sweep.trials=3", cwd=place, code=1, env={"PYTHONPATH": str(tmp_path)})
    assert done.stderr.startswith("error: sweep.trials=3 needs ")
    assert done.stderr.endswith("pip install 'lora_vit[search]'\n")
    assert done.stderr.count("\n") == 1
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_real_search_that_was_killed_resumes_and_its_commands_race_the_best(tmp_path):
    line = command("-m", *FIXED, "lora.rank=choice(1,2,4)", SPACE[1], "sweep.trials=8", "sweep.pack_size=2",
                   "sweep.workers=1", "sweep.name=s", "trainer.epochs=3")  # fmt: skip
    folder = tmp_path / "outputs/sweeps/s"

    def finished() -> dict[str, Any]:
        records = [read_record(path.parent) for path in folder.glob("*/record.json")]
        return {record.trial_id: record.finished for record in records if record.status == "completed"}

    first = start(line, tmp_path)
    wait_until(lambda: len(finished()) >= 3, first, 240, 0.02)
    first.kill()
    first.communicate()
    before = finished()
    assert len(before) < 8
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    after = finished()
    assert len(after) == 8
    assert after.items() >= before.items(), "none is trained twice"
    shell = done.stdout.partition("(each command joins it):\n")[2].partition("\noutputs/")[0]
    shell = shell.replace("python -m", f"{sys.executable} -m").replace("margin=0.5", "margin=50")  # quicker
    raced = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert raced.returncode == 0, raced.stdout + raced.stderr
    race = api.summarize(f"{folder}-best").race
    assert race is not None
    assert (len(race.cells), race.first, race.ended) == (3, 1, True)
