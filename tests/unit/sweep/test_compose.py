"""Trials composed the quick way are Hydra's, presets are what they say, and what cannot be is one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, run, run_command, trial_config
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lora_vit import api, compose, resolve
from lora_vit.compose import Composer, compose_all, expand, explain, initialized
from lora_vit.config import file_sha256, from_dict, trial_id
from lora_vit.errors import ConfigError
from lora_vit.records import read_record
from lora_vit.resolve import from_omegaconf, identify
from lora_vit.sweep.plan import Request
from lora_vit.sweep.source import suggested

GRID = [
    ["lora.rank=2", "optimizer.lr=1e-3", "seed=3"],
    ["lora.rank=8", "lora.alpha=${rank_times:2}"],
    ["lora.targets=[q,v]", "lora.blocks=[0]", "optimizer.betas=[0.8,0.9]"],
    ["lora=none", "lora.rank=4"],
    ["lora=full", "optimizer.lr=1e-4"],
    ["lora=mlp", "lora.dropout=0.1", "optimizer.clip_norm=1"],
    ["experiment=quickstart", "trainer.epochs=3"],
    ["model.head_dropout=0.2", "data=digits", "data.cache_size=null", "optimizer.clip_norm=null"],
]
PRESETS = {"quickstart": 24, "rank_alpha_dropout": 81, "rank_lr": 45, "targets": 45, "baselines": 45}


@pytest.fixture(scope="module")
def loader():
    """Composes trials, with Hydra in place."""
    with initialized():
        yield Composer("config", [])


@pytest.fixture
def small(loader):
    """The small trial, composed; to be changed."""
    return loader(list(SMALL))


def without_hydra(config):
    return {key: config[key] for key in config if key != "hydra"}


def test_the_quick_way_gives_hydras_config(loader):
    ids = set()
    for overrides in GRID:
        line = [*SMALL, *overrides]
        quick, exact = loader(line), loader.exactly(line)
        assert quick == without_hydra(exact), overrides
        ids.add(trial_id(from_omegaconf(quick, {})))
    assert len(ids) == len(GRID)


@pytest.mark.parametrize(("name", "trials"), PRESETS.items())
def test_presets(name, trials, project_root):
    text = (project_root / "conf" / "sweep" / f"{name}.yaml").read_text().splitlines()
    assert text[:2] == ["# @package _global_", f"# python -m lora_vit.train sweep={name}"]
    assert "?" in text[2]
    with initialized():
        request = expand([f"sweep={name}", "experiment=quickstart", "trainer.accelerator=cpu"])
    assert len({trial.trial_id for trial in request.trials}) == trials
    assert re.fullmatch(rf"outputs/sweeps/{name}-[0-9a-f]{{6}}", str(request.folder))


# --- one trial


def test_alpha_follows_the_rank(small):
    small.lora.rank, small.lora.alpha = 8, "${rank_times:2}"
    assert from_omegaconf(small).lora.alpha == 16.0
    small.lora.rank = None
    assert small.lora.alpha is None
    waiting = OmegaConf.create({"params": {"lora.alpha": "${rank_times:2}"}})  # a preset's, before there are trials
    assert waiting.params["lora.alpha"] == "${rank_times:2}"


def test_resolvers_of_ids_and_sizes(loader, small):
    small.data.cache_size = "${at_least:16,${model.image_size},'9'}"
    assert small.data.cache_size == 16
    changed = loader.exactly([*SMALL, "lora=none", "lora.rank=4"])
    assert changed.hydra.sweep.subdir == trial_id(trial_config("lora=none")), "its idle rank is no part of it"
    OmegaConf.set_struct(changed, False)
    changed.run_name = "${trial_id:}"
    assert changed.run_name == resolve.UNKNOWN_ID, "nothing else may stand there"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modle": 1}, "unknown key 'modle', did you mean 'model'?"),
        ({"lora.rank": "???"}, "lora.rank has no value: give one, for example lora.rank=..."),
        ({"seed": "???"}, "seed has no value: give one, for example seed=..."),
        ({"seed": "${nothing}"}, "Interpolation key 'nothing' not found"),
    ],
)
def test_an_impossible_trial_ends_in_a_line(small, changes, said):
    broken = OmegaConf.create(OmegaConf.to_container(small))
    for key, value in changes.items():
        OmegaConf.update(broken, key, value)
    with pytest.raises(ConfigError, match=re.escape(said)):
        from_omegaconf(broken)
    del broken.lora
    with pytest.raises(ConfigError, match=r"unknown key|lora has no value: leave '~lora' out"):
        from_omegaconf(broken)


@pytest.mark.parametrize(("method", "idle"), [("none", "lora.rank=4"), ("full", "lora.blocks=[0]")])
def test_what_has_no_effect_is_refused_alone_and_dropped_in_a_sweep(method, idle, loader):
    config = loader([*SMALL, f"lora={method}", idle])
    with pytest.raises(ConfigError, match=re.escape(idle)):
        from_omegaconf(config)
    assert from_omegaconf(config, {}) == trial_config(f"lora={method}")


def test_in_a_sweep_a_probe_has_one_rate_and_what_is_not_done_no_strength(loader):
    config = loader([*SMALL, "lora=none", "optimizer.head_lr=0.5", "optimizer.lora_b_lr_ratio=4", "data.mixup_alpha=2"])
    assert from_omegaconf(config, {}) == trial_config("lora=none", "optimizer.lr=0.5")
    digits, dropped = loader([*SMALL, "data=digits", "data.official_val=true", "data.cache_size=16"]), dict[str, str]()
    assert from_omegaconf(digits, dropped) == trial_config("data=digits", "data.cache_size=null")
    assert dropped == dict.fromkeys(("data.official_val", "data.cache_size"), "data=digits")


def test_weights_are_known_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path, trial = tmp_path / "w.safetensors", trial_config()
    save_file({"a": torch.zeros(1)}, path)
    trial.model.weights = "~/w.safetensors"
    for _ in range(2):  # the second time the given one is what is there
        identify(trial)
    given = trial.model.weights_sha256
    assert given == file_sha256(path)
    save_file({"a": torch.ones(1)}, path)
    says = f"model.weights_sha256={given} is asked for, but what is there has {file_sha256(path)}: give the same files"
    with pytest.raises(ConfigError, match=says):
        identify(trial)
    trial.model.weights = None
    with pytest.raises(ConfigError, match="but what is there has None"):
        identify(trial)


def test_content_that_is_not_the_given_one(monkeypatch):
    monkeypatch.setattr(resolve, "known_content", lambda data, fetch: "60 images" if fetch else None)
    trial = trial_config()
    for fetch, given, found in ((True, None, "60 images"), (False, None, None), (False, "7 images", "7 images")):
        trial.data.content = given
        identify(trial, fetch)
        assert trial.data.content == found
    with pytest.raises(ConfigError, match=r"data\.content=7 images .* has 60 images: give the same files"):
        identify(trial)


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
            return without_hydra(way([*SMALL, *overrides]))
        except Exception as error:
            return explain(error)

    assert outcome(loader) == outcome(loader.exactly)


def test_a_value_costs_no_composition(monkeypatch):
    exactly, whole = Composer.exactly, []
    monkeypatch.setattr(Composer, "exactly", lambda self, lines: whole.append(list(lines)) or exactly(self, lines))
    with initialized():
        loader = Composer("config", [])
        first = loader(["data=fake", "seed=1", "lora=qv"])
        assert loader(["data=fake", "seed=2", "lora=qv"]).seed == 2
        assert (first.seed, loader(["data=fake", "lora=qv"]).seed) == (1, 0), "one trial's value is no other's"
        loader(["data=fake"])
    assert whole == [["data=fake", "lora=qv"], ["data=fake"]]


def test_all_trials_with_their_labels(loader):
    swept = [
        ["lora.rank=2", "seed=0"],
        ["lora=none", "lora.rank=2", "seed=0"],
        ["lora=full", "lora.alpha=2.0", "+lora.dropout=0.1", "seed=0"],
    ]
    trials = compose_all(loader, SMALL, swept)
    assert [trial.label for trial in trials] == ["rank=2 seed=0", "lora=none seed=0", "lora=full seed=0"]
    assert [trial.overrides for trial in trials] == [[*SMALL, *overrides] for overrides in swept]
    assert [trial.config for trial in trials] == [trial_config(lines[0]) for lines in swept]
    assert [trial.dropped for trial in trials] == [
        {}, {"lora.rank": "lora=none"}, {"lora.alpha": "lora=full", "lora.dropout": "lora=full"}
    ]  # fmt: skip


def test_what_is_dropped_is_known_wherever_it_was_given(loader):
    fixed = [*SMALL, "optimizer.head_lr=0.5", "data.mixup_alpha=2", "optimizer.eps=1e-6"]
    adamw, probe = compose_all(loader, fixed, [["data.augment=mixup"], ["optimizer=sgd", "lora=none"]])
    assert adamw.dropped == {}
    assert probe.dropped == {"data.mixup_alpha": "data.augment=none", "optimizer.head_lr": "lora=none",
                             "optimizer.eps": "optimizer.name=sgd"}  # fmt: skip
    assert probe.config == trial_config("optimizer=sgd", "lora=none", "optimizer.lr=0.5")
    assert probe.label == "optimizer=sgd lora=none"


def test_trials_that_cannot_run_are_told_together(loader):
    swept = ["lora.rank=0"], ["lora.rank=2"], ["lora.rank=0", "seed=1"], ["lora.rnk=2"], ["lora.rank=two"]
    with pytest.raises(ConfigError) as caught:
        compose_all(loader, SMALL, swept)
    told = (r"4 of 5 trials cannot run, so none is started:\n  lora.rank=0 .* from 1 up.*\[rank=0 and 1 more\]\n"
            r"  .*'lora.rnk'.* 'lora.rank'\?.*\[rnk=2\]\n  lora.rank=two is impossible: .*\[rank=two\]")  # fmt: skip
    assert re.fullmatch(told, str(caught.value))


# --- what a sweep's command asks for


def asked(*lines: str, folder: Path | None = None) -> Request:
    with initialized():
        return expand([*SMALL, *lines], folder)


def test_a_grid_is_every_combination(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = asked("lora.rank=2,4", "seed=range(2)", "sweep.pack_size=3")
    assert [trial.label for trial in request.trials] == [f"rank={r} seed={s}" for r in (2, 4) for s in (0, 1)]
    assert request.options.pack_size == "3"
    assert (request.engine.name, request.search) == ("local", None)
    assert re.fullmatch(r"outputs/sweeps/rank_seed-[0-9a-f]{6}", str(request.folder))
    assert asked("lora.rank=2,4,8", "seed=0,1").folder == request.folder, "a grown list"
    assert asked("lora.rank=2,4", "seed=0,1", "trainer.log_every=5").folder == request.folder, "no other numbers"
    assert asked("lora.rank=2,4", "seed=0,1", "trainer.epochs=3").folder != request.folder
    assert re.fullmatch(r"sweep-[0-9a-f]{6}", asked("seed=0").folder.name)
    assert asked("model.name=vit_tiny,vit_tiny", "data.name=fake,fake").folder.name[:5] == "name-", "each word once"
    many = ("optimizer.weight_decay", "trainer.validate_every", "trainer.checkpoint_every", "data.train_per_class")
    assert asked("data.batch_size=8,16", *(f"{key}=choice(1)" for key in many)).folder.name[60] == "-", "bounded"
    assert asked("seed=0,1", "sweep.name=mine").folder == Path("outputs/sweeps/mine")
    assert asked("seed=0,1", folder=tmp_path / "a,b c").folder == tmp_path / "a,b c"
    quoted = asked("sweep.name='2024_11'", "data.root='a,b'", "lora.rank=1,2")
    assert quoted.folder == Path("outputs/sweeps/2024_11")
    assert [trial.config.data.root for trial in quoted.trials] == [f"{tmp_path}/a,b"] * 2


def test_trackers_are_no_part_of_ids_names_or_studies_and_reach_every_trial():
    plain, without = asked("lora.rank=1,2"), asked("lora.rank=1,2", "tracker=[]")
    assert plain.folder == without.folder
    for one, other in zip(plain.trials, without.trials, strict=True):
        assert one.trial_id == other.trial_id
        assert (list(one.config.tracker), other.config.tracker) == (["tensorboard"], {})
    space = ("lora.rank=choice(1,2)", "sweep.trials=3")
    searches = [asked(*space, *more).search for more in ((), ("tracker=[]",))]
    assert searches[0]["bases"] == searches[1]["bases"]
    found = [suggested(search, {"lora.rank": "2"}).config.tracker for search in searches]
    assert found == [plain.trials[0].config.tracker, {}]


REFUSED = [
    (["seed=range(0,0)"], ["the sweep is empty"]),
    (["sweep=rank_lrr"], ["rank_lrr", "did you mean 'rank_lr'"]),
    (["sweep.pack_size=0"], ["sweep.pack_size=0", "from 1 up, or auto"]),
    (["sweep.pack_sise=2"], ["sweep.pack_sise", "did you mean 'sweep.pack_size'"]),
    (["seed=0,1", "sweep.pack_size=1,2"], ["sweep.pack_size", "cannot be swept"]),
    (["seed=0,1", "trainer.devices=2"], ["trainer.devices=2", "sweep.workers=2"]),
    (["lora.rank=0,4,33"], ["2 of 3 trials cannot run, so none is started", "lora.rank=0", "[rank=0]", "lora.rank=33"]),
    (["seed=0,1", "data=imagefolder", "data.root=nowhere"], ["nowhere", "not a folder"]),
    (["seed=0,1", "hydra/launcher=basic"], ["hydra/launcher=basic has no effect", "engine=local"]),
    (["seed=0,1", "engine=slrm"], ["'engine/slrm' does not exist", "'slurm'"]),
    (["engine=local,slurm"], ["engine", "cannot be swept"]),
    (["seed=0,1", "tracker=[tensorbord]"], ["'tracker/tensorbord'", "did you mean 'tensorboard'?", "wandb"]),
    (["seed=0,1", "tracker=null"], ["tracker=null: a group has no option 'null'", "tracker=[]"]),
    (["tracker=tensorboard,mlflow"], ["tracker cannot be swept", "tracker=[tensorboard,mlflow]"]),
    (["seed=0,1", "sweep.wait=false"], ["sweep.wait=false needs engine=slurm"]),
    (["lora.rank=interval(1,4)"], ["lora.rank is a range without steps", "sweep.trials=30"]),
    (["sweep.trials=3"], ["nothing is searched", "interval"]),
    (["sweep.trials=3", "seed=0,1"], ["seed cannot be searched"]),
    (["sweep.trials=3", "optimizer.momentum=interval(0,0.9)"], ["optimizer.momentum has no effect with"]),
    (["sweep.trials=3", "lora.rank=1,2", "sweep.margin=1"], ["sweep.trials=3 makes a search", "sweep.margin a race"]),
    (["seed=0,1", "data.root=2024_11"], ["data.root=2024_11 is read as 202411", "\"data.root='2024_11'\""]),
    (["lora.rank=1,2", "sweep.trials=3", "sweep.dry_run=true"], ["sweep.dry_run=true cannot say what a search"]),
    (["lora.rank=1,2", "sweep.margin=1", "sweep.most_seeds=4"], ["sweep.most_seeds=4", "sweep.first_seeds=5"]),
    (["lora.rank=1,2", "sweep.first_seeds=4"], ["sweep.first_seeds=4 has no effect without sweep.margin"]),
    (["lora.rank=1,2", "seed=0,1", "sweep.margin=1"], ["seed cannot be swept in a race (sweep.margin)", "seed=0"]),
    (["lora.rank=1,2", "sweep.margin=1", "data.split_seed=${seed}"], ["split_seed depends on the seed"]),
    (["seed=0,1", "hydra.job.chdir=true"], ["hydra.job.chdir=true has no effect", "hydra/sweeper=basic"]),
    (["seed=0,1", "+hydra.callbacks.mine._target_=x.Y"], ["hydra.callbacks has no effect", "hydra/sweeper=basic"]),
    (["seed=0,1", "hydra.verbose=true"], ["hydra.verbose=true has no effect", "hydra/sweeper=basic"]),
    (["seed=0,1", "hydra/job_logging=default"], ["hydra/job_logging=default has no effect", "hydra/sweeper=basic"]),
    (["seed=0,1", "hydra.sweep.subdir=x"], ["hydra.sweep.subdir=x has no effect", "hydra/sweeper=basic"]),
    (["seed=0,1", "hydra.run.dir=x"], ["hydra.run.dir=x has no effect on a sweep", "sweep.name"]),
    (["lora.rank=1,2", "lora.alpha=${rank_times:2}", "hydra.run.dir=x"], ["hydra.run.dir=x has no effect on a sweep"]),
    (["lora.rank=1,2", "optimizer.lr=${oc.env:NO_RATE}"], ["2 of 2 trials cannot run", "'NO_RATE' not found"]),
    (["+hydra.sweeper.params={seed:'0,1'}", "sweep.name=${oc.env:NO_NAME}"], ["'NO_NAME' not found"]),
    (["hydra.sweeper.params={seed:'0,1'}"], ["hydra.sweeper.params", "see --cfg hydra"]),
    (["hydra.sweeper.params=3"], ["hydra.sweeper.params"]),
    (["+hydra.sweeper.params={seed:[0,1]}"], ["seed=[0, 1] is impossible"]),
    (["seed=0,1.5,x"], ["2 of 3 trials cannot run", "seed=1.5 is impossible", "seed=x is impossible"]),
    (["engine=slurm", "engine.timeout_min=long", "seed=0,1"], ["engine.timeout_min", "long"]),
    (["data=imagefolder", "data.root=/a,b"], ["data.root=/a is not a folder", "a comma separates values", "'a,b'"]),
    (["seed=0,1", "+hydra.launcher.n_jobs=2"], ["hydra.launcher.n_jobs=2", "engine="]),
    (["trainer.checkpoint_activations=true,2"], ["trainer.checkpoint_activations=2 is impossible", "true or false"]),
    (["lora.rank=interval(0,4)", "sweep.trials=9"], ["1 of 2 trials", "lora.rank=0"]),
    (["optimizer.lr=tag(log,interval(0,1))", "sweep.trials=9"], ["optimizer.lr=interval(0,1)", "above 0 first"]),
    (["optimizer.lr=interval(1,0.1)", "sweep.trials=9"], ["optimizer.lr=interval(1,0.1)", "then a higher"]),
    (["data.root=a{b", "seed=0,1"], ["data.root=a{b", '"data.root=\'a{b\'"']),
    (["model.weights=a.pt,b.pt"], ["2 of 2 trials", '"model.weights=\'a,b\'"']),
]
"""Overrides, and words that the message must hold."""


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[" ".join(o) for o, _ in REFUSED])
def test_what_a_sweep_refuses(overrides, words, tmp_path, monkeypatch):
    """With nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        api.sweep([*(line for line in SMALL if line.partition("=")[0] not in overrides), *overrides])
    assert [word for word in words if word not in str(refused.value)] == [], refused.value
    assert list(tmp_path.iterdir()) == []


