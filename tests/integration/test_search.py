"""Search by Optuna: it goes on where it was stopped, counts each trial once, and finds what a grid finds."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import SMALL, run_command, start, wait_until
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher

from lora_vit import train
from lora_vit.analysis import summarize
from lora_vit.compose import register_schema
from lora_vit.errors import ConfigError
from lora_vit.records import TrialRecord, read_record
from lora_vit.sweep.plan import SweepRun

EXTRA = "pip install lora_vit[search]"
optuna = pytest.importorskip("optuna", reason=f"needs {EXTRA}")
pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason=f"needs {EXTRA}")
try:
    optuna.create_study(storage="sqlite://")
except Exception as error:
    pytest.skip(f"Optuna opens no SQLite file ({type(error).__name__}): needs {EXTRA}", allow_module_level=True)

FIXED = ("lora.alpha=8", "lora.dropout=0.0")
SPACE = (*FIXED, "lora.rank=choice(1,2,4,8,16)", "optimizer.lr=tag(log,interval(1e-4,1e-2))")
GRID = (*FIXED, "lora.rank=1,2,4,8,16", "optimizer.lr=1e-4,2.5e-4,6.3e-4,1.6e-3,4e-3,1e-2")
"""30 settings over the same ranges: the learning rates are equally far apart in the logarithm."""


class Bench:
    """Commands in this process whose trials come to a figure at once. ``batches``: what was launched together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch = monkeypatch
        self.batches: list[dict[str, Any]] = []
        self.stops_after = math.inf
        self.failing: dict[int, str] = {}
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    @staticmethod
    def accuracy(config: Any) -> float:
        """Best at rank 4 and lr 2.2e-3, which is between the grid's points."""
        rank, lr = config.lora.rank or 1, config.optimizer.lr
        return 0.9 - 0.05 * abs(math.log2(rank / 4)) - 0.2 * abs(math.log10(lr / 2.2e-3))

    def outcome(self, config: Any) -> float | Exception:
        """``failing``: why trials of a rank fail."""
        why = self.failing.get(config.lora.rank)
        return RuntimeError(why) if why else self.accuracy(config)

    def __call__(self, *overrides: str) -> None:
        """The command. Raises what ``lora_vit.train`` shows as one line."""

        def run_sweep(asked: SweepRun, engine: None) -> dict[str, float | Exception]:
            if len(self.batches) >= self.stops_after:
                raise KeyboardInterrupt
            asked.folder.mkdir(parents=True, exist_ok=True)
            self.batches.append({job.trial_id: job for job in asked.jobs})
            return {job.trial_id: self.outcome(job.config) for job in asked.jobs}

        def task(cfg: Any) -> float:
            raise AssertionError("these trials train in packs")

        task.run_sweep = run_sweep  # type: ignore[attr-defined]
        GlobalHydra.instance().clear()
        register_schema()
        self.monkeypatch.setattr(sys, "argv", ["lora_vit.train", *overrides])
        try:
            train.through_hydra(task)
        finally:
            GlobalHydra.instance().clear()

    def ids(self) -> list[str]:
        """The trials, in the order in which they were first launched."""
        return list(dict.fromkeys(trial_id for batch in self.batches for trial_id in batch))

    def best(self) -> float:
        return max(self.accuracy(job.config) for batch in self.batches for job in batch.values())


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return Bench(monkeypatch)


def search(*overrides: str, n: int = 30, jobs: int = 6, name: str = "s") -> list[str]:
    size = (f"hydra.sweeper.n_trials={n}", f"hydra.sweeper.n_jobs={jobs}")
    return ["sweep=search", "experiment=quickstart", *SPACE, f"sweep.name={name}", *size, *overrides]


def study(folder: Path) -> Any:
    """The one study of a search's folder."""
    storage = f"sqlite:///{folder / 'search.db'}"
    (one,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=one.study_name, storage=storage)


