"""The processes of a sweep: one for each GPU, or several on a CPU, forked from a server that has imported torch.

torch is imported only where it is needed: the server imports it while the command composes its trials.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lora_vit.config import SweepConfig, TrialConfig
from lora_vit.errors import ConfigError, Interrupted, TrialFailed
from lora_vit.stopping import StopRequest
from lora_vit.sweep.follow import LOOK_EVERY, Follower
from lora_vit.sweep.ledger import Ledger
from lora_vit.sweep.plan import Job, SweepRun
from lora_vit.sweep.progress import View
from lora_vit.terminal import Every

MOST_CPU_WORKERS = 8
"""A CPU's cores are shared by at most so many processes."""
PROCESS_BYTES = 400 << 20
"""About what Python and torch hold."""
GOES_ON = "what is saved stays, and the same command goes on"




@contextlib.contextmanager
def not_importing_main() -> Iterator[None]:
    """Processes started meanwhile leave alone the script that we run in, which to import could mean to run again."""
    main = vars(sys.modules["__main__"])
    before: dict[str, Any] = {name: main.pop(name) for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(before)


def worker_context() -> SpawnContext | ForkServerContext:
    """How worker processes are made: forked from a server that has imported torch, or anew where forks are unsafe."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_vit.sweep.worker"])
    return context


def start_early(jobs: Sequence[Job], options: SweepConfig) -> None:
    """Start the server if there may be several workers. A wrong guess costs time, nothing else."""
    if sys.platform != "linux" or options.dry_run or len(jobs) < 2 or options.workers == "1":
        return
    several_threads = len(os.sched_getaffinity(0)) > 1 and os.environ.get("OMP_NUM_THREADS") != "1"
    if several_threads or options.workers != "auto":
        from multiprocessing import forkserver

        worker_context()
        with _deaf_to_ctrl_c():
            forkserver.ensure_running()


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What is started meanwhile does not get the terminal's Ctrl-C: the command does, and asks its workers to stop."""
    resource_tracker.ensure_running()  # which lets Ctrl-C through again, once it has started
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def number_of_workers(jobs: Sequence[Job], options: SweepConfig, engine: Any = None) -> int:
    """How many processes train side by side. Raises ConfigError where the settings ask for what cannot be."""
    import torch

    from lora_vit.sweep.setups import uses_gpus

    for job in jobs:
        devices = job.config.trainer.devices
        if devices not in ("auto", "1"):
            raise ConfigError(
                f"trainer.devices={devices}: a pack trains on one device and a sweep spreads its packs over them, so "
                f"give sweep.workers={devices} instead (or hydra/launcher=basic, one trial after another)"
            )
    if engine is not None:
        return int(engine.number_of_workers(options.workers))
    on_gpu = uses_gpus(jobs)
    visible = torch.cuda.device_count() if on_gpu else _on_cpu(jobs)
    if options.workers == "auto":
        return max(1, min(visible, len(jobs)))
    wanted = int(options.workers)
    if on_gpu and wanted > visible:
        raise ConfigError(f"sweep.workers={wanted}: only {visible} GPUs are visible, give at most that")
    return wanted


def threads_each(workers: int) -> int:
    """Threads of each worker: together they have those of one process."""
    import torch

    return max(1, torch.get_num_threads() // workers)


def _on_cpu(jobs: Sequence[Job]) -> int:
    """Processes that share the cores: of few threads, which waits less for one another than one of many does."""
    import torch

    from lora_vit.sweep.measure import MEMORY_SHARE, attainable_memory

    largest = max(expected_bytes(job.config) for job in jobs)
    fit = int(MEMORY_SHARE * attainable_memory(torch.device("cpu")) // largest)
    return min(torch.get_num_threads(), MOST_CPU_WORKERS, fit)


def expected_bytes(config: TrialConfig, trials: int = 1) -> int:
    """About what a process holds that trains such trials together on a CPU.

    The weights twice (loading), and for each token of the batch what each block keeps for its backward pass:
    seven vectors of the width and one of the MLP's.
    """
    from lora_vit.models.vit import shape_of  # imports torch

    m = shape_of(config.model)
    tokens = trials * config.data.batch_size * m.tokens
    weights = m.layers * m.width * (4 * m.width + 2 * m.mlp)
    trained = 4 if config.lora.method == "full" else 2
    return PROCESS_BYTES + 4 * (trained * weights + m.layers * tokens * (7 * m.width + m.mlp))


def run_workers(run: SweepRun, view: View, stop: StopRequest) -> None:
    """Train in this process, or in several of their own. Raises Interrupted once all is saved."""
    if run.workers > 1:
        _run_processes(run, view, stop)
        return
    from lora_vit.sweep.worker import stopping, work

    work(run, stopping(view.emit, stop), stop)


def _run_processes(run: SweepRun, view: View, stop: StopRequest) -> None:
    context = worker_context()
    events: Any = context.Queue()
    shared = (run.folder, run.name, events, threads_each(run.workers))
    processes = [context.Process(target=_work, args=(i, *shared), name=f"worker {i}") for i in range(run.workers)]
    try:
        with _deaf_to_ctrl_c(), not_importing_main():
            for process in processes:
                process.start()
        _watch(processes, events, view, stop, Follower(run, view))
    except KeyboardInterrupt:  # the second one
        for process in processes:
            process.kill()
        raise
    except (EOFError, ConnectionError) as error:  # the server that forks them was killed
        raise TrialFailed(f"worker processes cannot be started ({type(error).__name__}): {GOES_ON}") from None
    events.close()
    if stop.signum or view.stop_asked:
        raise Interrupted(stop.signum or signal.SIGTERM)
    codes = [p.exitcode for p in processes]
    if any(codes):
        message = f"worker processes ended with codes {codes}"
        if all(codes):
            raise TrialFailed(f"{message}: {GOES_ON}")
        print(f"note: {message}; the others did their work", file=sys.stderr)


def _watch(processes: Sequence[BaseProcess], events: Any, view: View, stop: StopRequest, others: Follower) -> None:
    """Show what the workers and others report until ours have ended; ask ours to stop when we are asked."""
    asked, now_and_then = False, Every(LOOK_EVERY)
    while any(p.is_alive() for p in processes) or not events.empty():
        try:
            kind, fields = events.get(timeout=0.2)
            view.emit(kind, **fields)
        except queue.Empty:
            if now_and_then.due():
                others.look()
        if (stop.signum or view.stop_asked) and not asked:
            asked = True
            for process in processes:
                if process.is_alive() and process.pid:
                    os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        process.join()


def _work(index: int, folder: Path, name: str, events: Any, threads: int) -> None:
    """A worker process."""
    import torch

    from lora_vit.sweep.worker import work

    torch.set_num_threads(threads)
    command = multiprocessing.parent_process()

    def emit(kind: str, **fields: Any) -> None:
        events.put((kind, fields))
        if command is not None and not command.is_alive():
            stop.signum = signal.SIGTERM  # it was killed

    code = 0
    with StopRequest() as stop:
        try:
            work(Ledger(folder).open_run(name), emit, stop)
        except Interrupted as error:
            code = error.exit_code
        except Exception as error:
            users = isinstance(error, (ConfigError, OSError))
            emit("say", text=f"worker {index}: {error}" if users else f"worker {index}:\n{traceback.format_exc()}")
            code = 1
    events.close()
    events.join_thread()
    sys.exit(code)