def test_a_search_is_kept_as_plain_values(tmp_path, monkeypatch):
    """A worker elsewhere composes its trials from them, without Hydra."""
    monkeypatch.chdir(tmp_path)
    request = asked("lora=choice(default,none)", "lora.rank=interval(1,4)", "optimizer.lr=tag(log,interval(1e-4,0.1))",
                    "sweep.trials=9", "data.root=images")  # fmt: skip
    search = request.search or {}
    assert [trial.config.optimizer.lr for trial in request.trials] == [1e-4, 0.1], "both ends are validated"
    assert search["trials"] == 9
    rank = {"low": 1, "high": 4, "log": False, "integer": True, "group": False, "step": 1}
    assert search["space"]["lora.rank"] == rank
    assert search["space"]["optimizer.lr"]["log"]
    assert [of["group"] for of in search["space"].values()] == [True, False, False]
    assert [options for options, _ in search["bases"]] == [[["lora", "default"]], [["lora", "none"]]]
    assert "hydra" not in search["bases"][0][1]
    monkeypatch.chdir("/")
    trial = suggested(search, {"lora": "default", "lora.rank": 2, "optimizer.lr": 1e-3})
    assert trial.config.data.root == f"{tmp_path}/images"


def test_a_setting_that_comes_later_changes_no_study_and_no_sweeps_name(monkeypatch):
    """At the value that means as before it is no part of either; what refers to it still can."""
    lines = ["lora.rank=interval(1,4)", "sweep.trials=9", "optimizer.head_lr=0.5", "data.augment=cutmix",
             "data.cutmix_alpha=${data.mixup_alpha}"]  # fmt: skip
    named: list[Any] = []
    monkeypatch.setattr(compose, "digest", lambda value, length: named.append(value) or "0" * length)
    request = asked(*lines)
    ((_, text),) = request.search["bases"]
    for seen in (text, str(named[0][0])):
        assert re.search(r"head_lr'?: 0\.5", seen)
        assert "momentum" not in seen
        assert "lora_b_lr_ratio" not in seen
    assert "mixup_alpha: 1.0" in text
    assert suggested(request.search, {"lora.rank": 4}).trial_id == request.trials[1].trial_id


