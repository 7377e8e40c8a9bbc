"""Processes that torchrun starts: who we are, exact sums, and agreement on values. Only a group imports torch."""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from lora_vit.errors import ConfigError, TrialFailed, UserError, out_of_memory, report
from lora_vit.stopping import repeating

T = TypeVar("T")
OWN_RUN = "lora_vit"  # torchrun's run id of processes that a command of ours has started; it reports how they end
PEER_ENDED = "another process has ended"


class Process(NamedTuple):
    """This process among those that train together. Alone it is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1


def started_by_torchrun() -> bool:
    """Whether torchrun has started this process. Raises ConfigError if another launcher has, as one of several."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # a scheduler may leave some of them
    if all(os.environ.get(name) for name in names) and os.environ["WORLD_SIZE"] != "1":
        shown = " ".join(f"{name}={os.environ[name]}" for name in names)
        raise ConfigError(f"{shown}: each of these processes would train all of it: start with torchrun, or unset RANK")
    return False


@contextlib.contextmanager
def group() -> Iterator[Process]:
    """Join the processes that torchrun has started, if it started this one, and leave them at the end.

    Rank 0 alone prints, also an error that a user can cause: it has it too (see :func:`on_all`). Any other error, also
    that memory ran out, is a rank's own, and it prints it. In a group, errors end in SystemExit.
    """
    if not started_by_torchrun():
        yield Process()
        return
    is_main, ours = os.environ["RANK"] == "0", os.environ["TORCHELASTIC_RUN_ID"] == OWN_RUN
    with contextlib.ExitStack() as stack:
        if not is_main:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        if ours:  # end with that command
            parent, end = os.getppid(), functools.partial(os.kill, os.getpid(), signal.SIGTERM)
            stack.enter_context(repeating(lambda: None if os.getppid() == parent else end(), every=1.0))
        stack.callback(_leave)
        try:
            yield _join()
        except (Exception, KeyboardInterrupt) as error:  # printed before we leave: torchrun then ends the other ranks
            known = isinstance(error, (UserError, KeyboardInterrupt))
            if known and ours:
                from torch.distributed.elastic.multiprocessing.errors import get_error_handler

                get_error_handler().record_exception(error)
            sys.exit(report(error, quiet=known and (ours or not (is_main or out_of_memory(error.__cause__)))))


@contextlib.contextmanager
def _expecting_others() -> Iterator[None]:
    """Know the end of another process by what torch says of its connection."""
    try:
        yield
    except RuntimeError as error:
        words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed")
        if any(word in str(error) for word in words):
            raise TrialFailed(PEER_ENDED) from None
        raise


@_expecting_others()
def _join() -> Process:
    """Join the group that the environment describes, with NCCL for CUDA tensors and gloo for the others."""
    import torch
    import torch.distributed as dist

    # Imported later (torchvision does), its default arguments would hold the group, and gloo's threads, for ever.
    import torch.distributed.nn.functional

    backend, local_rank = "gloo", int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())  # each may see one GPU, its own
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    except RuntimeError as error:
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT")
        given = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        why = str(error).strip().splitlines()[0].rpartition("] ")[2]  # behind a place in C++
        raise ConfigError(f"the processes cannot connect with {given} ({why}): change or unset these") from None
    world: Any = dist.group.WORLD
    # One may read or decode data for hours while others wait; that a process has ended is seen without a limit.
    world._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(days=365))
    return this_process()


def _leave() -> None:
    if (dist := _joined()) is not None:
        # Held until the end: a gloo thread may still need the GIL to let go of its last tensor, and of the group and
        # its backend only the latter waits for that thread without the GIL. (torch 2.6 hangs here otherwise.)
        backend = dist.group.WORLD._get_backend(sys.modules["torch"].device("cpu"))
        dist.destroy_process_group()
        del backend


def _joined() -> Any:
    """``torch.distributed`` if this process is in a group, else None. Nothing is imported to know."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def this_process() -> Process:
    dist = _joined()
    return Process(dist.get_rank(), dist.get_world_size()) if dist else Process()


@_expecting_others()
def sum_over_processes_(tensor: T) -> T:
    if (dist := _joined()) is not None:
        dist.all_reduce(tensor)
    return tensor


@_expecting_others()
def from_main(value: T) -> T:
    """Rank 0's value, on every process."""
    box = [value]
    if (dist := _joined()) is not None:
        dist.broadcast_object_list(box, src=0, device=sys.modules["torch"].device("cpu"))
    return box[0]


@_expecting_others()
def from_all(value: T) -> list[T]:
    """The values of all processes by rank, on every process."""
    values = [value] * this_process().world_size
    if (dist := _joined()) is not None:
        dist.all_gather_object(values, value)
    return values


def on_all(action: Callable[[], T]) -> T:
    """The action's result, once it has succeeded on every process; where another failed, TrialFailed says which."""
    try:
        result = action()
    except Exception as error:
        from_all(str(error))
        raise
    for rank, problem in enumerate(from_all(None)):
        if problem is not None:
            raise TrialFailed(f"process {rank}: {problem}")
    return result
