"""Run a sweep for a command: accept its folder, start workers, watch until the trials have ended, and report."""

import contextlib
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from lora_vit.build import prepare
from lora_vit.errors import ConfigError, Interrupted, TrialFailed
from lora_vit.records import RECORD, write_record
from lora_vit.resolve import is_identified
from lora_vit.stopping import StopRequest
from lora_vit.sweep.claims import HELD, Claims
from lora_vit.sweep.engines import Engine, start_engine
from lora_vit.sweep.plan import Request, Sweep
from lora_vit.sweep.source import Source, source_of
from lora_vit.sweep.trial import Trial, make_groups, without_seed
from lora_vit.sweep.view import SHOWN, View, header, print_summary, trial_row, value_of
from lora_vit.terminal import from_here, make_console, print_table

TRIES = 3  # so often in a row workers are started without that a trial ends
POLL_EVERY_TRIAL = 0.0005  # seconds between two looks, for each trial: a large sweep's folder takes long to list
COMPARED, MARGIN = 3, 0.5  # so many settings of a search are proposed for a race, to within so many points


def run_sweep(request: Request) -> dict[str, float] | None:
    """Train the trials that a command asks for, each once; skip what is finished.

    Returns the metric on val of each trial id; None after a dry run or with ``sweep.wait=false``. Raises
    ConfigError: nothing was trained; TrialFailed: some trials did not complete, all others are, or workers end without
    training anything; Interrupted: everything is saved.
    """
    options, search, sweep = request.options, request.search, Sweep(request.folder)
    earlier = sweep.search
    if not request.trials:
        raise ConfigError("the sweep is empty: a swept key has no value, give it some as lora.rank=2,4")
    if len(metrics := dict.fromkeys(trial.config.trainer.metric for trial in request.trials)) > 1:
        raise ConfigError(f"trainer.metric={','.join(metrics)}: one metric compares all trials of a sweep, give one")
    trials = _each_once(request.trials, sweep) if search is None else request.trials[:1]
    request = replace(request, trials=trials, metric=trials[0].config.trainer.metric)
    if options.margin is not None:
        request.trials = trials = _begin_race(request, sweep)
    for devices in {trial.config.trainer.devices for trial in trials} - {"auto", "1"}:
        raise ConfigError(f"trainer.devices={devices}: a pack trains on one device: give sweep.workers={devices}")
    engine = start_engine(request.engine, request.folder)
    request.workers = engine.number_of_workers(options.workers, trials * (search or {"trials": 1})["trials"])
    if options.dry_run:
        print_plan(sweep, request)
        return None
    prepare([trial.config for trial in trials])
    asked = trials
    if request.race or search:  # what it has asked for so far
        cells = (request.race or {}).get("cells")
        asked = [trial for trial in sweep.trials.values() if cells is None or trial.cell_id in cells]
    _reopen(sweep, asked, trials[0].config.trainer.resume == "restart", options.retry_failed)
    ours = {trial.trial_id for trial in asked}
    watched = [*asked, *(trial for trial in sweep.planned if trial.trial_id not in ours)]
    states = {trial.trial_id: sweep.state_of(trial) for trial in watched}
    is_open = {name for name, state in states.items() if not state.ended}
    sweep.ask(request, asked, is_open)
    Claims(sweep.folder).reopen(is_open)
    counts = Counter(states[trial.trial_id].status for trial in asked)
    finished = ", ".join(f"{n} {status}" for status, n in counts.items() if status != "new")
    size = f"a race of {len(trials)} cells" if request.race else f"{options.trials or len(asked)} trials"
    print(f"sweep {sweep.folder}: {size}" + (f" ({finished})" if finished else ""))
    if search and earlier and any(search[key] != earlier[key] for key in ("space", "bases")):
        print(f"note: {sweep.folder} has trials of another search too, which are compared; sweep.name=NEW leaves them")
    if left := is_open - ours:
        print(f"note: {len(left)} trials of earlier commands are open too: they train after these")
    view = View(sweep, [(t, states[t.trial_id]) for t in watched if t.trial_id in is_open | ours])
    try:
        if not follow(source_of(sweep), engine, view, request):
            return None
    finally:
        view.progress.close()
    return finish(sweep, list(view.trials.values()), request)


