"""What a trial leaves on disk: written whole, read back as it was, and refused in one line where it is damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from plain_trials import PLAIN, plain_trial

from lora_vit import files, records
from lora_vit.config import TrialConfig, ids, to_dict, trial_id
from lora_vit.errors import RecordError
from lora_vit.files import locked, read_rows, replacing, write_json, write_row
from lora_vit.records import (
    State,
    TrialRecord,
    read_record,
    state_of,
    write_record,
)
from lora_vit.stopping import repeating

NOW = 1000.0


@pytest.fixture
def clock(monkeypatch) -> None:
    """It is ``NOW``."""
    monkeypatch.setattr(records.time, "time", lambda: NOW)


# --- files that appear whole


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    """What was there stays until all is on the disk."""
    path, synced = tmp_path / "file", []

    def watched(handle: int) -> None:
        (temporary,) = (p for p in tmp_path.iterdir() if p != path)
        synced.append((path.read_bytes(), temporary.read_bytes(), temporary.name[:6]))

    monkeypatch.setattr(os, "fsync", watched)
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert synced == [(b"old", b"new", ".file.")]
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_who_may_read_a_file_is_the_users_to_say(tmp_path):
    """As for any new file."""
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "file", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("folder_went", [False, True])
def test_a_file_that_is_not_written_to_its_end_leaves_nothing(folder_went, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:  # noqa: PT012  (what is raised inside is the point)
        file.write(b"half")
        for other in tmp_path.glob(".file.*") if folder_went else ():
            other.unlink()
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failures", [2, 9])
def test_a_stale_handle_is_tried_again_a_few_times(failures, tmp_path, monkeypatch):
    """As where a file server has just moved."""
    left, waits, replace = [OSError(errno.ESTALE, "Stale file handle")] * failures, [], Path.replace

    def stale(path: Path, target: Path) -> Path:
        if left:
            raise left.pop()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stale)
    monkeypatch.setattr("lora_vit.files.time.sleep", waits.append)
    with contextlib.nullcontext() if failures == 2 else pytest.raises(OSError, match="Stale"):
        write_json(tmp_path / "record.json", {})
    assert (len(waits), (tmp_path / "record.json").exists()) == ((2, True) if failures == 2 else (3, False))


def test_json_is_readable_sorted_and_has_no_other_numbers(tmp_path):
    write_json(tmp_path / "file", {"b": (1, math.nan, [math.inf]), "a": {"x": -math.inf, "y": "ü"}})
    lines = '{\n "a": {\n  "x": null,\n  "y": "\\u00fc"\n },\n "b": [\n  1,\n  null,\n  [\n   null\n  ]\n ]\n}\n'
    assert (tmp_path / "file").read_text() == lines


# --- locks and signs of life


def test_a_lock_has_one_holder(tmp_path):
    path = tmp_path / "lock"
    (tmp_path / "other").touch()
    with locked(path):
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pytest.fail("two holders")
        assert path.exists()
    assert path.exists(), "it stays beside other files"
    (tmp_path / "other").unlink()
    with pytest.raises(RuntimeError), locked(path, wait=False):
        raise RuntimeError
    assert not path.exists(), "alone it goes, whatever happened"


def test_who_waits_for_a_lock_gets_it_when_it_is_free(tmp_path):
    """Also if the folder goes while the lock is held."""
    path, order = tmp_path / "lock", []

    def wait() -> None:
        with locked(path):
            order.append("second")
            shutil.rmtree(tmp_path)

    with locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert not tmp_path.exists()


def test_a_lock_that_another_process_replaced_is_not_ours(tmp_path, monkeypatch):
    """Between our opening and our locking the last holder removed the file; a new one stands there, or none."""
    path, flock = tmp_path / "lock", files.fcntl.flock
    for replaces in (False, True):
        looks = []

        def late(file, kind, looks=looks, replaces=replaces):
            flock(file, kind)
            looks.append(kind)
            if len(looks) == 1:
                path.unlink()
                if replaces:
                    path.touch()

        monkeypatch.setattr(files.fcntl, "flock", late)
        with locked(path), path.open("ab") as again, pytest.raises(BlockingIOError):
            flock(again, files.fcntl.LOCK_EX | files.fcntl.LOCK_NB)
        assert len(looks) == 2


def test_signs_of_life_are_repeated_until_the_end():
    called = threading.Semaphore(0)
    with pytest.raises(RuntimeError), repeating(called.release, 0.001):  # noqa: PT012
        for _ in range(3):
            assert called.acquire(timeout=30)
        (thread,) = (t for t in threading.enumerate() if t.name == "signs of life")
        assert thread.daemon
        raise RuntimeError
    assert not thread.is_alive(), "whatever happened"


# --- records


def some_record(status: str = "completed", config: TrialConfig | None = None, **changes: Any) -> TrialRecord:
    config = config or plain_trial()
    return TrialRecord(*ids(config), status, to_dict(config), started=1.0, finished=2.0, **changes)


def test_a_record_is_read_as_it_was_written(clock, tmp_path):
    filled = {key: {"a": 1.5} for key in ("best", "parameters", "cost", "environment", "data", "error")}
    record = some_record(metrics={"epoch": 2, "val_loss": math.nan}, **filled)
    write_record(tmp_path, record)
    assert record.heartbeat == NOW
    on_disk = {**dataclasses.asdict(record), "metrics": {"epoch": 2, "val_loss": None}, "schema": 3}
    assert json.loads((tmp_path / "record.json").read_text()) == on_disk
    assert dataclasses.asdict(read_record(tmp_path)) == on_disk


@pytest.mark.parametrize(
    ("status", "alive", "shown"),
    [
        ("running", NOW - 300, "running"),
        ("running", NOW - 301, "interrupted"),
        ("running", NOW + 301, "running"),
        ("stopped", NOW - 301, "stopped"),
    ],
)
def test_who_is_silent_for_five_minutes_counts_as_interrupted(status, alive, shown, clock, tmp_path):
    """The sign of life of a running trial is its record's time."""
    write_record(tmp_path, some_record(status))
    os.utime(tmp_path / "record.json", (alive, alive))
    record = read_record(tmp_path)
    assert record.heartbeat == (alive if status == "running" else NOW)
    assert record.shown_status() == state_of(tmp_path).status == shown


