"""What a sweep wants next: every combination (a grid), more seeds of the leaders (a race), or a study's suggestions.

Any worker asks its source once nothing is left to train, and what the source wants goes into the plan, for all to see.
A source remembers nothing: it decides by the records, so any process at any time comes to the same decision.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from lora_vit.analysis.pictures import Sums
from lora_vit.analysis.race import Race, standing, wanted
from lora_vit.errors import ConfigError, one_line
from lora_vit.records import SEARCH
from lora_vit.resolve import from_omegaconf
from lora_vit.sweep.plan import Sweep, label
from lora_vit.sweep.trial import Trial, digest, without_idle
from lora_vit.sweep.view import value_of

BATCHES = 5  # a search learns in between so many batches, unless the packs' size is given


class Source:
    """Decides which trials a sweep wants: this one, those that its command asked for."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep

    def extend(self) -> bool:
        """Put what is wanted next into the plan; whether that is anything new."""
        return False


def source_of(sweep: Sweep) -> Source:
    """The source of a sweep, as its plan says."""
    if sweep.race is not None:
        return RaceSource(sweep)
    return Source(sweep) if sweep.search is None else SearchSource(sweep)


class RaceSource(Source):
    """A sweep with ``sweep.margin``: cells get more seeds until one is left."""

    _plan: Any = None

    def look(self) -> None:
        """Read the records of the trials that were asked for, and decide."""
        plan = {**(self.sweep.race or {}), "metric": self.sweep.metric}
        if plan != self._plan:  # at first, and if another command has changed its rules, cells or metric
            self._plan = plan
            one_each = {trial.cell_id: trial for trial in self.sweep.trials.values()}
            # by the order of ids, which settles ties; of trials: cell, seed, value (None: failed) and val images
            self.cells = [one_each[cell].with_seed(plan["seed"]) for cell in plan["cells"]]
            self.ended: dict[str, tuple[str, int, object, object]] = {}
            self.sums = Sums(plan["metric"])
        for name, trial in self.sweep.trials.items():
            if name not in self.ended and trial.cell_id in plan["cells"]:
                state = self.sweep.state_of(trial)
                if state.ended and state.record is not None:
                    seed, value = trial.config.seed, value_of(state, plan["metric"])
                    self.ended[name] = (trial.cell_id, seed, value, state.record.data.get("val"))
                    if value is not None and 0 <= seed - plan["seed"] < plan["first_seeds"]:
                        self.sums.add(trial.cell_id, seed, self.sweep.folder / name)
        self.race: Race = standing(plan, self.ended.values(), self.sums)

    def extend(self) -> bool:
        """Ask for the next seeds of the cells that are in, for as many workers as there are."""
        with self.sweep.changing():
            if self.sweep.race is None:  # another command asks for a fixed sweep
                return False
            self.look()
            places = wanted(self.race, int(self.sweep.plan["workers"]))
            asked = [self.cells[cell].with_seed(self.race.first + number) for cell, number in places]
            queued = {trial.trial_id for trial in self.sweep.planned}
            return self.sweep.extend([trial for trial in asked if trial.trial_id not in queued])


