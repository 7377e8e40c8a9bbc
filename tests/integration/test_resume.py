"""Killed, stopped and repeated runs: the same command resumes, and the result is the same to the last bit."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import SMALL, command, contents, rows_of, run_command, start, wait_until

from lora_vit.records import read_record

LONG = ("trainer.epochs=6", "lora.dropout=0.2", "data.augment=[flip,mixup,cutmix]", "trainer.checkpoint_every=0.02")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_command(*LONG, "hydra.run.dir=run", cwd=folder)
    return folder / "run"


def start_until(rows: int, cwd: Path, *overrides: str) -> subprocess.Popen[str]:
    """The long run, still training when ``metrics.jsonl`` has that many rows."""
    process = start(command(*LONG, *overrides, "hydra.run.dir=run"), cwd)
    wait_until(lambda: rows_of(cwd / "run/metrics.jsonl") >= rows, process, every=0.002)
    return process


def assert_resumes(cwd: Path, uninterrupted: Path) -> None:
    run_command(*LONG, "hydra.run.dir=run", cwd=cwd)
    assert contents(cwd / "run") == contents(uninterrupted)
    assert read_record(cwd / "run").metrics == read_record(uninterrupted).metrics


@pytest.mark.slow
def test_killed_at_several_points(uninterrupted, tmp_path):
    chance = random.Random(4)
    for rows in (1, 9, 33):
        process = start_until(rows, tmp_path)
        time.sleep(chance.random() * 0.03)  # somewhere in a step, a checkpoint's writing or a validation
        process.kill()
        process.communicate()
    assert_resumes(tmp_path, uninterrupted)


@pytest.mark.slow
def test_asked_to_stop(uninterrupted, tmp_path):
    process = start_until(10, tmp_path)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, out
    said = "interrupted by SIGINT: saved; the same command with hydra.run.dir=run resumes"
    assert out.splitlines()[-1] == said
    assert "Traceback" not in out
    assert read_record(tmp_path / "run").status == "interrupted"
    assert_resumes(tmp_path, uninterrupted)


def test_a_folder_in_use_is_refused(tmp_path, monkeypatch, call):
    process = start_until(1, tmp_path, "trainer.epochs=5000")
    monkeypatch.chdir(tmp_path)
    code, _, err = call("train", *SMALL, *LONG, "hydra.run.dir=run")
    assert (code, err) == (1, f"error: {tmp_path}/run: another process is training there, wait for it or stop it\n")
    process.kill()
    process.communicate()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_written_is_one_line(place, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    code, _, err = call("train", *SMALL, f"hydra.run.dir={place}")
    assert (code, err.count("\n"), f"{place} cannot be written" in err) == (1, 1, True)


@pytest.mark.slow
def test_no_room_leaves_the_last_good_checkpoint(uninterrupted, tmp_path):
    process = start_until(12, tmp_path)
    process.kill()
    process.communicate()
    good = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    line = command(*LONG, "hydra.run.dir=run")
    limit = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh"]  # stands for a full disk: writing the checkpoint breaks off
    done = subprocess.run([*limit, *line], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert "make room" in line
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == good
    assert_resumes(tmp_path, uninterrupted)
