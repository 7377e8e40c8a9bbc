"""Commands under torchrun: whatever stops one process ends all at once, and rank 0 says it once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SMALL
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SOON = 120
"""Seconds in which a command must have ended that would otherwise wait for 30 minutes."""


def start(folder: Path, *overrides: str, launcher: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen[str]:
    """Two processes (of a node) that torchrun starts."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc-per-node=2"]
    return subprocess.Popen(
        [*torchrun, "-m", "lora_vit.train", *overrides],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def start_nodes(folder: Path, *overrides: tuple[str, ...]) -> list[subprocess.Popen[str]]:
    """A node for each command line, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}")
    return [start(folder, *SMALL, *given, launcher=launcher) for given in overrides]


def said(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, output, and the lines of errors that torchrun does not say itself (from its report on)."""
    try:
        out, err = process.communicate(timeout=SOON)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    lines = [x for x in err.splitlines() if x[:1] not in "WEI" or not x[1:5].isdecimal()]
    ours = "\n".join(lines).partition('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
    return process.returncode, out, ours.splitlines()


CASES = {
    "a preset": (["sweep=quickstart"], "error: a sweep starts its own processes"),
    "a setting": ([*SMALL, "lora.rank=0"], "error: lora.rank=0 is impossible"),
    "Hydra's error": ([*SMALL, "lora.rnk=0"], "error: unknown key 'lora.rnk'"),
    "data": (["data=imagefolder", "data.root=empty", "model=vit_tiny"], "error: empty"),
    "a folder that Hydra cannot make": ([*SMALL, "hydra.run.dir=file/run"], "error: file/run cannot be written"),
    "devices": ([*SMALL, "trainer.devices=3", "data.batch_size=6"], "error: trainer.devices=3: torchrun has started 2"),
    "training": ([*SMALL, "optimizer.lr=1e200"], "error: the loss or its gradient is not finite"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_stops_the_processes_is_said_once(case, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    overrides, message = CASES[case]
    code, out, errors = said(start(tmp_path, *overrides))
    assert code == 1
    assert len(errors) == 1, errors
    assert errors[0].replace(f"{tmp_path}/", "").startswith(message)
    if case == "training":
        assert out.count("trial ") == 1
        assert len(list(tmp_path.glob("outputs/runs/*"))) == 1
    else:
        assert out == ""
        assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize(("colour", "words"), [(None, ["process 1: ", "/1 is not a folder"]), (9, ["different files"])])
def test_what_another_process_finds_is_said_by_rank_0(colour, words, tmp_path):
    """Each has a folder of images of its own here, as nodes may have."""
    for rank, value in enumerate([0] if colour is None else [0, colour]):
        for name in ("a/1", "a/2", "b/1", "b/2"):
            path = tmp_path / str(rank) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), value).save(path)
    own = ("data=imagefolder", "data.root='${oc.env:LOCAL_RANK}'", "data.cache_dir=cache")
    code, out, errors = said(start(tmp_path, "model=vit_tiny", *own))
    assert (code, out) == (1, "")
    assert len(errors) == 1, errors
    assert [word for word in words if word not in errors[0]] == []


def test_help_is_printed_once(tmp_path):
    code, out, _ = said(start(tmp_path, *SMALL, "--cfg", "job"))
    assert code == 0
    assert out.count("batch_size:") == 1


def test_nodes_with_different_overrides_are_refused_on_both(tmp_path):
    outcomes = [said(node) for node in start_nodes(tmp_path, ("lora.rank=8",), ("lora.rank=16",))]
    assert [(code, out) for code, out, _ in outcomes] == [(1, ""), (1, "")]
    (line,) = [line for _, _, errors in outcomes for line in errors]
    assert "lora.rank=8" in line
    assert "lora.rank=16" in line
    assert list(tmp_path.iterdir()) == []


def test_two_nodes_train_and_end_together(tmp_path):
    """Then again with a trial that rank 0 refuses: the second node ends too."""
    same = ("hydra.run.dir=run", "data.batch_size=4")
    outcomes = [said(node) for node in start_nodes(tmp_path, same, same)]
    assert [code for code, _, _ in outcomes] == [0, 0]
    assert sorted("Validation Accuracy" in out for _, out, _ in outcomes) == [False, True]
    other = (*same, "lora.rank=8")
    outcomes = [said(node) for node in start_nodes(tmp_path, other, other)]
    assert [code for code, _, _ in outcomes] == [1, 1]
    (line,) = [line for _, _, errors in outcomes for line in errors]
    assert "holds trial" in line
