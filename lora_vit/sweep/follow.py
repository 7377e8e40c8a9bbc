"""What all workers of a run do, wherever they are, as claims and records tell it. Knows no torch."""

from __future__ import annotations

from lora_vit.records import RECORD
from lora_vit.sweep.claims import ENDED, FREE, HELD, Claims
from lora_vit.sweep.plan import Job, SweepRun
from lora_vit.sweep.progress import View
from lora_vit.sweep.schedule import stops

LOOK_EVERY = 2.0
"""Seconds between looks."""


class Follower:
    """Keeps a view up to date with what others train."""

    def __init__(self, run: SweepRun, view: View):
        self.run, self.view, self.claims = run, view, Claims(run.folder)

    def look(self) -> str:
        """Tell the view what is new; ``free`` where a trial is that nobody has, else ``held`` or ``ended``."""
        self.claims.look()
        if stops(self.run, self.claims):
            self.view.emit("stop")
        found = {ENDED}
        for job in self.run.jobs:
            if not self.view.is_ended(job):
                state = self.claims.state(job.trial_id)
                if state == ENDED:
                    self._ended(job)
                elif state == HELD:
                    self._running(job)
                found.add(state)
        return next(state for state in (FREE, HELD, ENDED) if state in found)

    def _ended(self, job: Job) -> None:
        state = self.run.state_of(job)
        if self.run.is_ended(job, state):
            self.view.emit("ended", id=job.trial_id, state=state)
        else:
            why = self.claims.why(job.trial_id) or f"its {RECORD} was removed"
            self.view.emit("left", id=job.trial_id, status="refused", val_accuracy=None, message=why)

    def _running(self, job: Job) -> None:
        row = self.view.rows[job.trial_id]
        if row.status == "waiting":
            self.view.emit("pack", ids=[job.trial_id])
        record = self.run.state_of(job).record
        done = 0 if record is None else int(record.metrics.get("epoch") or 0)
        for epoch in range(row.epoch + 1, done + 1):
            self.view.emit("advance", epochs=1.0)
            accuracy = record.metrics.get("val_accuracy") if record is not None else None
            self.view.emit("epoch", id=job.trial_id, epoch=epoch, val_accuracy=accuracy)
