"""Run a sweep for a command: accept its folder, start workers, watch until the trials have ended, and report."""

from __future__ import annotations

import contextlib
import shlex
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from lora_vit.build import prepare
from lora_vit.config import to_dict
from lora_vit.config.names import cell_names
from lora_vit.errors import ConfigError, Interrupted, TrialFailed
from lora_vit.records import NO_ACCURACY, RECORD, State, write_record
from lora_vit.resolve import is_identified
from lora_vit.stopping import StopRequest
from lora_vit.sweep.claims import Claims
from lora_vit.sweep.engines import Engine, start_engine
from lora_vit.sweep.plan import Request, Sweep
from lora_vit.sweep.source import RaceSource, SearchSource, Source, source_of, suggested
from lora_vit.sweep.trial import Trial, key_of, make_groups, without_idle, without_seed
from lora_vit.sweep.view import View
from lora_vit.terminal import from_here, make_console, print_table

TRIES = 3
"""So often in a row workers are started without that a trial ends."""
POLL_EVERY_TRIAL = 0.0005
"""Seconds between two looks for each trial of a large sweep, whose folder takes long to list."""
SHOWN = 30
"""Rows of a table on the terminal."""
COMPARED, MARGIN = 3, 0.5
"""So many settings that a search found are proposed for a race over other seeds, to within so many points."""


def run_sweep(request: Request) -> dict[str, float | TrialFailed] | None:
    """Train the trials that a command asks for, each once; skip what is finished.

    Returns:
        The validation accuracy or the failure of each trial id; None after a dry run or with ``sweep.wait=false``.

    Raises:
        ConfigError: nothing was trained.
        TrialFailed: workers end without training anything.
        Interrupted: everything is saved.
    """
    trials, options = _each_once(request.trials), request.options
    if not trials and request.search is None:
        raise ConfigError("no trials: give at least one")
    sweep = Sweep(request.folder)
    if unread := [trial for trial in trials if not is_identified(trial.config)]:  # by a dry run
        print(f"note: data={unread[0].config.data.name} has not been read yet: which trials are finished is not known")
    else:
        _report_changed(trials, sweep)
    about: dict[str, Any] = {"command": request.command or this_command(), "hydra": request.hydra, "race": None,
                             "search": request.search, "workers": 1}  # fmt: skip
    if request.search is not None:
        trials = [_example(request.search)]
    if options.margin is not None:
        trials, about["race"] = _cells(request, trials, sweep)
    _refuse_devices(trials)
    engine = start_engine(request.engine, request.folder)
    about["workers"] = engine.number_of_workers(options.workers, trials * (request.search or {"trials": 1})["trials"])
    if options.dry_run:
        print_plan(sweep, trials, about, options.pack_size)
        return None
    prepare([trial.config for trial in trials])
    asked = trials
    if about["race"] or request.search:  # what it has asked for so far
        cells = (about["race"] or {}).get("cells")
        asked = [trial for trial in sweep.trials.values() if cells is None or trial.cell_id in cells]
    restart = trials[0].config.trainer.resume == "restart"
    states = {trial.trial_id: _reopened(sweep, trial, restart, options.retry_failed) for trial in asked}
    for trial in (trial for batch in sweep.batches for trial in batch if trial.trial_id not in states):
        states[trial.trial_id] = sweep.state_of(trial)  # left over by earlier commands
    is_open = {name for name, state in states.items() if not state.ended}
    sweep.ask(trials if request.search is None else [], asked, is_open, options, **about)
    reopen(sweep, is_open)
    source = source_of(sweep)
    counts = Counter(states[trial.trial_id].status for trial in asked)
    finished = ", ".join(f"{n} {status}" for status, n in counts.items() if status != "new")
    size = f"a race of {len(trials)} cells" if about["race"] else f"{options.trials or len(asked)} trials"
    print(f"sweep {sweep.folder}: {size}" + (f" ({finished})" if finished else ""))
    if left := is_open.difference(trial.trial_id for trial in asked):
        print(f"note: {len(left)} trials of earlier commands are open too: they train after these")
    view = View(sweep, [(trial, states[trial.trial_id]) for trial in asked if trial.trial_id not in is_open])
    try:
        if not follow(sweep, source, engine, view, request):
            return None
    finally:
        view.close()
    return finish(sweep, source, [row.trial for row in view.rows.values()], request)