def test_it_finds_at_least_what_a_grid_of_the_same_size_finds_and_says_so(bench, monkeypatch, capsys):
    bench(*search())
    assert len(bench.ids()) == sum(map(len, bench.batches)) == 30
    grid = Bench(monkeypatch)
    grid("-m", "experiment=quickstart", *GRID, "sweep.name=g")
    assert len(grid.ids()) == 30
    assert bench.best() > grid.best()
    found = capsys.readouterr().out
    assert f"which tells none apart and flatters the best:\n  {bench.best():.2%}  rank=4 lr=0.00" in found


@pytest.mark.slow
def test_a_stopped_search_goes_on_as_if_never_stopped(bench, monkeypatch, tmp_path):
    whole = Bench(monkeypatch)
    whole(*search(n=18, name="whole"))
    bench.stops_after = 1
    with pytest.raises(KeyboardInterrupt):
        bench(*search(n=18))
    assert (tmp_path / "outputs/sweeps/s/search.db").is_file()
    bench.stops_after = math.inf
    bench(*search(n=18))
    assert bench.ids() == whole.ids()
    assert list(map(len, bench.batches)) == [6, 12, 6], "what was trained is answered with the batch that was stopped"
    bench(*search(n=18))
    assert bench.ids() == whole.ids(), "a finished search has nothing to train"
    bench(*search(n=20))
    assert len(bench.ids()) == 20
    values = [t.value for t in study(tmp_path / "outputs/sweeps/s").trials]
    assert len(values) == 20
    assert None not in values


@pytest.mark.slow
def test_a_trial_counts_once_however_often_it_is_suggested(bench, tmp_path):
    few = ("lora.rank=choice(1,2,4)", "optimizer.lr=choice(1e-3,2e-3)")
    bench(*search(*few, n=5))
    assert sum(map(len, bench.batches)) == 5
    bench(*search(*few, n=30))
    assert len(bench.ids()) == 6, "the space holds no more, and the search ends"
    trials = study(tmp_path / "outputs/sweeps/s").trials
    assert len(trials) > 6
    for trial in trials:
        job = next(b[trial.user_attrs["trial_id"]] for b in bench.batches if trial.user_attrs["trial_id"] in b)
        assert trial.value == bench.accuracy(job.config), "a repeated suggestion is told what the trial came to"


def test_settings_without_effect_make_no_new_trial(bench):
    bench(*search("lora=choice(none,default)", "lora.rank=choice(1,2,4)", "optimizer.lr=1e-3", n=4))
    assert len(bench.ids()) == 4, "a linear probe has no rank"
    labels = {job.label for batch in bench.batches for job in batch.values()}
    assert labels == {"lora=none", *(f"rank={rank} lora=default" for rank in (1, 2, 4))}


def test_failed_trials_are_told_with_their_reason_and_end_nothing(bench, tmp_path, capsys):
    bench.failing = {4: "the loss is not finite", 2: "another reason"}
    bench(*search(n=12))
    assert len(bench.ids()) == 12
    trials = study(tmp_path / "outputs/sweeps/s").trials
    told = {t.params["lora.rank"]: t.user_attrs["error"] for t in trials if t.state == optuna.trial.TrialState.FAIL}
    assert told == bench.failing
    failed = sum(t.value is None for t in trials)
    assert f"searched 12 trials ({failed} failed)" in capsys.readouterr().out
    bench.failing = {}
    bench(*search(n=12))  # the runner would answer them from their records
    assert len(bench.ids()) == 12
    assert "searched 12 trials (0 failed)" in capsys.readouterr().out


def test_failures_end_a_search_that_is_asked_to_stop(bench):
    bench.failing = dict.fromkeys((1, 2, 4, 8, 16), "no")
    with pytest.raises(RuntimeError, match="no"):
        bench(*search("sweep.on_failure=stop"))
    assert len(bench.batches) == 1
    with pytest.raises(ConfigError, match=r"no trial completed: python -m lora_vit\.sweep outputs/sweeps/t says why"):
        bench(*search(n=6, name="t"))


