"""Ways to break the trial axis that every comparison of packed with alone must notice."""

from __future__ import annotations

import torch

from lora_vit.lora import layers
from lora_vit.lora.dropout import DropoutState
from lora_vit.training import optim, pack


def swap_dropout_seeds(monkeypatch):
    original = DropoutState.__init__
    monkeypatch.setattr(DropoutState, "__init__", lambda self, seeds: original(self, [*seeds[1:], *seeds[:1]]))


def share_one_clip_norm(monkeypatch):
    original = optim.PackedOptimizer.step

    def shared(self, lr_K1, ok_K1, norm_K1):
        original(self, lr_K1, ok_K1, torch.linalg.vector_norm(norm_K1).expand_as(norm_K1))

    monkeypatch.setattr(optim.PackedOptimizer, "step", shared)


def mean_over_the_pack(monkeypatch):
    original = pack.sample_losses
    monkeypatch.setattr(pack, "sample_losses", lambda x, *others: original(x, *others) / len(x))


def pad_before_drawing(monkeypatch):
    original = layers.initial_lora_A

    def padded(spec, name, width):
        wide = layers.AdapterSpec(16, spec.scaling, spec.dropout, spec.seed)
        return original(wide, name, width)[-spec.rank :]  # the rows that a wider draw would leave this rank

    monkeypatch.setattr(layers, "initial_lora_A", padded)


def share_the_learning_rate(monkeypatch):
    original = pack.Pack.learning_rates
    monkeypatch.setattr(
        pack.Pack, "learning_rates", lambda self: original(self).mean(1, keepdim=True).expand(-1, self.K, -1)
    )


def share_the_head_dropout(monkeypatch):
    original = layers.PackedHead.__init__

    def shared(self, seeds, dropouts, *rest):
        original(self, seeds, [max(dropouts)] * len(dropouts), *rest)

    monkeypatch.setattr(layers.PackedHead, "__init__", shared)


WAYS = (swap_dropout_seeds, share_one_clip_norm, mean_over_the_pack, pad_before_drawing, share_the_learning_rate,
        share_the_head_dropout)  # fmt: skip
SABOTAGES = {way.__name__: way for way in WAYS}
