"""Who a process is, what reaches it from the others, and that leaving ends."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lora_vit import distributed
from lora_vit.distributed import Process

ROUNDS = 20
"""Groups that are joined and left; a race when leaving that is lost once in three shows itself."""

SUMMANDS = (
    torch.tensor([0.1, 1e16, -3.0], dtype=torch.float64),
    torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64),
)
COUNTS = (torch.tensor([[3, 2**40]]), torch.tensor([[5, 1]]))
FROM_MAIN = {"text": "ü" * 1000, "tensor": torch.arange(3), "nothing": None}


def test_a_process_alone():
    assert Process() == Process(rank=0, world_size=1, local_rank=0)
    assert Process().is_main
    assert not Process(rank=1, world_size=2).is_main
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.sum_over_processes_(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    value = object()
    assert distributed.from_main(value) is value
    distributed.leave_process_group()


@pytest.mark.parametrize(
    ("local_rank", "devices", "backend", "chosen"),
    [
        ("0", 0, "gloo", []),
        ("1", 2, "cpu:gloo,cuda:nccl", [1]),
        ("2", 2, "gloo", []),
        (None, 2, "cpu:gloo,cuda:nccl", [0]),
    ],
)
def test_each_process_takes_its_own_device(local_rank, devices, backend, chosen, monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    asked, devices_set = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", devices_set.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: asked.append((a, k)))
    assert distributed.join_process_group() == Process(5, 8, int(local_rank or 0))
    # half an hour: rank 0 may decode or download a data set while the others wait
    assert asked == [((backend,), {"timeout": timedelta(minutes=30)})]
    assert devices_set == chosen


def threads() -> list[str]:
    """Names of this process's threads, also of those that are not Python's (where the system shows them)."""
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]


def _two(rank: int, ports: list[int], folder: str) -> None:
    """A spawned process: what it is told, then joining and leaving again and again."""
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    seen = {}
    for port in ports:
        os.environ["MASTER_PORT"] = str(port)
        process = distributed.join_process_group()
        if not seen:
            summed, counts = SUMMANDS[rank].clone(), COUNTS[rank].clone()
            seen["process"] = (process.rank, process.world_size, process.local_rank)
            seen["in place"] = distributed.sum_over_processes_(summed) is summed
            seen["summed"], seen["counts"] = summed, distributed.sum_over_processes_(counts)
            seen["from main"] = distributed.from_main(FROM_MAIN if rank == 0 else "not this")
            seen["none"] = distributed.from_main(None if rank == 0 else "not this")
            import torchvision  # noqa: F401  (as every command does)

            torch.save(seen, Path(folder) / f"{rank}.pt")
        distributed.sum_over_processes_(torch.ones(5))
        distributed.from_main(rank)
        distributed.leave_process_group()
        assert not dist.is_initialized()
        assert [name for name in threads() if "gloo" in name] == [], "one that lives when Python ends may abort it"


@pytest.mark.distributed
def test_two_processes_agree_and_leave(tmp_path):
    sockets = [socket.socket() for _ in range(ROUNDS)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    context = mp.spawn(_two, args=(ports, str(tmp_path)), nprocs=2, join=False)
    try:
        ended = context.join(timeout=90) or context.join(timeout=90)  # returns once for the first that ends
        assert ended, "a process hangs in leaving its group"
    finally:
        for process in context.processes:
            process.kill()
    for rank in (0, 1):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert seen["process"] == (rank, 2, rank)
        assert seen["in place"]
        # one addition of two numbers has one result: to the last bit
        torch.testing.assert_close(seen["summed"], SUMMANDS[0] + SUMMANDS[1], rtol=0, atol=0)
        torch.testing.assert_close(seen["counts"], COUNTS[0] + COUNTS[1], rtol=0, atol=0)
        assert seen["from main"].keys() == FROM_MAIN.keys()
        assert seen["from main"]["text"] == FROM_MAIN["text"]
        assert seen["from main"]["tensor"].tolist() == [0, 1, 2]
        assert seen["from main"]["nothing"] is None
        assert seen["none"] is None
