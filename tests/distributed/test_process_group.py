"""Who a process is, what reaches it from the others, how errors end a group, and that leaving ends."""

from __future__ import annotations

import contextlib
import io
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import free_ports

from lora_vit import distributed
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError, TrialFailed

ROUNDS = 12
"""Groups that are joined and left; a race when leaving that is lost once in three shows itself."""

ENDS = ("all have it", "one lacks memory", "a rank's own")


def test_a_process_alone():
    with distributed.group() as process:
        assert process == Process(rank=0, world_size=1) == distributed.this_process()
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.sum_over_processes_(tensor) is tensor
    value = object()
    assert distributed.from_main(value) is value
    assert distributed.on_all(lambda: value) is value
    with pytest.raises(ZeroDivisionError):
        distributed.on_all(lambda: 1 // 0)


def test_processes_that_cannot_connect_name_the_variables(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope")
    monkeypatch.setenv("LOCAL_RANK", "0")
    error = RuntimeError("[enforce fail at /a/device.cc:84] ifa != nullptr. Unable to find: nope\nmore")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *given, **more: (_ for _ in ()).throw(error))
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME=nope.* \(ifa .*nope\): change or unset these"):
        distributed._join()


def test_whether_torchrun_started_us(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"RANK=1 WORLD_SIZE=2 .*: start with torchrun, or unset RANK"):
        distributed.started_by_torchrun()
    monkeypatch.delenv("MASTER_PORT")
    assert not distributed.started_by_torchrun(), "what a scheduler leaves does not count"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert distributed.started_by_torchrun()


@pytest.mark.parametrize(
    ("local_rank", "devices", "backend", "chosen"),
    [("0", 0, "gloo", []), ("1", 2, "cpu:gloo,cuda:nccl", [1]), ("1", 1, "cpu:gloo,cuda:nccl", [0])],
)
def test_each_process_takes_its_own_device(local_rank, devices, backend, chosen, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": local_rank, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    asked, devices_set, limits = [], [], []
    backend_of = {torch.device("cpu"): SimpleNamespace(_set_default_timeout=limits.append)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", devices_set.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: asked.append((a, k)))
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=SimpleNamespace(_get_backend=backend_of.get)))
    with distributed.group():
        assert asked == [((backend,), {"timeout": timedelta(minutes=30)})]
        assert devices_set == chosen
        assert limits == [timedelta(days=365)], "rank 0 may decode or download for hours while the others wait"


def threads() -> list[str]:
    """Names of this process's threads, also of those that are not Python's (where the system shows them)."""
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]


def _see(rank: int) -> dict[str, object]:
    """What a process of two gets from the other one."""
    # one addition of two numbers has one result: to the last bit
    floats = torch.tensor([[0.1, 1e16, -3.0], [0.2, 1.0, 3.0]], dtype=torch.float64)
    counts = torch.tensor([[3, 2**40], [5, 1]])
    summed = floats[rank].clone()
    seen: dict[str, object] = {
        "in place": distributed.sum_over_processes_(summed) is summed,
        "floats": torch.equal(summed, floats[0] + floats[1]),
        "counts": torch.equal(distributed.sum_over_processes_(counts[rank].clone()), counts[0] + counts[1]),
        "from main": distributed.from_main({"text": "ü" * 1000, "nothing": None} if rank == 0 else "not this"),
        "none": distributed.from_main(None if rank == 0 else "not this"),
        "from all": distributed.from_all(f"of {rank}"),
        "on all": distributed.on_all(lambda: rank),
    }
    for failing in (0, 1):
        try:
            distributed.on_all(lambda failing=failing: rank // (rank - failing))
        except (ZeroDivisionError, TrialFailed) as error:
            seen[f"{failing} fails"] = f"{type(error).__name__}: {error}".partition(" integer")[0]
    return seen


def expected(rank: int) -> dict[str, object]:
    fails = {f"{r} fails": "ZeroDivisionError:" if r == rank else f"TrialFailed: process {r}:" for r in (0, 1)}
    return {"in place": True, "floats": True, "counts": True, "from main": {"text": "ü" * 1000, "nothing": None},
            "none": None, "from all": ["of 0", "of 1"], "on all": rank, **fails}  # fmt: skip


def _end(rank: int, what: str) -> tuple[int, str]:
    """Exit code and printed errors of a group that ends so."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), distributed.group():
            distributed.from_main(None)  # both have joined: gloo may wait for one that leaves earlier
            if what == "all have it" or rank == 1:
                if what == "one lacks memory":
                    raise TrialFailed("full") from MemoryError()
                raise ConfigError("broken") if what == "all have it" else KeyError("broken")
            distributed.from_main(distributed.from_main(None))
    except SystemExit as end:
        return int(str(end.code)), err.getvalue()
    raise AssertionError("it did not end")


def _two(rank: int, ports: list[int], folder: str) -> None:
    """A spawned process: what it sees, then joining and leaving again and again, and errors."""
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      TORCHELASTIC_RUN_ID="a test")  # fmt: skip
    seen: dict[str, object] = {}
    for port in ports[:ROUNDS]:
        os.environ["MASTER_PORT"] = str(port)
        with distributed.group() as process:
            if not seen:
                import torchvision  # noqa: F401  (as every command does)

                assert process == Process(rank, 2)
                seen = _see(rank)
            distributed.sum_over_processes_(torch.ones(5))
            distributed.from_main(rank)
        assert not dist.is_initialized()
        assert [name for name in threads() if "gloo" in name] == [], "one that lives when Python ends may abort it"
    for port, what in zip(ports[ROUNDS:], ENDS, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        seen[what] = _end(rank, what)
    torch.save(seen, Path(folder) / f"{rank}.pt")


@pytest.mark.distributed
def test_two_processes_agree_fail_and_leave(tmp_path):
    context = mp.spawn(_two, args=(free_ports(ROUNDS + len(ENDS)), str(tmp_path)), nprocs=2, join=False)
    try:
        ended = context.join(timeout=90) or context.join(timeout=90)  # returns once for the first that ends
        assert ended, "a process hangs in leaving its group"
    finally:
        for process in context.processes:
            process.kill()
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    ends = [[one.pop(what) for what in ENDS] for one in seen]
    assert seen == [expected(0), expected(1)]
    lines = ["error: broken\n", *["error: another process has ended\n"] * 2]
    assert ends[0] == [(1, line) for line in lines], "rank 0 speaks for both"
    *silent, (code, trace) = ends[1]
    assert (silent, code) == ([(1, ""), (1, "error: full\n")], 1)
    assert trace.startswith("Traceback")
    assert "KeyError: 'broken'" in trace
