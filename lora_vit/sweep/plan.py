"""A sweep: its folder and the plan in it, which says what was asked for. Knows no torch.

``sweep.json`` is the one truth about what a sweep wants: every trial that any command asked for, with the config of the
newest command that named it, and the order of training. Claims say who has a trial, records say how it stands.
"""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_vit import __version__
from lora_vit.config import SweepConfig, from_dict, to_dict
from lora_vit.errors import ConfigError
from lora_vit.files import NO_LOCKS, locked, write_json
from lora_vit.records import CHECKPOINT, PLAN, RECORD, State, state_of
from lora_vit.sweep.trial import Trial

PLAN_SCHEMA = 4


@dataclass
class Request:
    """What one command asks of a sweep."""

    folder: Path
    options: SweepConfig
    trials: list[Trial] = field(default_factory=list)  # validated; of a search those at both ends of its space
    engine: Any = None  # options of one of lora_vit.sweep.engines.ENGINES
    command: str = field(default_factory=lambda: "python -m lora_vit.train " + shlex.join(sys.argv[1:]))
    hydra: str = ""  # Hydra's own part of the configuration, as YAML
    search: dict[str, Any] | None = None  # its space
    race: dict[str, Any] | None = None  # its rules and cells
    metric: str = "accuracy"  # that its trials are compared by
    workers: int = 1