def _each_once(trials: Sequence[Trial], sweep: Sweep) -> list[Trial]:
    """Each trial at its first place; what has no effect, names one twice, or was another trial earlier is reported."""
    once: dict[str, Trial] = {}
    for trial in trials:
        once.setdefault(trial.trial_id, trial)
    if dropped := dict.fromkeys(item for trial in trials for item in trial.dropped.items()):
        said = ", ".join(f"{key} with {why}" for key, why in dropped).replace("head_lr", "lr beside head_lr")
        print(f"note: without effect, so that such trials run once for all values: {said}")
    if twice := len(trials) - len(once):
        print(f"note: {twice} of {len(trials)} combinations are duplicates and run only once")
    earlier = {tuple(trial.overrides): name for name, trial in sweep.trials.items() if name not in once}
    changed = [t for t in once.values() if tuple(t.overrides) in earlier and t.trial_id not in sweep.trials]
    if unread := [trial for trial in trials if not is_identified(trial.config)]:  # by a dry run
        print(f"note: data={unread[0].config.data.name} has not been read yet: which trials are finished is not known")
    elif changed:
        before = ", ".join(earlier[tuple(trial.overrides)] for trial in changed[:3]) + ", ..." * (len(changed) > 3)
        was = f"note: {len(changed)} of these trials were run here with other images, weights or defaults ({before})"
        print(f"{was}; they are trained again, and the summary does not mix the two")
    return list(once.values())


def _begin_race(request: Request, sweep: Sweep) -> list[Trial]:
    """Set the race's rules and cells; returns a trial of each. Cells that earlier commands raced here join."""
    trials = request.trials
    asked, images = {trial.cell_id: trial for trial in trials}, {trial.config.data.content for trial in trials}
    settings = [set(without_seed(trial.overrides)) for trial in trials]
    raced, seed = (sweep.race or {}).get("cells", ()), trials[0].config.seed
    for trial in sweep.trials.values():  # not what has become another cell, whose weights or images have changed
        same = set(without_seed(trial.overrides)) in settings
        if trial.cell_id in raced and trial.config.data.content in images and not same:
            asked.setdefault(trial.cell_id, trial.with_seed(seed))
    rules = {key: getattr(request.options, key) for key in ("margin", "first_seeds", "most_seeds")}
    request.race = {**rules, "seed": seed, "cells": sorted(asked), "command": request.command}
    return [asked[cell] for cell in sorted(asked)]


def _reopen(sweep: Sweep, trials: Sequence[Trial], restart: bool, retry_failed: bool) -> None:
    """Open what the command asks to train again; a trial in training is left alone."""
    records = {trial.trial_id: sweep.state_of(trial).record for trial in trials if restart or retry_failed}
    again = {n: record for n, record in records.items() if record and (restart or record.status == "failed")}
    if not again:  # the folder may not be there, or not be ours to write
        return
    claims = Claims(sweep.folder)
    claims.look()
    for name in [name for name in again if claims.state(name) != HELD]:
        if restart:
            (sweep.folder / name / RECORD).unlink()
        else:
            again[name].status = "interrupted"
            write_record(sweep.folder / name, again[name])


def follow(source: Source, engine: Engine, view: View, request: Request) -> bool:
    """Start workers and watch until all trials have ended; whether we waited. Raises TrialFailed, Interrupted."""
    tries = 0
    with StopRequest() as stop:
        try:
            while True:
                alive, news = engine.look()  # before the trials, or workers that have just ended seem to be missing
                for text in news:
                    view.say(text)
                tries = 0 if view.look() else tries
                if not view.open():
                    if source.extend() or view.open():  # we, or a worker meanwhile
                        continue
                    break
                if stop.signum:
                    _end(engine, view, stop)
                missing = min(request.workers - alive, view.missing(alive))
                if missing > 0 and tries < TRIES:
                    tries += 1
                    view.say(engine.start(missing))
                    if not request.options.wait:
                        return False
                elif missing > 0 and not alive:
                    raise TrialFailed(f"{tries} times workers were started and ended no trial, see above: what is "
                                      "saved stays, and the same command resumes")  # fmt: skip
                stop.sleep(max(engine.poll_every, len(view.trials) * POLL_EVERY_TRIAL))
        except KeyboardInterrupt:  # the second one
            engine.stop(now=True)
            raise
        engine.withdraw()
    return True


