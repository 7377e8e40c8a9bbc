"""What a sweep wants next: every combination (a grid), more seeds of the leaders (a race), or a study's suggestions.

Any worker asks its source once nothing is left to train, and what the source wants goes into the plan, for all to see.
A source remembers nothing: it decides by the records, so any process at any time comes to the same decision.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from lora_vit.analysis.load import as_float
from lora_vit.analysis.race import Race, Rules, decide, typical_trials, wanted
from lora_vit.errors import ConfigError
from lora_vit.records import SEARCH, State
from lora_vit.resolve import from_omegaconf
from lora_vit.sweep.plan import Sweep, label
from lora_vit.sweep.trial import Trial, digest, without_idle

BATCHES = 5
"""A search asks for at most this part of its trials at once, unless the packs' size is given: it learns in between."""
MOST_REPEATS = 50
"""Suggestions in a row that are known, after which the space is taken to hold nothing new."""


class Source(Protocol):
    """Decides which trials a sweep wants."""

    def extend(self) -> bool:
        """Put what is wanted next into the plan; whether that is anything new."""


def source_of(sweep: Sweep) -> Source:
    """The source of a sweep, as its plan says."""
    if sweep.race is not None:
        return RaceSource(sweep)
    return SearchSource(sweep) if sweep.search is not None else Grid()


class Grid:
    """A sweep that wants what its command asked for."""

    def extend(self) -> bool:
        """Nothing more is wanted."""
        return False


