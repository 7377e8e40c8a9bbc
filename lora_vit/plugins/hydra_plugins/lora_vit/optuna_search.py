"""``sweep=search``: Optuna suggests, packs train, the sweep's folder remembers. Options of hydra-optuna-sweeper."""

import shlex
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig

from lora_vit.compose import Composer, compose_all, from_omegaconf, sweep_from_omegaconf
from lora_vit.config import trial_id
from lora_vit.errors import ConfigError
from lora_vit.records import state_of
from lora_vit.sweep.ledger import Ledger
from lora_vit.sweep.plan import digest, label
from lora_vit.sweep.processes import number_of_workers, start_early

ROUNDS = 5
"""Optuna learns between batches, so a search has at least so many unless the packs' size is given."""
MOST_REPEATS = 50
"""Suggestions for one batch, after which the space is taken to hold nothing new."""
COMPARED, MARGIN = 3, 0.5
"""So many settings race at the end, over other seeds than the one that chose them, and to within so many points."""


# Drawn jointly and away from what the batch holds already: each key for itself stays with the first rank that did well.
ConfigStore.instance().store(
    group="hydra/sweeper/sampler",
    name="joint_tpe",
    node={
        "_target_": "optuna.samplers.TPESampler",
        "_partial_": True,  # made for each suggestion
        "seed": 0,
        "multivariate": True,
        "constant_liar": True,
    },
    provider="lora_vit",
)