def test_impossible_suggestions_are_passed_over(bench, tmp_path):
    """Alone each end of the ranges is possible; rank 24 is not where the MLP's width is 16."""
    space = ("lora.rank=choice(1,24)", "model.mlp_dim=choice(48,16)", "lora.targets=[fc1]", "optimizer.lr=1e-3")
    bench(*search(*SMALL, *space, n=3))
    assert len(bench.ids()) == 3


@pytest.mark.parametrize(
    ("given", "size"), [("sweep.pack_size=4", 8), ("sweep.pack_size=auto", 6), ("hydra.sweeper.n_jobs=5", 5)]
)
def test_a_batch_is_what_the_workers_train_at_once(given, size, bench):
    bench(*search("sweep.workers=2", "hydra.sweeper.n_jobs=-1", given))
    assert {len(batch) for batch in bench.batches[:-1]} == {size}


@pytest.mark.slow
def test_a_batch_is_what_the_workers_of_an_engine_train_at_once(bench, monkeypatch):
    engine = SimpleNamespace(number_of_workers=lambda asked: {"auto": 7}[asked])
    register_schema()  # the launcher is found from here on
    (packed,) = (kind for kind in Plugins.instance().discover(Launcher) if kind.__name__ == "PackedLauncher")
    monkeypatch.setattr(packed, "engine", lambda self, folder: engine)
    bench(*search("sweep.pack_size=1", "hydra.sweeper.n_jobs=-1", n=14))
    assert [len(batch) for batch in bench.batches] == [7, 7]


