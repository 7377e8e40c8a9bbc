"""Trials composed the quick way are Hydra's, and the presets are what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, trial_config
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from lora_vit.hydra_callbacks import RefuseImpossible
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lora_vit import compose
from lora_vit.compose import (
    Composer,
    compose_all,
    drop_idle,
    explain,
    from_omegaconf,
    identify,
    register_schema,
    sweep_from_omegaconf,
)
from lora_vit.config import file_sha256, trial_id
from lora_vit.errors import ConfigError
from lora_vit.sweep.plan import Job

register_schema()
from hydra.core.plugins import Plugins  # noqa: E402  (after the plugin's folder is on the path)

GRID = [
    ["lora.rank=2", "optimizer.lr=1e-3", "seed=3"],
    ["lora.rank=8", "lora.alpha=${rank_times:2}"],
    ["lora.targets=[q,v]", "lora.blocks=[0]", "optimizer.betas=[0.8,0.9]"],
    ["lora=none", "lora.rank=4"],
    ["lora=full", "optimizer.lr=1e-4"],
    ["lora=mlp", "lora.dropout=0.1", "optimizer.clip_norm=1"],
    ["experiment=quickstart", "trainer.epochs=3"],
    [
        "model.head_dropout=0.2",
        "data=digits",
        "data.cache_size=null",
        "data.train_per_class=5",
        "optimizer.clip_norm=null",
    ],
]
PRESETS = {"quickstart": 24, "rank_alpha_dropout": 81, "rank_lr": 45, "targets": 45, "baselines": 45}


@pytest.fixture(scope="module")
def hydra():
    """Hydra's loader, and what it makes of the small trial's command line without anything swept."""
    Plugins.instance()._initialize()
    found = ConfigLoaderImpl(create_config_search_path("pkg://lora_vit.conf"))
    return found, found.load_configuration("config", list(SMALL), RunMode.MULTIRUN)


@pytest.fixture(scope="module")
def loader(hydra):
    return Composer(*hydra)


@pytest.fixture
def small(loader):
    """The small trial, composed; to be changed."""
    return loader(list(SMALL))


def test_the_quick_way_gives_hydras_config(loader):
    for overrides in GRID:
        line = [*SMALL, *overrides]
        quick, exact = loader(line), loader.exactly(line)
        assert quick == exact, overrides
        assert trial_id(from_omegaconf(quick, in_sweep=True)) == trial_id(from_omegaconf(exact, in_sweep=True))
    assert len({trial_id(from_omegaconf(loader([*SMALL, *o]), in_sweep=True)) for o in GRID}) == len(GRID)


def test_alpha_follows_the_rank(loader):
    trial = from_omegaconf(loader([*SMALL, "lora.rank=8", "lora.alpha=${rank_times:2}"]))
    assert trial.lora.alpha == 16.0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "trials"), PRESETS.items())
def test_presets(name, trials, tmp_path, project_root):
    text = (project_root / "conf" / "sweep" / f"{name}.yaml").read_text().splitlines()
    assert text[:2] == ["# @package _global_", f"# python -m lora_vit.train sweep={name}"]
    assert "?" in text[2]
    line = [sys.executable, "-m", "lora_vit.train", f"sweep={name}", "sweep.dry_run=true", "sweep.pack_size=1"]
    small = ["experiment=quickstart", "trainer.accelerator=cpu"]
    done = subprocess.run([*line, *small], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"plan of outputs/sweeps/{name}-[0-9a-f]{{6}}: {trials} trials", done.stdout), done.stdout
    assert list(Path(tmp_path).iterdir()) == []


# --- one trial


def test_a_rank_that_is_not_there_has_no_alpha(small):
    small.lora.rank, small.lora.alpha = None, "${rank_times:2}"
    assert small.lora.alpha is None
    waiting = OmegaConf.create({"params": {"lora.alpha": "${rank_times:2}"}})  # a preset's, before there are trials
    assert waiting.params["lora.alpha"] == "${rank_times:2}"


def test_resolvers_of_ids_and_sizes(loader, small):
    small.data.cache_size = "${at_least:16,${model.image_size},'9'}"
    assert small.data.cache_size == 16
    changed = OmegaConf.merge(loader([*SMALL, "lora=none", "lora.rank=4"]), {"lora": {"rank": 4}})
    OmegaConf.set_struct(changed, False)
    changed.hydra = {"name": "${trial_id:}"}
    assert changed.hydra.name == trial_id(trial_config("lora=none")), "its idle rank is no part of it"


COMMAND = {"hydra": {"overrides": {"task": [], "hydra": []}}}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"modle": 1}, "unknown key 'modle', did you mean 'model'?"),
        ({"xyzzyx": 1}, "unknown key 'xyzzyx' (see --help)"),
        ({"lora.rank": "???"}, "lora.rank has no value: give one, for example lora.rank=..."),
        ({"seed": "???"}, "seed has no value: give one, for example seed=..."),
        ({"seed": "${nothing}"}, "Interpolation key 'nothing' not found"),
        ({"lora.rank": 0}, "lora.rank=0 is impossible: give 1 or more (lora=none trains the head alone)"),
    ],
)
def test_an_impossible_trial_ends_in_a_line(small, changes, line):
    broken = OmegaConf.create(OmegaConf.to_container(small))
    for key, value in changes.items():
        OmegaConf.update(broken, key, value)
    with pytest.raises(ConfigError) as caught:
        from_omegaconf(broken)
    assert str(caught.value) == line
    with pytest.raises(SystemExit) as ended:
        RefuseImpossible().on_run_start(OmegaConf.merge(broken, COMMAND))
    assert str(ended.value) == f"error: {line}"
    OmegaConf.set_struct(small, False)
    RefuseImpossible().on_run_start(OmegaConf.merge(small, COMMAND))


def test_what_has_no_effect_is_refused_alone_and_dropped_in_a_sweep(loader):
    idle = loader([*SMALL, "lora=none", "lora.rank=4"])
    with pytest.raises(ConfigError, match=r"lora\.rank=4"):
        from_omegaconf(idle)
    assert from_omegaconf(idle, in_sweep=True) == trial_config("lora=none")


@pytest.mark.parametrize("method", ["none", "full"])
def test_a_baselines_idle_settings(method):
    values = {"lora": {"method": method, "rank": 4, "alpha": None, "blocks": [0]}, "seed": 1}
    assert drop_idle(values) == ["lora.rank", "lora.blocks"]
    assert values == {"lora": {"method": method, "rank": None, "alpha": None, "blocks": None}, "seed": 1}


@pytest.mark.parametrize("values", [{"lora": {"method": "lora", "rank": 4}}, {"lora": None}, {}, {"lora": {"rank": 4}}])
def test_nothing_of_adapters_is_idle(values):
    before = {key: dict(value) if value else value for key, value in values.items()}
    assert drop_idle(values) == []
    assert values == before


def test_weights_are_known_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    trial = trial_config()
    trial.model.weights = "~/w.safetensors"
    identify(trial)
    assert trial.model.weights_sha256 == file_sha256(path)
    identify(trial)  # once more: the given one is what is there
    save_file({"a": torch.ones(1)}, path)
    given = trial.model.weights_sha256
    with pytest.raises(ConfigError) as caught:
        identify(trial)
    assert str(caught.value) == (
        f"model.weights_sha256={given} is asked for, but what is there has {file_sha256(path)}: give the same files"
    )
    trial = trial_config()
    trial.model.weights_sha256 = given
    with pytest.raises(ConfigError, match="but what is there has None"):  # of random weights there is none
        identify(trial)


def test_content_that_is_not_the_given_one(monkeypatch):
    monkeypatch.setattr(compose, "known_content", lambda data, fetch: "60 images" if fetch else None)
    trial = trial_config()
    trial.data.content = None
    identify(trial)
    assert trial.data.content == "60 images"
    trial.data.content = None
    identify(trial, fetch=False)
    assert trial.data.content is None
    trial.data.content = "7 images"
    with pytest.raises(ConfigError) as caught:
        identify(trial)
    assert str(caught.value) == (
        "data.content=7 images is asked for, but what is there has 60 images: give the same files"
    )


def test_the_sweeps_own_settings(loader):
    node = loader([*SMALL, "sweep.pack_size=3", "sweep.on_failure=stop"]).sweep
    sweep = sweep_from_omegaconf(node)
    assert (sweep.pack_size, sweep.on_failure) == ("3", "stop")
    with pytest.raises(ConfigError, match=r"sweep\.on_failure=retry"):
        sweep_from_omegaconf(loader([*SMALL, "sweep.on_failure=retry"]).sweep)


# --- many trials


@pytest.mark.parametrize(
    "overrides",
    [
        ["+lora.rank=3"], ["++lora.rank=3"], ["lora.rank=3", "~lora.alpha"], ["data@model=fake"], ["lora.rank=two"],
        ["hydra.verbose=true", "seed=4"], ["optimizer.betas=7"], ["nothing.there=1"], ["lora.rank=1,2"],
    ],
)  # fmt: skip
def test_what_is_more_than_a_value_is_left_to_hydra(overrides, loader):
    """With its result or its message."""

    def outcome(way):
        try:
            return way([*SMALL, *overrides])
        except Exception as error:
            return explain(error)

    assert outcome(loader) == outcome(loader.exactly)


def test_a_value_costs_no_composition(hydra, monkeypatch):
    loader, whole = Composer(*hydra), []
    exactly = loader.exactly
    monkeypatch.setattr(loader, "exactly", lambda overrides: whole.append(list(overrides)) or exactly(overrides))
    asked = []
    options = loader.loader.get_group_options
    monkeypatch.setattr(loader.loader, "get_group_options", lambda key: asked.append(key) or options(key))
    first = loader(["data=fake", "seed=1", "lora=qv"])
    assert loader(["data=fake", "seed=2", "lora=qv"]).seed == 2
    assert (first.seed, loader(["data=fake", "lora=qv"]).seed) == (1, 0), "one trial's value is no other's"
    assert whole == [["data=fake", "lora=qv"]]
    assert sorted(asked) == ["data", "lora", "seed"]
    loader(["data=fake"])
    assert whole[1:] == [["data=fake"]]


def composed(hydra, *swept):
    return compose_all(*hydra, [[*SMALL, *overrides] for overrides in swept])


def test_all_trials_with_their_labels(hydra):
    swept = [
        ["lora.rank=2", "seed=0"],
        ["lora=none", "lora.rank=2", "seed=0"],
        ["lora=full", "lora.alpha=2.0", "+lora.dropout=0.1", "seed=0"],
    ]
    jobs = composed(hydra, *swept)
    assert [job.label for job in jobs] == ["rank=2", "lora=none", "lora=full"]
    assert [job.overrides for job in jobs] == [[*SMALL, *overrides] for overrides in swept]
    assert [job.config for job in jobs] == [trial_config("lora.rank=2"), *map(trial_config, ("lora=none", "lora=full"))]
    assert [job.idle() for job in jobs] == [[], ["lora.rank=2"], ["lora.alpha=2.0", "+lora.dropout=0.1"]]
    assert Job(jobs[1].config, ["lora.method=none", "lora=none", "optimizer.lr=1"]).idle() == []
    (alone,) = composed(hydra, ["seed=0"])
    assert alone.label.endswith("log_every=1 seed=0"), "of one trial all is told"


def test_trials_that_cannot_run_are_told_together(hydra):
    with pytest.raises(ConfigError) as caught:
        composed(hydra, ["lora.rank=0"], ["lora.rank=2"], ["lora.rank=0", "seed=1"], ["lora.rnk=2"], ["lora.rank=two"])
    assert str(caught.value).splitlines() == [
        "4 of 5 trials cannot run, so none is started:",
        "  lora.rank=0 is impossible: give 1 or more (lora=none trains the head alone)   [rank=0 and 1 more]",
        "  unknown key 'lora.rnk', did you mean 'lora.rank'?   [rnk=2]",
        "  lora.rank: Value 'two' of type 'str' could not be converted to Integer   [rank=two]",
    ]
    assert compose._refusal({"no": [""]}, 1).splitlines()[1] == "  no   [as given]"


@pytest.mark.parametrize(("seconds", "told"), [(0.0, False), (5.0, False), (5.1, True)])
def test_long_compositions_are_told(seconds, told, hydra, monkeypatch, capsys):
    clock = iter((100.0, 100.0 + seconds, 100.0 + seconds))
    monkeypatch.setattr(compose, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    due = iter((False, told))
    asked = []
    monkeypatch.setattr(compose, "Every", lambda period: asked.append(period) or SimpleNamespace(due=lambda: next(due)))
    composed(hydra, ["seed=0"], ["seed=1"])
    lines = ["composing: 2/2 trials", "composed 2 trials in 5.1 s"] if told else []
    printed = capsys.readouterr()
    assert (printed.out, printed.err.splitlines(), asked) == ("", lines, [5.0])


# --- errors


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


AVAILABLE = "Could not find 'lora/qvv'\n\nAvailable options in 'lora':\n\tdefault\n\tqv\nConfig search path:\n\tpkg"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("rank is bad"), "rank is bad"),
        (caused(RuntimeError("outer"), ConfigError("rank is bad")), "rank is bad"),
        (OverrideParseException("a=[1", "no end\nthere"), "cannot read the override 'a=[1': no end"),
        (caused(ValueError("x"), KeyError("Could not override 'lora.rnk'.")),
         "unknown key 'lora.rnk', did you mean 'lora.rank'?"),
        (ValueError("Could not override 'xyzzyx'."), "unknown key 'xyzzyx' (see --help)"),
        (ValueError("Ambiguous value for argument 'lr=1,2'"),
         "lr=1,2 names several values: add -m for a sweep over them, or write a list as key=[a,b]"),
        (ValueError("Sweep parameters 'lr=range(2)' need -m"),
         "lr=range(2) names several values: add -m for a sweep over them, or write a list as key=[a,b]"),
        (ValueError(AVAILABLE), "'lora/qvv' does not exist, did you mean 'qv'? (one of: default, qv)"),
        (ValueError(AVAILABLE.replace("find 'lora/qvv", "load 'zzz")), "'zzz' does not exist (one of: default, qv)"),
        (caused(ValueError("first"), ValueError("bad value\n    full_key: lora.rank\n")), "lora.rank: bad value"),
        (caused(ValueError("first\nline"), ValueError("other")), "first"),
    ],
)  # fmt: skip
def test_errors_in_one_line(error, line):
    assert explain(error) == line


def test_an_error_raised_while_another_was_handled():
    later = ValueError("later")
    later.__context__ = ConfigError("rank is bad")
    assert explain(later) == "rank is bad"
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__context__ = two, one  # a ring
    assert explain(one) == "one"
