"""What of a sweep is open, and which of it trains next. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable

from lora_vit.sweep.claims import Claims
from lora_vit.sweep.plan import Group, Job, SweepRun, make_groups

Emit = Callable[..., None]


class Schedule:
    """The open trials of a sweep in packs, of which a worker takes those that nobody has."""

    def __init__(self, run: SweepRun, claims: Claims, emit: Emit):
        self.run, self.claims, self.emit = run, claims, emit
        self.groups = make_groups(run.jobs)
        self._ended: set[str] = set()
        self._planned = {group.key: self._plan(group) for group in self.groups}

    def open_jobs(self, group: Group) -> list[Job]:
        """Trials of the group that have not ended, whoever has them."""
        found = []
        for job in group.jobs:
            if job.trial_id in self._ended:
                continue
            state = self.run.state_of(job)
            if self.run.is_ended(job, state):
                self._ended.add(job.trial_id)
                self.emit("ended", id=job.trial_id, state=state)
            else:
                found.append(job)
        return found

    def planned(self, group: Group) -> int:
        """How many trials of the group were open when we began."""
        return len(self._planned[group.key])

    def all_taken(self, jobs: list[Job]) -> bool:
        """Whether living processes have all of these trials."""
        return all(self.claims.is_taken(job.trial_id) for job in jobs)

    def take_pack(self, group: Group, open_jobs: list[Job], size: int) -> list[Job]:
        """Claim the open trials of the next pack; empty where others have all packs.

        A process that finds a pack's first open trial taken leaves the whole pack to its owner. So what trains
        together follows from the trials and the pack size alone, not from who was faster.
        """
        planned = self._planned[group.key]
        open_ids = {job.trial_id for job in open_jobs}
        for first in range(0, len(planned), size):
            taken: list[Job] = []
            for job in planned[first : first + size]:
                if job.trial_id not in open_ids:
                    continue
                if not self.claims.take(job.trial_id):
                    break
                if self.run.is_ended(job, self.run.state_of(job)):  # since we looked
                    self.claims.release(job.trial_id)
                    continue
                taken.append(job)
            if taken:
                return taken
        return []

    def give_back(self, jobs: list[Job]) -> None:
        """Release claims: the trials have ended, or are free for the next look."""
        for job in jobs:
            self.claims.release(job.trial_id)

    def refuse(self, job: Job, error: Exception) -> None:
        """Leave a trial's folder as it is, and say why; it has ended for us."""
        self._ended.add(job.trial_id)
        self.claims.release(job.trial_id)
        self.emit("left", id=job.trial_id, status="refused", val_accuracy=None, message=str(error))
        if self.run.options.on_failure == "stop":
            self.emit("stop")

    def _plan(self, group: Group) -> list[Job]:
        """What is open now, in the order of packs: begun trials first, they were promised before."""
        return sorted(self.open_jobs(group), key=lambda job: not self.run.is_begun(job))
