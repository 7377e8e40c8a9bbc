"""Packs of the small trial without folders: what a test of single steps needs."""

from __future__ import annotations

from lora_vit.build import build_setup
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.training.pack import Pack
from lora_vit.training.trial import Setup, TrialRun


def new_trials(configs: list[TrialConfig]) -> list[TrialRun]:
    """Trials that have not begun and write nothing."""
    return [TrialRun(config) for config in configs]


def new_pack(configs: list[TrialConfig], setup: Setup | None = None) -> Pack:
    """A pack of new trials."""
    return Pack(new_trials(configs), setup or build_setup(configs[0], Process()))


def take_steps(pack: Pack, count: int) -> list[list[float]]:
    """Train; returns each step's losses."""
    return [pack.step(lr_K1, False).tolist() for lr_K1 in pack.learning_rates()[:count]]
