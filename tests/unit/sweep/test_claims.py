"""Claims: each trial has one owner, and the dead lose theirs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_vit.sweep import claims as claims_module
from lora_vit.sweep.claims import ENDED, FREE, HELD, Claims, Owner

WORKER = """
import os, random, signal, sys, time
from pathlib import Path
from lora_vit.sweep.claims import ENDED, Claims
folder, index, trials, dies_after = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(index)
order = [f"{i:04d}" for i in range(trials)]
chance.shuffle(order)
done = 0
with Claims(folder) as claims:
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
def test_sixteen_processes_run_a_thousand_trials_once_each(tmp_path):
    """Two of them are killed while they hold a claim; a file made exclusively notices any trial run twice."""
    trials = 1000
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(i), str(trials), "5" if i < 2 else "-1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(16)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 16
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


def another_host() -> Owner:
    return Owner(host="elsewhere/1", pid=os.getpid(), born="1", token="other")


def take(claims: Claims, trial: str) -> bool:
    """As a process does that has just looked."""
    claims.look()
    return claims.take(trial)


def held(claims: Claims, trial: str) -> bool:
    claims.look()
    return claims.state(trial) == HELD


def test_one_owner(tmp_path):
    mine, theirs = Claims(tmp_path), Claims(tmp_path, another_host())
    assert take(mine, "a")
    assert not take(theirs, "a")
    assert held(theirs, "a")
    mine.release("a")
    assert not held(theirs, "a")
    assert take(theirs, "a")
    assert not take(mine, "a")


def test_a_process_that_is_gone_loses_its_claim_at_once(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = Claims(tmp_path, Owner(pid=gone.pid, born="1"))
    assert take(dead, "a")
    assert take(Claims(tmp_path), "a")


def test_a_process_id_used_again_is_another_process(tmp_path):
    earlier = Claims(tmp_path, Owner(pid=os.getpid(), born="1", token="earlier"))
    assert take(earlier, "a")
    assert take(Claims(tmp_path), "a")


def test_another_host_is_dead_when_its_sign_of_life_stands_still(tmp_path, monkeypatch):
    """By our own clock: theirs may be wrong, even in the future."""
    theirs, mine = Claims(tmp_path, another_host()), Claims(tmp_path)
    assert take(theirs, "a")
    os.utime(tmp_path / ".claims/a.1", (time.time() + 1e6, time.time() + 1e6))
    now = [1000.0]
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now[0])
    assert not take(mine, "a")
    now[0] += claims_module.DEAD_AFTER - 1
    assert not take(mine, "a")
    theirs.beat()
    now[0] += 2
    assert not take(mine, "a"), "it has given a sign of life since"
    now[0] += claims_module.DEAD_AFTER + 1
    assert take(mine, "a")
    theirs._beat = 0  # it was silent for long
    theirs.beat()
    assert theirs.lost == {"a"}
    theirs.release("a")
    assert held(mine, "a"), "a lost claim's release does not free the new owner's"


def test_a_damaged_claim_does_not_block_for_ever(tmp_path, monkeypatch):
    mine = Claims(tmp_path)
    Path(tmp_path / ".claims/a.1").write_text('{"host": "el')
    now = [0.0]
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now[0])
    assert not take(mine, "a")
    now[0] += claims_module.DEAD_AFTER + 1
    assert take(mine, "a")


def test_signs_of_life_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "BEAT_EVERY", 0.01)
    with Claims(tmp_path) as claims:
        assert take(claims, "a")
        path = tmp_path / ".claims/a.1"
        os.utime(path, (1.0, 1.0))
        until = time.monotonic() + 30
        while path.stat().st_mtime == 1.0:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert path.with_name("a.1.free").samefile(path)


# --- what is in the folder


def claim(folder: Path, name: str) -> dict[str, object]:
    values = json.loads((folder / ".claims" / name).read_text())
    assert isinstance(values, dict)
    return values


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".claims").iterdir())


