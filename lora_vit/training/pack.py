"""K trials on one model: their streams, flat parameters, optimizer rows, and the way in and out for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_vit.config import TrialConfig
from lora_vit.data.augment import Transform
from lora_vit.data.dataset import ImageData
from lora_vit.data.stream import EvalStream, Samples, TrainStream
from lora_vit.distributed import Process
from lora_vit.lora.layers import LoRAAdapters, PackedHead
from lora_vit.models.vit import PackedViT
from lora_vit.records import TrialRecord
from lora_vit.training.checkpoint import TrialState
from lora_vit.training.evaluate import Predictions, evaluate
from lora_vit.training.optim import FlatParameters, PackedAdamW, Schedule, schedule
from lora_vit.training.step import StepState, train_step
from lora_vit.training.trackers import TrialFiles

EVAL_BATCH = 256
"""Largest number of images of one evaluation step, times trials."""


@dataclass
class Trial:
    """One trial on its way: what it is, where it stands and where it writes (rank 0 only)."""

    config: TrialConfig
    record: TrialRecord
    state: TrialState
    files: TrialFiles | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.record.trial_id

    def done(self) -> bool:
        """Whether all epochs are trained."""
        return self.state.epoch >= self.config.trainer.epochs


@dataclass
class Setup:
    """What all trials of a pack share, and how their model is built."""

    build_model: Callable[[list[TrialConfig]], PackedViT]
    samples: Samples
    transform: Transform
    device: torch.device
    process: Process
    compile: bool
    environment: dict[str, object] = field(default_factory=dict)
    base_weights: dict[str, object] = field(default_factory=dict)

    @property
    def data(self) -> ImageData:
        """The data set."""
        return self.samples.data

    def train_stream(self, config: TrialConfig) -> TrainStream:
        """The ordered, augmented batches of a trial (this process's part)."""
        p = self.process
        return TrainStream(self.samples, self.transform, config.data.batch_size, config.seed, p.rank, p.world_size)

    def eval_stream(self, split: str, batch_size: int) -> EvalStream:
        """Every sample of a split once (this process's share)."""
        p = self.process
        return EvalStream(self.samples, self.transform, split, batch_size, p.rank, p.world_size)


class Pack:
    """Trials that train together. They stand at the same step of their epochs, not in the same epoch."""

    def __init__(self, trials: list[Trial], setup: Setup):
        configs = [t.config for t in trials]
        self.trials, self.setup, self.K = trials, setup, len(trials)
        self._predictions: dict[str, list[Predictions]] = {}
        offsets = {t.state.step_in_epoch for t in trials}
        if len(offsets) != 1:
            raise ValueError(f"trials of a pack stand at different steps of their epochs: {sorted(offsets)}")
        self.step_in_epoch = offsets.pop()
        self.model = setup.build_model(configs).train()
        self._forward = torch.compile(self.model) if setup.compile else self.model
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        for prefix, module in self.model.named_modules():
            if isinstance(module, (LoRAAdapters, PackedHead)):
                for leaf, _ in module.named_parameters(recurse=False):
                    self._owners[f"{prefix}.{leaf}"] = (module, leaf)
        per_trial = set(self._owners)
        self.flat = FlatParameters(named, per_trial, self.K)
        decay_mask_P = self.flat.decay_mask(named, per_trial)
        self.optimizer = PackedAdamW(self.flat, [c.optimizer for c in configs], decay_mask_P)
        self._open_streams(configs)
        self.schedules: list[Schedule] = [
            schedule(c.optimizer, c.trainer.epochs * self.steps_per_epoch) for c in configs
        ]
        self._init_step_state(configs)
        for k, trial in enumerate(trials):
            if trial.state.values:
                self._load(k, trial.state)

    def _open_streams(self, configs: list[TrialConfig]) -> None:
        """One stream for each (seed, epoch): trials that agree in both share images and stem."""
        self.streams: list[TrainStream] = []
        self.stream_of_trial: list[int] = []
        self._stream_trial: list[Trial] = []
        known: dict[tuple[int, int], int] = {}
        for config, trial in zip(configs, self.trials, strict=True):
            key = (config.seed, trial.state.epoch)
            if key not in known:
                known[key] = len(self.streams)
                self.streams.append(self.setup.train_stream(config))
                self._stream_trial.append(trial)
            self.stream_of_trial.append(known[key])
        self.steps_per_epoch = self.streams[0].steps_per_epoch

    def _init_step_state(self, configs: list[TrialConfig]) -> None:
        device, K = self.setup.device, self.K
        local = configs[0].data.batch_size // self.setup.process.world_size
        steps = [t.state.epoch * self.steps_per_epoch + self.step_in_epoch for t in self.trials]
        head = self.model.head
        smoothing = [c.optimizer.label_smoothing for c in configs]
        self.step_state = StepState(
            model=self._forward,  # type: ignore[arg-type]
            flat=self.flat,
            optimizer=self.optimizer,
            dropout=head.state,
            step_K=torch.tensor(steps, dtype=torch.int64, device=device),
            position_B=torch.arange(local, device=device) + self.setup.process.rank * local,
            smoothing_K1=torch.tensor(smoothing, dtype=head.weight.dtype, device=device)[:, None],
            loss_sum_K=torch.tensor([t.state.loss_sum for t in self.trials], dtype=torch.float64, device=device),
            first_bad_step_K=torch.full((K,), -1, dtype=torch.int64, device=device),
            global_batch=configs[0].data.batch_size,
        )

    def learning_rates(self) -> Tensor:
        """Of the rest of this epoch's steps, [steps, K, 1], on the device."""
        rates = [
            [
                s.factor(t.state.epoch * self.steps_per_epoch + i) * t.config.optimizer.lr
                for s, t in zip(self.schedules, self.trials, strict=True)
            ]
            for i in range(self.step_in_epoch, self.steps_per_epoch)
        ]
        like = self.flat.values_KP
        return torch.tensor(rates, dtype=torch.float64)[..., None].to(like.device, like.dtype)

    def step(self, lr_K1: Tensor, stop: bool) -> Tensor:
        """Train one step; returns the losses [K] on the device."""
        batches = [
            stream.batch(trial.state.epoch, self.step_in_epoch)
            for stream, trial in zip(self.streams, self._stream_trial, strict=True)
        ]
        images = batches[0].images if len(batches) == 1 else torch.cat([b.images for b in batches])
        labels_KB = torch.stack([batches[g].labels for g in self.stream_of_trial])
        loss_K = train_step(self.step_state, images, labels_KB, self.stream_of_trial, lr_K1, stop)
        self.step_in_epoch += 1
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
        """Begin the next epoch for every trial."""
        for trial in self.trials:
            trial.state.epoch += 1
            trial.state.step_in_epoch = 0
            trial.state.loss_sum = 0.0
        self.step_in_epoch = 0
        self.step_state.loss_sum_K.zero_()

    def pull(self) -> None:
        """Copy what is on the device into the trials' states."""
        loss_sums = self.step_state.loss_sum_K.tolist()
        updates = self.optimizer.updates_K1[:, 0].tolist()
        o = self.optimizer
        on_host = [m.cpu() for m in (self.flat.values_KP, o.exp_avg_KP, o.exp_avg_sq_KP)]
        for k, trial in enumerate(self.trials):
            s = trial.state
            s.step_in_epoch, s.loss_sum, s.updates = self.step_in_epoch, loss_sums[k], int(updates[k])
            s.values, s.exp_avg, s.exp_avg_sq = (self.export(k, m) for m in on_host)

    def without(self, leaving: list[Trial]) -> Pack | None:
        """The pack of the trials that stay, or None."""
        self.pull()
        rest = [t for t in self.trials if t not in leaving]
        return Pack(rest, self.setup) if rest else None

    def _load(self, k: int, state: TrialState) -> None:
        for matrix, tensors in (
            (self.flat.values_KP, state.values),
            (self.optimizer.exp_avg_KP, state.exp_avg),
            (self.optimizer.exp_avg_sq_KP, state.exp_avg_sq),
        ):
            row_P = matrix[k].cpu()  # one copy each way on a GPU, the row itself on a CPU
            views = self._views(k, row_P)
            if set(views) != set(tensors):
                raise ValueError(f"the checkpoint of {self.trials[k].name} has other tensors than its model")
            for name, view in views.items():
                view.copy_(tensors[name])
            matrix[k] = row_P
        self.optimizer.updates_K1[k] = state.updates

    def export(self, k: int, matrix_KP: Tensor) -> dict[str, Tensor]:
        """Trial k's row of a matrix as named, unpadded tensors on the CPU (copies)."""
        return {name: v.clone() for name, v in self._views(k, matrix_KP[k].cpu()).items()}

    def _views(self, k: int, row_P: Tensor) -> dict[str, Tensor]:
        """A row as unpadded views under the names of trial k's adapter file."""
        views: dict[str, Tensor] = {}
        for name, view in self.flat.views(row_P).items():
            owner, leaf = self._owners.get(name, (None, ""))
            if isinstance(owner, LoRAAdapters):
                rank = owner.specs[k].rank
                for g, projection in enumerate(owner.names):
                    part = view[g, :rank] if leaf == "lora_A" else view[g, :, :rank]
                    views[f"{projection}.{leaf}"] = part
            elif isinstance(owner, PackedHead):
                views[f"{owner.NAME}.{leaf}"] = view
            else:
                views[name.removeprefix("trunk.")] = view
        return views

    def padding_is_zero(self) -> bool:
        """Whether padded ranks are still exactly zero (they get no gradient), where a trial's values are finite."""
        values_KP = self.flat.values_KP
        used_KP = torch.zeros(values_KP.shape, dtype=torch.bool)
        for k in range(self.K):
            for view in self._views(k, used_KP[k]).values():
                view.fill_(True)
        padding_KP = values_KP.masked_fill(used_KP.to(values_KP.device), 0.0)
        return not bool((padding_KP.any(1) & self.finite_K()).any())

    def finite_K(self) -> Tensor:
        """Whether all of a trial's trained values are finite, bool [K], on the device."""
        return torch.isfinite(self.flat.values_KP).all(1)

    def parameter_counts(self, k: int) -> dict[str, int]:
        """Numbers of trial k's parameters: trainable, adapter, head and total."""
        views = self._views(k, self.flat.values_KP[k])
        adapter = sum(v.numel() for n, v in views.items() if ".lora_" in n)
        head = sum(v.numel() for n, v in views.items() if n.startswith(PackedHead.NAME))
        shared = sum(p.numel() for n, p in self.model.trunk.named_parameters() if ".lora_" not in n)
        trainable = sum(v.numel() for v in views.values())
        return {"trainable": trainable, "adapter": adapter, "head": head, "total": shared + adapter + head}
