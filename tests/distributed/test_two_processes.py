"""Two real gloo processes train as one does, whoever starts them, and end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.multiprocessing as mp
from helpers import command, largest_difference, rows_of, run_command, start, train_together, trial_config, wait_until

from lora_vit.files import read_rows
from lora_vit.records import read_record

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NOISY = ("lora.dropout=0.2", "data.augment=[crop_flip,randaugment,color_jitter,random_erasing,mixup]",
         "model.head_dropout=0.3", "optimizer.class_weights=[1,2,3,4]")  # fmt: skip
TOLERANCE = 1e-9
"""fp64; two halves of a batch are summed in another order."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_command(*NOISY, "hydra.run.dir=run", cwd=folder)
    return folder / "run"


@pytest.fixture
def training(tmp_path):
    """A command that has started two processes, which train; it is killed at the end."""
    process = start(command(*NOISY, "trainer.devices=2", "trainer.epochs=5000", "hydra.run.dir=run"), tmp_path)
    wait_until(lambda: rows_of(tmp_path / "run/metrics.jsonl") >= 10, process, every=0.01)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("starter", ["the command", "torchrun"])
def test_two_processes_train_as_one(starter, one_process, tmp_path):
    own = command(*NOISY, "hydra.run.dir=run", *(["trainer.devices=2"] if starter == "the command" else []))
    line = own if starter == "the command" else [*TORCHRUN, *own[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, others = read_rows(tmp_path / "run/metrics.jsonl"), read_rows(one_process / "metrics.jsonl")
    assert [row.pop("kind") for row in rows] == [other.pop("kind") for other in others]
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=TOLERANCE)
    record, alone = read_record(tmp_path / "run"), read_record(one_process)
    assert record.trial_id == alone.trial_id
    assert record.environment["world_size"] == 2
    for name in ("val_accuracy", "test_accuracy"):
        assert record.metrics[name] == alone.metrics[name]
    assert done.stdout.count("epoch 2/2") == done.stdout.count("Validation Accuracy") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_probes_of_two_processes_read_one_file_of_features(tmp_path):
    own = ("lora=none", "data.augment=flip", "model.head_dropout=0.3", "data.cache_dir=cache", "hydra.run.dir=run")
    for count in ("1", "2"):
        (tmp_path / count).mkdir()
        run_command(*own, f"trainer.devices={count}", cwd=tmp_path / count)
    one, two = (read_rows(tmp_path / count / "run/metrics.jsonl") for count in ("1", "2"))
    for row, other in zip(one, two, strict=True):
        assert row.pop("kind") == other.pop("kind")
        assert row == pytest.approx(other, rel=TOLERANCE)
    assert len([*(tmp_path / "2/cache").glob("features-*")]) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_all_processes_save_and_end(signum, training, tmp_path):
    training.send_signal(signum)
    out, _ = training.communicate(timeout=60)
    assert training.returncode == 128 + signum, out
    assert out.splitlines()[-1].startswith(f"interrupted by {signum.name}: saved")
    assert (out.count("interrupted"), "Traceback" in out) == (1, False)
    assert read_record(tmp_path / "run").status == "interrupted"
    assert (tmp_path / "run/checkpoint.pt").exists()


def test_a_process_that_is_killed_ends_the_others(training, tmp_path):
    (pid,) = (p.pid for p in psutil.Process(training.pid).children() if p.environ()["RANK"] == "0")
    os.kill(training.pid, signal.SIGSTOP)  # the other has time to notice before the launcher looks
    os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    os.kill(training.pid, signal.SIGCONT)
    out, _ = training.communicate(timeout=60)
    assert training.returncode == 1, out
    assert out.splitlines()[-1] == "error: process 0 ended with code -9"
    record = read_record(tmp_path / "run")
    assert record.error is not None
    assert (record.status, record.error["message"]) == ("failed", "process 0 ended with code -9")


def test_processes_end_with_the_command_that_started_them(training, tmp_path):
    workers = psutil.Process(training.pid).children()
    training.kill()
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert read_record(tmp_path / "run").status == "interrupted"


def test_what_the_processes_report_is_one_line(tmp_path):
    done = run_command("trainer.devices=2", "optimizer.lr=1e200", "hydra.run.dir=run", cwd=tmp_path, code=1)
    assert "not finite at step" in done.stderr
    assert len(done.stderr.splitlines()) == 1


PACK = (
    ("seed=1", "lora.rank=2", "lora.dropout=0.3", "optimizer.clip_norm=0.5"),
    ("seed=2", "lora.rank=5", "lora.dropout=0.1", "optimizer.lr=1e-2"),
    ("seed=1", "optimizer.lr=1e200"),
)


def _train_pack(rank: int, port: int, folder: str, precision: str) -> None:
    """A spawned process: its half of every batch of three trials, of which one diverges.

    The second has room for half of its images in one pass.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="a test",
    )
    torch.set_num_threads(1)
    from lora_vit import distributed
    from lora_vit.build import build_setup

    with distributed.group() as process:
        configs = [trial_config(*p, precision) for p in PACK]
        setup = build_setup(configs[0], process)
        setup.most_trained = 6 if rank == 1 else setup.most_trained
        outcomes = train_together(configs, Path(folder) / f"rank{rank}", setup)
        torch.save([o.tensors for o in outcomes], Path(folder) / f"tensors{rank}.pt")
        torch.save([o.losses for o in outcomes], Path(folder) / f"losses{rank}.pt")


@pytest.mark.parametrize("precision", ["trainer.precision=fp64", "trainer.precision=fp16"])
def test_a_pack_of_three(precision, tmp_path):
    """In fp16 a sum over half of the images may be finite where that over all is not: the first loss is the same."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(_train_pack, args=(port, str(tmp_path), precision), nprocs=2)
    alone = train_together([trial_config(*p, precision) for p in PACK], tmp_path / "one")
    of_both = [torch.load(tmp_path / f"tensors{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank, tensors in enumerate(of_both):
        losses = torch.load(tmp_path / f"losses{rank}.pt", weights_only=True)
        for k in (0, 1):
            one = alone[k]
            together = type(one)(one.trial, losses[k], tensors[k], one.predicted)
            assert all(torch.equal(tensor, of_both[0][k][name]) for name, tensor in tensors[k].items())
            assert losses[k][0] == pytest.approx(one.losses[0], rel=1e-3)
            assert "fp16" in precision or largest_difference(together, one) < TOLERANCE
        assert read_record(tmp_path / f"rank{rank}" / "2").status == "failed"