def this_command() -> str:
    """The running command, to be given again."""
    return "python -m lora_vit.train " + shlex.join(sys.argv[1:])


def _each_once(trials: Sequence[Trial]) -> list[Trial]:
    """Each trial at its first place; what has no effect, or names one twice, is reported."""
    once: dict[str, Trial] = {}
    for trial in trials:
        once.setdefault(trial.trial_id, trial)
    idle = dict.fromkeys(key_of(line) for trial in trials for line in trial.overrides
                         if line not in without_idle(trial.config, trial.overrides))  # fmt: skip
    if idle:
        print(f"note: {', '.join(idle)} without effect on baselines, which run once for all values")
    if twice := len(trials) - len(once):
        print(f"note: {twice} of {len(trials)} combinations are duplicates and run only once")
    return list(once.values())


def _report_changed(trials: Sequence[Trial], sweep: Sweep) -> None:
    """Say if settings that were asked for earlier are other trials now: their images or weights have changed."""
    ids = {trial.trial_id for trial in trials}
    earlier = {tuple(trial.overrides): name for name, trial in sweep.trials.items() if name not in ids}
    changed = [t for t in trials if tuple(t.overrides) in earlier and t.trial_id not in sweep.trials]
    if changed:
        before = ", ".join(earlier[tuple(trial.overrides)] for trial in changed[:3]) + ", ..." * (len(changed) > 3)
        print(f"note: {len(changed)} of these trials were run here with other images, weights or defaults ({before}); "
              "they are trained again, and the summary does not mix the two")  # fmt: skip


def _refuse_devices(trials: Iterable[Trial]) -> None:
    for trial in trials:
        devices = trial.config.trainer.devices
        if devices not in ("auto", "1"):
            raise ConfigError(
                f"trainer.devices={devices}: a pack trains on one device and a sweep spreads its packs over them, so "
                f"give sweep.workers={devices} instead (or hydra/sweeper=basic, one trial after another)"
            )


def _example(search: dict[str, Any]) -> Trial:
    """A trial of a search: what all of its trials train on."""
    first = {key: of["choices"][0][0] if "choices" in of else of["low"] for key, of in search["space"].items()}
    return suggested(search, first)


def _cells(request: Request, trials: list[Trial], sweep: Sweep) -> tuple[list[Trial], dict[str, Any]]:
    """A trial of each cell of a race, and its rules; cells that earlier commands raced here join."""
    asked, images = {trial.cell_id: trial for trial in trials}, {trial.config.data.content for trial in trials}
    settings = [set(without_seed(trial.overrides)) for trial in trials]
    raced = (sweep.race or {}).get("cells", ())
    for trial in sweep.trials.values():  # not what has become another cell, whose weights or images have changed
        same = set(without_seed(trial.overrides)) in settings
        if trial.cell_id in raced and trial.config.data.content in images and not same:
            asked.setdefault(trial.cell_id, trial.with_seed(trials[0].config.seed))
    rules = {key: getattr(request.options, key) for key in ("margin", "first_seeds", "most_seeds")}
    cells = [asked[cell] for cell in sorted(asked)]
    command = request.command or this_command()
    return cells, {**rules, "seed": trials[0].config.seed, "cells": sorted(asked), "command": command}


def _reopened(sweep: Sweep, trial: Trial, restart: bool, retry_failed: bool) -> State:
    """How a trial stands, once what the command asks to train again is open; a trial in training is left alone."""
    state = sweep.state_of(trial)
    record = state.record
    if record is None or not (restart or (retry_failed and record.status == "failed")):
        return state
    claims = Claims(sweep.folder)
    claims.look()
    if claims.state(trial.trial_id) == "held":
        return state
    folder = sweep.folder_of(trial)
    if restart:
        (folder / RECORD).unlink()
    else:
        record.status = "interrupted"
        write_record(folder, record)
    return sweep.state_of(trial)


def reopen(sweep: Sweep, trial_ids: Iterable[str]) -> None:
    """Make trials free that were ended by an earlier command."""
    claims = Claims(sweep.folder)
    claims.look()
    for name in trial_ids:
        claims.reopen(name)


