"""A sweep: its trials, its folder, which trials can share a backbone, and its name. Knows no torch."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lora_vit.config import WITHOUT_IDENTITY, SweepConfig, TrialConfig, canonical, ids, to_dict
from lora_vit.errors import ConfigError
from lora_vit.records import CHECKPOINT, State, state_of


@dataclass
class Job:
    """One trial of a sweep.

    Attributes:
        config: validated.
        overrides: what makes it this trial, as on the command line.
        label: the swept settings, short.
        board: name of its folder of event files, where an earlier command has given it one.
        trial_id: of the config.
        cell_id: of the config.
    """

    config: TrialConfig
    overrides: list[str]
    label: str = ""
    board: str = ""
    trial_id: str = field(init=False)
    cell_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.trial_id, self.cell_id = ids(self.config)

    @property
    def cell_label(self) -> str:
        """The swept settings of its cell, short."""
        return " ".join(without_seed(self.label.split())) or self.trial_id

    def with_seed(self, seed: int) -> Job:
        """The cell's trial with another seed (its settings do not depend on it: :func:`refuse_seed_dependent`)."""
        overrides, label = ([*without_seed(lines), f"seed={seed}"] for lines in (self.overrides, self.label.split()))
        return Job(replace(self.config, seed=seed), overrides, " ".join(label))

    def idle(self) -> list[str]:
        """The overrides that have no effect: ``lora.rank`` of a baseline."""
        given = self.overrides if self.config.lora.method != "lora" else []
        return [line for line in given if (key := key_of(line)).startswith("lora.") and key != "lora.method"]


@dataclass(frozen=True)
class SweepRun:
    """One command's run of a sweep.

    Attributes:
        jobs: the trials, each once.
        folder: of the sweep.
        options: how it runs.
        launched: when the command began (seconds since 1970): what ended before may be trained again if asked for.
        workers: processes that train side by side.
        hydra: Hydra's own part of the composed configuration, as YAML.
    """

    jobs: tuple[Job, ...]
    folder: Path
    options: SweepConfig
    launched: float
    workers: int = 1
    hydra: str = ""

    @property
    def name(self) -> str:
        """Names the run among those of its folder; a later run's name sorts behind it."""
        return f"{self.launched:017.6f}"

    def folder_of(self, job: Job) -> Path:
        """The trial's folder."""
        return self.folder / job.trial_id

    def board_of(self, job: Job) -> Path:
        """The trial's folder of event files."""
        return self.folder / "tensorboard" / (job.board or board_name(job))

    def hydra_files(self, job: Job) -> dict[str, str]:
        """Name to text of what goes into the trial's ``.hydra/``."""
        config = {**to_dict(job.config), "sweep": asdict(self.options)}
        return {
            "config.yaml": yaml.safe_dump(config, sort_keys=False),
            "overrides.yaml": yaml.safe_dump(job.overrides),
            "hydra.yaml": self.hydra,
        }

    def state_of(self, job: Job) -> State:
        """Where the trial stands."""
        return state_of(self.folder_of(job), job.config, job.trial_id)

    def is_ended(self, job: Job, state: State) -> bool:
        """Whether a trial that stands so needs no (more) training."""
        return state.ended

    def in_order(self) -> SweepRun:
        """The run with its trials in the order of training: begun ones first, they were promised before; then by seed.

        Trials with one seed share images and the frozen stem, and a sweep that is stopped early has whole seeds.
        """

        def place(job: Job) -> tuple[bool, int]:
            return not (self.folder_of(job) / CHECKPOINT).exists(), job.config.seed

        return replace(self, jobs=tuple(sorted(self.jobs, key=place)))


@dataclass
class Group:
    """Trials that may train in one pack, in the order of training.

    Attributes:
        key: digest of what they share.
        jobs: the trials.
        alone: whether each needs a pack of its own (it trains parameters of the trunk).
    """

    key: str
    jobs: list[Job]
    alone: bool

    @property
    def title(self) -> str:
        """How the plan calls it."""
        c = self.jobs[0].config
        where = "linear probe" if c.lora.method == "none" else "full fine-tuning"
        if c.lora.method == "lora":
            blocks = "" if c.lora.blocks is None else f" in blocks {','.join(map(str, c.lora.blocks))}"
            where = "LoRA on " + " ".join(c.lora.targets or []) + blocks
            where += f", bias {c.lora.bias}" if c.lora.bias != "none" else ""
        size = "" if c.model.image_size is None else f" {c.model.image_size} px"
        return f"{c.model.name}{size}, {c.data.name}, batch {c.data.batch_size}, {where}"


