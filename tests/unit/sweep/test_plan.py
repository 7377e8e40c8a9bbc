"""What may share a pack, where its trials stand, and how a sweep is called."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from plain_trials import BASELINE, PLAIN, plain_trial
from sweeps import LAUNCHED, leave_record, plain_job, sweep_run

from lora_vit.config import cell_id, trial_id
from lora_vit.records import CHECKPOINT
from lora_vit.sweep.plan import (
    Job,
    SweepRun,
    default_name,
    digest,
    group_key,
    label,
    make_groups,
    setup_key,
    short_key,
    without_duplicates,
)

INSIDE = {
    "model.head_dropout": 0.4,
    "optimizer.lr": 1.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": [0.5, 0.6],
    "optimizer.eps": 1e-6,
    "optimizer.decay_bias_and_norm": False,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.1,
    "optimizer.clip_norm": 1.0,
    "optimizer.label_smoothing": 0.1,
    "lora.rank": 8,
    "lora.alpha": 3.0,
    "lora.dropout": 0.5,
    "lora.scaling": "rslora",
    "lora.init": "gaussian",
    "seed": 7,
}
"""Another value of each setting that may differ inside a pack."""
BETWEEN = {
    "lora.method": "none",
    "lora.targets": ["q", "v"],
    "lora.blocks": [0],
    "lora.bias": "all",
    "trainer.epochs": 3,
    "trainer.devices": "2",
    "trainer.resume": "restart",
    "trainer.checkpoint_every": 1.0,
    "trainer.log_every": 2,
    "trainer.validate_every": 2,
}
"""Of each that makes another pack on the same data and backbone."""
BELOW = {
    "model.name": "vit_b_16",
    "model.weights": "IMAGENET1K_V1",
    "model.image_size": 8,
    "model.patch_size": 4,
    "model.num_layers": 3,
    "model.num_heads": 4,
    "model.hidden_dim": 64,
    "model.mlp_dim": 64,
    "model.library": "timm",
    "model.mean": [0.1, 0.2, 0.3],
    "model.std": [0.1, 0.2, 0.3],
    "model.interpolation": "bicubic",
    "model.weights_sha256": "0" * 64,
    "data.name": "cifar100",
    "data.content": "60 images",
    "data.root": "elsewhere",
    "data.batch_size": 4,
    "data.augment": "crop_flip",
    "data.split_seed": 1,
    "data.val_fraction": 0.3,
    "data.test_fraction": 0.3,
    "data.train_per_class": 10,
    "data.official_val": True,
    "data.cache_size": 8,
    "data.cache_dir": "elsewhere",
    "trainer.precision": "fp32",
    "trainer.accelerator": "gpu",
    "trainer.compile": True,
}
"""Of each that needs other data or another backbone."""


def test_every_setting_is_inside_or_between_packs():
    settings = {f"{group}.{key}" for group, keys in PLAIN.items() if isinstance(keys, dict) for key in keys}
    assert settings | {"seed"} == INSIDE.keys() | BETWEEN.keys() | BELOW.keys()


@pytest.mark.parametrize("setting", [*INSIDE, *BETWEEN, *BELOW])
def test_what_shares_a_pack_and_what_a_backbone(setting):
    plain, other = plain_trial(), plain_trial({setting: {**INSIDE, **BETWEEN, **BELOW}[setting]})
    assert (group_key(other) == group_key(plain)) == (setting in INSIDE)
    assert (setup_key(other) == setup_key(plain)) == (setting not in BELOW)


def test_the_same_places_written_otherwise_share_a_pack():
    key = group_key(plain_trial({"lora.targets": ["q", "v"], "lora.blocks": [0, 1]}))
    assert key == group_key(plain_trial({"lora.targets": ["v", "q"], "lora.blocks": [1, 0]}))
    assert key == group_key(plain_trial({"lora.targets": ["q", "v"]})), "there are two blocks"


def test_groups_and_their_trials_in_the_order_in_which_they_are_met():
    full = {**BASELINE, "lora.method": "full"}
    grid = [
        {"seed": 1, "lora.rank": 1},
        full,
        {"seed": 0, "lora.rank": 2},
        {"seed": 1, "lora.rank": 2},
        {"seed": 0, "lora.rank": 1},
    ]
    jobs = [plain_job(changes) for changes in grid]
    first, second = make_groups(jobs)
    assert first.jobs == [jobs[0], jobs[2], jobs[3], jobs[4]]
    assert second.jobs == [jobs[1]]
    assert (first.key, second.key) == (group_key(jobs[0].config), group_key(jobs[1].config))
    assert (first.alone, second.alone) == (False, True)
    assert make_groups([]) == []


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({}, False),
        ({"lora.bias": "all"}, True),
        ({"lora.bias": "lora_only"}, True),
        ({**BASELINE, "lora.method": "none"}, False),
        ({**BASELINE, "lora.method": "full"}, True),
    ],
)
def test_who_trains_parameters_of_the_trunk_trains_alone(changes, alone):
    assert plain_trial(changes).lora.trains_trunk is alone


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, "LoRA on q k v o fc1 fc2"),
        ({"lora.targets": ["q", "v"], "lora.blocks": [0, 1]}, "LoRA on q v in blocks 0,1"),
        ({"lora.bias": "all", "lora.blocks": [1]}, "LoRA on q k v o fc1 fc2 in blocks 1, bias all"),
        ({**BASELINE, "lora.method": "none"}, "linear probe"),
        ({**BASELINE, "lora.method": "full"}, "full fine-tuning"),
    ],
)
def test_how_a_group_is_called(changes, what):
    (group,) = make_groups([plain_job(changes)])
    assert group.title == f"vit_tiny 16 px, fake, batch 8, {what}"


def test_duplicates():
    """The first of equal trials stays in its place."""
    jobs = [Job(plain_trial({"lora.rank": rank}), [str(i)]) for i, rank in enumerate((4, 2, 4, 2, 4, 1))]
    assert without_duplicates(jobs) == ([jobs[0], jobs[1], jobs[5]], 3)
    assert without_duplicates(jobs[:2]) == (jobs[:2], 0)


# --- a trial of a run


def test_a_job_is_its_trial():
    config = plain_trial({"seed": 3})
    job = Job(config, ["seed=3"])
    assert (job.trial_id, job.cell_id) == (trial_id(config), cell_id(config))
    assert (job.board, job.label) == ("", "")


def test_where_a_trial_lies(tmp_path):
    """Its TensorBoard folder is called after the settings, unless it has a name already."""
    plain, named = plain_job(), plain_job({"seed": 1}, label="X=4 weights=a/b.pt")
    run = sweep_run(tmp_path, [plain, named])
    assert run.folder_of(plain) == tmp_path / plain.trial_id
    assert run.board_of(plain) == tmp_path / "tensorboard" / plain.trial_id
    assert run.board_of(named) == tmp_path / "tensorboard" / f"X=4_weights=a_b.pt_{named.trial_id}"
    named.board = "as before"
    assert run.board_of(named) == tmp_path / "tensorboard" / "as before"


def test_a_trials_state_is_of_the_trial_that_is_meant(tmp_path):
    job = plain_job()
    other = plain_job({"seed": 1})
    run = sweep_run(tmp_path, [job, other])
    assert run.state_of(job).status == "new"
    leave_record(run, job, "completed")
    assert run.state_of(job).status == "completed"
    run.folder_of(job).rename(run.folder_of(other))
    state = run.state_of(other)
    assert state.status == "refused"
    assert "seed is 0 there, 1 here" in state.problem
    assert run.is_ended(other, state)


def test_a_restart_counts_what_began_since_the_command(tmp_path):
    again = plain_job({"seed": 0, "trainer.resume": "restart"})
    once = plain_job({"seed": 1})
    run = sweep_run(tmp_path, [again, once])
    for job in (again, once):
        leave_record(run, job, "completed", started=LAUNCHED - 1)
    assert [run.is_ended(job, run.state_of(job)) for job in (again, once)] == [False, True]
    leave_record(run, again, "completed", started=LAUNCHED)
    assert run.is_ended(again, run.state_of(again))


@pytest.mark.parametrize("again", [False, True])
def test_what_failed_is_open_again_where_it_is_asked_for(again, tmp_path):
    job = plain_job()
    run = sweep_run(tmp_path, [job], retry_failed=again)
    leave_record(run, job, "failed")
    assert run.is_ended(job, run.state_of(job)) is not again


def test_the_order_of_training(tmp_path):
    """What was begun was promised before; then whole seeds, as the grid has them."""
    grid = [{"seed": seed, "lora.rank": rank} for rank in (1, 2) for seed in (1, 0, 10)]
    jobs = [plain_job(changes) for changes in grid]
    run = sweep_run(tmp_path, jobs)
    for job in (jobs[4], jobs[2], jobs[0]):
        leave_record(run, job, "running")
        if job is not jobs[0]:
            (run.folder_of(job) / CHECKPOINT).touch()
    assert run.in_order().jobs == tuple(jobs[i] for i in (4, 2, 1, 0, 3, 5))
    assert SweepRun(run.jobs, run.folder, run.options, run.launched).workers == 1


# --- names


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": [2, 3], "a": 1}, '{"a": 1, "b": [2, 3]}'),
        ([Path("some") / "where", None], '["some/where", null]'),
        ("x", '"x"'),
    ],
)
def test_a_digest_is_of_the_text_that_a_value_is_as_json(value, text):
    whole = hashlib.sha256(text.encode()).hexdigest()
    assert digest(value) == whole[:10]
    assert digest(value, 6) == whole[:6]


@pytest.mark.parametrize(
    ("key", "short"),
    [
        ("seed", "seed"),
        ("optimizer.lr", "lr"),
        ("a.b.c", "c"),
        ("hydra/launcher", "launcher"),
        ("a/b/c", "c"),
        ("+seed", "seed"),
        ("++lora.rank", "rank"),
        ("~seed", "seed"),
    ],
)
def test_short_keys(key, short):
    assert short_key(key) == short


def test_label():
    """What differs between trials, in the order given; a value may have any signs."""
    overrides = ["lora.rank=4", "seed=0", "sweep.name=x", "hydra.verbose=true", "data=fake", "model.weights=a/b=c.pt"]
    assert label(overrides, {"data=fake"}) == "rank=4 seed=0 weights=a/b=c.pt"
    assert label(overrides[:1], {"lora.rank=4"}) == ""


BASE = {
    "seed": 0,
    "data": {"name": "fake", "root": "here"},
    "lora": {"rank": 4, "alpha": 32.0},
    "trainer": {"devices": "auto", "epochs": 2},
    "sweep": {"pack_size": "auto"},
    "hydra": {"verbose": False},
}


def name_of(changes=(), swept=("lora.rank", "seed"), fixed=()) -> str:
    """The name where some of what is composed is otherwise: ``{"trainer": {"epochs": 3}}``."""
    base = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    for key, value in dict(changes).items():
        base[key] = {**base[key], **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
    return default_name(base, list(swept), dict(fixed))


@pytest.mark.parametrize(
    ("changes", "fixed"),
    [
        ({"seed": 3}, {}),
        ({"lora": {"rank": 8}}, {}),
        ({"data": {"root": "there"}}, {}),
        ({"trainer": {"devices": "2"}}, {}),
        ({"sweep": {"pack_size": "2"}}, {}),
        ({"hydra": {"verbose": True}}, {}),
        ({}, {"hydra/launcher": "basic"}),
        ({}, {"hydra.verbose": "true"}),
        ({}, {"sweep.pack_size": "2"}),
        ({}, {"trainer.devices": "2"}),
    ],
)
def test_a_name_stays_when_values_grow(changes, fixed):
    """And whatever decides no numbers changes."""
    assert name_of(changes, fixed=fixed) == name_of()


def test_a_name_changes_with_what_is_fixed():
    names = [
        name_of(),
        name_of({"lora": {"alpha": 16.0}}),
        name_of({"trainer": {"epochs": 3}}),
        name_of({"data": {"name": "digits"}}),
        name_of(fixed={"data": "cifar100"}),
        name_of(fixed={"data": "digits"}),
        name_of(swept=("lora.rank",)),
        name_of({"seed": 1}, swept=("lora.rank",)),
    ]
    assert len(set(names)) == len(names)


def test_a_swept_group_leaves_the_name_whatever_is_in_it():
    assert name_of({"data": {"name": "digits"}}, swept=("data",)) == name_of(swept=("data",))
    assert default_name({"seed": 0}, ["lora.rank"], {}).startswith("rank-"), "nothing of it need be there"
    assert default_name({"seed": 0, "lora": {"alpha": 1.0}}, ["lora.rank"], {}).startswith("rank-")


def test_the_words_of_a_name():
    def words(**given) -> str:
        name, _, digits = name_of(**given).rpartition("-")
        assert len(bytes.fromhex(digits)) == 3
        return name

    assert words() == "rank_seed"
    assert words(swept=("seed", "lora.rank")) == "seed_rank"
    assert words(swept=("lora.rank", "model.rank", "seed")) == "rank_seed"
    assert words(swept=()) == "sweep"
    assert words(fixed={"sweep": "rank_lr"}) == "rank_lr"
    long = [f"optimizer.long_name_{i}" for i in range(20)]
    assert words(swept=long) == "_".join(f"long_name_{i}" for i in range(20))[:60]
