"""What of a sweep is open, and which of it trains next. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable

from lora_vit.sweep.claims import ENDED, FAILED, FREE, HELD, Claims
from lora_vit.sweep.plan import Group, Job, SweepRun, make_groups

Emit = Callable[..., None]


def stops(run: SweepRun, claims: Claims) -> bool:
    """Whether a trial has failed where that is to stop all: as of the last look."""
    return run.options.on_failure == "stop" and any(claims.has_failed(job.trial_id) for job in run.jobs)


class Schedule:
    """The trials of a run in packs, of which a worker takes those that nobody has.

    The packs follow from the run's trials, their order and the pack size alone, not from who was faster or when a
    worker came: a process that finds a pack's first open trial taken leaves the whole pack to its owner.
    """

    def __init__(self, run: SweepRun, claims: Claims, emit: Emit):
        self.run, self.claims, self.emit = run, claims, emit
        self.groups = make_groups(run.jobs)
        self._place: dict[str, int] = {}  # in each group, behind the last pack that we took since we looked

    def look(self) -> None:
        """See what others have taken, freed and ended; where a failure is to stop all, so does one of theirs."""
        self.claims.look()
        self._place.clear()
        if stops(self.run, self.claims):
            self.emit("stop")

    def is_free(self, group: Group) -> bool:
        """Whether a trial of the group was open, and nobody had it, at the last look."""
        return any(self.claims.state(job.trial_id) == FREE for job in group.jobs)

    def take_pack(self, group: Group, size: int, strays: bool = False) -> list[Job]:
        """Claim the open trials of a pack, the first that can be had; empty where none is free as of the last look.

        ``strays``: every free trial, also of packs whose first one another has.
        """
        skip, step = 0, 1
        for first in range(self._place.get(group.key, 0), len(group.jobs), size):
            taken: list[Job] = []
            for job in group.jobs[first : first + size]:
                state = self.claims.state(job.trial_id)
                if state == ENDED:
                    continue
                if state == FREE and skip:
                    skip -= 1
                    break
                if state == HELD or not self.claims.take(job.trial_id):
                    if strays:
                        continue
                    if state == FREE:  # taken since we looked, and so, probably, are the next ones: ever fewer tries
                        skip, step = step - 1, 2 * step
                    break
                if self.run.is_ended(job, self.run.state_of(job)):  # by a command that knows no claims
                    self.claims.release(job.trial_id, ENDED)
                else:
                    taken.append(job)
            if taken:
                self._place[group.key] = first + size
                return taken
        return []

    def give_back(self, jobs: list[Job]) -> None:
        """Release claims of trials that have not ended: they are free for the next look."""
        for job in jobs:
            self.claims.release(job.trial_id)

    def refuse(self, job: Job, error: Exception) -> None:
        """Leave a trial's folder as it is, and say why; it has ended for this run."""
        self.left(job.trial_id, "refused", None, str(error))

    def left(self, trial_id: str, status: str, val_accuracy: float | None, message: str) -> None:
        """A trial has ended: its claim says how, the view is told, and a failure stops all where it is to.

        The claim of one that was refused says why as well: no record does.
        """
        mark = FAILED if status in ("failed", "refused") else ENDED
        self.claims.release(trial_id, mark, message if status == "refused" else "")
        self.emit("left", id=trial_id, status=status, val_accuracy=val_accuracy, message=message)
        if stops(self.run, self.claims):
            self.emit("stop")