def test_a_claim_is_a_link_to_its_owners_file(tmp_path):
    """Each owner of a trial adds one, and another when it is done with it; nothing else stays."""
    folder = tmp_path / "deep/sweep"
    first, second = (Claims(folder, Owner(host=f"h{i}", pid=i, born=f"b{i}", token=f"t{i}")) for i in (1, 2))
    assert names(folder) == []
    assert take(first, "a")
    assert claim(folder, "a.1") == {"host": "h1", "pid": 1, "born": "b1", "token": "t1"}
    assert take(second, "a") is False
    assert names(folder) == ["a.1", "t1.owner"]
    first.release("a")
    assert names(folder) == ["a.1", "a.1.free", "t1.owner"]
    for number in (2, 4):
        assert take(second, "a")
        assert claim(folder, f"a.{number}")["token"] == "t2"
        second.release("a")
        assert take(first, "a")
        assert claim(folder, f"a.{number + 1}")["token"] == "t1"
        assert not take(second, "a")
        first.release("a")
    marked = [f"a.{number}{mark}" for number in range(1, 6) for mark in ("", ".free")]
    assert names(folder) == [*marked, "t1.owner", "t2.owner"]
    assert take(first, "b"), "the trials do not know of each other"
    assert (folder / ".claims/b.1").samefile(folder / ".claims/t1.owner")


def test_what_has_ended_is_not_taken_before_it_is_opened_again(tmp_path):
    mine, theirs = Claims(tmp_path, Owner(token="mine")), Claims(tmp_path, another_host())
    for trial in ("a", "b"):
        assert take(mine, trial)
    mine.release("a", ENDED)
    assert names(tmp_path)[:3] == ["a.1", "a.1.ended", "b.1"]
    assert [mine.state("a"), theirs.state("a")] == [ENDED, FREE], "theirs is as of its last look"
    assert take(theirs, "a") is False
    assert theirs.state("a") == ENDED
    theirs.reopen("b")
    assert theirs.state("b") == HELD, "what somebody has is left to him"
    theirs.reopen("a")
    theirs.reopen("new")
    assert names(tmp_path)[:5] == ["a.1", "a.1.ended", "a.2", "a.2.free", "b.1"]
    assert theirs.state("a") == FREE
    assert take(mine, "a")


def test_of_many_claims_the_last_one_counts(tmp_path):
    """By number, of which 10 is more than 9."""
    mine = Claims(tmp_path)
    for _ in range(11):
        assert take(mine, "a")
        mine.release("a")
    assert (tmp_path / ".claims/a.11.free").exists()
    assert take(mine, "a")
    assert held(mine, "a")


def test_why_a_trial_has_ended_without_a_record_is_kept(tmp_path):
    mine, theirs = Claims(tmp_path), Claims(tmp_path, another_host())
    for trial in ("a", "b"):
        assert take(mine, trial)
        mine.release(trial, ENDED, why="its folder is another's" if trial == "a" else "")
    theirs.look()
    assert [theirs.why(trial) for trial in ("a", "b")] == ["its folder is another's", ""]
    assert theirs.state("a") == ENDED


def test_what_another_took_since_the_look_is_not_taken(tmp_path):
    """And is not tried again before the next look."""
    mine, theirs = Claims(tmp_path), Claims(tmp_path, another_host())
    mine.look()
    assert take(theirs, "a")
    assert mine.state("a") == FREE
    assert mine.take("a") is False
    assert mine.state("a") == HELD
    theirs.release("a")
    assert mine.take("a") is False
    assert take(mine, "a")


def test_a_file_server_that_does_twice_what_it_is_asked_once(tmp_path, monkeypatch):
    """The link is there, and the answer to the repeated request says that it exists."""
    mine = Claims(tmp_path)
    link = os.link

    def twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert take(mine, "a")


def test_what_is_not_held_is_not_given_back(tmp_path):
    mine, theirs = Claims(tmp_path), Claims(tmp_path, another_host())
    mine.release("a")
    assert names(tmp_path) == []
    assert take(theirs, "a")
    mine.release("a")
    assert held(mine, "a")
    assert not held(mine, "b")
    theirs.release("a")
    theirs.release("a")
    assert names(tmp_path) == ["a.1", "a.1.free", "other.owner"]


