"""Commands under torchrun: whatever stops rank 0, all processes end at once, and it is said once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SMALL

from lora_vit.errors import ConfigError
from lora_vit.start import started_by_torchrun

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SOON = 120
"""Seconds in which a command must have ended that would otherwise wait for 30 minutes."""
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def start(folder: Path, *overrides: str, launcher: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen[str]:
    """Two processes (of a node) that torchrun starts; what they write goes to files, so that all of it is seen."""
    line = [*TORCHRUN, *launcher, "--nproc-per-node=2", "-m", "lora_vit.train", *overrides]
    return subprocess.Popen(
        line, cwd=folder, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def said(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output, and of the errors what torchrun does not say itself (from its report on)."""
    try:
        out, err = process.communicate(timeout=SOON)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    lines = [x for x in err.splitlines() if x[:1] not in "WEI" or not x[1:5].isdecimal()]
    ours = "\n".join(lines).partition('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
    return process.returncode, out, ours


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


CASES = {
    "a preset": (["sweep=quickstart"], "error: a sweep starts its own processes: give the same command without"),
    "a setting": ([*SMALL, "lora.rank=0"], "error: lora.rank=0 is impossible"),
    "Hydra's error": ([*SMALL, "lora.rnk=0"], "error: unknown key 'lora.rnk'"),
    "data": (["data=imagefolder", "data.root=empty", "model=vit_tiny"], "error: empty"),
    "a folder": ([*SMALL, "hydra.run.dir=/proc/run"], "error: /proc/run cannot be written"),
    "devices": ([*SMALL, "trainer.devices=3", "data.batch_size=6"], "error: trainer.devices=3: torchrun has started 2"),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_what_stops_rank_0_ends_all(case, tmp_path):
    (tmp_path / "empty").mkdir()
    overrides, message = CASES[case]
    code, out, ours = said(start(tmp_path, *overrides))
    assert code == 1
    assert out == ""
    assert ours.replace(f"{tmp_path}/", "").startswith(message), ours
    assert len(ours.splitlines()) == 1, "the others say nothing"
    assert [p.name for p in tmp_path.iterdir() if p.name != "outputs"] == ["empty"]
    assert not list(tmp_path.glob("outputs/*/*"))


@pytest.mark.slow
@pytest.mark.distributed
def test_nodes_with_different_overrides_are_refused_on_both(tmp_path):
    launcher = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    nodes = [start(tmp_path, *SMALL, f"lora.rank={rank}", launcher=launcher) for rank in (8, 16)]
    for code, out, ours in map(said, nodes):
        assert (code, out) == (1, "")
        assert len(ours.splitlines()) == 1, ours
        assert "lora.rank=8" in ours
        assert "lora.rank=16" in ours
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_two_nodes_train_and_end_together(tmp_path):
    """Then again with rank 0 killed before the others know what to train: the second node ends too."""

    def nodes(*overrides: str) -> list[subprocess.Popen[str]]:
        launcher = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
        return [start(tmp_path, *SMALL, *overrides, launcher=launcher) for _ in range(2)]

    outs = [said(node) for node in nodes("hydra.run.dir=run", "data.batch_size=4")]
    assert [code for code, _, _ in outs] == [0, 0]
    assert sorted("Validation Accuracy" in out for _, out, _ in outs) == [False, True]
    outs = [said(node) for node in nodes("hydra.run.dir=run", "data.batch_size=4", "lora.rank=8")]
    assert [code for code, _, _ in outs] == [1, 1]
    lines = [line for _, _, ours in outs for line in ours.splitlines()]
    assert len(lines) == 1, lines
    assert "holds trial" in lines[0]


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
        ("RANK=0 WORLD_SIZE=2", "without MASTER_ADDR and MASTER_PORT"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a", "without MASTER_PORT"),
        ("RANK=0 MASTER_ADDR=a MASTER_PORT=1 TORCHELASTIC_RUN_ID=x", "without WORLD_SIZE"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "describe no process group"),
        ("RANK=one WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "describe no process group"),
    ],
)
def test_whether_torchrun_started_us(variables, outcome, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, _, value in (word.partition("=") for word in variables.split()):
        monkeypatch.setenv(name, value)
    if isinstance(outcome, str):
        with pytest.raises(ConfigError, match=outcome):
            started_by_torchrun()
    else:
        assert started_by_torchrun() is outcome