class Sweep:
    """The trials under one folder, as every process sees them."""

    def __init__(self, folder: Path):
        """Read the plan, an empty one where there is none. Raises ConfigError where it cannot be read."""
        self.folder = folder
        self._version: tuple[int, ...] = ()
        self._parsed: dict[str, tuple[Any, Trial]] = {}
        self.refresh()

    @classmethod
    def existing(cls, folder: Path) -> "Sweep":
        """The sweep of a folder that holds one. Raises ConfigError otherwise, or if another version made it."""
        sweep = cls(folder)
        if not sweep._version:
            raise ConfigError(f"{folder} is not a sweep folder (no {PLAN}): give a path like outputs/sweeps/NAME")
        if (version := sweep.plan["version"]) not in (None, __version__):
            raise ConfigError(f"{folder} was planned by lora_vit {version}, this is {__version__}: install the same")
        return sweep

    def refresh(self) -> None:
        """Read the plan again if another process has changed it."""
        path = self.folder / PLAN
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())  # after opening: a file server then asks its disk
                version: tuple[int, ...] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                if version == self._version:
                    return
                text = file.read()
        except FileNotFoundError:
            text, version = json.dumps(_empty()).encode(), ()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}): give another sweep.name") from None
        try:
            plan = json.loads(text)
            if plan["schema"] != PLAN_SCHEMA:
                raise ValueError(f"it has version {plan['schema']}")
            for name, v in plan["trials"].items():
                if name not in self._parsed or self._parsed[name][0] != v:
                    self._parsed[name] = v, Trial(from_dict(v["config"]), v["overrides"], v["label"], v["board"])
                if (trial_id := self._parsed[name][1].trial_id) != name:
                    raise ValueError(f"trial {name} is {trial_id} in it")
            trials = {name: self._parsed[name][1] for name in plan["trials"]}
            # those that are to train, in the order of training; packs never cross a batch
            self.batches = [[trials[name] for name in batch] for batch in plan["batches"]]
            self.planned = [trial for batch in self.batches for trial in batch]
            self.options = SweepConfig(**plan["options"])  # of the newest command, as are race and search
        except (LookupError, TypeError, ValueError) as error:
            remedy = "remove it, the records stay, and give the sweep's command again"
            raise ConfigError(f"{path} is no plan of this version ({error!r}): {remedy}") from None
        self.plan, self.trials, self._version = plan, trials, version
        self.race, self.search, self.metric = plan["race"], plan["search"], plan.get("metric", "accuracy")

    @contextlib.contextmanager
    def changing(self) -> Any:
        """Hold the plan while no other process does; what changes in ``self.plan`` is written at the end."""
        try:
            with locked(self.folder / ".sweep.lock"):
                self.refresh()
                before = json.dumps(self.plan, sort_keys=True)
                yield self.plan
                if json.dumps(self.plan, sort_keys=True) != before or not self._version:
                    write_json(self.folder / PLAN, self.plan)
                    self.refresh()
        except OSError as error:
            remedy = "mount its file system with locks (flock), or " * (error.errno in NO_LOCKS)
            remedy += "give another sweep.name or hydra.sweep.dir"
            raise ConfigError(f"{self.folder} cannot be written ({error.strerror}): {remedy}") from None

    def ask(self, request: Request, asked: Sequence[Trial], is_open: set[str]) -> None:
        """Write down what a command asks for: its trials train first, with its settings; earlier ones stay.

        Of what it waits for (``asked``), trials that were started come first, then it is by seed: trials with one seed
        share images and the frozen stem, and a sweep that is stopped early has whole seeds. ``is_open``: ids of the
        trials, also of earlier commands, that need training.
        """
        with self.changing() as plan:
            if request.search is None:
                self._note_look(request, is_open)
                self._add(request.trials)
            now = {trial.trial_id for trial in asked}
            ordered = sorted(asked, key=lambda t: (not (self.folder_of(t) / CHECKPOINT).exists(), t.config.seed))
            first = [trial.trial_id for trial in ordered if trial.trial_id in is_open]
            earlier = [[name for name in batch if name in is_open and name not in now] for batch in plan["batches"]]
            plan.update({key: getattr(request, key) for key in ("command", "workers", "hydra", "race", "search")})
            plan.update(batches=[batch for batch in (first, *earlier) if batch], options=asdict(request.options),
                        metric=request.metric, version=__version__)  # fmt: skip

    def _note_look(self, request: Request, is_open: set[str]) -> None:
        """Note what had ended when its cells get more seeds, or a race another margin: claims count such looks."""
        planned = self.plan["trials"]
        ended = [trial for name, trial in planned.items() if name not in is_open]
        cells, seeds = {trial["cell"] for trial in ended}, [trial["config"]["seed"] for trial in ended]
        if ended and request.race and (race := self.plan["race"]):
            margins = dict.fromkeys([*race.get("margins", [race["margin"]]), request.race["margin"]])
            request.race |= {"margins": [*margins]} if len(margins) > 1 else {}
        elif any(trial.cell_id in cells and trial.trial_id not in planned for trial in request.trials):
            look, looks = [len(ended), min(seeds), max(seeds)], self.plan.get("looks", [])
            self.plan["looks"] = looks if look in looks else [*looks, look]

    def extend(self, trials: Sequence[Trial]) -> bool:
        """Append what a race or a search wants next, if anything; the caller holds the plan (:meth:`changing`)."""
        self._add(trials)
        self.plan["batches"] += [[trial.trial_id for trial in trials]] if trials else []
        return bool(trials)

    def _add(self, trials: Iterable[Trial]) -> None:
        for trial in trials:
            board = self.plan["trials"].get(trial.trial_id, {}).get("board", trial.board)
            about = {"cell": trial.cell_id, "label": trial.label, "overrides": trial.overrides, "board": board}
            self.plan["trials"][trial.trial_id] = {**about, "config": to_dict(trial.config)}

    def folder_of(self, trial: Trial) -> Path:
        return self.folder / trial.trial_id

    def state_of(self, trial: Trial) -> State:
        return state_of(self.folder_of(trial), trial.config, trial.trial_id)


def _empty() -> dict[str, Any]:
    return {"schema": PLAN_SCHEMA, "version": None, "command": None, "hydra": "", "workers": 1,
            "options": dict.fromkeys(SweepConfig.__annotations__), "race": None, "search": None, "trials": {},
            "batches": [], "pack_sizes": {}}  # fmt: skip


def trial_folders(folder: Path) -> list[Path]:
    """Folders of the sweep that hold a record; files and folders of others are left alone."""
    return sorted(path.parent for path in folder.glob(f"*/{RECORD}"))


def short_key(key: str) -> str:
    """``optimizer.lr`` as ``lr``."""
    return key.rpartition(".")[2].rpartition("/")[2].lstrip("+~")


def label(overrides: Sequence[str]) -> str:
    """``rank=4 lr=0.001`` of the overrides that are swept."""
    return " ".join(f"{short_key(key)}={value}" for key, _, value in (o.partition("=") for o in overrides))
