"""Claims: each trial has one owner, the dead lose theirs, and who has lost one writes nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lora_vit.sweep import claims as claims_module
from lora_vit.sweep.claims import DEAD_AFTER, ENDED, FREE, HELD, Claims

WORKER = """
import os, random, signal, sys, time
from pathlib import Path
from lora_vit.sweep.claims import ENDED, Claims
folder, index, trials, dies_after = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(index)
order = [f"{i:04d}" for i in range(trials)]
chance.shuffle(order)
done = 0
with Claims(folder).living() as claims:
    print("ready", flush=True)
    sys.stdin.readline()  # all begin at once, or the first could leave nothing for the last
    while True:
        left = [t for t in order if not (folder / f"{t}.done").exists()]
        if not left:
            break
        claims.look()
        for trial in left:
            if not claims.take(trial):
                continue
            if (folder / f"{trial}.done").exists():
                claims.release(trial)
                continue
            running = os.open(folder / f"{trial}.running", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            if done == dies_after:
                os.unlink(folder / f"{trial}.running")  # what a real trial leaves behind is resumed
                os.kill(os.getpid(), signal.SIGKILL)
            os.close(os.open(folder / f"{trial}.done", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.unlink(folder / f"{trial}.running")
            os.close(running)
            claims.release(trial, ENDED)
            done += 1
        time.sleep(0.01)
print(done)
"""


@pytest.mark.slow
def test_eight_processes_run_hundreds_of_trials_once_each(tmp_path):
    """Two of them are killed while they hold a claim; a file made exclusively notices any trial run twice."""
    trials = 400
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(i), str(trials), "5" if i < 2 else "-1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(8)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 8
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    done = 10  # by the two that were killed
    for i, process in enumerate(processes):
        out, err = process.communicate(timeout=240)
        assert process.returncode == (-9 if i < 2 else 0), err
        done += int(out or 0)
    assert done == trials
    assert len(list(tmp_path.glob("*.done"))) == trials
    assert not list(tmp_path.glob("*.running"))


@pytest.fixture
def clock(monkeypatch):
    """Our own clock, by hand."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(claims_module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def claims_of(folder, host: str | None = None, pid: int | None = None, born: str | None = None) -> Claims:
    """A process's claims; of another machine, or of another process."""
    claims = Claims(folder)
    given = {"host": host, "pid": pid, "born": born}
    claims._identity |= {key: value for key, value in given.items() if value is not None}
    return claims


def take(claims: Claims, trial: str = "a") -> bool:
    """As a process does that has just looked."""
    claims.look()
    return claims.take(trial)


def seen(claims: Claims, trial: str = "a") -> str:
    claims.look()
    return claims.state(trial)


def test_one_owner_at_a_time(tmp_path):
    mine, theirs = claims_of(tmp_path), claims_of(tmp_path, "elsewhere")
    theirs.look()
    assert take(mine)
    assert not theirs.take("a"), "taken since it looked"
    assert not take(theirs)
    assert seen(theirs) == seen(mine) == HELD
    assert not take(mine)  # nor twice by its owner
    mine.release("a")
    assert seen(theirs) == FREE
    assert take(theirs)
    assert not take(mine)
    theirs.release("a", ENDED)
    assert seen(mine) == ENDED
    assert not take(mine)
    mine.reopen(["a"])
    assert seen(mine) == FREE


def test_the_highest_of_many_claims_counts(tmp_path):
    claims = claims_of(tmp_path)
    for _ in range(11):  # more than one digit
        assert take(claims)
        claims.release("a")
    assert take(claims)
    assert seen(claims_of(tmp_path)) == HELD


@pytest.mark.parametrize("how", ["ended", "a zombie", "its id is another process's now"])
def test_a_process_of_this_machine_that_has_ended_loses_its_claim_at_once(how, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    if how == "ended":
        gone.wait()
    while how == "a zombie" and claims_module._born(gone.pid) != ENDED:
        time.sleep(0.01)
    assert take(claims_of(tmp_path, pid=os.getpid() if how.startswith("its") else gone.pid, born="1"))
    assert seen(claims_of(tmp_path)) == FREE
    assert take(claims_of(tmp_path))
    gone.wait()


@pytest.mark.parametrize(("host", "pid"), [("elsewhere", None), (None, os.getpid())], ids=["elsewhere", "stopped here"])
def test_an_owner_is_dead_once_its_sign_of_life_stands_still_by_our_clock(host, pid, clock, tmp_path):
    theirs, mine = claims_of(tmp_path, host, pid), claims_of(tmp_path)
    assert take(theirs)
    os.utime(tmp_path / ".claims" / f"{theirs.token}.owner", (1, 1))  # their clock means nothing
    assert seen(mine) == HELD
    clock.seconds = DEAD_AFTER
    assert seen(mine) == HELD
    os.utime(tmp_path / ".claims" / f"{theirs.token}.owner", (2, 2))
    clock.seconds += 0.1
    assert seen(mine) == HELD  # it moved
    clock.seconds += DEAD_AFTER + 0.1
    assert seen(mine) == FREE
    assert take(mine)


def test_an_owner_that_was_taken_for_dead_knows_it_before_it_writes(clock, tmp_path):
    theirs, mine = claims_of(tmp_path, "elsewhere"), claims_of(tmp_path)
    assert take(theirs)
    assert theirs.mine("a")
    assert seen(mine) == HELD
    clock.seconds = DEAD_AFTER + 1
    assert take(mine)
    assert mine.mine("a")
    assert not theirs.mine("a")
    theirs.release("a")  # is not theirs to give back
    assert seen(mine) == HELD
    assert not theirs.mine("never had")


@pytest.mark.parametrize("damage", ["owner", "claim", "both"])
def test_damaged_files_do_not_block_for_ever_nor_free_at_once(damage, clock, tmp_path):
    theirs, mine = claims_of(tmp_path, "elsewhere"), claims_of(tmp_path)
    assert take(theirs)
    if damage in ("owner", "both"):
        (tmp_path / ".claims" / f"{theirs.token}.owner").write_text("")
    if damage in ("claim", "both"):
        (tmp_path / ".claims" / "a.1").write_text("")
    assert seen(mine) == HELD
    clock.seconds = DEAD_AFTER + 1
    assert seen(mine) == FREE


def test_signs_of_life_carry_how_far_the_trials_are(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "BEAT_EVERY", 0.02)
    mine, other = claims_of(tmp_path), claims_of(tmp_path)
    with mine.living():
        assert take(mine)
        mine.progress["a"] = 1.5
        until = time.monotonic() + 20
        while not (other.look() or other.epochs("a")):
            assert time.monotonic() < until
        assert other.epochs("a") == 1.5
        assert other.token_of("a") == mine.token
    assert seen(other) == FREE  # given back at the end
    assert other.epochs("a") == 0


def test_an_error_is_noted_for_the_next_process_and_not_for_ourselves(tmp_path):
    first, second = claims_of(tmp_path), claims_of(tmp_path)
    assert take(first)
    assert first.seen_elsewhere("a") == ""
    first.release("a", FREE, "ValueError: boom")
    assert take(second)
    assert second.seen_elsewhere("a") == "ValueError: boom"
    second.release("a", FREE, "ValueError: boom")
    assert take(second)
    assert second.seen_elsewhere("a") == ""


def test_a_file_server_that_does_twice_what_it_is_asked_once(tmp_path, monkeypatch):
    mine, create = claims_of(tmp_path), os.open

    def twice(path, flags, *mode):
        handle = create(path, flags, *mode)
        if flags & os.O_EXCL and str(path).endswith("a.1"):
            os.write(handle, mine.token.encode())
            os.close(handle)
            return create(path, flags, *mode)
        return handle

    monkeypatch.setattr(claims_module.os, "open", twice)
    assert take(mine)
    assert seen(mine) == HELD


def test_on_a_full_disk_a_claim_stays_until_its_owner_ends(tmp_path, monkeypatch):
    mine = claims_of(tmp_path)
    assert take(mine)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(claims_module.os, "open", full)
    mine.release("a")  # says nothing
    monkeypatch.undo()
    assert seen(claims_of(tmp_path)) == HELD


@pytest.mark.parametrize("dead", [False, True])
def test_a_process_is_looked_for_by_its_id_where_there_is_no_proc(dead, tmp_path, monkeypatch):
    assert take(claims_of(tmp_path, pid=4242, born=""))
    mine = claims_of(tmp_path)
    mine.look()
    monkeypatch.setattr(claims_module, "Path", lambda *_: SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(claims_module.psutil, "pid_exists", lambda pid: not dead and pid == 4242)
    assert mine.state("a") == (FREE if dead else HELD)


def test_two_names_a_trial_stay_behind(tmp_path):
    mine = claims_of(tmp_path)
    assert take(mine)
    mine.release("a", ENDED)
    names = {p.name: p.read_text() for p in (tmp_path / ".claims").iterdir()}
    assert names["a.1"] == mine.token
    assert json.loads(names["a.1.ended"]) == {"token": mine.token, "error": ""}
    assert set(names) == {"a.1", "a.1.ended", f"{mine.token}.owner"}
