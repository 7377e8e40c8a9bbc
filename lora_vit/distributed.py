"""Process groups: who we are, exact sums over all processes, and one object from rank 0 to the others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lora_vit.errors import TrialFailed

T = TypeVar("T")




@dataclass
class Process:
    """This process among those that train together; alone it is rank 0 of 1.

    Attributes:
        rank: among all.
        world_size: of how many.
        local_rank: among those of this machine.
        has_led: as rank 0 it has told the others what to train.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    has_led: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and to the terminal."""
        return self.rank == 0


def join_process_group() -> Process:
    """Join the group that the environment describes, with NCCL for CUDA tensors and gloo for the others."""
    # Imported later (torchvision does), its default arguments would hold the group, and gloo's threads, for ever.
    import torch.distributed.nn.functional

    process = Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0)))
    backend = "gloo"
    if torch.cuda.is_available() and process.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(process.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    with _expecting_others():
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return process


def leave_process_group() -> None:
    """Leave the group, where there is one."""
    if (group := dist.group.WORLD) is not None:
        # Held until the end: a gloo thread may still need the GIL to let go of its last tensor, and of the group and
        # its backend only the latter waits for that thread without the GIL. (torch 2.6 hangs here otherwise.)
        backend = group._get_backend(torch.device("cpu"))
        del group
        dist.destroy_process_group()
        del backend


def sum_over_processes_(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place; nothing to do for one process."""
    if dist.is_initialized():
        with _expecting_others():
            dist.all_reduce(tensor)
    return tensor


def from_main(value: Any) -> Any:
    """Rank 0's value, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    with _expecting_others():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def from_all(value: T) -> list[T]:
    """The values of all processes by rank, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    with _expecting_others():
        dist.all_gather_object(values, value)
    return values


def on_all(action: Callable[[], T]) -> T:
    """The action's result, once it has succeeded on every process. Raises its error here, TrialFailed elsewhere."""
    result, error = [], None
    try:
        result.append(action())
    except Exception as caught:
        error = caught
    problems = from_all(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise TrialFailed(f"process {rank}: {problem}")
    return result[0]


@contextlib.contextmanager
def leading(process: Process) -> Iterator[None]:
    """Rank 0's part. Where it ends without having told the others what to train: they end too, as failed if it has."""
    failed = True
    try:
        yield
        failed = False
    except SystemExit as end:
        failed = bool(end.code)
        raise
    finally:
        if not process.has_led:
            with contextlib.suppress(TrialFailed):
                from_main(TrialFailed if failed else None)


@contextlib.contextmanager
def _expecting_others() -> Iterator[None]:
    """Tell the end of another process by what torch says of its connection."""
    try:
        yield
    except RuntimeError as error:
        words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed")
        if any(word in str(error) for word in words):
            raise TrialFailed("another process has ended, see what it said") from None
        raise
