"""A sweep's plan file: every trial ever asked for, and measured pack sizes. Knows no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_vit.config import ConfigError
from lora_vit.records import PLAN, RECORD, locked, write_json
from lora_vit.sweep.plan import Job

PLAN_SCHEMA = 1


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
            return {"schema": PLAN_SCHEMA, "created": time.time(), "trials": {}, "pack_sizes": {}}
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

    def add(self, jobs: Sequence[Job], command: str | None = None) -> dict[str, Any]:
        """Note the trials that are asked for now, and by which command where it is ours to know; earlier ones stay."""

        def change(plan: dict[str, Any]) -> None:
            for job in jobs:
                plan["trials"].setdefault(job.trial_id, {"cell": job.cell_id, "overrides": job.overrides})
                plan["trials"][job.trial_id]["label"] = job.label
            plan["command"] = command or plan.get("command")

        return self.update(change)

    def pack_size(self, key: str, trials: int) -> dict[str, Any] | None:
        """The size measured for a group on this kind of machine, and the figures behind it.

        None where it was measured with too few trials to say anything for so many.
        """
        found: dict[str, Any] | None = self.read()["pack_sizes"].get(key)
        if found is not None and found["limited_by_trials"]:
            largest = max(map(int, found["seconds_per_trial_epoch"]))
            return found if trials < 2 * largest else None
        return found

    def keep_pack_size(self, key: str, figures: dict[str, Any]) -> None:
        """Remember a size and the figures behind it for the next time."""
        self.update(lambda plan: plan["pack_sizes"].update({key: figures}))


def trial_folders(folder: Path) -> list[Path]:
    """Folders of the sweep that hold a record; files and folders of others are left alone."""
    try:
        return sorted(p for p in folder.iterdir() if (p / RECORD).is_file())
    except OSError:
        return []
