"""The packs of a sweep, and which of them trains next. Knows no torch."""

from collections.abc import Callable, Iterator

from lora_vit.sweep.claims import ENDED, FREE, HELD, Claims
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.trial import Group, Trial, make_groups


class Packs:
    """The open trials of a sweep in packs, from which a worker takes those that are free.

    They follow from the plan's order and the pack size alone: a pack whose first open trial is taken is its owner's.
    """

    def __init__(self, sweep: Sweep, claims: Claims):
        self.sweep, self.claims = sweep, claims
        self.skip: dict[str, str] = {}  # ids of trials that this process cannot train, and why
        self._groups: list[Group] = []
        self._planned: list[list[Trial]] | None = None
        self._open: list[Group] = []  # with a trial that was free at the last look

    def look(self) -> str:
        """See what others have taken, freed and ended: ``free`` if anything is, else ``held``, else ``ended``."""
        self.claims.look()
        self.sweep.refresh()
        if self._planned is not self.sweep.batches:
            self._planned = self.sweep.batches
            self._groups = [group for batch in self._planned for group in make_groups(batch)]
        ids = [[t.trial_id for t in group.trials if t.trial_id not in self.skip] for group in self._groups]
        states = [set(map(self.claims.state, names)) for names in ids]
        self._open = [group for group, found in zip(self._groups, states, strict=True) if FREE in found]
        return FREE if self._open else HELD if any(HELD in found for found in states) else ENDED

    def take(self, size_of: Callable[[Group], int | None], strays: bool = False) -> Iterator[tuple[Group, list[Trial]]]:
        """Claim the packs that were free at the last look, each when it is asked for.

        ``size_of``: trials that train together, or None while another process measures it; ``strays``: for the first
        pack take every free trial, also of packs whose first one another process has.
        """
        for group in self._open:
            place, passes, step = 0, 0, 1
            while place < len(group.trials) and (size := size_of(group)) is not None:
                taken: list[Trial] = []
                for trial in group.trials[place : place + size]:
                    state = self.claims.state(trial.trial_id)
                    if state == ENDED or trial.trial_id in self.skip:
                        continue
                    if state == FREE and passes:
                        passes -= 1
                        break
                    if state == HELD or not self.claims.take(trial.trial_id):
                        if strays:
                            continue
                        if state == FREE:  # taken since we looked, as the next ones probably are: try ever fewer
                            passes, step = step - 1, 2 * step
                        break
                    if self.sweep.state_of(trial).ended:  # by a single run in its folder
                        self.claims.release(trial.trial_id, ENDED)
                    else:
                        taken.append(trial)
                place += size
                if taken:
                    yield group, taken
                    strays, passes, step = False, 0, 1