class Search(Sweeper):
    """Looks for the settings of the highest validation accuracy; the launcher trains ``n_jobs`` of them at a time.

    ``n_trials`` counts different trials over all commands that share the folder. Suggestions are drawn with seeds of
    their own, from ``sampler.seed`` on: a search that was stopped does not draw its first ones again.
    """

    def __init__(self, **options: Any):
        self.options = SimpleNamespace(**options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. Raises ConfigError: an option has no meaning here."""
        self.config: Any = config
        self.composer = Composer(hydra_context.config_loader, config)
        self.run, self.folder = sweep_from_omegaconf(config.sweep), Path(str(config.hydra.sweep.dir))
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        o, direction = self.options, getattr(self.options.direction, "name", self.options.direction)
        is_grid = "Grid" in config.hydra.sweeper.sampler._target_
        if direction != "maximize" or o.search_space or o.custom_search_space or is_grid:
            raise ConfigError("sweep=search maximizes over hydra.sweeper.params: choose hydra/sweeper=optuna instead "
                              "for another direction, search_space, custom_search_space or sampler=grid")  # fmt: skip

        if o.n_trials < 1:
            raise ConfigError(f"hydra.sweeper.n_trials={o.n_trials} is impossible: give 1 or more")

    def sweep(self, arguments: list[str]) -> None:
        """Search. Called by Hydra. Raises ConfigError, and a trial's failure where it ends the search."""
        self._read_space(arguments)
        ends = {key: getattr(d, "choices", None) or (d.low, d.high) for key, d in self.space.items()}
        first = {key: values[0] for key, values in ends.items()}
        corners = [self._overrides({**first, key: value}) for key, values in ends.items() for value in values]
        jobs = compose_all(self.composer.loader, self.config, corners)
        self._open_study(jobs[0].trial_id)
        most_failures = 0 if self.run.on_failure == "stop" else self.options.max_failure_rate
        batch = {name: self._overrides(t.params) for name, t in self._by_id().items()}  # of earlier commands
        launched = 0
        while batch := batch or self._suggest(self._at_once(jobs)):
            returns = self.launcher.launch(list(batch.values()), initial_job_idx=launched)
            launched += len(returns)
            failed = [job for name, job in zip(batch, returns, strict=True) if self._tell(name, job)]
            if len(failed) > most_failures * len(batch):
                raise failed[0]._return_value
            batch = {}
        self._report()

    def _read_space(self, arguments: list[str]) -> None:
        """Optuna's distributions, and what is fixed; the command line replaces a preset's."""
        from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

        given = [*(f"{key}={value}" for key, value in (self.options.params or {}).items()), *arguments]
        last = {line.partition("=")[0]: line for line in given}
        self.space: dict[str, Any]
        self.space, self.fixed = create_params_from_overrides(list(last.values()))
        # the best seed is luck, and the rest is the command's
        if wrong := [key for key in self.space if key == "seed" or key.startswith(("sweep.", "hydra."))]:
            raise ConfigError(f"{wrong[0]} cannot be searched: give it one value")
        if not self.space:
            raise ConfigError("nothing is searched: give a range, as 'optimizer.lr=tag(log,interval(1e-4,1e-2))'")

    def _overrides(self, params: dict[str, Any], fixed: bool = True) -> list[str]:
        """A suggestion as on the command line; of a number between two ends, four digits."""
        drawn = {key for key, d in self.space.items() if isinstance(getattr(d, "low", None), float)}
        shown = {key: f"{params[key]:.4g}" if key in drawn else params[key] for key in self.space}
        return [f"{key}={value}" for key, value in {**shown, **(self.fixed if fixed else {})}.items()]

    def _open_study(self, example: str) -> None:
        """The study of this space and of what is fixed (the trial ``example`` stands for that), new or as it was left.

        Raises ConfigError.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of what later versions have for good
        o = self.options
        study = "-".join(filter(None, (o.study_name, digest([self.space, example]))))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.study = optuna.create_study(
                study_name=study, storage=o.storage, direction="maximize", load_if_exists=True
            )
        except Exception as error:  # of the folder, of Optuna or of the database's driver
            raise ConfigError(f"hydra.sweeper.storage={o.storage} cannot be opened ({type(error).__name__}): "
                              "pip install lora_vit[search] brings what it needs") from None  # fmt: skip

    def _by_id(self) -> dict[str, Any]:
        """Optuna's trials by the ids of ours; of several that name one, a completed one."""
        named = [t for t in self.study.trials if "trial_id" in t.user_attrs]
        return {t.user_attrs["trial_id"]: t for t in sorted(named, key=lambda t: t.value is not None)}

    def _at_once(self, jobs: list[Any]) -> int:
        """Trials of a batch: what the workers train side by side, as far as that is known."""
        if self.options.n_jobs > 0:
            return int(self.options.n_jobs)
        engine = self.launcher.engine(self.folder) if hasattr(self.launcher, "engine") else None
        if engine is None:
            start_early(jobs, self.run)
        workers = number_of_workers(jobs * self.options.n_trials, self.run, engine)
        most = self.options.n_trials // ROUNDS
        if self.run.pack_size != "auto":
            return workers * int(self.run.pack_size)
        return max(workers, min(workers * (Ledger(self.folder).largest_pack() or most), most))

    def _suggest(self, at_once: int) -> dict[str, list[str]]:
        """The next batch: overrides of trials that are new, by their ids; known ones are answered at once."""
        known, batch, sampler = self._by_id(), dict[str, list[str]](), self.config.hydra.sweeper.sampler
        for number in range(len(self.study.trials), len(self.study.trials) + MOST_REPEATS):
            if len(batch) >= min(at_once, self.options.n_trials - len(known)):
                break
            seed = {"seed": (sampler.seed or 0) + number} if "seed" in sampler else {}
            self.study.sampler = instantiate(sampler, _partial_=False, **seed)
            trial = self.study.ask(self.space)
            overrides = self._overrides(trial.params)
            try:
                name = trial_id(from_omegaconf(self.composer(overrides), in_sweep=True))
            except ConfigError as error:
                self._fail(trial, str(error))
                continue
            trial.set_user_attr("trial_id", name)
            if name in known:
                self.study.tell(trial, known[name].value, known[name].state)
            else:
                batch[name] = overrides
        return batch

    def _tell(self, name: str, job: JobReturn) -> bool:
        """Tell Optuna what a trial came to; whether it failed, and Optuna did not know."""
        from optuna.trial import Trial, TrialState, create_trial

        state, failed = state_of(Path(str(job.working_dir))), job.status == JobStatus.FAILED
        if failed and self.run.on_failure == "stop" and state.status != "failed":
            return True  # saved or not begun: the same command goes on with it
        same = [t for t in self.study.trials if t.user_attrs.get("trial_id") == name]
        untold = [Trial(self.study, t._trial_id) for t in same if not t.state.is_finished()]
        for trial in untold:
            if failed:
                recorded = (state.record.error or {}).get("message") if state.record else state.problem
                self._fail(trial, recorded or str(job._return_value))
            else:
                self.study.tell(trial, job.return_value)
        if not failed and all(t.state == TrialState.FAIL for t in same):  # it was tried again
            again = {"params": same[0].params, "distributions": self.space, "user_attrs": {"trial_id": name}}
            self.study.add_trial(create_trial(value=job.return_value, **again))
        return failed and bool(untold)

    def _fail(self, trial: Any, why: str) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr("error", why)
        self.study.tell(trial, state=TrialState.FAIL)

    def _report(self) -> None:
        """Print what was found, and the command that says whether it holds. Raises ConfigError: all failed."""
        trials = self._by_id().values()
        best = sorted((t for t in trials if t.value is not None), key=lambda t: -t.value)
        if not best:
            raise ConfigError(f"no trial completed: python -m lora_vit.sweep {shlex.quote(str(self.folder))} says why")
        print(f"searched {len(trials)} trials ({len(trials) - len(best)} failed) with one seed, which tells none apart "
              "and flatters the best:")  # fmt: skip
        ours = ("-m", "--multirun", "seed", "sweep", "sweep.name", "hydra.sweep.dir")
        fixed = {key: value for key, value in self.fixed.items() if key not in ours}
        given = {a.partition("=")[0]: a for a in sys.argv[1:] if not a.startswith(("hydra.sweeper", "hydra/sweeper"))}
        others = [a for key, a in given.items() if key not in (*ours, *self.space, *self.fixed)]
        same = [*others, *(f"{key}={value}" for key, value in fixed.items())]
        race, new = [f"seed={self.config.seed + 1}", f"sweep.margin={MARGIN}"], f"{self.folder}-best"
        commands = []
        for trial in best[:COMPARED]:
            found = self._overrides(trial.params, fixed=False)
            print(f"  {trial.value:.2%}  {label(found, set())}")
            line = ["-m", *same, *found, *race, f"hydra.sweep.dir={new}"]
            commands.append("python -m lora_vit.train " + shlex.join(line))
        print(f"a race over other seeds says which of them is best, to within {MARGIN} points (each command joins it):")
        print(" && \\\n".join([*commands, f"python -m lora_vit.summarize {shlex.quote(new)}"]))