def follow(sweep: Sweep, source: Source, engine: Engine, view: View, request: Request) -> bool:
    """Start workers while trials are free, and watch until all have ended; whether that was waited for.

    Raises:
        ConfigError: the engine refuses.
        Interrupted: workers were asked to stop and have saved, or they continue by themselves.
        TrialFailed: workers end, and no trial does.
    """
    workers, tries = int(sweep.plan["workers"]), 0
    with StopRequest() as stop:
        try:
            while True:
                alive, news = engine.look()  # before the trials, or workers that have just ended seem to be missing
                for text in news:
                    view.say(text)
                for trial, state in view.look():
                    request.ended(trial, state)
                    tries = 0
                if not view.open():
                    if source.extend() or view.open():  # we, or a worker meanwhile
                        continue
                    break
                if stop.signum:
                    _end(engine, view, stop)
                missing = min(workers - alive, view.free() - max(0, alive - view.busy()))  # the idle will take some
                if missing > 0 and tries < TRIES:
                    tries += 1
                    view.say(engine.start(missing))
                    if not request.options.wait:
                        return False
                elif missing > 0 and not alive:
                    raise TrialFailed(f"{tries} times workers were started and ended no trial, see above: what is "
                                      "saved stays, and the same command resumes")  # fmt: skip
                stop.sleep(max(engine.poll_every, len(view.rows) * POLL_EVERY_TRIAL))
        except KeyboardInterrupt:  # the second one
            engine.stop(now=True)
            raise
        engine.withdraw()
    return True


def _end(engine: Engine, view: View, stop: StopRequest) -> None:
    """End as the user asks: a terminal is asked whether workers that outlive the command are to end too."""
    if engine.outlives_us and not _asks_to_cancel(view):
        view.say("the workers continue; the same command follows them again")
        raise Interrupted(stop.signum)
    view.say("asking the workers to save and to end")
    engine.stop()
    while engine.look()[0]:
        time.sleep(engine.poll_every)
    raise Interrupted(stop.signum or signal.SIGTERM)


def _asks_to_cancel(view: View) -> bool:
    view.close()
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return input("end the workers too, once they have saved? [y/N] ").strip().lower().startswith("y")
    except (EOFError, KeyboardInterrupt):
        return False


def finish(
    sweep: Sweep, source: Source, trials: Sequence[Trial], request: Request
) -> dict[str, float | TrialFailed]:
    """Print the tables; the validation accuracy or the failure of each trial."""
    states = {trial.trial_id: sweep.state_of(trial) for trial in trials}
    outcomes: dict[str, float | TrialFailed] = {}
    for name, state in states.items():
        if state.status == "completed" and state.record and state.record.metrics.get("val_accuracy") is not None:
            outcomes[name] = state.record.metrics["val_accuracy"]
    console = make_console()
    if isinstance(source, RaceSource):
        print_race(console, sweep, source)
    elif isinstance(source, SearchSource):
        print_found(console, sweep, outcomes, request)
    else:
        print_cells(console, trials, outcomes)
    failed = [(trial, states[trial.trial_id]) for trial in trials if trial.trial_id not in outcomes]
    if failed:
        print_failures(console, failed)
        retry = not request.options.retry_failed and any(state.status == "failed" for _, state in failed)
        again = "; sweep.retry_failed=true tries the failed ones again" if retry else ""
        error = TrialFailed(f"{len(failed)} of {len(trials)} trials did not complete{again}")
        outcomes.update(dict.fromkeys((trial.trial_id for trial, _ in failed), error))
    where = from_here(sweep.folder)
    console.print(f"{where}\ntensorboard --logdir {where}/tensorboard\npython -m lora_vit.summarize {where}")
    return outcomes


def print_cells(console: Console, trials: Sequence[Trial], accuracies: dict[str, Any]) -> None:
    """Cells by mean validation accuracy, best first."""
    cells: dict[str, list[Trial]] = {}
    for trial in trials:
        cells.setdefault(trial.cell_id, []).append(trial)
    names = cell_names({cell: to_dict(members[0].config) for cell, members in cells.items()})
    rows = []
    for cell, members in cells.items():
        values = [accuracies[trial.trial_id] for trial in members if trial.trial_id in accuracies]
        if values:
            spread = f"{100 * statistics.stdev(values):.2f}" if len(values) > 1 else "-"
            rows.append((statistics.fmean(values), names[cell], spread, f"{len(values)}/{len(members)}"))
    rows.sort(key=lambda row: -row[0])
    lines = [(str(i), name, f"{100 * mean:.2f}", spread, n) for i, (mean, name, spread, n) in enumerate(rows, 1)]
    header = ("", "cell", "mean val accuracy", "sd over seeds", "seeds")
    if lines:
        title = "Cells by mean validation accuracy (the summary says which differences are real)"
        print_table(console, title, header, lines, SHOWN)