class RaceSource:
    """A sweep with ``sweep.margin``: cells get more seeds until one is left.

    Attributes:
        cells: a trial of each cell with the first seed, in the order of the cells' ids, which settles ties.
        race: where the race stood at the last look.
        ended: how the trials stand that have ended, by cell and number of the seed.
    """

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.ended: dict[tuple[int, int], State] = {}
        self._begin(sweep.race or {})

    def _begin(self, plan: dict[str, Any]) -> None:
        self._plan, self.rules, self.first = plan, Rules.of(plan), int(plan["seed"])
        one_each = {trial.cell_id: trial for trial in self.sweep.trials.values()}
        self.cells = [one_each[cell].with_seed(self.first) for cell in plan["cells"]]
        self.ended.clear()
        self.look()

    def trial(self, cell: int, number: int) -> Trial:
        """The cell's trial with the race's ``number``-th seed."""
        return self.cells[cell].with_seed(self.first + number)

    def look(self) -> None:
        """Read the records of the trials that were asked for, and decide."""
        places = {cell.cell_id: i for i, cell in enumerate(self.cells)}
        asked = {}
        for trial in self.sweep.trials.values():
            number = trial.config.seed - self.first
            if trial.cell_id in places and 0 <= number < self.rules.most_seeds:
                asked[places[trial.cell_id], number] = trial
        for place, trial in asked.items():
            if place not in self.ended and (state := self.sweep.state_of(trial)).ended and state.record is not None:
                self.ended[place] = state
        shape = (len(self.cells), max([self.rules.first_seeds, *(number + 1 for _, number in asked)]))
        self._y, self._failed, images = np.full(shape, np.nan), np.zeros(shape, dtype=bool), [math.inf]
        for place, state in self.ended.items():
            record, self._failed[place] = state.record, True
            if record is not None and record.status == "completed":
                accuracy = as_float(record.metrics.get("val_accuracy"))
                self._y[place], self._failed[place] = (accuracy, False) if 0 <= accuracy <= 1 else (np.nan, True)
                images.append(record.data.get("val") or math.inf)
        self.race: Race = decide(self._y, self._failed, self.rules, 1 / min(images))

    def extend(self) -> bool:
        """Ask for the next seeds of the cells that are in, for as many workers as there are."""
        with self.sweep.changing():
            if self.sweep.race != self._plan:  # another command has changed its rules or cells
                self._begin(self.sweep.race or {})
            self.look()
            trials = [self.trial(*place) for place in self.wanted()]
            queued = {trial.trial_id for batch in self.sweep.batches for trial in batch}
            new = [trial for trial in trials if trial.trial_id not in queued]
            if new:
                self.sweep.extend(new)
        return bool(new)

    def wanted(self) -> list[tuple[int, int]]:
        """Cell and number of the seed of the trials that the race waits for."""
        return wanted(self.race, self._y, self._failed, self.rules, int(self.sweep.plan["workers"]))

    def failed_cells(self) -> set[str]:
        """Ids of the cells of which a trial has failed."""
        return {self.cells[cell].cell_id for (cell, _), state in self.ended.items() if state.status == "failed"}

    def standing(self, names: Mapping[str, str]) -> str:
        """Where the race stands, in a line; ``names``: of the cells, by id."""
        race, trials, k = self.race, len(self.ended), len(self.cells)
        if not race.seeds:
            return f"race: {k} cells, {trials} trials so far, at least {k * self.rules.first_seeds}"
        if not race.ended:
            return (f"race: {len(race.survivors)} of {k} cells are left after {race.seeds} seeds, {trials} trials so "
                    f"far, about {race.expected(self.rules)} more if the means stay")  # fmt: skip
        end = f"{names[self.cells[race.selected].cell_id]} is selected" if race.selected is not None else "not resolved"
        return f"race: {end} after {race.seeds} seeds, {trials} trials"

    def rows(self, names: Mapping[str, str]) -> list[tuple[str, ...]]:
        """The cells: name, mean, seeds, by how much the mean may still fall, and who left when; the leaders first."""
        race, rows = self.race, []
        for i, mean in enumerate(race.means):
            left = race.exits.get(i)
            room = f"{100 * race.room[i]:.2f}" if np.isfinite(race.room[i]) else ""
            if left is None:
                state = "selected" if i == race.selected else "left over" if race.ended else "in"
            elif left.behind is None:
                state = f"out: failed at seed {self.first + left.seeds - 1}"
            else:
                state = f"out after {left.seeds} seeds: behind {names[self.cells[left.behind].cell_id]}"
            order = (left is not None, -race.seeds_of(i), -mean if np.isfinite(mean) else 0.0)
            text = f"{100 * mean:.2f}" if np.isfinite(mean) else "-"
            rows.append((order, (names[self.cells[i].cell_id], text, str(race.seeds_of(i)), room, state)))
        return [row for _, row in sorted(rows, key=lambda row: row[0])]

    def sizes(self) -> str:
        """How many trials the race may take, in a line."""
        k, rules = len(self.cells), self.rules
        known = [row[np.isfinite(row)] for row in self._y]
        spreads = [float(row.var(ddof=1)) for row in known if len(row) > 1]
        spread = math.sqrt(sum(spreads) / len(spreads)) if spreads else 0.6 * rules.margin
        typical = len(self.ended) + self.race.expected(rules)
        if not self.race.seeds:
            typical = max(typical, typical_trials(k, spread, rules) if k > 1 else 0)
        return (f"a race of {k} cells takes at least {k * rules.first_seeds} trials, at most {k * rules.most_seeds}, "
                f"typically about {typical} (if trials of a cell spread by {100 * spread:.2f} points"
                f"{', as they do here' if spreads else ''}); {len(self.ended)} have ended")  # fmt: skip