def test_a_full_disk_keeps_a_claim_until_its_owner_ends(tmp_path, monkeypatch):
    mine, theirs = Claims(tmp_path), Claims(tmp_path, another_host())
    assert take(mine, "a")

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        mine.release("a", ENDED)
    assert held(theirs, "a")


def test_an_owner_has_its_own_claim_and_does_not_take_it_twice(tmp_path):
    mine = Claims(tmp_path, Owner(host="h", pid=0, born="long ago", token="mine"))
    assert take(mine, "a")
    assert held(mine, "a")
    assert not take(mine, "a")
    assert names(tmp_path) == ["a.1", "mine.owner"]


def test_who_is_second_at_the_same_moment_has_nothing(tmp_path, monkeypatch):
    """Both have seen the trial free; the hard link decides."""
    mine, theirs = Claims(tmp_path), Claims(tmp_path, another_host())
    link = os.link
    with monkeypatch.context() as patch:

        def late(source, target):
            patch.setattr(os, "link", link)
            assert take(theirs, "a")
            link(source, target)  # too late

        patch.setattr(os, "link", late)
        assert take(mine, "a") is False
    assert claim(tmp_path, "a.1")["token"] == "other"
    mine.release("a")
    assert held(theirs, "a")


# --- who lives


def test_an_owner_is_told_by_host_boot_process_and_token(monkeypatch):
    """The start time is field 22 of ``/proc/PID/stat``, whatever the process calls itself."""
    mine, other = Owner(), Owner()
    assert mine.pid == os.getpid()
    assert mine.token != other.token
    assert (mine.host, mine.born) == (other.host, other.born)
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs Linux's /proc")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert mine.host == f"{platform.node()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    name = Path("/proc/self/comm").read_text()
    try:
        Path("/proc/self/comm").write_text("plain")
        assert mine.born == Path("/proc/self/stat").read_text().split()[21]
        Path("/proc/self/comm").write_text("a) S 1 (b 2) ")
        assert Owner().born == mine.born
    finally:
        Path("/proc/self/comm").write_text(name)


def without_proc(monkeypatch) -> None:
    """As on macOS."""
    read, exists = Path.read_text, Path.exists

    def refuse(path: Path, *args: object, **more: object) -> str:
        if path.is_relative_to("/proc"):
            raise FileNotFoundError(path)
        return read(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "exists", lambda path: not path.is_relative_to("/proc") and exists(path))


def test_an_owner_where_there_is_no_proc(monkeypatch):
    without_proc(monkeypatch)
    mine = Owner()
    assert (mine.host, mine.born) == (f"{platform.node()}/", "")


def test_a_start_time_that_cannot_be_found_is_left_out(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "1 (x) S 2")
    assert Owner().born == ""


@pytest.mark.parametrize(("answer", "lives"), [(None, True), (PermissionError, True), (ProcessLookupError, False)])
def test_a_process_is_asked_for_by_signal_where_there_is_no_proc(answer, lives, tmp_path, monkeypatch):
    asked = []

    def kill(pid, signum):
        asked.append((pid, signum))
        if answer is not None:
            raise answer

    without_proc(monkeypatch)
    monkeypatch.setattr(os, "kill", kill)
    assert take(Claims(tmp_path, Owner(host="here", pid=123, token="other")), "a")
    assert held(Claims(tmp_path, Owner(host="here")), "a") == lives
    assert asked == [(123, 0)]


