"""Who trains which trial, when several processes or machines share a sweep's folder.

A claim is the file ``.claims/TRIAL.N``, which only one process can create (``O_EXCL``, also on file servers); it holds
its owner's token. The highest N of a trial is its claim, until ``TRIAL.N.free`` or ``TRIAL.N.ended`` says that the
owner is done with it. Whoever finds the trial free, or its owner dead, creates N + 1. Nothing is removed, so nothing
can be removed by mistake. ``TOKEN.owner`` is an owner's one sign of life for all its claims, and says how far they are.

docs/architecture.md (*Sweeps*) says when an owner is dead, and what one does that wakes up (:meth:`Claims.mine`).
"""

import contextlib
import json
import os
import platform
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from lora_vit.files import replacing
from lora_vit.stopping import repeating

BEAT_EVERY = 5.0  # seconds between signs of life of an owner
DEAD_AFTER = 120.0  # seconds without one after which it counts as dead
FREE, HELD, ENDED = "free", "held", "ended"


def this_host() -> str:
    """Tells machines, their boots and containers apart: a process id means something in one of them only."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _born(pid: int) -> str:
    """When Linux started a process (ids are used again), elsewhere nothing; ``ended`` if it has, or is a zombie."""
    if not Path("/proc/self").exists():
        return "" if psutil.pid_exists(pid) else ENDED
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ENDED
    return ENDED if fields[0] == "Z" else fields[19]


class Claims:
    """This process's claims in one sweep's folder, and how those of others stood at the last look."""

    def __init__(self, folder: Path):
        self.folder = folder / ".claims"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.token = uuid.uuid4().hex
        self.held = contextlib.ExitStack()  # what else is ours until the claims end
        self.progress: dict[str, float] = {}  # epochs of the trials that we train, for others to see
        self._identity = {"host": this_host(), "pid": os.getpid(), "born": _born(os.getpid())}
        self._is_known = False  # whether we have given a sign of life
        self._held: dict[str, int] = {}
        self._last: dict[str, tuple[int, str]] = {}  # a trial's highest N, and its mark
        self._tokens: dict[Path, str] = {}
        self._owners: dict[str, tuple[bool, dict[str, Any]]] = {}  # asked once a look
        self._signs: dict[str, tuple[int, float]] = {}  # last sign of life, and when we first saw it

    def look(self) -> None:
        """See how all trials stand now: one listing of the folder."""
        last: dict[str, tuple[int, str]] = {}
        for name in os.listdir(self.folder):
            trial_id, _, rest = name.partition(".")
            number, _, mark = rest.partition(".")
            if number.isdecimal():
                last[trial_id] = max(last.get(trial_id, (0, "")), (int(number), mark))
        self._last = last
        self._owners.clear()

    def ended(self) -> int:
        return sum(mark == ENDED for _, mark in self._last.values())

    def state(self, trial_id: str) -> str:
        """``free``, ``held`` by a living process, or ``ended``: as of the last look."""
        _, mark = self._last.get(trial_id, (0, FREE))
        if not mark:
            return HELD if trial_id in self._held or not self._owner(trial_id)[0] else FREE
        return FREE if mark == FREE else ENDED

    def epochs(self, trial_id: str) -> float:
        """How many epochs of a trial its owner has said are trained."""
        is_held = not self._last.get(trial_id, (0, FREE))[1]
        return float(self._owner(trial_id)[1].get("epochs", {}).get(trial_id, 0.0)) if is_held else 0.0

    def token_of(self, trial_id: str) -> str:
        """The token of a trial's owner; empty where it cannot be read."""
        claim = self._claim(trial_id)
        token = self._tokens[claim] = self._tokens.get(claim) or _read(claim)
        return token

    def take(self, trial_id: str) -> bool:
        """Claim a trial that is free as of the last look; False if another process was faster."""
        if self.state(trial_id) != FREE:
            return False
        if not self._is_known:
            self.beat()  # others take no claim seriously whose owner gave no sign of life
        number = self._last.get(trial_id, (0, FREE))[0] + 1
        if not self._create(self._path(trial_id, number), self.token):
            return False
        self._last[trial_id] = (number, "")
        self._held[trial_id] = number
        return True

    def release(self, trial_id: str, mark: str = FREE, error: str = "") -> None:
        """Give a claim back, with what went wrong here for the next process: others may take it, or it has ended."""
        number = self._held.pop(trial_id, None)
        self.progress.pop(trial_id, None)
        if number is None:
            return
        with contextlib.suppress(OSError):  # a full disk: the trial is free once our process has ended
            self._create(self._path(trial_id, number, mark), json.dumps({"token": self.token, "error": error}))
        self._last[trial_id] = (number, mark)

    def seen_elsewhere(self, trial_id: str) -> str:
        """The error for which another process gave a trial back before we took it."""
        _, said = _sign_of_life(self._path(trial_id, self._held.get(trial_id, 1) - 1, FREE))
        return "" if said.get("token") == self.token else str(said.get("error", ""))

    def reopen(self, trial_ids: Iterable[str]) -> None:
        self.look()
        for trial_id in trial_ids:
            if self.state(trial_id) == ENDED:
                self._last[trial_id] = (self._last[trial_id][0], FREE)
                self.take(trial_id)
                self.release(trial_id)

    def mine(self, trial_id: str) -> bool:
        """Whether a claim of ours still is: no other process has taken the trial over."""
        number = self._held.get(trial_id)
        with contextlib.suppress(OSError):  # an absent disk fails the write itself
            if number and (self._path(trial_id, number + 1).exists() or not self._path(trial_id, number).exists()):
                del self._held[trial_id]
        return trial_id in self._held

    def beat(self) -> None:
        path = self.folder / f"{self.token}.owner"
        try:
            with replacing(path) as file:
                file.write(json.dumps({**self._identity, "epochs": dict(self.progress)}).encode())
            self._is_known = True
        except OSError:
            with contextlib.suppress(OSError):  # a full disk ends the training itself
                os.utime(path)

    @contextlib.contextmanager
    def living(self) -> Any:
        """Give signs of life while the context lasts; what is still held is free afterwards."""
        with repeating(self.beat, BEAT_EVERY), self.held:
            try:
                yield self
            finally:
                for trial_id in list(self._held):
                    self.release(trial_id)

    def _claim(self, trial_id: str) -> Path:
        return self._path(trial_id, self._last.get(trial_id, (0, FREE))[0])

    def _path(self, trial_id: str, number: int, mark: str = "") -> Path:
        return self.folder / f"{trial_id}.{number}{mark and '.'}{mark}"

    def _create(self, path: Path, text: str) -> bool:
        """Create a file that is not there; False if it is, and not by ourselves."""
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return _read(path) == text  # a file server may have done what it was asked twice
        with os.fdopen(handle, "w") as file:
            file.write(text)
        return True

    def _owner(self, trial_id: str) -> tuple[bool, dict[str, Any]]:
        """Whether a trial's owner is dead, and what it says; the claim itself stands for one that left no file."""
        claim, token = self._claim(trial_id), self.token_of(trial_id)
        if (name := token if token.isalnum() else claim.name) not in self._owners:
            sign, values = _sign_of_life(self.folder / f"{name}.owner")
            sign, is_here = sign or _sign_of_life(claim)[0], values.get("host") == self._identity["host"]
            if name not in self._signs or self._signs[name][0] != sign:
                self._signs[name] = (sign, time.monotonic())
            is_silent = time.monotonic() - self._signs[name][1] > DEAD_AFTER
            has_ended = is_here and _born(values["pid"]) != values["born"]
            self._owners[name] = is_silent or has_ended, values
        return self._owners[name]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _sign_of_life(path: Path) -> tuple[int, dict[str, Any]]:
    """A file's time and what it says; 0 and {} if absent, {} alone if it is not ours to read."""
    sign, values = 0, None
    with contextlib.suppress(OSError, ValueError), path.open() as file:  # first: a file server then asks its disk
        values = json.load(file)
    with contextlib.suppress(OSError):
        sign = path.stat().st_mtime_ns
    return sign, values if isinstance(values, dict) else {}
