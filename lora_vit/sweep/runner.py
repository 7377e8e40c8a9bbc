"""Run a sweep: accept its folder, train what is open in one or several workers, and say how it ended."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lora_vit.build import prepare
from lora_vit.data.dataset import IN_PACKAGES
from lora_vit.errors import Interrupted, TrialFailed
from lora_vit.records import NO_ACCURACY, RECORD, State
from lora_vit.stopping import StopRequest
from lora_vit.sweep.claims import ENDED, FREE, Claims
from lora_vit.sweep.dryrun import print_plan
from lora_vit.sweep.engine import Engine, run_on
from lora_vit.sweep.follow import Follower
from lora_vit.sweep.ledger import Ledger
from lora_vit.sweep.plan import Job, SweepRun, key_of, this_command, without_duplicates
from lora_vit.sweep.processes import GOES_ON, number_of_workers, run_workers
from lora_vit.sweep.progress import View
from lora_vit.terminal import from_here, make_console, print_table

if TYPE_CHECKING:
    from lora_vit.sweep.race import SweepRace

POLL_EVERY = 1.0
"""Seconds between looks at trials that others have."""
SHOWN = 30
"""Rows of a table on the terminal."""




def run_sweep(asked: SweepRun, engine: Engine | None = None) -> dict[str, float | Exception] | None:
    """Train the trials that a command asks for, each once; skip what is finished.

    Args:
        asked: by the command.
        engine: starts the workers; None: they are this process, or its children.

    Returns:
        The validation accuracy or the failure of each trial id; None after a dry run, and where nobody waits.

    Raises:
        ConfigError: nothing was trained.
        Interrupted: everything is saved.
    """
    options, ledger = asked.options, Ledger(asked.folder)
    idle = dict.fromkeys(key_of(line) for job in asked.jobs for line in job.idle())
    jobs, twice = without_duplicates(asked.jobs)
    if idle:
        print(f"note: {', '.join(idle)} without effect in some trials (baselines), which run once for all values")
    if twice:
        print(f"note: {twice} of the {len(jobs) + twice} settings name a trial that another one names: each runs once")
    plan = ledger.read()  # refuses a folder of another version before anything is written
    _tell_changed(jobs, plan["trials"])
    run, race = replace(asked, jobs=tuple(jobs)), None
    if options.margin is not None:
        from lora_vit.sweep.race import SweepRace  # imports scipy

        raced = (plan["race"] or {}).get("cells", ())
        one_each = {trial["cell"]: name for name, trial in plan["trials"].items() if trial["cell"] in raced}
        race = SweepRace(run, ledger.jobs(plan, one_each.values()))
        workers = number_of_workers(race.cells, options, engine)
        run = replace(run, jobs=tuple(race.look(workers)))
    if options.dry_run:
        _dry_run(run, race, engine)
        return None
    if race is None:
        messages = train(run, engine)
        return None if messages is None else finish(run, messages)
    ledger.add([race.job(cell, 0) for cell in range(len(race.cells))], this_command(), race.plan)
    return _run_race(run, race, workers, engine)


def _run_race(run: SweepRun, race: SweepRace, workers: int, engine: Engine | None) -> dict[str, float | Exception]:
    """Train what the race wants, round by round, until it wants no more or a round leaves trials open."""
    console, messages = make_console(), dict[str, str]()
    while run.jobs:
        race.show(console, SHOWN)
        messages |= train(run, engine) or {}
        trained = {job.trial_id for job in run.jobs}
        run = replace(run, jobs=tuple(race.look(workers)))
        stopped = run.options.on_failure == "stop" and not trained.isdisjoint(race.failed())
        if stopped or any(job.trial_id in trained for job in run.jobs):
            break
    Ledger(run.folder).add([], this_command(), race.plan)  # another command may have begun a race of other rules
    return finish(replace(run, jobs=tuple(race.ended_jobs()) + run.jobs), messages, race)


def train(run: SweepRun, engine: Engine | None) -> dict[str, str] | None:
    """Train what is open of the run's trials; why trials left where no record says it, None where nobody waits."""
    states, asked = _open_part(run, engine)
    prepare([job.config for job in asked.jobs])
    Ledger(run.folder).add(run.jobs, this_command())
    todo = {job.trial_id for job in asked.jobs}
    asked = begin(asked) if todo else asked
    counts = Counter(state.status for state in states.values())
    finished = ", ".join(f"{n} {status}" for status, n in counts.items() if status != "new")
    print(f"sweep {run.folder}: {len(run.jobs)} trials" + (f" ({finished})" if finished else ""))
    view = View(run.jobs)
    for trial_id in states.keys() - todo:
        view.emit("ended", id=trial_id, state=states[trial_id])
    if not train_open(asked, view, engine):
        return None
    view.console.print(f"{view.ended()} of {len(run.jobs)} trials ended")
    return {row.job.trial_id: row.message for row in view.rows.values()}


def _open_part(run: SweepRun, engine: Engine | None) -> tuple[dict[str, State], SweepRun]:
    """Where each trial stands, and the run of those that are open, with its number of workers."""
    states = {job.trial_id: run.state_of(job) for job in run.jobs}
    todo = tuple(job for job in run.jobs if not run.is_ended(job, states[job.trial_id]))
    return states, replace(run, jobs=todo, workers=number_of_workers(todo or run.jobs, run.options, engine))