def _end(engine: Engine, view: View, stop: StopRequest) -> None:
    """End as the user asks: a terminal is asked whether workers that outlive the command are to end too."""
    if engine.outlives_us:
        view.progress.close()
        answer = ""
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            if sys.stdin.isatty() and sys.stderr.isatty():
                answer = input("end the workers too, once they have saved? [y/N] ")
        if not answer.strip().lower().startswith("y"):
            view.say("the workers continue; the same command follows them again")
            raise Interrupted(stop.signum)
    view.say("asking the workers to save and to end")
    engine.stop()
    while engine.look()[0]:
        time.sleep(engine.poll_every)
    raise Interrupted(stop.signum or signal.SIGTERM)


def finish(sweep: Sweep, trials: Sequence[Trial], request: Request) -> dict[str, float]:
    """Print the tables; the metric on val of each trial. Raises TrialFailed if some have none."""
    states = {trial.trial_id: sweep.state_of(trial) for trial in trials}
    console, metric = make_console(), sweep.metric
    values = {n: found for n, state in states.items() if (found := value_of(state, metric)) is not None}
    print_summary(console, sweep)
    if values and sweep.search is not None:
        print_races(console, sweep, values)
    failed = [trial_row(t.trial_id, t.label, states[t.trial_id], metric) for t in trials if t.trial_id not in values]
    if failed:
        print_table(console, "Not completed", header(metric), failed, SHOWN)
    where = from_here(sweep.folder)
    board = f"tensorboard --logdir {where}/tensorboard\n" * any("tensorboard" in t.config.tracker for t in trials)
    console.print(f"{where}\n{board}python -m lora_vit.summarize {where}")
    lost = {name: why for state in states.values() if state.record for name, why in state.record.untracked.items()}
    for name, why in lost.items():
        console.print(f"note: the tracker {name} has failed ({why}): lora-vit track {where} --to {name} fills it")
    if failed:
        can_retry = not request.options.retry_failed and any(row[2] == "failed" for row in failed)
        again = "; sweep.retry_failed=true tries the failed ones again" * can_retry
        raise TrialFailed(f"{len(failed)} of {len(trials)} trials did not complete{again}")
    return values


def print_races(console: Console, sweep: Sweep, values: dict[str, float]) -> None:
    """The commands that say whether what a search found holds."""
    new, commands = f"{sweep.folder}-best", []
    for name in sorted(values, key=lambda name: -values[name])[:COMPARED]:
        trial = sweep.trials[name]
        lines = [line for line in without_seed(trial.overrides) if not line.startswith(("sweep", "hydra"))]
        race = [f"seed={trial.config.seed + 1}", f"sweep.margin={MARGIN}", f"hydra.sweep.dir={new}"]
        commands.append("python -m lora_vit.train " + shlex.join(["-m", *lines, *race]))
    console.print(f"The best of one seed each is biased upwards. A race over other seeds, to within {MARGIN} points:")
    console.print(" && \\\n".join([*commands, f"python -m lora_vit.summarize {shlex.quote(new)}"]), markup=False)


def print_plan(sweep: Sweep, request: Request) -> None:
    """What ``sweep.dry_run=false`` would train: its packs, and their sizes where they have been measured."""
    console, trials, pack_size = make_console(), request.trials, request.options.pack_size
    if request.race is not None:
        least, most, first = (request.race[key] for key in ("first_seeds", "most_seeds", "seed"))
        k, trials = len(trials), [trial.with_seed(first + n) for n in range(least) for trial in trials]
        console.print(f"a race of {k} cells takes at least {k * least} trials, at most {k * most}")
    open_ones = [trial for trial in trials if not sweep.state_of(trial).ended]
    sizes = {of["group"]: str(of["size"]) for of in sweep.plan["pack_sizes"].values()}
    rows = []
    for group in make_groups(open_ones):
        size = sizes.get(group.title, "measured at the start") if pack_size == "auto" else pack_size
        size = "1" if group.trials[0].config.lora.trains_trunk else size
        rows.append((group.title, str(len(group.trials)), size))
    console.print(f"plan of {sweep.folder}: {len(trials)} trials, {len(trials) - len(open_ones)} of them finished; "
                  f"{request.workers} workers", markup=False)  # fmt: skip
    print_table(console, "", ("trials that share a backbone", "trials", "pack size"), rows)