class SearchSource(Source):
    """A sweep with ``sweep.trials``: Optuna's TPE suggests settings of one seed, drawn over all keys jointly."""

    def extend(self) -> bool:
        """Report to the study what has ended, and ask for the next trials."""
        with self.sweep.changing():
            if (search := self.sweep.search) is None:
                return False
            study = self._open_study(search)
            known = self._tell(study)
            lost = [suggested(search, t.params) for name, t in known.items() if name not in self.sweep.trials]
            size, workers = self.sweep.options.pack_size, int(self.sweep.plan["workers"])
            at_once = int(size) if size != "auto" else max(1, search["trials"] // BATCHES // workers)
            left = search["trials"] - len(known)
            return self.sweep.extend(lost or self._ask(study, search, min(at_once, left), known))

    def _open_study(self, search: dict[str, Any]) -> Any:
        """The study, in the sweep's folder: another space or fixed setting is another one in the same file."""
        import optuna
        from optuna.storages import journal

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        path, name = str(self.sweep.folder / SEARCH), digest([search["space"], search["bases"]])
        try:
            file = journal.JournalFileBackend(path, lock_obj=journal.JournalFileOpenLock(path))
            storage = optuna.storages.JournalStorage(file)
            return optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
        except (AssertionError, LookupError, TypeError, ValueError) as error:  # whatever is in the file
            why = f"Optuna {optuna.__version__}: {one_line(error)}"
            raise ConfigError(f"{path} cannot be read ({why}): move it away, no trial is lost") from None

    def _tell(self, study: Any) -> dict[str, Any]:
        """Tell what trials came to; returns the study's trials by the ids of ours, but for those suggested again."""
        from optuna.trial import TrialState, create_trial

        known = {t.user_attrs["trial_id"]: t for t in study.trials if "trial_id" in t.user_attrs}
        for name, theirs in known.items():
            if theirs.state == TrialState.COMPLETE or name not in self.sweep.trials:
                continue
            if not (state := self.sweep.state_of(self.sweep.trials[name])).ended or state.record is None:
                continue
            value = value_of(state, self.sweep.metric)
            if not theirs.state.is_finished():
                study.tell(theirs.number, value, state=TrialState.FAIL if value is None else None)
            elif value is not None:  # it had failed, and was tried again
                study.add_trial(create_trial(value=value, params=theirs.params, distributions=theirs.distributions,
                                             user_attrs=theirs.user_attrs))  # fmt: skip
        return known

    def _ask(self, study: Any, search: dict[str, Any], count: int, known: dict[str, Any]) -> list[Trial]:
        import optuna

        space = {key: distribution(of) for key, of in search["space"].items()}
        new: dict[str, Trial] = {}
        for number in range(len(study.trials), len(study.trials) + 50):  # then the space holds nothing new
            if len(new) >= count:
                break
            # a seed of its own, so that a search that was stopped does not draw its first suggestions again
            study.sampler = optuna.samplers.TPESampler(seed=number, multivariate=True, constant_liar=True)
            theirs = study.ask(space)
            try:
                trial = suggested(search, theirs.params)
            except ConfigError as error:
                theirs.set_user_attr("error", str(error))
                study.tell(theirs, state=optuna.trial.TrialState.FAIL)
                continue
            if trial.trial_id in {**known, **new}:
                value = value_of(self.sweep.state_of(trial), self.sweep.metric)
                study.tell(theirs, value, state=None if value is not None else optuna.trial.TrialState.FAIL)
                continue
            theirs.set_user_attr("trial_id", trial.trial_id)
            new[trial.trial_id] = trial
        return list(new.values())


def distribution(of: dict[str, Any]) -> Any:
    from optuna import distributions as kinds

    if "choices" in of:
        return kinds.CategoricalDistribution([text for text, _ in of["choices"]])
    kind = kinds.IntDistribution if of["integer"] else kinds.FloatDistribution
    return kind(of["low"], of["high"], log=of["log"], step=of["step"])


def suggested(search: dict[str, Any], params: Mapping[str, Any]) -> Trial:
    """The trial of a suggestion; a number between two ends gets four digits. Raises ConfigError if it cannot be.

    ``search``: ``space`` (what each key may be), ``bases`` (the composed config, unresolved, for each combination of
    group options), ``fixed`` (the others), ``cwd``; ``params``: each key's value, or its text among the choices.
    """
    from omegaconf import OmegaConf

    space = search["space"]
    texts = {key: str(value) if not isinstance(value, float) else f"{value:.4g}" for key, value in params.items()}
    groups = [[key, texts[key]] for key, of in space.items() if of.get("group")]
    config = OmegaConf.create(next(text for options, text in search["bases"] if options == groups))
    config.tracker = search["tracker"]
    for key, of in space.items():
        if not of.get("group"):
            value = dict(map(tuple, of["choices"]))[texts[key]] if "choices" in of else type(params[key])(texts[key])
            OmegaConf.update(config, key, value)
    trial = from_omegaconf(config, {}, cwd=search.get("cwd"))
    lines = [f"{key}={texts[key]}" for key in space]
    return Trial(trial, [*search["fixed"], *lines], label(without_idle(trial, lines)))