# --- Hydra's own idioms


@pytest.mark.slow
def test_paths_may_be_hydras(tmp_path, monkeypatch):
    """``${hydra:runtime.cwd}`` alone and in a sweep."""
    monkeypatch.chdir(tmp_path)
    place = "data.cache_dir=${hydra:runtime.cwd}/here"
    run_command("hydra.run.dir=single", place, "trainer.epochs=1", cwd=tmp_path)
    trials = [from_dict(read_record(tmp_path / "single").config), *(trial.config for trial in asked(place).trials)]
    assert [trial.data.cache_dir for trial in trials] == [f"{tmp_path}/here"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["hydra", "job"])
def test_printing_the_configuration_fetches_nothing(what, tmp_path):
    """The data set is not here, and a name that would need it says so."""
    line = [sys.executable, "-m", "lora_vit.train", "--cfg", what, "--resolve", f"data.root={tmp_path}/empty"]
    done = run(line, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fetch" not in done.stderr + done.stdout
    assert (f"_{resolve.UNKNOWN_ID}" in done.stdout) == (what != "job")
    assert list(tmp_path.iterdir()) == []


# --- errors


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Could not override 'xyzzyx'.", "unknown key 'xyzzyx' (see --help)"),
        ("Could not load 'zzz'\n\nAvailable options in 'lora':\n\tdefault\n\tqv\nConfig search path:\n\tpkg",
         "'zzz' does not exist (one of: default, qv)"),
        ("first\nline", "first"),
    ],
)  # fmt: skip
def test_errors_in_one_line(text, line):
    """Where nothing is near; tests/integration/test_bad_input.py has what commands show otherwise."""
    assert explain(ValueError(text)) == line


def test_an_error_raised_while_another_was_handled():
    later, one, two = ValueError("later"), ValueError("one"), ValueError("two")
    later.__context__ = ConfigError("rank is bad")
    one.__cause__, two.__context__ = two, one  # a ring
    assert [explain(later), explain(one)] == ["rank is bad", "one"]
