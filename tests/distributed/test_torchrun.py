"""Commands in a group of processes: whatever stops one ends all at once, and rank 0 says it once."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from helpers import SMALL, free_ports, start
from PIL import Image

from lora_vit import train

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
OWN_IMAGES = ["model=vit_tiny", "data=imagefolder", "data.cache_dir=cache"]
CASES = {  # arguments, and words of the one line; none: the command succeeds
    "a preset": (["sweep=quickstart"], ["error: a sweep starts its own processes"]),
    "a setting": ([*SMALL, "lora.rank=0"], ["error: lora.rank=0 is impossible"]),
    "Hydra's error": ([*SMALL, "lora.rnk=0"], ["error: unknown key 'lora.rnk'"]),
    "data": ([*OWN_IMAGES, "data.root=empty"], ["error: ", "empty"]),
    "a folder that Hydra cannot make": ([*SMALL, "hydra.run.dir=file/run"], ["error: file/run cannot be written"]),
    "devices": ([*SMALL, "trainer.devices=3", "data.batch_size=6"],
                ["error: trainer.devices=3: torchrun has started 2"]),
    "data of one process": ([*OWN_IMAGES, "data.root='of ${oc.env:RANK}'"], ["process 1: ", "of 1 is not a folder"]),
    "different data": ([*OWN_IMAGES, "data.root='differs ${oc.env:RANK}'"], ["same overrides", ": trial "]),
    "different overrides": ([*SMALL, "lora.rank=1"], ["lora.rank=1", "lora.rank=2"]),
    "help": ([*SMALL, "--cfg", "job"], []),
    "a bad step": ([*SMALL, "optimizer.lr=1e200", "hydra.run.dir=bad"], ["error: the loss", "not finite"]),
    "a trial": ([*SMALL, "data.batch_size=4", "hydra.run.dir=run"], []),
    "another trial there": ([*SMALL, "lora.rank=8", "hydra.run.dir=run"], ["holds trial"]),
}  # fmt: skip
ONCE = {"help": "batch_size:", "a bad step": "trial ", "a trial": "Validation Accuracy"}
"""What is printed by one process; the others of these commands print nothing."""


def _give(rank: int, ports: list[int], folder: str) -> None:
    """A process: one command after the other, as torchrun would start them."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      TORCHELASTIC_RUN_ID="a test")  # fmt: skip
    ended = {}
    for port, (case, (arguments, _)) in zip(ports, CASES.items(), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = ["train", *(text.replace("lora.rank=1", f"lora.rank={rank + 1}") for text in arguments)]
        out, err, code = io.StringIO(), io.StringIO(), 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                train.main()
        except SystemExit as end:
            code = int(str(end.code or 0))
        ended[case] = (code, out.getvalue(), err.getvalue())
    torch.save(ended, f"../{rank}.pt")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What each command came to in both processes, and their folder."""
    folder = tmp_path_factory.mktemp("group") / "here"
    (folder / "empty").mkdir(parents=True)
    (folder / "file").touch()
    for name, value in (("of 0", 0), ("differs 0", 0), ("differs 1", 9)):
        for i, label in enumerate("aabb"):
            (folder / name / label).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), value).save(folder / name / label / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        mp.spawn(_give, args=(free_ports(len(CASES)), str(folder)), nprocs=2)
    return [torch.load(folder.parent / f"{rank}.pt", weights_only=True) for rank in (0, 1)], folder


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_once_and_ends_all(case, ended):
    words = CASES[case][1]
    (code, out, err), (other_code, other_out, other_err) = (one[case] for one in ended[0])
    assert code == other_code == (1 if words else 0), err
    assert (other_out, other_err) == ("", ""), "rank 0 speaks for both"
    assert out.count(ONCE[case]) == 1 if case in ONCE else out == ""
    assert len(err.splitlines()) == (1 if words else 0), err
    assert [word for word in words if word not in err] == []


def test_only_trials_leave_a_folder(ended):
    names = {path.name for path in ended[1].iterdir()}
    assert names - {"empty", "file", "of 0", "differs 0", "differs 1", "cache"} == {"bad", "run"}


def test_two_nodes_of_two_processes_train_and_end_together(tmp_path):
    launcher = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_ports(1)[0]}"]
    line = [sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc-per-node=2", "-m", "lora_vit.train"]
    nodes = [start([*line, *SMALL, "hydra.run.dir=run", "data.batch_size=4"], tmp_path) for _ in range(2)]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted("Validation Accuracy" in out for out in said) == [False, True]
    assert [path.name for path in Path(tmp_path).iterdir()] == ["run"]