def test_another_space_or_another_setting_is_another_study_in_the_same_folder(bench):
    bench(*search(n=4))
    bench(*search("lora.rank=choice(1,2,4,8,16,32)", n=4))
    bench(*search("trainer.epochs=1", n=4))
    bench(*search("trainer.epochs=1", "hydra.sweeper.study_name=mine", n=4))
    assert len(bench.ids()) == 12
    bench(*search("trainer.epochs=2", "hydra.sweeper.study_name=mine", n=4))
    bench(*search("lora.rank=choice(1,2)", "hydra.sweeper.study_name=mine", n=4))
    assert len(bench.ids()) == 20, "a name of one's own mixes no settings"
    assert len(optuna.get_all_study_summaries("sqlite:///outputs/sweeps/s/search.db")) == 6


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("sweep.dry_run=true", "sweep.dry_run=true needs"),
        ("seed=0,1", "seed cannot be searched"),
        ("sweep.workers=1,2", r"sweep\.workers cannot be searched"),
        ("lora.rank=choice(0,2)", "lora.rank=0 is impossible"),
        ("lora.rnk=choice(1,2)", "unknown key 'lora.rnk'"),
        ("hydra.sweeper.direction=minimize", "sweep=search maximizes"),
        ("hydra.sweeper.n_trials=0", r"hydra\.sweeper\.n_trials=0 is impossible: give 1 or more"),
        ("hydra/sweeper/sampler=grid", "sweep=search maximizes"),
        ("hydra.sweeper.storage=nosuch://x", "nosuch://x cannot be opened"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_trained(given, why, bench):
    with pytest.raises((ConfigError, SystemExit), match=why):
        bench(*search(given))
    assert bench.batches == []


def test_hydras_own_door_works_as_hydra_documents_it(bench, tmp_path):
    bench("-m", "hydra/sweeper=optuna", "experiment=quickstart", *SPACE, "sweep.name=s", "hydra.sweeper.n_trials=4")
    assert [len(batch) for batch in bench.batches] == [2, 2]
    assert "best_value" in (tmp_path / "outputs/sweeps/s/optimization_results.yaml").read_text()


@pytest.mark.parametrize("arguments", [("sweep=search",), ("-m", "hydra/sweeper=optuna", "lora.rank=1,2")])
def test_without_the_extra_one_line_says_what_to_install(arguments, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import pkgutil\nwalk = pkgutil.walk_packages\n"
        "pkgutil.walk_packages = lambda *a, **k: (m for m in walk(*a, **k) if 'optuna_sweeper' not in m.name)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run_command(*arguments, cwd=tmp_path, code=1, env={"PYTHONPATH": path})
    assert done.stderr == f"error: hydra/sweeper/optuna is not installed: {EXTRA}\n"


def records_of(sweep: Path) -> dict[str, TrialRecord]:
    return {p.parent.name: read_record(p.parent) for p in sorted(sweep.glob("*/record.json"))}


@pytest.mark.slow
def test_a_real_search_tells_why_trials_failed_and_its_last_command_compares_the_best(tmp_path):
    done = run_command(
        "sweep=search", "optimizer.lr=choice(1e-3,1e-2,1e300)", "lora.rank=2", "lora.alpha=4", "lora.dropout=0.0",
        "sweep.name=s", "sweep.workers=1", "sweep.pack_size=3", cwd=tmp_path,
    )  # fmt: skip
    folder = tmp_path / "outputs/sweeps/s"
    assert len(records_of(folder)) == 3
    assert "searched 3 trials (1 failed)" in done.stdout
    (failed,) = [t for t in study(folder).trials if t.params["optimizer.lr"] == 1e300][:1]
    own = read_record(folder / failed.user_attrs["trial_id"]).error
    assert own is not None
    assert failed.user_attrs["error"] == own["message"]
    summary = summarize([folder])
    assert "The search's command, given again, names the commands that race its best" in summary.verdict
    commands = done.stdout.partition("to within 0.5 points (each command joins it):\n")[2]
    assert commands.count("sweep.margin=0.5") == 2
    shell = commands.replace("python -m", f"{sys.executable} -m").replace("margin=0.5", "margin=50")  # quicker
    compared = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    best = {
        (r.config["optimizer"]["lr"], r.config["seed"]) for r in records_of(tmp_path / "outputs/sweeps/s-best").values()
    }
    assert best >= {(lr, seed) for lr in (1e-3, 1e-2) for seed in range(1, 6)}
    race = summarize([tmp_path / "outputs/sweeps/s-best"]).race
    assert race is not None
    assert (len(race.cells), race.first, race.race.ended) == (2, 1, True)


@pytest.mark.slow
def test_a_search_on_digits_that_was_killed_finds_at_least_what_a_grid_finds(tmp_path):
    """Few images and epochs: the rank and the learning rate decide how far the training comes."""
    common = [
        "experiment=quickstart", "trainer.epochs=3", "trainer.validate_every=3", "data.train_per_class=5",
        "data.val_fraction=0.12", "data.test_fraction=0.05", "sweep.workers=1",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    python = [sys.executable, "-m", "lora_vit.train"]
    line = [*python, "sweep=search", *common, *SPACE, "sweep.name=s", "sweep.pack_size=6"]
    folder = tmp_path / "outputs/sweeps/s"
    first = start(line, tmp_path)
    # two of the third batch are begun
    wait_until(lambda: sum(1 for _ in folder.glob("*/record.json")) >= 14, first, 240, 0.02)
    first.kill()
    first.communicate()
    finished = {name: r.finished for name, r in records_of(folder).items() if r.status == "completed"}
    assert 12 <= len(finished) < 30
    second = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stdout + second.stderr
    searched = records_of(folder)
    assert len(searched) == 30
    assert {name: searched[name].finished for name in finished} == finished, "none is trained twice"
    grid = [*python, "-m", *common, *GRID, "sweep.name=g", "sweep.pack_size=15"]
    done = subprocess.run(grid, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    best, of_grid = (
        max(r.metrics["val_accuracy"] for r in records_of(tmp_path / "outputs/sweeps" / name).values())
        for name in ("s", "g")
    )
    assert best >= of_grid
    assert f"  {best:.2%}  rank=" in second.stdout
