"""Packs of three small trials without folders: what a test of single steps needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_trials import plain_trial

from lora_vit.build import build_setup
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.training.pack import Pack
from lora_vit.training.trial import Setup, TrialRun

THREE = (
    {"seed": 1, "lora.rank": 2, "lora.alpha": 4, "lora.dropout": 0.3, "optimizer.lr": 3e-3, "model.head_dropout": 0.2,
     "optimizer.weight_decay": 0.1, "optimizer.clip_norm": 0.5, "optimizer.label_smoothing": 0.1,
     "optimizer.betas": [0.8, 0.99]},
    {"seed": 2, "lora.rank": 5, "lora.alpha": 16, "lora.dropout": 0.1, "optimizer.lr": 1e-2, "model.head_dropout": 0.0,
     "optimizer.weight_decay": 0.0, "optimizer.clip_norm": 2.0, "optimizer.schedule": "cosine",
     "optimizer.warmup": 0.2},
    {"seed": 1, "lora.rank": 1, "lora.alpha": 1, "lora.dropout": 0.0, "optimizer.lr": 1e-3, "model.head_dropout": 0.5,
     "lora.scaling": "rslora", "optimizer.schedule": "constant"},
)  # fmt: skip
"""They differ in all that trials of a pack may differ in; two share a stream."""


def three(changes: dict[str, Any] | None = None) -> list[TrialConfig]:
    """The three, with some settings changed in all of them."""
    return [plain_trial(trial | (changes or {})) for trial in THREE]


def new_trials(configs: list[TrialConfig]) -> list[TrialRun]:
    """Trials that have not begun and write nothing."""
    return [TrialRun(config) for config in configs]


def new_pack(configs: list[TrialConfig], setup: Setup | None = None) -> Pack:
    """A pack of new trials."""
    return Pack(new_trials(configs), setup or build_setup(configs[0], Process()))


def take_steps(pack: Pack, count: int) -> list[list[float]]:
    """Train; returns each step's losses."""
    return [pack.step(lr_K1, False).tolist() for lr_K1 in pack.learning_rates()[:count]]


class Passes:
    """Notes the images times trials of each pass of packs to come; beyond ``room`` of them memory runs out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.room, self.seen = 1 << 62, list[int]()
        init = Pack.__init__

        def watched(pack: Pack, *args: Any) -> None:
            init(pack, *args)
            whole = pack.forward
            pack.forward = lambda images, streams: self.take(len(images), streams, pack.K) or whole(images, streams)

        monkeypatch.setattr(Pack, "__init__", watched)

    def take(self, images: int, streams: list[int], K: int) -> None:
        count = images // (max(streams) + 1) * K
        self.seen.append(count)
        if count > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
