"""A trial as a sweep asks for it, and which trials may train together. Knows no torch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_vit.config import TrialConfig, canonical, idle, ids, to_dict
from lora_vit.config.names import BASELINES, METHODS


@dataclass
class Trial:
    config: TrialConfig
    overrides: list[str] = field(default_factory=list)  # what makes it this trial, as on the command line
    label: str = ""  # the swept settings, short
    board: str = ""  # its folder of event files, whose name stays when a later command sweeps other settings
    dropped: dict[str, str] = field(default_factory=dict)  # settings that were given and do nothing here, and why
    trial_id: str = field(init=False)
    cell_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.trial_id, self.cell_id = ids(self.config)
        name = "_".join(self.label.replace("/", "_").split())[:100]  # file systems allow 255 bytes
        self.board = self.board or f"{name}{name and '_'}{self.trial_id}"

    def with_seed(self, seed: int) -> "Trial":
        """The cell's trial with another seed; no other setting may depend on the seed."""
        overrides, label = ([*without_seed(lines), f"seed={seed}"] for lines in (self.overrides, self.label.split()))
        return Trial(replace(self.config, seed=seed), overrides, " ".join(label))


@dataclass
class Group:
    """Trials that may train in one pack, at least one, in the order of training; ``key``: digest of what they share."""

    key: str
    trials: list[Trial]

    @property
    def title(self) -> str:
        c, lora = self.trials[0].config, self.trials[0].config.lora
        blocks = "" if lora.blocks is None else f" in blocks {','.join(map(str, lora.blocks))}"
        bias = "" if lora.bias == "none" else f", bias {lora.bias}"
        where = BASELINES.get(lora.method) or f"{METHODS[lora.method]} on {' '.join(lora.targets or [])}{blocks}{bias}"
        size = "" if c.model.image_size is None else f" {c.model.image_size} px"
        return f"{c.model.name}{size}, {c.data.name}, batch {c.data.batch_size}, {where}"


def make_groups(trials: Sequence[Trial]) -> list[Group]:
    """Trials that may share packs; groups and trials are in the order in which they are first met."""
    groups: dict[str, Group] = {}
    for trial in trials:
        key = group_key(trial.config)
        groups.setdefault(key, Group(key, [])).trials.append(trial)
    return list(groups.values())


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
    return digest([setup_key(config), lora, vars(config.trainer), config.optimizer.name])


def digest(value: Any, length: int = 10) -> str:
    """Hex digits of the sha256 over a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:length]


def without_seed(lines: Sequence[str]) -> list[str]:
    """The overrides, or the words of a label, that belong to the cell."""
    return [line for line in lines if key_of(line) != "seed"]


def without_idle(config: TrialConfig, overrides: Sequence[str]) -> list[str]:
    """The overrides that have an effect; a probe's ``optimizer.head_lr`` is its rate."""
    without_effect = idle(config).keys() - {"optimizer.head_lr"}
    return [line for line in overrides if key_of(line) not in without_effect]


def key_of(override: str) -> str:
    """``lora.rank`` of ``+lora.rank=4``."""
    return override.partition("=")[0].lstrip("+")
