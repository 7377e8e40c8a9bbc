"""The process from which a sweep's workers are forked. It imports torch while the command does the same."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext, SpawnContext

from lora_vit.config import SweepConfig
from lora_vit.sweep.plan import Job


def worker_context() -> SpawnContext | ForkServerContext:
    """How worker processes are made: forked from a server that has imported torch, or anew where forks are unsafe."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_vit.sweep.packed"])
    return context


def start_early(jobs: Sequence[Job], options: SweepConfig) -> None:
    """Start the server if there will probably be several workers. A wrong guess costs time, nothing else."""
    if sys.platform != "linux" or options.dry_run or len(jobs) < 2:
        return
    several = options.workers not in ("auto", "1")
    if options.workers == "auto":
        on_cpu = all(job.config.trainer.accelerator == "cpu" for job in jobs) or not _has_nvidia_driver()
        several = on_cpu and len(os.sched_getaffinity(0)) > 1 and os.environ.get("OMP_NUM_THREADS") != "1"
    if several:
        from multiprocessing import forkserver

        worker_context()
        forkserver.ensure_running()


def _has_nvidia_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
