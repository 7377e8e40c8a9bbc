"""Two real gloo processes train as one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from helpers import (
    SMALL,
    command,
    largest_difference,
    rows_of,
    run_command,
    start,
    train_together,
    trial_config,
    wait_until,
)

from lora_vit.files import read_rows
from lora_vit.records import read_record

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NOISY = ("lora.dropout=0.2", "data.augment=crop_flip", "model.head_dropout=0.3")
TOLERANCE = 1e-9
"""fp64; two halves of a batch are summed in another order."""


def same_rows(a: Path, b: Path) -> None:
    rows, others = read_rows(a / "metrics.jsonl"), read_rows(b / "metrics.jsonl")
    assert len(rows) == len(others) == 16
    for row, other in zip(rows, others, strict=True):
        assert row.pop("kind") == other.pop("kind")
        assert row == pytest.approx(other, rel=TOLERANCE)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_command(*NOISY, "hydra.run.dir=run", cwd=folder)
    return folder / "run"


def test_processes_that_we_start(one_process, tmp_path):
    done = run_command(*NOISY, "trainer.devices=2", "hydra.run.dir=run", cwd=tmp_path)
    same_rows(tmp_path / "run", one_process)
    record, alone = read_record(tmp_path / "run"), read_record(one_process)
    assert record.trial_id == alone.trial_id
    assert record.environment["world_size"] == 2
    assert record.metrics["val_accuracy"] == alone.metrics["val_accuracy"]
    assert record.metrics["test_accuracy"] == alone.metrics["test_accuracy"]
    assert done.stdout.count("epoch 2/2") == 1  # rank 0 alone speaks


def test_torchrun(one_process, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "lora_vit.train", *SMALL, *NOISY, "hydra.run.dir=run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    same_rows(tmp_path / "run", one_process)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_all_processes_end_and_the_same_command_goes_on(signum, one_process, tmp_path):
    """The command is asked; the processes that it started finish their step, save and end."""
    arguments = (*NOISY, "trainer.devices=2", "trainer.epochs=400", "hydra.run.dir=run")
    process = start(command(*arguments), tmp_path)
    wait_until(lambda: rows_of(tmp_path / "run/metrics.jsonl") >= 10, process, every=0.01)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, out
    assert read_record(tmp_path / "run").status == "interrupted"
    steps = [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")]
    assert steps == sorted(steps)
    assert (tmp_path / "run/checkpoint.pt").exists()


def test_a_batch_that_does_not_divide(tmp_path):
    done = run_command("trainer.devices=3", "hydra.run.dir=run", cwd=tmp_path, code=1)
    assert "data.batch_size=8 is not divisible by the 3 processes" in done.stderr


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(p) for p in found]


def test_a_process_that_dies_ends_the_others(tmp_path):
    process = start(command("trainer.devices=2", "trainer.epochs=2000", "hydra.run.dir=run"), tmp_path)
    wait_until(lambda: rows_of(tmp_path / "run/metrics.jsonl") >= 5, process)
    workers = [p for p in children(process.pid) if "resource_tracker" not in Path(f"/proc/{p}/cmdline").read_text()]
    os.kill(process.pid, signal.SIGSTOP)  # the other has time to notice before the launcher looks
    os.kill(max(workers), signal.SIGKILL)
    time.sleep(1)
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out
    record = read_record(tmp_path / "run")
    assert record.status == "failed"
    assert record.error is not None
    assert "ended with code -9" in record.error["message"]


PACK = (
    ("seed=1", "lora.rank=2", "lora.dropout=0.3", "optimizer.clip_norm=0.5"),
    ("seed=2", "lora.rank=5", "lora.dropout=0.1", "optimizer.lr=1e-2"),
    ("seed=1", "optimizer.lr=1e200"),
)


def _train_pack(rank: int, port: int, folder: str) -> None:
    """A spawned process: its half of every batch of three trials, of which one diverges."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from lora_vit import distributed
    from lora_vit.build import build_setup

    process = distributed.join_process_group()
    try:
        configs = [trial_config(*p) for p in PACK]
        outcomes = train_together(configs, Path(folder) / f"rank{rank}", build_setup(configs[0], process))
        torch.save([o.tensors for o in outcomes], Path(folder) / f"tensors{rank}.pt")
        torch.save([o.losses for o in outcomes], Path(folder) / f"losses{rank}.pt")
    finally:
        distributed.leave_process_group()


def test_a_pack_of_three(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_train_pack, args=(port, str(tmp_path)), nprocs=2)
    alone = train_together([trial_config(*p) for p in PACK], tmp_path / "one")
    for rank in (0, 1):
        tensors = torch.load(tmp_path / f"tensors{rank}.pt", weights_only=True)
        losses = torch.load(tmp_path / f"losses{rank}.pt", weights_only=True)
        for k in (0, 1):
            one = alone[k]
            together = type(one)(one.trial, losses[k], tensors[k], one.predicted)
            assert largest_difference(together, one) < TOLERANCE
        assert read_record(tmp_path / f"rank{rank}" / "2").status == "failed"