def test_a_process_of_this_host_lives_until_it_ends(tmp_path):
    """Also before anybody has waited for it; without its start time by its id alone."""
    mine = Claims(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    unborn = Claims(tmp_path, Owner(pid=process.pid, born="", token="other"))
    born = Path(f"/proc/{process.pid}/stat")
    assert take(unborn, "a")
    assert held(mine, "a")
    if born.exists():
        known = Claims(tmp_path, Owner(pid=process.pid, born=born.read_text().split()[21], token="another"))
        assert take(known, "b")
        assert held(mine, "b")
        without_birth = {"host": mine.owner.host, "pid": process.pid, "token": "of an earlier version"}
        (tmp_path / ".claims/c.1").write_text(json.dumps(without_birth))
        assert held(mine, "c")
    assert process.stdin is not None
    process.stdin.close()
    if born.exists():
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet waited for
        assert not held(mine, "b")
        assert not held(mine, "a")
        assert not held(mine, "c")
    process.wait()
    assert not held(mine, "a")


def test_another_host_has_its_time_to_the_last_second(tmp_path, monkeypatch):
    """For all that it has, from when we first looked."""
    theirs, mine = Claims(tmp_path, another_host()), Claims(tmp_path)
    assert take(theirs, "a")
    assert take(theirs, "b")
    now = [1e6]
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now[0])
    assert held(mine, "a")
    now[0] += 50
    assert held(mine, "b")
    now[0] += claims_module.DEAD_AFTER - 50
    assert held(mine, "a"), "not more than the time has passed"
    now[0] += 1
    assert not held(mine, "a")
    assert not held(mine, "b")
    os.utime(tmp_path / ".claims/a.1", (1.0, 1.0))
    assert held(mine, "a"), "a sign of life, also one from the past"


# --- signs of life


def test_one_sign_of_life_is_for_all_claims(tmp_path):
    mine = Claims(tmp_path)
    mine.beat()
    assert names(tmp_path) == [], "no claim yet"
    for trial in ("a", "b"):
        assert take(mine, trial)
    os.utime(tmp_path / ".claims/a.1", (1.0, 1.0))
    mine.beat()
    for trial in ("a", "b"):
        assert abs((tmp_path / f".claims/{trial}.1").stat().st_mtime - time.time()) < 60


@pytest.mark.parametrize("silent", [False, True])
def test_who_was_silent_for_long_looks_for_what_others_took(silent, tmp_path, monkeypatch):
    """By the folder's clock; who gave its signs of life cannot have lost anything, and saves the look."""
    mine = Claims(tmp_path)
    for trial in ("lost", "kept"):
        assert take(mine, trial)
    mine.beat()
    (tmp_path / ".claims/lost.2").touch()
    passed = claims_module.DEAD_AFTER * (0.51 if silent else 0.49)
    now = mine._beat / 1e9 + passed
    utime = os.utime
    monkeypatch.setattr(os, "utime", lambda path: utime(path, (now, now)))
    mine.beat()
    assert mine.lost == ({"lost"} if silent else set())


def test_a_lost_trial_can_be_won_again(tmp_path):
    mine, theirs = Claims(tmp_path), Claims(tmp_path, another_host())
    assert take(mine, "a")
    mine._beat = 0  # silent for long
    (tmp_path / ".claims/a.2").touch()
    mine.beat()
    assert mine.lost == {"a"}
    mine.release("a", ENDED)
    assert "a.1.ended" not in names(tmp_path), "it is another's to say"
    (tmp_path / ".claims/a.2.free").touch()
    assert take(mine, "a")
    assert mine.lost == set()
    mine.beat()
    assert mine.lost == set()
    mine.release("a")
    assert "a.3.free" in names(tmp_path)
    assert take(theirs, "a")


def test_claims_are_given_back_at_the_end(tmp_path):
    theirs = Claims(tmp_path, another_host())
    threads = threading.active_count()
    with Claims(tmp_path) as mine:
        assert isinstance(mine, Claims)
        assert threading.active_count() == threads + 1
        assert take(mine, "a")
        assert take(mine, "b")
        assert held(theirs, "b")
    assert threading.active_count() == threads
    assert not held(theirs, "a")
    assert not held(theirs, "b")


def test_a_claim_outlives_several_beats():
    """Their number in the time after which others think us dead: a slow disk may swallow some."""
    assert claims_module.DEAD_AFTER >= 10 * claims_module.BEAT_EVERY