def _dry_run(run: SweepRun, race: SweepRace | None, engine: Engine | None) -> None:
    if race is not None:
        print(race.sizes() + "; the trials that it wants now:" * bool(run.jobs))
    if not run.jobs:
        return
    states, asked = _open_part(run, engine)
    if run.options.measure:
        prepare([job.config for job in asked.jobs])
    if any(job.config.data.content is None and job.config.data.name not in IN_PACKAGES for job in run.jobs):
        print("note: the images have not been read yet, so all trials count as open")
    print_plan(asked, states)


def _tell_changed(jobs: Sequence[Job], planned: dict[str, Any]) -> None:
    """Say where settings that were asked for earlier are other trials now: their images or weights have changed."""
    ids = {job.trial_id for job in jobs}
    earlier = {tuple(plan["overrides"]): trial_id for trial_id, plan in planned.items() if trial_id not in ids}
    changed = [job for job in jobs if tuple(job.overrides) in earlier and job.trial_id not in planned]
    if changed:
        before = ", ".join(earlier[tuple(job.overrides)] for job in changed[:3]) + (", ..." if len(changed) > 3 else "")
        print(
            f"note: {len(changed)} of these trials were run here with other images, weights or defaults ({before}); "
            "they are trained anew, and the summary does not mix the two"
        )


def begin(run: SweepRun) -> SweepRun:
    """Write the run down for its workers; what ended earlier is free again."""
    claims = Claims(run.folder)
    claims.look()
    for job in run.jobs:
        claims.reopen(job.trial_id)
    return Ledger(run.folder).begin(run.in_order())


def train_open(run: SweepRun, view: View, engine: Engine | None) -> bool:
    """Train what is open, and wait for what others have; whether that was waited for."""
    others, waited = Follower(run, view), False
    try:
        with StopRequest() as stop:
            if engine is not None:
                return run_on(engine, run, view, stop)
            while (standing := others.look()) != ENDED:
                ended = view.ended()
                if standing == FREE:
                    run_workers(run, view, stop)
                    if others.look() == FREE and view.ended() == ended:
                        raise TrialFailed(f"trials are open, and no worker could take them: {GOES_ON}")
                    continue
                if not waited:
                    view.emit("say", text="another process has the remaining trials: waiting for it")
                    waited = True
                stop.heed()
                time.sleep(POLL_EVERY)
    except Interrupted:
        if not view.stop_asked:
            raise
    finally:
        view.close()
    return True


def finish(run: SweepRun, messages: dict[str, str], race: SweepRace | None = None) -> dict[str, float | Exception]:
    """Print the tables and give Hydra its values; ``messages`` say why trials left, where no record does.

    Of a race, a cell's first trial fails with any of the cell's.
    """
    states = {job.trial_id: run.state_of(job) for job in run.jobs}
    outcomes: dict[str, float | Exception] = {}
    for trial_id, state in states.items():
        if state.status == "completed" and state.record and state.record.metrics.get("val_accuracy") is not None:
            outcomes[trial_id] = state.record.metrics["val_accuracy"]
    failed = [(job, states[job.trial_id]) for job in run.jobs if job.trial_id not in outcomes]
    console = make_console()
    if race is None:
        print_cells(console, run.jobs, outcomes)
    else:
        race.show(console, SHOWN)
        if race.race.ended:
            from lora_vit.analysis import summarize
            from lora_vit.errors import RecordError

            with contextlib.suppress(RecordError):  # all have failed
                console.print(summarize(run.folder).verdict, markup=False)
    if failed:
        print_failures(console, failed, messages)
        retry = not run.options.retry_failed and any(state.status == "failed" for _, state in failed)
        again = "; sweep.retry_failed=true tries the failed ones again" if retry else ""
        error = TrialFailed(f"{len(failed)} of {len(run.jobs)} trials did not complete{again}")
        outcomes.update(dict.fromkeys((job.trial_id for job, _ in failed), error))
        if race is not None:
            outcomes.update(dict.fromkeys(race.failed(), error))
    where = from_here(run.folder)
    console.print(f"{where}\ntensorboard --logdir {where}/tensorboard\npython -m lora_vit.summarize {where}")
    return outcomes


def print_cells(console: Console, jobs: Sequence[Job], accuracies: dict[str, Any]) -> None:
    """Cells by mean validation accuracy, best first."""
    cells: dict[str, list[Job]] = {}
    for job in jobs:
        cells.setdefault(job.cell_id, []).append(job)
    rows = []
    for members in cells.values():
        values = [accuracies[job.trial_id] for job in members if job.trial_id in accuracies]
        if values:
            spread = f"{100 * statistics.stdev(values):.2f}" if len(values) > 1 else "-"
            seeds = f"{len(values)}/{len(members)}"
            rows.append((statistics.fmean(values), members[0].cell_label, spread, seeds))
    rows.sort(key=lambda row: -row[0])
    lines = [(str(i), name, f"{100 * mean:.2f}", spread, n) for i, (mean, name, spread, n) in enumerate(rows, 1)]
    header = ("", "cell", "mean val accuracy", "sd over seeds", "seeds")
    title = "Cells by mean validation accuracy (which differences are real: see below)"
    if lines:
        print_table(console, title, header, lines, SHOWN)


def print_failures(console: Console, failed: Sequence[tuple[Job, State]], messages: dict[str, str]) -> None:
    """Which trials did not complete, and why."""
    lines = []
    for job, state in failed:
        why = state.problem or messages.get(job.trial_id, "")
        if state.status == "completed":
            why = f"{RECORD} {NO_ACCURACY}"
        if state.record is not None and state.record.error:
            why = str(state.record.error.get("message") or "")
        lines.append((job.trial_id, job.label, "not started" if state.status == "new" else state.status, why))
    print_table(console, "Not completed", ("trial", "settings", "status", "why"), lines, SHOWN)
