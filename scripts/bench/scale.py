"""What a sweep of many trials on many workers costs beside the training: operations on its folder, seconds, bytes.

    python scripts/bench/scale.py --trials 10000 --workers 64 --milliseconds 1

Everything but the training is real: plan, run, claims, schedule, records and the command that follows. Workers are
threads, a trial takes ``--seconds``, and each operation on the folder takes ``--milliseconds`` more, as it does on a
shared one. What a trial itself writes (record, checkpoint, event files) is not counted: it does not depend on how many
there are. Listing a folder counts as one operation for each 100 names.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_vit.sweep.follow import LOOK_EVERY, Follower
from lora_vit.sweep.ledger import Ledger
from lora_vit.sweep.progress import View
from lora_vit.sweep.runner import begin

from lora_vit.api import compose
from lora_vit.config import SweepConfig, to_dict
from lora_vit.records import TrialRecord, write_record
from lora_vit.stopping import StopRequest
from lora_vit.sweep import claims as claims_module
from lora_vit.sweep.claims import ENDED
from lora_vit.sweep.plan import Group, Job, SweepRun
from lora_vit.sweep.worker import Worker

NAMES_AN_OPERATION = 100


class Operations:
    """Counts what is done in a folder, and makes it slower."""

    def __init__(self, folder: Path, delay: float):
        self.folder, self.delay = str(folder), delay
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.here = threading.local()

    @contextlib.contextmanager
    def not_counted(self) -> Iterator[None]:
        """For what is the trial's own."""
        self.here.off = True
        try:
            yield
        finally:
            self.here.off = False

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count and slow down while the context lasts."""
        names = ("link", "stat", "utime", "listdir", "scandir", "replace", "unlink", "mkdir", "open", "fsync", "chmod")
        before = {name: getattr(os, name) for name in names}
        for name, function in before.items():
            setattr(os, name, self._wrapped(name, function))
        before_open = Path.open
        Path.open = self._wrapped("open", before_open)  # type: ignore[method-assign]
        try:
            yield
        finally:
            Path.open = before_open  # type: ignore[method-assign]
            for name, function in before.items():
                setattr(os, name, function)

    def _wrapped(self, name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            ours = name == "fsync" or str(args[0]).startswith(self.folder)
            if not ours or getattr(self.here, "off", False):
                return function(*args, **options)
            if threading.current_thread().name == "signs of life":  # by the hour, not by the trial
                return function(*args, **options)
            try:
                result = function(*args, **options)
                weight = 1 + len(result) // NAMES_AN_OPERATION if name == "listdir" else 1
            except OSError:
                weight = 1
                raise
            finally:
                with self.lock:
                    self.counts[name] += weight
                time.sleep(weight * self.delay)
            return result

        return call


class SimulatedWorker(Worker):
    """A worker whose trials take their time and are completed."""

    def __init__(self, run: SweepRun, operations: Operations, seconds: float):
        super().__init__(run, lambda kind, **fields: None, StopRequest())
        self.setups.of = lambda job: None  # type: ignore[method-assign, assignment, return-value]
        self.operations, self.seconds = operations, seconds

    def train_taken(self, group: Group, jobs: Sequence[Job], setup: Any) -> None:
        """Leave records as training does."""
        time.sleep(self.seconds)
        for job in jobs:
            with self.operations.not_counted():
                place = self.run.folder_of(job)
                place.mkdir()  # once: a trial that is trained twice is an error
                record = TrialRecord(job.trial_id, job.cell_id, "completed", to_dict(job.config))
                record.metrics = {"val_accuracy": 0.5, "epoch": job.config.trainer.epochs}
                record.started = record.finished = time.time()
                write_record(place, record)
            self.claims.release(job.trial_id, ENDED)


def simulate(folder: Path, trials: int, workers: int, pack: int, seconds: float, delay: float) -> dict[str, float]:
    """Run a sweep; returns seconds, operations a trial, and bytes and names left behind a trial."""
    base = compose(["experiment=quickstart"])
    jobs = [Job(dataclasses.replace(base, seed=seed), [f"seed={seed}"]) for seed in range(trials)]
    options = SweepConfig("s", str(pack), str(workers), False, "continue", False, False, True, None, 5, 30)
    run = SweepRun(tuple(jobs), folder, options, time.time(), workers)
    operations = Operations(folder, delay)
    began = time.perf_counter()
    with operations.counted():
        Ledger(folder).add(jobs, "simulated")
        for job in jobs:
            run.state_of(job)
        run = begin(run)
        view = View(run.jobs)
        threads = [threading.Thread(target=SimulatedWorker(run, operations, seconds).work) for _ in range(workers)]
        for thread in threads:
            thread.start()
        follower = Follower(run, view)
        while follower.look() != claims_module.ENDED:
            time.sleep(LOOK_EVERY)
        for thread in threads:
            thread.join()
        for job in run.jobs:
            assert run.state_of(job).status == "completed"
        view.close()
    took = time.perf_counter() - began
    left = [p for p in folder.rglob("*") if p.name != "record.json" and p.parent.name not in {j.trial_id for j in jobs}]
    size = sum(p.stat().st_size / p.stat().st_nlink for p in left if p.is_file())
    total = sum(operations.counts.values())
    print(f"{dict(operations.counts)}", file=sys.stderr)
    return {"seconds": took, "operations a trial": total / trials, "bytes a trial": size / trials,
            "names a trial": len(left) / trials}  # fmt: skip


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--pack", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="that a pack takes")
    parser.add_argument("--milliseconds", type=float, default=1.0, help="that an operation takes longer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve() / "sweep"
        found = simulate(place, args.trials, args.workers, args.pack, args.seconds, args.milliseconds / 1000)
    for name, value in found.items():
        print(f"{name:20} {value:10.1f}")


if __name__ == "__main__":
    main()
