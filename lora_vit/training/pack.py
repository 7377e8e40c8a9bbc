"""K trials on one model: their streams, flat parameters, optimizer rows, and the way in and out for each."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_vit.config import TrialConfig
from lora_vit.lora.layers import LoRAAdapters
from lora_vit.training.checkpoint import TrialState
from lora_vit.training.evaluate import Predictions, evaluate
from lora_vit.training.optim import FlatParameters, PackedAdamW, scheduled_rate
from lora_vit.training.setup import Setup
from lora_vit.training.step import train_step
from lora_vit.training.trial import TrialRun

EVAL_BATCH = 256
"""Largest number of images of one evaluation step, times trials."""


class Pack:
    """Trials that train together. They stand at the same step of their epochs, not in the same epoch."""

    def __init__(self, trials: list[TrialRun], setup: Setup):
        configs = [t.config for t in trials]
        self.trials, self.setup, self.K = trials, setup, len(trials)
        self._predictions: dict[str, list[Predictions]] = {}
        offsets = {t.state.step_in_epoch for t in trials}
        if len(offsets) != 1:
            raise ValueError(f"trials of a pack stand at different steps of their epochs: {sorted(offsets)}")
        self.step_in_epoch = offsets.pop()
        self.model = setup.build_model(configs).train()
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._adapters = {name: m for name, m in self.model.named_modules() if isinstance(m, LoRAAdapters)}
        owners = {*self._adapters, "head"}
        per_trial = {name for name in named if name.rpartition(".")[0] in owners}
        self.flat = FlatParameters(named, per_trial, self.K)
        self.optimizer = PackedAdamW(self.flat, [c.optimizer for c in configs])
        # One stream for each (seed, epoch): trials that agree in both share images and stem.
        keys = [(t.config.seed, t.state.epoch) for t in trials]
        own_keys = list(dict.fromkeys(keys))
        self.stream_of_trial = [own_keys.index(key) for key in keys]
        self._first_of_stream = [trials[keys.index(key)] for key in own_keys]
        self.streams = [setup.train_stream(t.config) for t in self._first_of_stream]
        self.steps_per_epoch = self.streams[0].steps_per_epoch
        self._init_step(configs)
        for k, trial in enumerate(trials):
            if trial.state.values:
                self._load(k, trial.state)

    def _init_step(self, configs: list[TrialConfig]) -> None:
        """What :func:`train_step` reads and updates on the device."""
        device, head, process = self.setup.device, self.model.head, self.setup.process
        self.forward = torch.compile(self.model) if self.setup.compile else self.model
        self.dropout = head.state
        self.global_batch = configs[0].data.batch_size
        local = self.global_batch // process.world_size
        self.position_B = torch.arange(local, device=device) + process.rank * local  # places in the global batch
        self.step_K = torch.tensor([self.step_of(t) for t in self.trials], dtype=torch.int64, device=device)
        self.smoothing_K1 = head.weight.new_tensor([c.optimizer.label_smoothing for c in configs])[:, None]
        self.loss_sum_K = torch.tensor([t.state.loss_sum for t in self.trials], dtype=torch.float64, device=device)
        # first step with a loss or gradient that is not finite, -1: none
        self.first_bad_step_K = torch.full((self.K,), -1, dtype=torch.int64, device=device)
        self.updating = False  # between the first change of a step and its last

    def learning_rates(self) -> Tensor:
        """Of the rest of this epoch's steps, [steps, K, 1], on the device."""
        steps, standing = self.steps_per_epoch, [(t.config, self.step_of(t)) for t in self.trials]
        rates = [
            [scheduled_rate(c.optimizer, step + i, c.trainer.epochs * steps) for c, step in standing]
            for i in range(steps - self.step_in_epoch)
        ]
        like = self.flat.values_KP
        return torch.tensor(rates, dtype=torch.float64)[..., None].to(like.device, like.dtype)

    def step(self, lr_K1: Tensor, stop: bool) -> Tensor:
        """Train one step; returns the losses [K] on the device."""
        batches = [
            stream.batch(trial.state.epoch, self.step_in_epoch)
            for stream, trial in zip(self.streams, self._first_of_stream, strict=True)
        ]
        images = batches[0].images if len(batches) == 1 else torch.cat([b.images for b in batches])
        labels_KB = torch.stack([batches[g].labels for g in self.stream_of_trial])
        loss_K = train_step(self, images, labels_KB, lr_K1, stop)
        self.step_in_epoch += 1
        self.updating = False
        self._predictions.clear()
        return loss_K

    def predict(self, split: str) -> list[Predictions]:
        """Each trial's predictions on a split; kept until the next step."""
        if split not in self._predictions:
            data, batch = self.setup.data, max(1, EVAL_BATCH // self.K)
            stream = self.setup.eval_stream(split, batch)
            self._predictions[split] = evaluate(self.model, stream, data.splits[split], data.labels, self.setup.device)
        return self._predictions[split]

    def end_epoch(self) -> None:
        """Start the next epoch for every trial."""
        for trial in self.trials:
            trial.state.epoch += 1
            trial.state.step_in_epoch = 0
            trial.state.loss_sum = 0.0
        self.step_in_epoch = 0
        self.loss_sum_K.zero_()

    def pull(self) -> None:
        """Copy what is on the device into the trials' states."""
        loss_sums = self.loss_sum_K.tolist()
        updates = self.optimizer.updates_K1[:, 0].tolist()
        on_host = [matrix_KP.cpu() for matrix_KP in self._matrices()]
        for k, trial in enumerate(self.trials):
            s = trial.state
            s.step_in_epoch, s.loss_sum, s.updates = self.step_in_epoch, loss_sums[k], int(updates[k])
            s.values, s.exp_avg, s.exp_avg_sq = (self.export(k, matrix_KP) for matrix_KP in on_host)

    def step_of(self, trial: TrialRun) -> int:
        """The trial's steps so far, over all epochs."""
        return trial.state.epoch * self.steps_per_epoch + self.step_in_epoch

    def _load(self, k: int, state: TrialState) -> None:
        for matrix_KP, tensors in zip(self._matrices(), (state.values, state.exp_avg, state.exp_avg_sq), strict=True):
            if not tensors:
                continue  # not trained here: there are no moments yet
            row_P = matrix_KP[k].cpu()  # one copy each way on a GPU, the row itself on a CPU
            views = self._views(k, row_P)
            if set(views) != set(tensors):
                raise ValueError(f"the checkpoint of {self.trials[k].name} has other tensors than its model")
            for name, view in views.items():
                view.copy_(tensors[name])
            matrix_KP[k] = row_P
        self.optimizer.updates_K1[k] = state.updates

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.flat.values_KP, self.optimizer.exp_avg_KP, self.optimizer.exp_avg_sq_KP

    def export(self, k: int, matrix_KP: Tensor) -> dict[str, Tensor]:
        """Trial k's row of a matrix as named, unpadded tensors on the CPU (copies)."""
        return {name: v.clone() for name, v in self._views(k, matrix_KP[k].cpu()).items()}

    def _views(self, k: int, row_P: Tensor) -> dict[str, Tensor]:
        """A row as unpadded views under the names of trial k's adapter file."""
        row = self.flat.views(row_P)
        views: dict[str, Tensor] = {}
        for prefix, adapters in self._adapters.items():
            views |= adapters.trial_tensors(k, row.pop(f"{prefix}.lora_A"), row.pop(f"{prefix}.lora_B"))
        for leaf in ("weight", "bias"):
            views[f"{self.model.head.name}.{leaf}"] = row.pop(f"head.{leaf}")
        return views | {name.removeprefix("trunk."): view for name, view in row.items()}

    def padding_is_zero(self) -> bool:
        """Whether padded ranks are still exactly zero: they get no gradient."""
        used_KP = torch.zeros(self.flat.values_KP.shape, dtype=torch.bool)
        for k in range(self.K):
            for view in self._views(k, used_KP[k]).values():
                view.fill_(True)
        return not bool(self.flat.values_KP.masked_fill(used_KP.to(self.flat.values_KP.device), 0.0).any())

    def parameter_counts(self, k: int) -> dict[str, int]:
        """Numbers of trial k's parameters: trainable, adapter, head and total."""
        sizes = {name: view.numel() for name, view in self._views(k, self.flat.values_KP[k]).items()}
        adapter = sum(size for name, size in sizes.items() if ".lora_" in name)
        head = sum(size for name, size in sizes.items() if name.startswith(f"{self.model.head.name}."))
        shared = sum(p.numel() for name, p in self.model.trunk.named_parameters() if ".lora_" not in name)
        return {"trainable": sum(sizes.values()), "adapter": adapter, "head": head, "total": shared + adapter + head}
