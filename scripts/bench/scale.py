"""What a sweep of many trials on many workers costs beside the training: operations on its folder, seconds, bytes.

    python scripts/bench/scale.py --trials 10000 --workers 64 --milliseconds 1

Everything but the training is real: plan, claims, packs, records and the view of the command. Workers are threads, a
pack takes ``--seconds``, and each operation on the folder takes ``--milliseconds`` more, as it does on a shared one.
What a trial itself writes (record, checkpoint, event files) is not counted: it does not depend on how many there are.
Listing a folder counts as one operation for each 100 names. What the command does is counted by the look.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_vit.api import compose
from lora_vit.config import SweepConfig, to_dict
from lora_vit.records import RECORD, TrialRecord, write_record
from lora_vit.stopping import StopRequest
from lora_vit.sweep.claims import ENDED, Claims
from lora_vit.sweep.plan import Request, Sweep
from lora_vit.sweep.trial import Group, Trial
from lora_vit.sweep.view import View
from lora_vit.sweep.worker import Worker

NAMES_AN_OPERATION = 100
LOOK_EVERY = 0.5


class Operations:
    """Counts what is done in a folder, and makes it slower.

    Attributes:
        counts: of the workers, by the name of the operation.
        looks: of the main thread, which follows; reading a trial's record is not among them.
    """

    def __init__(self, folder: Path, delay: float):
        self.folder, self.delay = str(folder), delay
        self.counts: Counter[str] = Counter()
        self.looks: Counter[str] = Counter()
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
        names = ("stat", "utime", "listdir", "scandir", "replace", "unlink", "mkdir", "open", "fsync")
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
            thread = threading.current_thread()
            ours = name == "fsync" or str(args[0]).startswith(self.folder)
            if not ours or getattr(self.here, "off", False) or thread.name == "signs of life":  # by the hour
                return function(*args, **options)
            follows = thread is threading.main_thread() and not str(args[0]).endswith(RECORD)
            weight = 1
            try:
                result = function(*args, **options)
                weight += len(result) // NAMES_AN_OPERATION if name == "listdir" else 0
            finally:
                with self.lock:
                    (self.looks if follows else self.counts)[name] += weight
                time.sleep(weight * self.delay)
            return result

        return call


class SimulatedWorker(Worker):
    """A worker whose trials take their time and are completed."""

    def __init__(self, folder: Path, claims: Claims, operations: Operations, seconds: float):
        super().__init__(Sweep.existing(folder), claims, StopRequest(), lambda text: None)
        self.sizes.setup_of = lambda trial: None  # type: ignore[method-assign, assignment, return-value]
        self.operations, self.seconds = operations, seconds

    def train_pack(self, group: Group, trials: list[Trial], setup: Any) -> None:
        """Leave records as training does."""
        time.sleep(self.seconds)
        for trial in trials:
            with self.operations.not_counted():
                place = self.sweep.folder_of(trial)
                place.mkdir()  # once: a trial that is trained twice is an error
                record = TrialRecord(trial.trial_id, trial.cell_id, "completed", to_dict(trial.config))
                record.metrics = {"val_accuracy": 0.5, "epoch": trial.config.trainer.epochs}
                write_record(place, record)
            self.claims.release(trial.trial_id, ENDED)


def simulate(folder: Path, trials: int, workers: int, pack: int, seconds: float, delay: float) -> dict[str, float]:
    """Run a sweep; returns seconds, operations a trial and a look, and bytes and names left behind a trial."""
    base = compose(["experiment=quickstart", "trainer.accelerator=cpu"])
    asked = [Trial(dataclasses.replace(base, seed=seed), [f"seed={seed}"]) for seed in range(trials)]
    options = SweepConfig("s", str(pack), str(workers), False, False, True, None, 5, 30, None)
    operations = Operations(folder, delay)

    def work() -> None:
        with Claims(folder).living() as claims:
            SimulatedWorker(folder, claims, operations, seconds).work()

    began, looks = time.perf_counter(), 0
    sweep = Sweep(folder)
    names = {trial.trial_id for trial in asked}
    sweep.ask(Request(folder, options, asked, workers=workers), asked, names)
    Claims(folder).reopen(names)
    with operations.counted():
        threads = [threading.Thread(target=work) for _ in range(workers)]
        for thread in threads:
            thread.start()
        view = View(sweep, [])
        view.console.quiet = True
        while view.open():
            view.look()
            looks += 1
            time.sleep(LOOK_EVERY)
        for thread in threads:
            thread.join()
        view.progress.close()
    took = time.perf_counter() - began
    assert all(sweep.state_of(trial).status == "completed" for trial in asked)
    left = [p for p in folder.rglob("*") if p.name != RECORD and p.parent.name not in names]
    size = sum(p.stat().st_size for p in left if p.is_file())
    print(f"workers {dict(operations.counts)}, {looks} looks {dict(operations.looks)}", file=sys.stderr)
    return {"seconds": took, "operations a trial": sum(operations.counts.values()) / trials,
            "operations a look": sum(operations.looks.values()) / looks, "bytes a trial": size / trials,
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