LEFT_OUT = object()
DEFAULTS = TrialRecord("id", "cell", "running", {})
FIELDS = [field.name for field in dataclasses.fields(TrialRecord) if field.name != "schema"]
REQUIRED = ("trial_id", "cell_id", "status", "config")


def damage(folder: Path, **changes: Any) -> None:
    """A whole record with some fields changed or left out."""
    write_record(folder, some_record())
    values = {**json.loads((folder / "record.json").read_text()), **changes}
    (folder / "record.json").write_text(json.dumps({k: v for k, v in values.items() if v is not LEFT_OUT}))


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_may_be_missing_if_it_has_a_default_and_is_never_of_another_type(name, tmp_path):
    """Earlier versions lack what a later one adds."""
    damage(tmp_path, **{name: LEFT_OUT})
    if name in REQUIRED:
        with pytest.raises(RecordError, match=rf"record\.json lacks '{name}'"):
            read_record(tmp_path)
    else:
        assert getattr(read_record(tmp_path), name) == getattr(DEFAULTS, name)
    for value, kind in ((["x"], "list"), (None, "NoneType")):
        damage(tmp_path, **{name: value})
        if value is None and name in ("finished", "error"):
            assert getattr(read_record(tmp_path), name) is None
            continue
        with pytest.raises(RecordError, match=rf"record\.json: '{name}' is a {kind}$"):
            read_record(tmp_path)


