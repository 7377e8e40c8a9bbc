"""Processes that torchrun starts: who we are, exact sums, and agreement on values. torch is imported in a group alone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lora_vit.errors import ConfigError, TrialFailed, UserError, report
from lora_vit.stopping import repeating

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process, and what a process group cannot do without."""
OWN_RUN = "lora_vit"
"""torchrun's run id where one of our commands has started itself again, see :mod:`lora_vit.launch`."""
PEER_ENDED = "another process has ended"


@dataclass(frozen=True)
class Process:
    """This process among those that train together; alone it is rank 0 of 1.

    Attributes:
        rank: among all.
        world_size: of how many.
        local_rank: among those of this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and to the terminal."""
        return self.rank == 0


def started_by_torchrun() -> bool:
    """Whether the environment describes a process group that this process belongs to.

    Raises:
        ConfigError: the description of a group of several is not whole.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    shown = " ".join(f"{name}={value}" for name, value in given.items())
    if missing := [name for name in VARIABLES if name not in given]:
        alone = given.get("WORLD_SIZE", "1") == "1" or "RANK" not in given
        if alone and "TORCHELASTIC_RUN_ID" not in os.environ:
            return False  # left over by a scheduler
        raise ConfigError(f"{shown} without {' and '.join(missing)}: start with torchrun, or unset RANK")
    rank, size, port = given["RANK"], given["WORLD_SIZE"], given["MASTER_PORT"]
    if not (rank.isdecimal() and size.isdecimal() and port.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"{shown} describe no process group: start with torchrun, or unset RANK")
    return True


def started_by_ourselves() -> bool:
    """Whether a command of ours has started this process, and reports how it ends."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == OWN_RUN


@contextlib.contextmanager
def group() -> Iterator[Process]:
    """Join the processes that torchrun has started, if it started this one; leave them at the end.

    Rank 0 alone prints. An error that a user can cause ends the other ranks without a line, because rank 0 has it too
    (see :func:`on_all`); any other error is a rank's own, and it prints it. Errors end the process: SystemExit.
    """
    if not started_by_torchrun():
        yield Process()
        return
    is_main = os.environ["RANK"] == "0"
    with contextlib.ExitStack() as stack:
        if not is_main:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        if started_by_ourselves():
            stack.enter_context(_ending_with(os.getppid()))
        stack.callback(leave_process_group)
        try:
            yield join_process_group()
        except (Exception, KeyboardInterrupt) as error:  # printed before we leave: torchrun then ends the other ranks
            shared = isinstance(error, (UserError, KeyboardInterrupt))
            if shared and started_by_ourselves():
                from torch.distributed.elastic.multiprocessing.errors import get_error_handler

                get_error_handler().record_exception(error)
            sys.exit(report(error, quiet=shared and (started_by_ourselves() or not is_main)))


def _ending_with(parent: int) -> contextlib.AbstractContextManager[None]:
    """Ask this process to stop once the one that started it is gone."""

    def look() -> None:
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return repeating(look, every=1.0)


def join_process_group() -> Process:
    """Join the group that the environment describes, with NCCL for CUDA tensors and gloo for the others."""
    import torch
    import torch.distributed as dist

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
    """Leave the group, if there is one."""
    if (dist := _joined()) is not None:
        group = dist.group.WORLD
        # Held until the end: a gloo thread may still need the GIL to let go of its last tensor, and of the group and
        # its backend only the latter waits for that thread without the GIL. (torch 2.6 hangs here otherwise.)
        backend = group._get_backend(sys.modules["torch"].device("cpu"))
        del group
        dist.destroy_process_group()
        del backend


def _joined() -> Any:
    """``torch.distributed`` if this process is in a group, else None. Nothing is imported to know."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def this_process() -> Process:
    """This process in the group that it has joined; alone it is rank 0 of 1."""
    if (dist := _joined()) is None:
        return Process()
    return Process(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


def sum_over_processes_(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place; nothing to do for one process."""
    if (dist := _joined()) is not None:
        with _expecting_others():
            dist.all_reduce(tensor)
    return tensor


def from_main(value: T) -> T:
    """Rank 0's value, on every process."""
    if (dist := _joined()) is None:
        return value
    box = [value]
    with _expecting_others():
        dist.broadcast_object_list(box, src=0, device=sys.modules["torch"].device("cpu"))
    return box[0]


def from_all(value: T) -> list[T]:
    """The values of all processes by rank, on every process."""
    if (dist := _joined()) is None:
        return [value]
    values = [value] * dist.get_world_size()
    with _expecting_others():
        dist.all_gather_object(values, value)
    return values


def on_all(action: Callable[[], T]) -> T:
    """The action's result, once it has succeeded on every process.

    Raises the action's error where it failed, and TrialFailed on the other processes, which names the first of those.
    """
    results: list[T] = []
    error = None
    try:
        results.append(action())
    except Exception as caught:
        error = caught
    problems = from_all(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise TrialFailed(f"process {rank}: {problem}")
    return results[0]


def agree(value: str, problem: str) -> None:
    """Raise ConfigError on every process, with the problem and the values, unless all have the same value."""
    values = dict.fromkeys(from_all(value))
    if len(values) > 1:
        raise ConfigError(f"{problem}: {' | '.join(values)}")


@contextlib.contextmanager
def _expecting_others() -> Iterator[None]:
    """Tell the end of another process by what torch says of its connection."""
    try:
        yield
    except RuntimeError as error:
        words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed")
        if any(word in str(error) for word in words):
            raise TrialFailed(PEER_ENDED) from None
        raise