class SearchSource:
    """A sweep with ``sweep.trials``: Optuna's TPE suggests settings of one seed, drawn over all keys jointly.

    The study is kept in the sweep's folder; another space, or another fixed setting, is another study in the same file.
    Suggestions are drawn with seeds of their own, so that a search that was stopped does not draw its first ones again.
    """

    def __init__(self, sweep: Sweep):
        self.sweep = sweep

    def extend(self) -> bool:
        """Report to the study what has ended, and ask for the next trials."""
        with self.sweep.changing():
            search = self.sweep.search
            if search is None:
                return False
            study = self._open_study(search)
            known = self._tell(study)
            lost = [suggested(search, t.params) for name, t in known.items() if name not in self.sweep.trials]
            new = lost or self._ask(study, search, self._at_once(search, len(known)), known)
            if new:
                self.sweep.extend(new)
        return bool(new)

    def _open_study(self, search: dict[str, Any]) -> Any:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        path = str(self.sweep.folder / SEARCH)
        storage = optuna.storages.JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
        name = digest([search["space"], search["bases"]])
        return optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)

    def _tell(self, study: Any) -> dict[str, Any]:
        """Tell what trials came to; returns the study's trials by the ids of ours."""
        from optuna.trial import TrialState, create_trial

        named = {t.user_attrs["trial_id"]: t for t in study.trials if "trial_id" in t.user_attrs}
        for name, theirs in named.items():
            state = self.sweep.state_of(self.sweep.trials[name]) if name in self.sweep.trials else None
            record = state.record if state is not None and state.ended else None
            value = record.metrics.get("val_accuracy") if record is not None and record.status == "completed" else None
            if record is None or theirs.state == TrialState.COMPLETE or (theirs.state.is_finished() and value is None):
                continue
            if theirs.state.is_finished():  # it had failed, and was tried again
                again = {"params": theirs.params, "distributions": theirs.distributions, "user_attrs": theirs.user_attrs}
                study.add_trial(create_trial(value=value, **again))
            elif value is not None:
                study.tell(theirs.number, value)
            else:
                study.tell(theirs.number, state=TrialState.FAIL)
        return named

    def _at_once(self, search: dict[str, Any], known: int) -> int:
        size, workers = self.sweep.options.pack_size, int(self.sweep.plan["workers"])
        batch = int(size) if size != "auto" else max(1, search["trials"] // BATCHES // workers)
        return max(0, min(batch, search["trials"] - known))

    def _ask(self, study: Any, search: dict[str, Any], count: int, known: dict[str, Any]) -> list[Trial]:
        """Up to ``count`` suggestions that are new."""
        import optuna

        space = {key: _distribution(optuna.distributions, of) for key, of in search["space"].items()}
        new: dict[str, Trial] = {}
        for number in range(len(study.trials), len(study.trials) + MOST_REPEATS):
            if len(new) == count:
                break
            study.sampler = optuna.samplers.TPESampler(seed=number, multivariate=True, constant_liar=True)
            theirs = study.ask(space)
            try:
                trial = suggested(search, theirs.params)
            except ConfigError as error:
                theirs.set_user_attr("error", str(error))
                study.tell(theirs, state=optuna.trial.TrialState.FAIL)
                continue
            if trial.trial_id in known or trial.trial_id in new:
                same = known.get(trial.trial_id)
                value = same.value if same is not None else None
                study.tell(theirs, value, state=None if value is not None else optuna.trial.TrialState.FAIL)
                continue
            theirs.set_user_attr("trial_id", trial.trial_id)
            new[trial.trial_id] = trial
        return list(new.values())


def _distribution(kinds: Any, of: dict[str, Any]) -> Any:
    if "choices" in of:
        return kinds.CategoricalDistribution([text for text, _ in of["choices"]])
    kind = kinds.IntDistribution if of["integer"] else kinds.FloatDistribution
    return kind(of["low"], of["high"], log=of["log"], step=of["step"])


def suggested(search: dict[str, Any], params: Mapping[str, Any]) -> Trial:
    """The trial of a suggestion; a number between two ends gets four digits. Raises ConfigError if it cannot be.

    Args:
        search: ``space`` (what each key may be), ``bases`` (the composed config, unresolved, for each combination of
            group options) and ``fixed`` (the other overrides).
        params: the value of each key, or its text among the choices.
    """
    from omegaconf import OmegaConf

    space = search["space"]
    texts = {key: str(value) if not isinstance(value, float) else f"{value:.4g}" for key, value in params.items()}
    groups = [[key, texts[key]] for key, of in space.items() if of.get("group")]
    config = OmegaConf.create(next(text for options, text in search["bases"] if options == groups))
    for key, of in space.items():
        if not of.get("group"):
            value = dict(map(tuple, of["choices"]))[texts[key]] if "choices" in of else type(params[key])(texts[key])
            OmegaConf.update(config, key, value)
    trial = from_omegaconf(config, in_sweep=True)
    lines = [f"{key}={texts[key]}" for key in space]
    return Trial(trial, [*search["fixed"], *lines], label(without_idle(trial, lines)))