def test_times_may_be_whole_numbers_and_what_a_later_version_adds_is_left_out(tmp_path):
    for value in (3, 3.5):
        damage(tmp_path, started=value, heartbeat=value, finished=value, colour="blue")
        record = read_record(tmp_path)
        assert record.started == record.heartbeat == record.finished == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 1', "is not complete JSON"),
        ('["schema"]', "is not a trial record"),
        ("{}", "is not a trial record"),
        ('{"schema": 1}', "has schema 1, not 3: use the matching version"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_a_record_that_is_none_is_refused(text, said, tmp_path):
    path = tmp_path / "record.json"
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(RecordError) as caught:
        read_record(tmp_path)
    assert f"{path} {said}" in str(caught.value)


def test_a_status_is_one_of_five(tmp_path):
    for status in ("running", "completed", "failed", "stopped", "interrupted"):
        damage(tmp_path, status=status)
        assert read_record(tmp_path).status == status
        assert State(status).ended is (status in ("completed", "failed")), "or open"
    assert (State("new").ended, State("refused").ended) == (False, True)
    damage(tmp_path, status="asleep")
    with pytest.raises(RecordError, match="status 'asleep' is unknown"):
        read_record(tmp_path)


# --- where a trial stands


def test_states_of_folders(tmp_path):
    """By what is in them; a folder that cannot be used says why."""
    config = plain_trial()
    assert state_of(tmp_path / "absent") == State("new")
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "absent")
    (tmp_path / "file").touch()
    damage(tmp_path, status="running")
    here = state_of(tmp_path, config)
    assert (here.status, here.record, here.problem) == ("running", read_record(tmp_path), "")
    damage(tmp_path, status=LEFT_OUT)
    for folder, why in ((tmp_path / "file", "cannot be read: Not a directory"), (tmp_path, "lacks 'status'")):
        refused = state_of(folder, config)
        assert (refused.status, refused.record) == ("refused", None)
        assert f"{folder / 'record.json'} {why}" in refused.problem
        assert refused.problem.endswith("give another folder, or remove that file")


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({}, "lora.rank is 4 there, 8 here"),
        ({"lora.rank": 8}, "seed is 0 there, 3 here"),
        ({"lora.rank": 8, "seed": 3, "data.root": "x", "data.content": "y"}, "data.content is y there, None here"),
        ({"lora.rank": 8, "seed": 3, "model.weights": "GLYPHS_V1"}, "model.weights is GLYPHS_V1 there, None here"),
    ],
)
def test_a_folder_of_another_trial_says_what_differs_first(theirs, said, tmp_path):
    """Of two trials' settings in the order of the schema."""
    ours, record = plain_trial({"lora.rank": 8, "seed": 3}), some_record(config=plain_trial(theirs))
    write_record(tmp_path, record)
    state = state_of(tmp_path, ours)
    assert (state.status, state.record) == ("refused", None)
    both = f"holds trial {record.trial_id}, this is trial {trial_id(ours)}"
    assert state.problem == f"{tmp_path} {both}: give another folder ({said})"
    assert state_of(tmp_path, ours, record.trial_id).status == "completed", "the id that is expected decides"
    assert state_of(tmp_path, None, "0123456789").status == "completed", "whichever is there"


@pytest.mark.parametrize(
    "edit",
    [
        {"trial_id": "0123456789"},
        {"cell_id": "0123456789"},
        {"config": to_dict(plain_trial({"optimizer.lr": 1e-4}))},
        {"config": {**to_dict(plain_trial()), "seed": "0"}},
        {"config": {**to_dict(plain_trial()), "lora": None}},
        {"config": {**to_dict(plain_trial()), "model": {**PLAIN["model"], "new": 1}}},
        {"config": {**to_dict(plain_trial()), "optimizer": {**PLAIN["optimizer"], "lr": 10**400}}},
    ],
)
def test_an_edited_record_is_not_believed(edit, tmp_path):
    """Its settings are those of its trial id, or it says nothing."""
    damage(tmp_path, **edit)
    with pytest.raises(RecordError, match=r"record\.json was edited: its config is (that of trial|incomplete)"):
        read_record(tmp_path)
    assert state_of(tmp_path, plain_trial()).status == "refused"


# --- rows


def test_rows_are_written_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("ab") as file:
        write_row(file, {"b": 1.5, "a": [math.nan]})
        assert path.read_text() == '{"a": [null], "b": 1.5}\n'


def test_whole_rows_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    path.write_text('{"a": "\u2028"}\n{"b": 1}\n{"c":')
    assert read_rows(path) == [{"a": "\u2028"}, {"b": 1}], "a crash left the last"
    path.write_text('{"a": 1}\nnonsense\n{"c": 3}\n')
    with pytest.raises(RecordError, match=f"^{path}: row 2 is not JSON$"):
        read_rows(path)
