"""Workers that an engine (Slurm, Ray) starts: asked for, followed by what they leave in the folder, replaced if lost.

An engine only starts and watches processes. What they train is theirs to find out, as everywhere: from the folder.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import Protocol

from lora_vit.errors import Interrupted, TrialFailed
from lora_vit.stopping import StopRequest
from lora_vit.sweep.claims import ENDED, FREE
from lora_vit.sweep.follow import LOOK_EVERY, Follower
from lora_vit.sweep.plan import SweepRun
from lora_vit.sweep.processes import GOES_ON
from lora_vit.sweep.progress import View

TRIES = 3
"""So often in a row workers are started without that a trial ends."""


class Engine(Protocol):
    """Starts workers, each of which runs ``python -m lora_vit.sweep work FOLDER`` or what it runs."""

    outlives_us: bool
    """Whether workers go on when the command ends."""

    def number_of_workers(self, asked: str) -> int:
        """How many ``sweep.workers`` means here. Raises ConfigError."""

    def start(self, run: SweepRun, count: int) -> str:
        """Ask for workers; returns where they are told of, and how to stop them. Raises ConfigError."""

    def look(self) -> tuple[int, list[str]]:
        """Workers that run, or wait for their turn; and what is to be said of those that have failed, once."""

    def stop(self) -> None:
        """Ask all workers to save and to end."""

    def withdraw(self) -> None:
        """Take back the workers whose turn has not come: nothing is left for them. Those that run end by themselves."""


def run_on(engine: Engine, run: SweepRun, view: View, stop: StopRequest) -> bool:
    """Have workers train until every trial has ended, or until none of the rest can be; whether all have ended.

    Raises:
        ConfigError: the engine refuses.
        Interrupted: workers were asked to stop and have saved, or go on by themselves.
        TrialFailed: workers end, and no trial does.
    """
    wanted, others, tries, ended = min(run.workers, len(run.jobs)), Follower(run, view), 0, -1
    while (standing := others.look()) != ENDED:
        alive, news = engine.look()
        for text in news:
            view.emit("say", text=text)
        if stop.signum or view.stop_asked:
            _end(engine, view, stop)
        if view.ended() > ended:
            tries, ended = 0, view.ended()
        missing = wanted - alive
        if standing == FREE and missing == wanted and tries == TRIES:
            raise TrialFailed(f"{tries} times workers were started and ended no trial, see above: {GOES_ON}")
        if standing == FREE and missing > 0 and tries < TRIES:
            tries += 1
            view.emit("say", text=engine.start(run, missing))
            if not run.options.wait:
                return False
        time.sleep(LOOK_EVERY)
    engine.withdraw()
    return True


def _end(engine: Engine, view: View, stop: StopRequest) -> None:
    """End as the user asks: a terminal is asked whether the workers are to end too."""
    signum = stop.signum or signal.SIGTERM
    if engine.outlives_us and not view.stop_asked and not _asks_to_cancel(view):
        view.emit("say", text="the workers go on; the same command follows them again")
        raise Interrupted(signum)
    view.emit("say", text="asking the workers to save and to end")
    engine.stop()
    while engine.look()[0]:
        time.sleep(LOOK_EVERY)
    raise Interrupted(signum)


def _asks_to_cancel(view: View) -> bool:
    view.close()
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return input("end the workers too, once they have saved? [y/N] ").strip().lower().startswith("y")
    except (EOFError, KeyboardInterrupt):
        return False
