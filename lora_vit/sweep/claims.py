"""Who trains which trial, where several processes or machines share a sweep's folder.

A claim is a file ``.claims/TRIAL.N`` that appears whole or not at all. The highest N of a trial is its owner; who
finds that one released or dead makes N + 1, which only one process can. Nothing is removed, so nothing can be
removed by mistake; a few hundred bytes a trial stay behind.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_vit.records import repeating, replacing

BEAT_EVERY = 10.0
"""Seconds between signs of life of an owner."""

DEAD_AFTER = 120.0
"""Seconds without a sign of life, seen by our own clock, after which another host's claim counts as dead."""


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
    """This process's claims in one sweep's folder."""

    def __init__(self, folder: Path, owner: Owner | None = None):
        self.folder = folder / ".claims"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.owner = owner or Owner()
        self.lost: set[str] = set()  # claims of ours that another took over
        self._held: dict[str, int] = {}
        self._seen: dict[Path, tuple[Any, float]] = {}  # of other owners: last sign of life, when we saw it first
        self._lock = threading.Lock()
        self._life = repeating(self.beat, BEAT_EVERY)

    def take(self, trial_id: str) -> bool:
        """Claim a trial; False where another living process has it."""
        number = self._highest(trial_id)
        if number and not self._free(self._path(trial_id, number)):
            return False
        if not self._create(self._path(trial_id, number + 1)):
            return False
        with self._lock:
            self._held[trial_id] = number + 1
            self.lost.discard(trial_id)
        return True

    def release(self, trial_id: str) -> None:
        """Give a claim back: the trial is finished or saved."""
        with self._lock:
            number = self._held.pop(trial_id, None)
        if number is not None and trial_id not in self.lost:
            with replacing(self._path(trial_id, number)) as file:
                file.write(json.dumps({**vars(self.owner), "released": True}).encode())

    def is_taken(self, trial_id: str) -> bool:
        """Whether a living process, perhaps this one, has the trial."""
        number = self._highest(trial_id)
        return bool(number) and not self._free(self._path(trial_id, number))

    def beat(self) -> None:
        """Give a sign of life for each claim, and notice those that were taken over."""
        with self._lock:
            held = dict(self._held)
        for trial_id, number in held.items():
            if self._highest(trial_id) > number:
                with self._lock:
                    self.lost.add(trial_id)
                continue
            try:
                os.utime(self._path(trial_id, number))
            except OSError:
                continue  # a full or absent disk ends the training itself

    def __enter__(self) -> Claims:
        self._life.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._life.__exit__(None, None, None)
        for trial_id in list(self._held):
            self.release(trial_id)

    def _path(self, trial_id: str, number: int) -> Path:
        return self.folder / f"{trial_id}.{number}"

    def _highest(self, trial_id: str) -> int:
        number = 0
        while self._path(trial_id, number + 1).exists():
            number += 1
        return number

    def _create(self, path: Path) -> bool:
        """Make the claim's file, whole, unless it is there: a hard link is atomic on shared folders too."""
        temporary = self.folder / f".{self.owner.token}.{threading.get_ident()}"
        temporary.write_text(json.dumps(vars(self.owner)))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def _free(self, path: Path) -> bool:
        """Whether the claim is released or its owner dead. Clocks of other hosts are never compared with ours."""
        try:
            values = json.loads(path.read_text())
            beat = path.stat().st_mtime_ns
        except (OSError, ValueError):
            values, beat = {}, 0  # damaged: free once nobody has touched it for long
        if values.get("released"):
            return True
        if values.get("token") == self.owner.token:
            return False
        if values.get("host") == self.owner.host:
            return not _is_running(int(values["pid"]), str(values.get("born", "")))
        last, since = self._seen.get(path, (None, 0.0))
        if last != beat:
            self._seen[path] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > DEAD_AFTER