def board_name(job: Job) -> str:
    """A trial's folder among those of event files, called after its settings."""
    return "_".join([*job.label.replace("/", "_").split(), job.trial_id])


def digest(value: Any, length: int = 10) -> str:
    """Hex digits of the sha256 over a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:length]


def trains_trunk(config: TrialConfig) -> bool:
    """Whether parameters of the trunk are trained, so that trials cannot share it."""
    return config.lora.method == "full" or (config.lora.bias or "none") != "none"


def setup_key(config: TrialConfig) -> str:
    """Digest of what data and backbone depend on: trials that agree can use one loaded copy."""
    values = to_dict(config)
    del values["model"]["head_dropout"]
    trainer = {key: values["trainer"][key] for key in ("precision", "accelerator", "compile")}
    return digest([values["model"], values["data"], trainer])


def group_key(config: TrialConfig) -> str:
    """Digest of what the trials of a pack share; all else may differ inside a pack."""
    shared = canonical(config)
    lora = {key: shared["lora"][key] for key in ("method", "targets", "blocks", "bias")}
    return digest([setup_key(config), lora, to_dict(config)["trainer"]])


def make_groups(jobs: Sequence[Job]) -> list[Group]:
    """Trials that may share packs; groups and trials in the order in which they are first met."""
    groups: dict[str, Group] = {}
    for job in jobs:
        key = group_key(job.config)
        groups.setdefault(key, Group(key, [], trains_trunk(job.config))).jobs.append(job)
    return list(groups.values())


def without_duplicates(jobs: Sequence[Job]) -> tuple[list[Job], int]:
    """Each trial once, at its first place, and how many were left out."""
    once: dict[str, Job] = {}
    for job in jobs:
        once.setdefault(job.trial_id, job)
    return list(once.values()), len(jobs) - len(once)


def refuse_seed_dependent(jobs: Sequence[Job], others: Sequence[Job]) -> None:
    """Raise ConfigError where a setting follows the seed (``others``: the same trials, composed with another seed)."""
    for one, other in zip(jobs, others, strict=True):
        ours, theirs = to_dict(one.config), to_dict(other.config)
        if wrong := [key for key in ours if key != "seed" and ours[key] != theirs[key]]:
            raise ConfigError(f"{wrong[0]} depends on the seed: a race compares cells over its seeds, so give every "
                              "setting but seed a value of its own")  # fmt: skip


def without_seed(overrides: Sequence[str]) -> list[str]:
    """The overrides, or the words of a label, that are the cell's."""
    return [line for line in overrides if key_of(line) != "seed"]


def key_of(override: str) -> str:
    """``lora.rank`` of ``+lora.rank=4``."""
    return override.partition("=")[0].lstrip("+")


def short_key(key: str) -> str:
    """``optimizer.lr`` as ``lr``."""
    return key.rpartition(".")[2].rpartition("/")[2].lstrip("+~")


def this_command() -> str:
    """The running command, to be given again."""
    return "python -m lora_vit.train " + shlex.join(sys.argv[1:])


def label(overrides: Sequence[str], constant: frozenset[str] | set[str]) -> str:
    """``rank=4 lr=0.001``: a trial's overrides without those that all trials share."""
    shown = [o for o in overrides if o not in constant and not o.startswith(("sweep.", "hydra."))]
    return " ".join(f"{short_key(key)}={value}" for key, _, value in (o.partition("=") for o in shown))


def default_name(base: dict[str, Any], swept: Sequence[str], fixed: dict[str, str]) -> str:
    """A sweep's name: the swept keys, and 6 hex digits of everything that is not swept.

    A grown list of values keeps the name; a changed fixed setting changes it.

    Args:
        base: the composed configuration of what is not swept.
        swept: dotted keys and group names.
        fixed: overrides that are not swept.
    """
    rest = {k: v for k, v in base.items() if k not in ("hydra", "sweep", *swept)}
    for key in (*WITHOUT_IDENTITY, *swept):
        section, _, name = key.partition(".")
        if name and isinstance(rest.get(section), dict):
            rest[section].pop(name, None)
    given = {k: v for k, v in fixed.items() if not k.startswith(("hydra", "sweep.")) and k not in WITHOUT_IDENTITY}
    preset = [given["sweep"]] if "sweep" in given else []
    words = preset or [short_key(key) for key in swept] or ["sweep"]
    return "_".join(dict.fromkeys(words))[:60] + "-" + digest([rest, given], 6)
