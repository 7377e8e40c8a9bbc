"""Who trains which trial, where several processes or machines share a sweep's folder.

An owner's file ``.claims/TOKEN.owner`` says who it is, and when it last gave a sign of life. A claim is a hard link to
it, ``.claims/TRIAL.N``, which only one process can make. The highest N of a trial is its owner, until a second link
``TRIAL.N.free``, ``.ended`` or ``.failed`` says that it is done with it; who finds the trial free, or its owner dead,
makes N + 1. So the names in one folder tell how all trials stand, a claim costs one operation, and a sign of life is
one for all claims. Nothing is removed, so nothing can be removed by mistake; two names a trial stay behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_vit.files import write_json
from lora_vit.stopping import repeating

BEAT_EVERY = 10.0
"""Seconds between signs of life of an owner."""

DEAD_AFTER = 120.0
"""Seconds without a sign of life, seen by our own clock, after which another host's claim counts as dead."""

FREE, HELD, ENDED, FAILED = "free", "held", "ended", "failed"


@dataclass
class Owner:
    """Who holds a claim: host, process and a token of its own."""

    host: str = field(default_factory=lambda: f"{platform.node()}/{_boot_id()}")
    pid: int = field(default_factory=os.getpid)
    born: str = field(default_factory=lambda: "".join(_process(os.getpid())[19:20]))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


def _boot_id() -> str:
    """Tells boots (and containers' hosts) apart, so that a process id of another one is not taken for ours."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> list[str]:
    """What Linux says of a process: its state first, when it started (for ids are used again) as the 20th."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _is_running(pid: int, born: str) -> bool:
    if Path("/proc/self").exists():
        fields = _process(pid)
        return bool(fields) and fields[0] != "Z" and (not born or fields[19] == born)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Claims:
    """This process's claims in one sweep's folder, and how those of others stood at the last look."""

    def __init__(self, folder: Path, owner: Owner | None = None):
        self.folder = folder / ".claims"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.owner = owner or Owner()
        self.lost: set[str] = set()  # claims of ours that another took over
        self._file = self.folder / f"{self.owner.token}.owner"
        self._held: dict[str, int] = {}
        self._last: dict[str, tuple[int, str]] = {}  # a trial's highest N, and its mark
        self._owners: dict[tuple[str, int], dict[str, Any]] = {}
        self._signs: dict[str, tuple[int, float]] = {}  # of other owners: last sign of life, when we saw it first
        self._beat = self._inode = 0
        self._lock = threading.Lock()
        self._life = repeating(self.beat, BEAT_EVERY)

    def look(self) -> None:
        """See how all trials stand now: one look at the folder."""
        last: dict[str, tuple[int, str]] = {}
        for name in os.listdir(self.folder):
            trial_id, _, rest = name.partition(".")
            number, _, mark = rest.partition(".")
            if number.isdecimal():
                last[trial_id] = max(last.get(trial_id, (0, "")), (int(number), mark))
        self._last = last

    def state(self, trial_id: str) -> str:
        """``free``, ``held`` by a living process, or ``ended``: as of the last look."""
        number, mark = self._last.get(trial_id, (0, FREE))
        if not mark:
            mark = FREE if trial_id not in self._held and self._is_dead(trial_id, number) else HELD
            self._last[trial_id] = (number, mark)  # asked once a look
        return ENDED if mark == FAILED else mark

    def has_failed(self, trial_id: str) -> bool:
        """Whether a trial has ended as failed, or could not be trained: as of the last look."""
        return self._last.get(trial_id, (0, FREE))[1] == FAILED

    def take(self, trial_id: str) -> bool:
        """Claim a trial; False where it was not free at the last look, or another was faster."""
        if self.state(trial_id) != FREE:
            return False
        number = self._last.get(trial_id, (0, FREE))[0] + 1
        taken = self._link(trial_id, number)
        self._last[trial_id] = (number, HELD)
        if taken:
            with self._lock:
                self._held[trial_id] = number
                self.lost.discard(trial_id)
        return taken

    def release(self, trial_id: str, mark: str = FREE, why: str = "") -> None:
        """Give a claim back: the trial is free to be gone on with, ended or failed (``why`` where no record tells)."""
        with self._lock:
            number = self._held.pop(trial_id, None)
        if number is not None and trial_id not in self.lost:
            path = self._path(trial_id, number, mark)
            with contextlib.suppress(OSError):  # a full disk: free once we have ended
                if why:
                    write_json(path, {"why": why})
                else:
                    os.link(self._file, path)
            self._last[trial_id] = (number, mark)

    def why(self, trial_id: str) -> str:
        """What was said of a trial that has ended without a record."""
        try:
            text = self._path(trial_id, *self._last[trial_id]).read_text()
            return str(json.loads(text).get("why", ""))
        except (OSError, ValueError):
            return ""

    def reopen(self, trial_id: str) -> None:
        """Make a trial free that has ended."""
        if self.state(trial_id) == ENDED:
            self._last[trial_id] = (self._last[trial_id][0], FREE)
            if self.take(trial_id):
                self.release(trial_id)

    def beat(self) -> None:
        """Give a sign of life; after a long silence look for claims that others have taken over meanwhile."""
        try:
            os.utime(self._file)
            now = os.stat(self._file).st_mtime_ns  # by the clock of whoever keeps the folder
        except OSError:
            return  # no claim yet; a full or absent disk ends the training itself
        silence, self._beat = now - self._beat, now
        if silence < DEAD_AFTER / 2 * 1e9:
            return
        with self._lock:
            held = dict(self._held)
        self.lost |= {trial_id for trial_id, number in held.items() if self._path(trial_id, number + 1).exists()}

    def __enter__(self) -> Claims:
        self._life.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._life.__exit__(None, None, None)
        for trial_id in list(self._held):
            self.release(trial_id)

    def _path(self, trial_id: str, number: int, mark: str = "") -> Path:
        return self.folder / f"{trial_id}.{number}{mark and '.'}{mark}"

    def _link(self, trial_id: str, number: int) -> bool:
        """Make the claim unless it is there: a hard link is atomic on shared folders too."""
        if not self._beat:
            self._file.write_text(json.dumps(vars(self.owner)))
            self._inode = os.stat(self._file).st_ino
            self.beat()
        path = self._path(trial_id, number)
        try:
            os.link(self._file, path)
        except FileExistsError:
            return os.stat(path).st_ino == self._inode  # a file server may have done what it was asked twice
        return True

    def _is_dead(self, trial_id: str, number: int) -> bool:
        """Whether a claim's owner is. Clocks of other hosts are never compared with ours."""
        path = self._path(trial_id, number)
        try:
            if (trial_id, number) not in self._owners:
                self._owners[trial_id, number] = json.loads(path.read_text())
            owner, beat = self._owners[trial_id, number], 0
            if owner.get("host") != self.owner.host:
                beat = path.stat().st_mtime_ns
        except (OSError, ValueError):
            owner, beat = {"token": str(path)}, 0  # damaged: free once nobody has touched it for long
        if owner["token"] == self.owner.token:
            return False
        if owner.get("host") == self.owner.host:
            return not _is_running(int(owner["pid"]), str(owner.get("born", "")))
        last, since = self._signs.get(owner["token"], (None, 0.0))
        if last != beat:
            self._signs[owner["token"]] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > DEAD_AFTER