def print_race(console: Console, sweep: Sweep, source: RaceSource) -> None:
    """How the race stands, and its verdict if it has ended."""
    source.look()
    header = ("cell", "mean val accuracy", "seeds", "slack (points)", "")
    print_table(console, source.title(), header, source.rows(), SHOWN)
    if source.race.ended:
        from lora_vit.analysis import summarize  # imports pandas
        from lora_vit.errors import RecordError

        with contextlib.suppress(RecordError):  # all have failed
            console.print(summarize(sweep.folder).verdict, markup=False)


def print_found(console: Console, sweep: Sweep, accuracies: dict[str, Any], request: Request) -> None:
    """What a search found, and the command that says whether it holds. Raises ConfigError if all trials failed."""
    best = sorted(accuracies, key=lambda name: -accuracies[name])[:COMPARED]
    if not best:
        raise ConfigError(f"no trial completed: python -m lora_vit.sweep {shlex.quote(str(sweep.folder))} says why")
    console.print(f"{len(accuracies)} trials completed, one seed each: no significance, and the best is biased upwards")
    for name in best:
        console.print(f"  {accuracies[name]:.2%}  {sweep.trials[name].label}", markup=False)
    new = f"{sweep.folder}-best"
    commands = []
    for name in best:
        trial = sweep.trials[name]
        lines = [line for line in without_seed(trial.overrides) if not line.startswith(("sweep", "hydra"))]
        race = [f"seed={trial.config.seed + 1}", f"sweep.margin={MARGIN}", f"hydra.sweep.dir={new}"]
        commands.append("python -m lora_vit.train " + shlex.join(["-m", *lines, *race]))
    console.print(f"A race over other seeds says which is best, to within {MARGIN} points (each command joins it):")
    console.print(" && \\\n".join([*commands, f"python -m lora_vit.summarize {shlex.quote(new)}"]), markup=False)


def print_failures(console: Console, failed: Sequence[tuple[Trial, State]]) -> None:
    """Which trials did not complete, and why."""
    lines = []
    for trial, state in failed:
        why = f"{RECORD} {NO_ACCURACY}" if state.status == "completed" else state.problem
        if state.record is not None and state.record.error:
            why = str(state.record.error.get("message") or "")
        lines.append((trial.trial_id, trial.label, "not started" if state.status == "new" else state.status, why))
    print_table(console, "Not completed", ("trial", "settings", "status", "why"), lines, SHOWN)


def print_plan(sweep: Sweep, trials: Sequence[Trial], about: dict[str, Any], pack_size: str) -> None:
    """What ``sweep.dry_run=false`` would train: its packs, and what is known from measured ones."""
    console = make_console()
    if about["race"] is not None:
        sweep.race, sweep.trials = about["race"], {**sweep.trials, **{t.trial_id: t for t in trials}}
        source = RaceSource(sweep)
        console.print(source.sizes(), markup=False)
        trials = source.wanted()
    open_ones = [trial for trial in trials if not sweep.state_of(trial).ended]
    rows = []
    for group in make_groups(open_ones):
        known = next((f for f in sweep.plan["pack_sizes"].values() if f["group"] == group.title), None)
        size = "1" if group.alone else pack_size if pack_size != "auto" else "" if known is None else str(known["size"])
        seconds = (known or {"seconds_per_trial_epoch": {}})["seconds_per_trial_epoch"].get(size)
        epochs = sum(trial.config.trainer.epochs for trial in group.trials)
        time_in_all = "" if seconds is None else f"{seconds * epochs / about['workers']:,.0f} s"
        rows.append((group.title, str(len(group.trials)), size or "measured at the start", time_in_all))
    finished = len(trials) - len(open_ones)
    console.print(f"plan of {sweep.folder}: {len(trials)} trials, {finished} of them finished; "
                  f"{about['workers']} workers", markup=False)  # fmt: skip
    print_table(console, "", ("trials that share a backbone", "trials", "pack size", "time, as measured here"), rows)
