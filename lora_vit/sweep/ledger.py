"""A sweep's files: the plan (every trial ever asked for, and measured pack sizes), and its runs. Knows no torch.

A run is what one command has asked for: which trials, in which order, and how. Workers read plan and run, on whichever
machine they are, and need nothing else.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_vit import __version__
from lora_vit.config import SweepConfig, from_dict, to_dict
from lora_vit.errors import ConfigError
from lora_vit.files import locked, write_json
from lora_vit.records import PLAN, RECORD
from lora_vit.sweep.plan import Job, SweepRun, board_name

PLAN_SCHEMA = 3
RUNS = ".runs"


class Ledger:
    """The plan file ``sweep.json``: every trial that the sweep was ever asked for, and measured pack sizes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self) -> dict[str, Any]:
        """The plan; an empty one where there is none.

        Raises:
            ConfigError: the file is damaged or of another version.
        """
        path = self.folder / PLAN
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"schema": PLAN_SCHEMA, "created": time.time(), "base": None, "trials": {}, "pack_sizes": {},
                    "race": None}  # fmt: skip
        except NotADirectoryError:
            raise ConfigError(f"{self.folder} is a file: give another sweep.name") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}): give another sweep.name") from None
        except ValueError as error:
            raise ConfigError(f"{path} is not whole JSON ({error}): remove it, the trials' records stay") from None
        if not isinstance(plan, dict) or plan.get("schema") != PLAN_SCHEMA:
            version = plan.get("schema") if isinstance(plan, dict) else None
            raise ConfigError(
                f"{path} is of sweep version {version}, this program writes {PLAN_SCHEMA}: use the matching version "
                "of lora_vit, or another sweep.name"
            )
        return plan

    def update(self, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Change the plan while no other process does. Raises ConfigError where the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / ".sweep.lock"):
                plan = self.read()
                before = json.dumps(plan, sort_keys=True)
                change(plan)
                if json.dumps(plan, sort_keys=True) != before or not (self.folder / PLAN).exists():
                    write_json(self.folder / PLAN, plan)
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be written ({error.strerror}): give another sweep.name or hydra.sweep.dir"
            ) from None
        return plan

    def add(
        self, jobs: Sequence[Job], command: str | None = None, race: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Note the trials that are asked for now, and by which command where it is ours to know; earlier ones stay.

        ``race``: its rules, where the sweep is one.
        """

        def change(plan: dict[str, Any]) -> None:
            for job in jobs:
                values = to_dict(job.config)
                plan["base"] = plan["base"] or values
                trial = {"cell": job.cell_id, "overrides": job.overrides, "board": board_name(job),
                         "differs": _differences(plan["base"], values)}  # fmt: skip
                plan["trials"].setdefault(job.trial_id, trial)["label"] = job.label
            plan["command"] = command or plan.get("command")
            plan["race"] = {**race, "command": command} if race else plan["race"]

        return self.update(change)

    def begin(self, run: SweepRun) -> SweepRun:
        """Write down what a command asks for, all of it in the plan already; returns it as workers will read it."""
        values = {"version": __version__, "launched": run.launched, "workers": run.workers, "hydra": run.hydra,
                  "options": asdict(run.options), "trials": [job.trial_id for job in run.jobs]}  # fmt: skip
        (self.folder / RUNS).mkdir(exist_ok=True)
        write_json(self.folder / RUNS / f"{run.name}.json", values)
        return self.open_run(run.name)

    def open_run(self, name: str = "") -> SweepRun:
        """A run as its command wrote it down; the newest where none is named.

        Raises:
            ConfigError: there is none, of this version of lora_vit, or its files were edited.
        """
        found = sorted((self.folder / RUNS).glob(f"{name or '*'}.json"))
        if not found:
            raise ConfigError(
                f"{self.folder} has no run to work on: give the folder of a packed sweep, as seen from here"
            )
        plan = self.read()
        try:
            values = json.loads(found[-1].read_text(encoding="utf-8"))
            if values["version"] != __version__:
                raise ConfigError(
                    f"{self.folder} was begun by lora_vit {values['version']}, here is {__version__}: install the same"
                )
            jobs, options = self.jobs(plan, values["trials"]), SweepConfig(**values["options"])
            return SweepRun(tuple(jobs), self.folder, options, values["launched"], values["workers"], values["hydra"])
        except (LookupError, TypeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{found[-1]} is not whole, or {PLAN} beside it lacks a trial of it ({error!r}): give "
                              "the sweep's command again") from None  # fmt: skip

    def jobs(self, plan: dict[str, Any], trial_ids: Iterable[str]) -> list[Job]:
        """Trials as the plan has them. Raises ConfigError where the file was edited."""
        jobs = []
        for trial_id in trial_ids:
            trial = plan["trials"][trial_id]
            config = from_dict(_with_differences(plan["base"], trial["differs"]))
            job = Job(config, trial["overrides"], trial["label"], trial["board"])
            if job.trial_id != trial_id:
                raise ConfigError(f"{self.folder / PLAN} was edited: trial {trial_id} is another one in it")
            jobs.append(job)
        return jobs

    def pack_size(self, key: str, trials: int) -> dict[str, Any] | None:
        """The size measured for a group on this kind of machine, and the figures behind it.

        None where it was measured with too few trials to say anything for so many.
        """
        found: dict[str, Any] | None = self.read()["pack_sizes"].get(key)
        if found is not None and found["limited_by_trials"]:
            largest = max(map(int, found["seconds_per_trial_epoch"]))
            return found if trials < 2 * largest else None
        return found

    def largest_pack(self) -> int:
        """The largest pack size measured so far; 0 where none was."""
        return max((figures["size"] for figures in self.read()["pack_sizes"].values()), default=0)

    def keep_pack_size(self, key: str, figures: dict[str, Any]) -> None:
        """Remember a size and the figures behind it for the next time."""
        self.update(lambda plan: plan["pack_sizes"].update({key: figures}))


def _differences(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Dotted key to value, where a config differs from another one."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update({f"{key}.{inner}": v for inner, v in value.items() if v != base[key][inner]})
        elif value != base[key]:
            found[key] = value
    return found


def _with_differences(base: dict[str, Any], differs: dict[str, Any]) -> dict[str, Any]:
    values = copy.deepcopy(base)
    for key, value in differs.items():
        section, _, inner = key.rpartition(".")
        (values[section] if section else values)[inner] = value
    return values


def trial_folders(folder: Path) -> list[Path]:
    """Folders of the sweep that hold a record; files and folders of others are left alone."""
    try:
        return sorted(p for p in folder.iterdir() if (p / RECORD).is_file())
    except OSError:
        return []
