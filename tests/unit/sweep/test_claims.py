"""Claims: each trial has one owner, and the dead lose theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_vit.sweep import claims as claims_module
from lora_vit.sweep.claims import Claims, Owner

WORKER = """
import os, random, signal, sys, time
from pathlib import Path
from lora_vit.sweep.claims import Claims
folder, index, trials, dies_after = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(index)
order = [f"{i:04d}" for i in range(trials)]
chance.shuffle(order)
done = 0
with Claims(folder) as claims:
    while True:
        left = [t for t in order if not (folder / f"{t}.done").exists()]
        if not left:
            break
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
            claims.release(trial)
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
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(16)
    ]
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


def test_one_owner(tmp_path):
    mine, theirs = Claims(tmp_path), Claims(tmp_path, another_host())
    assert mine.take("a")
    assert not theirs.take("a")
    assert theirs.is_taken("a")
    mine.release("a")
    assert not theirs.is_taken("a")
    assert theirs.take("a")
    assert not mine.take("a")


def test_a_process_that_is_gone_loses_its_claim_at_once(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = Claims(tmp_path, Owner(pid=gone.pid, born="1"))
    assert dead.take("a")
    assert Claims(tmp_path).take("a")


def test_a_process_id_used_again_is_another_process(tmp_path):
    earlier = Claims(tmp_path, Owner(pid=os.getpid(), born="1", token="earlier"))
    assert earlier.take("a")
    assert Claims(tmp_path).take("a")


def test_another_host_is_dead_when_its_sign_of_life_stands_still(tmp_path, monkeypatch):
    """By our own clock: theirs may be wrong, even in the future."""
    theirs, mine = Claims(tmp_path, another_host()), Claims(tmp_path)
    assert theirs.take("a")
    os.utime(tmp_path / ".claims/a.1", (time.time() + 1e6, time.time() + 1e6))
    now = [1000.0]
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now[0])
    assert not mine.take("a")
    now[0] += claims_module.DEAD_AFTER - 1
    assert not mine.take("a")
    theirs.beat()
    now[0] += 2
    assert not mine.take("a"), "it has given a sign of life since"
    now[0] += claims_module.DEAD_AFTER + 1
    assert mine.take("a")
    theirs.beat()
    assert theirs.lost == {"a"}
    theirs.release("a")
    assert mine.is_taken("a"), "a lost claim's release does not free the new owner's"


def test_a_damaged_claim_does_not_block_for_ever(tmp_path, monkeypatch):
    mine = Claims(tmp_path)
    Path(tmp_path / ".claims/a.1").write_text('{"host": "el')
    now = [0.0]
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now[0])
    assert not mine.take("a")
    now[0] += claims_module.DEAD_AFTER + 1
    assert mine.take("a")


def test_signs_of_life_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "BEAT_EVERY", 0.01)
    with Claims(tmp_path) as claims:
        assert claims.take("a")
        path = tmp_path / ".claims/a.1"
        os.utime(path, (1.0, 1.0))
        until = time.monotonic() + 30
        while path.stat().st_mtime == 1.0:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert json.loads(path.read_text())["released"]
