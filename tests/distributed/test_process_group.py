"""Who a process is, what reaches it from the others, how errors end a group, and that leaving ends."""

from __future__ import annotations

import contextlib
import io
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
from lora_vit.errors import ConfigError, TrialFailed

ROUNDS = 20
"""Groups that are joined and left; a race when leaving that is lost once in three shows itself."""

SUMMANDS = (
    torch.tensor([0.1, 1e16, -3.0], dtype=torch.float64),
    torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64),
)
COUNTS = (torch.tensor([[3, 2**40]]), torch.tensor([[5, 1]]))
FROM_MAIN = {"text": "ü" * 1000, "tensor": torch.arange(3), "nothing": None}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def test_a_process_alone():
    with distributed.group() as process:
        assert process == Process(rank=0, world_size=1, local_rank=0) == distributed.this_process()
    assert Process().is_main
    assert not Process(rank=1, world_size=2).is_main
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.sum_over_processes_(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    value = object()
    assert distributed.from_main(value) is value
    assert distributed.on_all(lambda: value) is value
    distributed.agree("anything", "a problem")
    with pytest.raises(ZeroDivisionError):
        distributed.on_all(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("variables", "outcome"),
    [
        ("", False),
        ("RANK=0", False),
        ("WORLD_SIZE=4", False),
        ("LOCAL_RANK=0 RANK=0 WORLD_SIZE=1", False),
        ("MASTER_ADDR=a MASTER_PORT=1 WORLD_SIZE=1", False),
        ("RANK=0 WORLD_SIZE=1 MASTER_ADDR=a MASTER_PORT=1", True),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", True),
        ("RANK=0 WORLD_SIZE=2", "MASTER_ADDR= MASTER_PORT= "),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a", "MASTER_ADDR=a MASTER_PORT= "),
        ("RANK=0 MASTER_ADDR=a MASTER_PORT=1 TORCHELASTIC_RUN_ID=x", "WORLD_SIZE= "),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK=2 WORLD_SIZE=2"),
        ("RANK=one WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK=one"),
    ],
)
def test_whether_torchrun_started_us(variables, outcome, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, _, value in (word.partition("=") for word in variables.split()):
        monkeypatch.setenv(name, value)
    if isinstance(outcome, str):
        with pytest.raises(ConfigError, match=f"{outcome}.*start with torchrun, or unset RANK"):
            distributed.started_by_torchrun()
    else:
        assert distributed.started_by_torchrun() is outcome


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
    variables = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": local_rank}
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    asked, devices_set = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", devices_set.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: asked.append((a, k)))
    with distributed.group():
        # half an hour: rank 0 may decode or download a data set while the others wait
        assert asked == [((backend,), {"timeout": timedelta(minutes=30)})]
        assert devices_set == chosen


def threads() -> list[str]:
    """Names of this process's threads, also of those that are not Python's (where the system shows them)."""
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]


def ended_by(action) -> tuple[int, str]:
    """Exit code and errors of a group that this process joins for an action."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended, distributed.group():
        action()
    return ended.value.code, err.getvalue()


def _see(rank: int) -> dict[str, object]:
    """What a process of two gets from the other one."""
    summed, counts = SUMMANDS[rank].clone(), COUNTS[rank].clone()
    seen: dict[str, object] = {"in place": distributed.sum_over_processes_(summed) is summed, "summed": summed}
    seen["counts"] = distributed.sum_over_processes_(counts)
    seen["from main"] = distributed.from_main(FROM_MAIN if rank == 0 else "not this")
    seen["none"] = distributed.from_main(None if rank == 0 else "not this")
    seen["from all"] = distributed.from_all(f"of {rank}")
    seen["on all"] = distributed.on_all(lambda: rank)
    distributed.agree("the same", "a problem")
    for failing in (0, 1):
        try:
            distributed.on_all(lambda failing=failing: rank // (rank - failing))
        except (ZeroDivisionError, TrialFailed) as error:
            seen[f"{failing} fails"] = f"{type(error).__name__}: {error}"
    return seen


def _fail(rank: int, kind: type[Exception], failing: tuple[int, ...]) -> None:
    if rank in failing:
        raise kind("broken")
    distributed.from_main(None)
    distributed.from_main(None)


def _two(rank: int, ports: list[int], folder: str) -> None:
    """A spawned process: what it sees, then joining and leaving again and again, and errors."""
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    seen: dict[str, object] = {}
    for port in ports[3:]:
        os.environ["MASTER_PORT"] = str(port)
        with distributed.group() as process:
            if not seen:
                import torchvision  # noqa: F401  (as every command does)

                seen = {"process": (process.rank, process.world_size, process.local_rank), **_see(rank)}
            distributed.sum_over_processes_(torch.ones(5))
            distributed.from_main(rank)
        assert not dist.is_initialized()
        assert [name for name in threads() if "gloo" in name] == [], "one that lives when Python ends may abort it"
    for port, (what, action) in zip(ports, {
        "values differ": lambda: distributed.agree(f"of {rank}", "start alike"),
        "all have it": lambda: _fail(rank, ConfigError, (0, 1)),
        "a rank's own": lambda: _fail(rank, KeyError, (1,)),
    }.items(), strict=False):  # fmt: skip
        os.environ["MASTER_PORT"] = str(port)
        seen[what] = ended_by(action)
    torch.save(seen, Path(folder) / f"{rank}.pt")


@pytest.mark.distributed
def test_two_processes_agree_fail_and_leave(tmp_path):
    sockets = [socket.socket() for _ in range(ROUNDS + 3)]
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
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in (0, 1):
        mine = seen[rank]
        assert mine["process"] == (rank, 2, rank)
        assert mine["in place"]
        # one addition of two numbers has one result: to the last bit
        torch.testing.assert_close(mine["summed"], SUMMANDS[0] + SUMMANDS[1], rtol=0, atol=0)
        torch.testing.assert_close(mine["counts"], COUNTS[0] + COUNTS[1], rtol=0, atol=0)
        assert mine["from main"].keys() == FROM_MAIN.keys()
        assert mine["from main"]["text"] == FROM_MAIN["text"]
        assert mine["from main"]["tensor"].tolist() == [0, 1, 2]
        assert mine["from main"]["nothing"] is None
        assert mine["none"] is None
        assert mine["from all"] == ["of 0", "of 1"]
        assert mine["on all"] == rank
        for failing in (0, 1):
            told = "ZeroDivisionError: " if rank == failing else f"TrialFailed: process {failing}: "
            assert mine[f"{failing} fails"].startswith(f"{told}integer division")
    # rank 0 speaks for both
    assert seen[0]["values differ"] == (1, "error: start alike: of 0 | of 1\n")
    assert seen[0]["all have it"] == (1, "error: broken\n")
    assert seen[1]["values differ"] == seen[1]["all have it"] == (1, "")
    assert seen[0]["a rank's own"] == (1, "error: another process has ended\n")
    code, trace = seen[1]["a rank's own"]
    assert code == 1
    assert trace.startswith("Traceback")
    assert "KeyError: 'broken'" in trace
