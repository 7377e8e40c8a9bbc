"""Killed, stopped and repeated runs: the same command goes on, and the result is the same to the last bit."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import command, contents, rows_of, run_command, start, wait_until

from lora_vit.records import read_record

LONG = ("trainer.epochs=6", "lora.dropout=0.2", "data.augment=crop_flip", "trainer.checkpoint_every=0.02")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_command(*LONG, "hydra.run.dir=run", cwd=folder)
    return folder / "run"


def start_long(cwd: Path, *overrides: str) -> subprocess.Popen[str]:
    return start(command(*LONG, *overrides, "hydra.run.dir=run"), cwd)


def wait_for_rows(process: subprocess.Popen[str], folder: Path, rows: int) -> None:
    """Until ``metrics.jsonl`` has that many rows."""
    wait_until(lambda: rows_of(folder / "metrics.jsonl") >= rows, process, every=0.002)


@pytest.mark.slow
def test_killed_at_several_points_and_finished_by_the_same_command(uninterrupted, tmp_path):
    chance = random.Random(4)
    for rows in (1, 9, 20, 33):
        process = start_long(tmp_path)
        wait_for_rows(process, tmp_path / "run", rows)
        time.sleep(chance.random() * 0.03)  # somewhere in a step, a checkpoint's writing or a validation
        process.kill()
        process.communicate()
    process = start_long(tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert contents(tmp_path / "run") == contents(uninterrupted)
    assert read_record(tmp_path / "run").metrics == read_record(uninterrupted).metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140)],
)
def test_asked_to_stop(signum, code, uninterrupted, tmp_path):
    process = start_long(tmp_path)
    wait_for_rows(process, tmp_path / "run", 10)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    assert "Traceback" not in out
    assert read_record(tmp_path / "run").status == "interrupted"
    process = start_long(tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert contents(tmp_path / "run") == contents(uninterrupted)


def test_a_finished_run_is_reported_and_not_trained_again(uninterrupted):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.iterdir()}
    done = run_command(*LONG, "hydra.run.dir=run", cwd=uninterrupted.parent)
    assert done.stdout.splitlines()[-1].startswith("Validation Accuracy: ")
    assert "epoch" not in done.stdout
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.iterdir()} == before


def test_the_folder_of_another_trial_is_refused_untouched(uninterrupted):
    before = {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()}
    done = run_command(*LONG, "lora.rank=3", "hydra.run.dir=run", cwd=uninterrupted.parent, code=1)
    assert "lora.rank is 4 there, 3 here" in done.stderr
    assert {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()} == before


def test_restart_trains_anew(tmp_path):
    run_command("hydra.run.dir=run", "trainer.epochs=1", cwd=tmp_path)
    first = contents(tmp_path / "run")
    done = run_command("hydra.run.dir=run", "trainer.epochs=1", "trainer.resume=restart", cwd=tmp_path)
    assert "epoch 1/1" in done.stdout
    assert contents(tmp_path / "run") == first


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    done = run_command("hydra.run.dir=run", cwd=tmp_path, code=1)
    assert "cannot be written" in done.stderr or "Permission denied" in done.stderr


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    done = run_command("hydra.run.dir=run", cwd=tmp_path, code=1)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "run" in done.stderr


def _small_files_only() -> None:
    # stands for a full disk: the checkpoint's writing breaks off half way
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.slow
def test_no_room_leaves_the_last_good_checkpoint(uninterrupted, tmp_path):
    process = start_long(tmp_path)
    wait_for_rows(process, tmp_path / "run", 12)
    process.kill()
    process.communicate()
    good = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert len(good) > 20_000
    done = subprocess.run(
        command(*LONG, "hydra.run.dir=run"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=_small_files_only,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "make room" in done.stderr
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == good
    process = start_long(tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert contents(tmp_path / "run") == contents(uninterrupted)
