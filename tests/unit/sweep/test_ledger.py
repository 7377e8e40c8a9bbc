"""The plan file of a sweep: what it holds, how it grows, and what is said where it cannot be read or written."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from lora_vit.sweep.ledger import PLAN_SCHEMA, Ledger, trial_folders
from omegaconf import OmegaConf
from sweeps import plain_job, seed_jobs, sweep_run

from lora_vit.config import to_dict
from lora_vit.errors import ConfigError
from lora_vit.files import locked
from lora_vit.records import PLAN
from lora_vit.sweep import ledger as ledger_module


@pytest.fixture
def noon(monkeypatch):
    """The clock says 43200."""
    monkeypatch.setattr(ledger_module.time, "time", lambda: 43200.0)


def test_the_plan_file_holds_every_trial_ever_asked_for(noon, tmp_path):
    """Their cells, how they were asked for first, how they are called now, and the last command."""
    ledger = Ledger(tmp_path / "deep/sweep")
    assert ledger.read() == {
        "schema": 3, "created": 43200.0, "base": None, "trials": {}, "pack_sizes": {}, "race": None,
    }  # fmt: skip
    assert not ledger.folder.exists(), "reading makes nothing"
    first = plain_job({"lora.rank": 8}, label="rank=8")
    other = plain_job({"lora.rank": 2}, label="rank=2")
    again = plain_job({"lora.rank": 8}, label="rank=8 seed=0")
    again.overrides = ["seed=0", "lora.rank=8"]
    ledger.add([first, other], "first command")
    plan = ledger.add([again], "second command")
    assert json.loads((tmp_path / "deep/sweep/sweep.json").read_text()) == plan
    assert plan == {
        "schema": 3,
        "race": None,
        "created": 43200.0,
        "command": "second command",
        "base": json.loads(json.dumps(to_dict(first.config))),
        "pack_sizes": {},
        "trials": {
            first.trial_id: {
                "cell": first.cell_id,
                "overrides": ["lora.rank=8"],
                "label": "rank=8 seed=0",
                "board": f"rank=8_{first.trial_id}",
                "differs": {},
            },
            other.trial_id: {
                "cell": other.cell_id,
                "overrides": ["lora.rank=2"],
                "label": "rank=2",
                "board": f"rank=2_{other.trial_id}",
                "differs": {"lora.rank": 2},
            },
        },
    }
    assert ledger.read() == plan


def test_the_file_is_replaced_only_where_something_changed(tmp_path):
    ledger, path = Ledger(tmp_path), tmp_path / PLAN
    ledger.update(lambda plan: None)
    assert json.loads(path.read_text())["trials"] == {}, "an empty plan is written once"
    ledger.add([plain_job()], "command")
    os.link(path, tmp_path / "before")
    ledger.add([plain_job()], "command")
    assert path.samefile(tmp_path / "before")
    ledger.update(lambda plan: plan.update(schema=plan.pop("schema")))
    assert path.samefile(tmp_path / "before"), "the order of the keys says nothing"
    ledger.add([plain_job()], "another command")
    assert not path.samefile(tmp_path / "before")


def test_a_plan_is_changed_by_one_process_at_a_time(tmp_path):
    """And what another wrote meanwhile is read under the lock."""
    ledger = Ledger(tmp_path)
    lock = tmp_path / ".sweep.lock"

    def change(plan):
        with pytest.raises(BlockingIOError), locked(lock, wait=False):
            pass
        plan["command"] = "changed"

    assert ledger.update(change)["command"] == "changed"
    with locked(lock, wait=False):
        pass


FIGURES = {"size": 2, "seconds_per_trial_epoch": {"1": 1.0, "2": 0.5}, "limited_by_trials": True}


def test_a_measured_pack_size_holds_for_as_many_trials_as_it_was_measured_with(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.pack_size("kind", 2) is None
    ledger.keep_pack_size("kind", FIGURES)
    assert ledger.pack_size("other", 2) is None
    assert ledger.pack_size("kind", 3) == FIGURES
    assert ledger.pack_size("kind", 4) is None, "packs of four have not been tried"
    free = {**FIGURES, "limited_by_trials": False}
    ledger.keep_pack_size("free", free)
    assert ledger.pack_size("free", 100) == free
    assert ledger.read()["pack_sizes"] == {"kind": FIGURES, "free": free}


def test_the_largest_size_tried_is_the_largest_number(tmp_path):
    """Not the last of the texts in order, where 16 comes before 8; and not the size that was chosen."""
    ledger = Ledger(tmp_path)
    figures = {"size": 1, "seconds_per_trial_epoch": {"8": 0.3, "16": 0.2, "1": 1.0}, "limited_by_trials": True}
    ledger.keep_pack_size("kind", figures)
    assert ledger.pack_size("kind", 31) == figures
    assert ledger.pack_size("kind", 32) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not whole JSON (Expecting value: line 1 column 1 (char 0)): remove it, the trials' records stay"),
        ('{"schema"', "is not whole JSON"),
        ("[]", "is of sweep version None, this program writes 3"),
        ("{}", "is of sweep version None, this program writes 3"),
        ('{"schema": 99}', "is of sweep version 99, this program writes 3: use the matching version of lora_vit"),
    ],
)
def test_a_plan_of_another_version_or_cut_in_half_is_refused(text, said, tmp_path):
    (tmp_path / PLAN).write_text(text)
    for act in (Ledger(tmp_path).read, lambda: Ledger(tmp_path).add([], "command")):
        with pytest.raises(ConfigError) as caught:
            act()
        assert f"{tmp_path / PLAN} {said}" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert (tmp_path / PLAN).read_text() == text
    assert PLAN_SCHEMA == 3


def test_a_folder_that_cannot_be_used_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "taken" / PLAN).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"file is a file: give another sweep\.name$"):
        Ledger(tmp_path / "file").read()
    with pytest.raises(ConfigError, match=r"sweep\.json cannot be read \(Is a directory\): give another sweep\.name$"):
        Ledger(tmp_path / "taken").read()
    for place, why in (("file", "File exists"), ("file/below", "Not a directory")):
        with pytest.raises(ConfigError) as caught:
            Ledger(tmp_path / place).add([], "command")
        remedy = "give another sweep.name or hydra.sweep.dir"
        assert str(caught.value) == f"{tmp_path / place} cannot be written ({why}): {remedy}"


def test_folders_of_trials_are_those_with_a_record(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").touch()
    (tmp_path / "own").mkdir()
    (tmp_path / "odd/record.json").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    assert trial_folders(tmp_path) == [tmp_path / name for name in ("a", "b", "c")]
    assert trial_folders(tmp_path / "absent") == []
    assert trial_folders(tmp_path / "notes.txt") == []


# --- runs

LORA_SETTINGS = [f"lora.{name}" for name in to_dict(plain_job().config)["lora"] if name != "method"]


def begun(folder, jobs, launched=1000.0, **changes):
    """The run of these jobs as its command has written it down."""
    run = dataclasses.replace(sweep_run(folder, jobs, **changes), launched=launched, hydra="hydra: {}\n")
    Ledger(folder).add(jobs, "command")
    return run, Ledger(folder).begin(run)


def test_a_worker_reads_the_run_that_the_command_asked_for(tmp_path):
    """All of it: which trials in which order, each with its settings and its name, and how they are to be trained."""
    jobs = [
        plain_job(
            {"lora.rank": 2, "lora.targets": ["v", "q"], "optimizer.lr": 3e-4, "seed": 5}, label="rank=2 lr=3e-4"
        ),
        plain_job(),
        plain_job({"lora.method": "none", **dict.fromkeys(LORA_SETTINGS)}, label="lora=none"),
    ]
    run, read = begun(tmp_path / "deep", jobs, workers=3, pack_size="2", on_failure="stop", retry_failed=True)
    assert read == dataclasses.replace(run, jobs=read.jobs)
    assert [to_dict(job.config) for job in read.jobs] == [to_dict(job.config) for job in jobs]
    assert [(job.trial_id, job.label, job.overrides) for job in read.jobs] == [
        (job.trial_id, job.label, job.overrides) for job in jobs
    ]
    assert read.board_of(read.jobs[0]) == tmp_path / "deep/tensorboard" / f"rank=2_lr=3e-4_{jobs[0].trial_id}"
    files = read.hydra_files(read.jobs[0])
    assert files["hydra.yaml"] == "hydra: {}\n"
    composed = OmegaConf.create(files["config.yaml"])
    assert (composed.optimizer.lr, composed.seed, composed.sweep.on_failure) == (3e-4, 5, "stop")
    assert list(OmegaConf.create(files["overrides.yaml"])) == jobs[0].overrides


def test_the_newest_run_is_worked_on_unless_one_is_named(tmp_path):
    first, second, third = seed_jobs(3)
    earlier, _ = begun(tmp_path, [first, second], launched=999.5)
    _, newest = begun(tmp_path, [third], launched=1000.0)
    assert [job.trial_id for job in newest.jobs] == [third.trial_id]
    assert Ledger(tmp_path).open_run().name == newest.name
    named = Ledger(tmp_path).open_run(earlier.name)
    assert [job.trial_id for job in named.jobs] == [first.trial_id, second.trial_id]


def test_a_trial_keeps_its_folder_of_event_files_when_it_is_called_otherwise(tmp_path):
    begun(tmp_path, [plain_job(label="rank=4")])
    _, read = begun(tmp_path, [plain_job(label="rank=4 seed=0")], launched=1001.0)
    assert read.jobs[0].label == "rank=4 seed=0"
    assert read.board_of(read.jobs[0]).name == f"rank=4_{read.jobs[0].trial_id}"


def test_what_no_worker_can_read_is_told_in_one_line(tmp_path, monkeypatch):
    (job,) = seed_jobs(1)
    with pytest.raises(ConfigError, match="has no run to work on"):
        Ledger(tmp_path).open_run()
    run, _ = begun(tmp_path, [job])
    with pytest.raises(ConfigError, match="has no run to work on"):
        Ledger(tmp_path).open_run("1.0")
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "__version__", "9.9")
        with pytest.raises(ConfigError, match=r"was begun by lora_vit 0\.1\.0, here is 9\.9: install the same"):
            Ledger(tmp_path).open_run(run.name)
    path = tmp_path / PLAN
    path.write_text(path.read_text().replace('"lr": 0.001', '"lr": 0.002'))
    with pytest.raises(ConfigError, match=f"was edited: trial {job.trial_id} is another one"):
        Ledger(tmp_path).open_run()


def test_a_folder_that_was_copied_in_part_is_told_in_one_line(tmp_path):
    run, _ = begun(tmp_path, seed_jobs(2))
    plan, file = tmp_path / PLAN, tmp_path / ".runs" / f"{run.name}.json"
    whole, values = plan.read_text(), json.loads(plan.read_text())
    del values["trials"][run.jobs[0].trial_id]
    plan.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"lacks a trial of it .*{run.jobs[0].trial_id}.*: give the sweep's command"):
        Ledger(tmp_path).open_run()
    plan.write_text(whole)
    for text in (file.read_text()[:-5], "{}", "[]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="is not whole, or sweep"):
            Ledger(tmp_path).open_run()
