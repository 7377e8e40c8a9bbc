"""K trials on one model: their streams, flat parameters, optimizer rows, steps, and the way in and out for each.

Shape legend: K trial, G stream, B image of this process, N sample of a split, C class, P trained value of a trial.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot

from lora_vit import distributed
from lora_vit.config import TrialConfig
from lora_vit.data.augment import to_device
from lora_vit.data.dataset import ImageData
from lora_vit.data.stream import TrainStream
from lora_vit.errors import ConfigError, out_of_memory
from lora_vit.lora.layers import LoRAAdapters
from lora_vit.metrics import Predictions
from lora_vit.training.optim import LEAST, FlatParameters, LossScale, PackedOptimizer, scheduled_rate
from lora_vit.training.trial import Setup, TrialRun


def sample_losses(logits_KBC: Tensor, labels_KB: Tensor, smoothing_K1: Tensor, weights_KC: Tensor | None = None,
                  shares_K1L: Tensor | None = None) -> Tensor:  # fmt: skip
    """Cross entropy with per-trial label smoothing (Szegedy et al., 2016) and weights of the classes, [K, B].

    ``shares_K1L``: of the two labels that each image has where images are mixed; the labels then are [K, B, L].
    """
    log_p_KBC = log_softmax(logits_KBC, dim=-1)
    if weights_KC is not None:
        log_p_KBC = log_p_KBC * weights_KC[:, None]
    true_KBL = log_p_KBC.gather(-1, labels_KB if shares_K1L is not None else labels_KB[..., None])
    true_KB = true_KBL.squeeze(-1) if shares_K1L is None else (true_KBL * shares_K1L).sum(-1)
    return -(1 - smoothing_K1) * true_KB - smoothing_K1 * log_p_KBC.mean(-1)


def class_weights(trials: Sequence[TrialConfig], data: ImageData) -> np.ndarray | None:
    """Weights of the classes for each trial, float64 [K, C]; None if no trial has any. Raises ConfigError."""
    if not any(given := [t.optimizer.class_weights for t in trials]):
        return None
    labels = data.labels[data.splits["train"]]
    counts = np.bincount(labels, minlength=(C := len(data.class_names))).clip(1)  # of a class without images 1
    if wrong := next((w for w in given if isinstance(w, list) and len(w) != C), None):
        raise ConfigError(f"optimizer.class_weights={wrong}: give {C} numbers, one for each class, or balanced")
    # balanced as in scikit-learn
    return np.stack([len(labels) / (C * counts) if w == "balanced" else np.array(w or [1.0] * C) for w in given])


@contextlib.contextmanager
def halving(setup: Setup, most: str, count: int, K: int) -> Iterator[None]:
    """Where memory runs out for ``count`` images of each trial, have the setup's ``most`` name half of them instead."""
    try:
        yield
    except Exception as error:
        if count == 1 or not out_of_memory(error):
            raise
        setattr(setup, most, count // 2 * K)


class Pack:
    """Trials that train together. They stand at the same step of their epochs (or ValueError), not in one epoch."""

    def __init__(self, trials: list[TrialRun], setup: Setup):
        configs, states, device = [t.config for t in trials], [t.state for t in trials], setup.device
        self.trials, self.setup, self.K = trials, setup, len(trials)
        self._predictions: dict[str, list[Predictions]] = {}
        (self.step_in_epoch,) = {s.step_in_epoch for s in states}
        self.model = setup.build_model(configs).train()
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._adapters = {name: m for name, m in self.model.named_modules() if isinstance(m, LoRAAdapters)}
        per_trial = {name for name in named if name.rpartition(".")[0] in {*self._adapters, "head"}}
        self.flat = FlatParameters(named, per_trial, self.K)
        o = self.optimizer = PackedOptimizer(self.flat, [c.optimizer for c in configs])
        self._matrices = self.flat.values_KP, o.exp_avg_KP, o.exp_avg_sq_KP
        keys = [(t.config.seed, t.state.epoch) for t in trials]  # those that agree in both share stream and stem
        own = list(dict.fromkeys(keys))
        self.stream_of_trial = [own.index(key) for key in keys]
        self.global_batch, shared = configs[0].data.batch_size, (setup.samples, setup.transform)
        self.streams = [TrainStream(*shared, self.global_batch, seed, setup.process) for seed, _ in own]
        self.steps_per_epoch = self.streams[0].steps_per_epoch
        self.forward: Any = self.model
        if configs[0].trainer.compile:
            limits: Any = torch._dynamo.config  # else torch runs every pack after the eighth kind eagerly
            limits.cache_size_limit = limits.accumulated_cache_size_limit = 1 << 16
            # each shape by itself: with symbolic ones the masks' arithmetic takes minutes
            self.forward = torch.compile(self.model, dynamic=False)
        self.position_B = torch.arange(self.streams[0].local, device=device) + self.streams[0].first  # in the batch
        self.step_K = torch.tensor([self.step_of(t) for t in trials], dtype=torch.int64, device=device)
        self.smoothing_K1 = self.model.head.weight.new_tensor([c.optimizer.label_smoothing for c in configs])[:, None]
        weights = class_weights(configs, setup.data)
        self.weights_KC = None if weights is None else self.smoothing_K1.new_tensor(weights)
        self.divisor: int | Tensor = self.global_batch  # of a batch's sum of losses; with weights, theirs
        self.shares_K1L: Tensor | None = None  # of an image's labels, where a batch is mixed
        self.loss_sum_K = torch.tensor([s.loss_sum for s in states], dtype=torch.float64, device=device)
        self.first_bad_step_K = torch.full((self.K,), -1, dtype=torch.int64, device=device)  # -1: all were finite
        self.updating = False  # between the first change of a step and its last
        self.loss_scale = LossScale(states, device) if setup.transform.dtype == torch.float16 else None
        for k, s in enumerate(states):
            self.optimizer.updates_K1[k] = s.updates
            for matrix_KP, tensors in zip(self._matrices, (s.values, s.exp_avg, s.exp_avg_sq), strict=True):
                if tensors:  # a new trial has none, one that is only evaluated no moments
                    row_P = matrix_KP[k].cpu()  # one copy each way on a GPU, the row itself on a CPU
                    for name, view in self._views(k, row_P).items():
                        view.copy_(tensors[name])
                    matrix_KP[k] = row_P

    def learning_rates(self) -> Tensor:
        """Of the rest of this epoch's steps, [steps, K, 1], on the device."""
        total, each = self.steps_per_epoch, [(t.config, self.step_of(t)) for t in self.trials]
        left, like = range(total - self.step_in_epoch), self.flat.values_KP
        rates = [[scheduled_rate(c.optimizer, step + i, c.trainer.epochs * total) for i in left] for c, step in each]
        return torch.tensor(rates, dtype=torch.float64).T[..., None].to(like.device, like.dtype)

    def step(self, lr_K1: Tensor, stop: bool) -> Tensor:
        """Train one step on the streams' next batches; returns as :meth:`update`."""
        epoch_of = {g: trial.state.epoch for g, trial in zip(self.stream_of_trial, self.trials, strict=True)}
        batches = [stream.batch(epoch_of[g], self.step_in_epoch) for g, stream in enumerate(self.streams)]
        images = batches[0][0] if len(batches) == 1 else torch.cat([images for images, *_ in batches])
        labels_KB = torch.stack([batches[g][1] for g in self.stream_of_trial])
        if labels_KB.ndim == 3:
            shares = np.array([[(batches[g][2], 1 - batches[g][2])] for g in self.stream_of_trial])
            self.shares_K1L = to_device(shares, images.device).to(self.smoothing_K1.dtype)
        if self.weights_KC is not None:
            ids_GN = [s.batch_ids(epoch_of[g], self.step_in_epoch, whole=True) for g, s in enumerate(self.streams)]
            ids_KN = np.stack([ids_GN[g] for g in self.stream_of_trial])
            self.divisor = self.weights_KC.gather(1, to_device(self.setup.data.labels[ids_KN], images.device)).sum(1)
        return self.update(images, labels_KB, lr_K1, stop)

    def update(self, images: Tensor, labels_KB: Tensor, lr_K1: Tensor, stop: bool) -> Tensor:
        """Forward, backward, one all-reduce, one optimizer update: no host sync. Returns the losses, [K].

        A trial's loss is the mean over its own images of the global batch, and the losses are summed over trials, so
        that each trial's gradient is exactly its own. A trial whose loss or gradient is not finite is left unchanged
        from then on; in fp16 for this step alone, until its loss scale falls below 1. ``images``: normalised, of all
        streams, [G*B, 3, H, W]; ``labels_KB``: of mixed images two each; ``stop``: summed into ``flat.stop``.
        """
        flat, scaling = self.flat, self.loss_scale
        size, is_auto = 0, self.trials[0].config.trainer.micro_batch == "auto"
        while size != self.micro_batch:
            size = self.micro_batch
            with halving(self.setup, "most_trained", size if is_auto else 1, self.K):
                flat.losses_K.copy_(self._differentiate(images, labels_KB, size))
            if size != self.micro_batch:
                said = f"memory ran out: batches are now taken in parts of {self.micro_batch} images of each trial"
                print(said, flush=True)
                for trial in self.trials:
                    trial.say(said)
        flat.stop.fill_(float(stop))
        distributed.sum_over_processes_(flat.buffer)

        if scaling is not None:
            flat.grads_KP.div_(scaling.scale_K[:, None])
        norm_K1 = torch.linalg.vector_norm(flat.grads_KP, dim=1, keepdim=True)
        loss_K = flat.losses_K.clone()
        finite_K = torch.isfinite(loss_K) & torch.isfinite(norm_K1[:, 0])
        self.updating = True
        if scaling is None:
            bad_K = ~finite_K
            self.loss_sum_K += loss_K
        else:
            scaling.update(finite_K)
            bad_K = scaling.scale_K < LEAST
            mean_K = self.loss_sum_K / max(1, self.step_in_epoch)  # in the place of a loss that overflowed
            self.loss_sum_K += torch.where(torch.isfinite(loss_K), loss_K, mean_K)
        self.first_bad_step_K = torch.where(bad_K & (self.first_bad_step_K < 0), self.step_K, self.first_bad_step_K)
        self.optimizer.step(lr_K1, (finite_K & (self.first_bad_step_K < 0))[:, None], norm_K1)
        self.step_K += 1
        self.step_in_epoch += 1
        self.updating = False
        self._predictions.clear()
        return loss_K

    @property
    def micro_batch(self) -> int:
        """Images of a trial that a pass takes at once in this process; the last pass of a step may take fewer."""
        asked, local = self.trials[0].config.trainer.micro_batch, len(self.position_B)
        if asked != "auto":
            return local if asked is None else min(local, int(asked))
        had_room = (trial.state.micro_batch or local for trial in self.trials)  # one that resumes takes parts as before
        return min(local, max(1, self.setup.most_trained // self.K), *had_room)

    def _differentiate(self, images: Tensor, labels_KB: Tensor, size: int) -> Tensor:
        """Fill the gradients, part by part of the batch, each multiplied by its trial's loss scale; the losses, [K]."""
        images_GB = images.unflatten(0, (-1, labels_KB.shape[1]))
        parts, settings = [], (self.smoothing_K1, self.weights_KC, self.shares_K1L)
        for start in range(0, labels_KB.shape[1], size):
            here = slice(start, start + size)
            self.model.head.state.set(self.step_K, self.position_B[here])
            logits_KBC = self.forward(images_GB[:, here].flatten(0, 1), self.stream_of_trial)
            loss_K = sample_losses(logits_KBC, labels_KB[:, here], *settings).sum(1) / self.divisor
            scaled_K = loss_K if self.loss_scale is None else loss_K * self.loss_scale.scale_K
            self.flat.differentiate(scaled_K.sum(), add=start > 0)
            parts.append(loss_K.detach())
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def predict(self, split: str) -> list[Predictions]:
        """Each trial's predictions on a split; kept until the next step. No sample is padded or dropped."""
        if split in self._predictions:
            return self._predictions[split]
        setup, model, K = self.setup, self.model, self.K
        ids = setup.data.splits[split]
        labels, N = setup.data.labels[ids], len(ids)
        # Each process fills its own share; the sum over processes then is the whole, exactly.
        predicted_KN = torch.zeros(K, N, dtype=torch.int64, device=setup.device)
        said_4KN = torch.zeros(4, K, N, dtype=torch.float64, device=setup.device)
        own = np.arange(setup.process.rank, N, setup.process.world_size)
        model.eval()
        while len(own):
            places = own[: max(1, setup.most_evaluated // K)]
            with halving(setup, "most_evaluated", len(places), K):
                images, labels_B = setup.samples.gather(ids[places])
                logits_KBC = model(setup.transform.eval(images), [0] * K)
                where = to_device(places, setup.device)
                predicted_KN[:, where] = logits_KBC.argmax(-1)
                log_p_KBC = log_softmax(logits_KBC, -1)
                log_true_KB1, p_KBC = log_p_KBC.gather(-1, labels_B.expand(K, -1)[..., None]), log_p_KBC.exp()
                rivals_KB = (log_p_KBC <= log_true_KB1).logical_not().sum(-1)  # more probable classes; all where NaN
                brier_KB = (p_KBC - one_hot(labels_B, p_KBC.shape[-1])).square().sum(-1)
                rows = log_true_KB1[..., 0], p_KBC.amax(-1), brier_KB, rivals_KB
                said_4KN[:, :, where] = torch.stack(rows).double()
                own = own[len(places) :]
        model.train()
        predicted, said = (distributed.sum_over_processes_(x).cpu().numpy() for x in (predicted_KN, said_4KN))
        true, top, brier = (x_KN.astype(np.float32) for x_KN in (np.exp(said[0]), *said[1:3]))
        columns: Any = predicted, true, top, said[3] < 5, brier, (-said[0].mean(1)).tolist()
        self._predictions[split] = [Predictions(ids, labels, *of_k) for of_k in zip(*columns, strict=True)]
        return self._predictions[split]

    def end_epoch(self) -> None:
        """Start the next epoch for every trial."""
        for trial in self.trials:
            trial.state.epoch += 1
        self.step_in_epoch = 0
        self.loss_sum_K.zero_()

    def pull(self) -> list[TrialRun]:
        """Copy what is on the device into the trials' states; returns the trials that are worth a checkpoint."""
        loss_sums, updates = self.loss_sum_K.tolist(), self.optimizer.updates_K1[:, 0].tolist()
        on_host, scaling = [matrix_KP.cpu() for matrix_KP in self._matrices], self.loss_scale
        scales, good = ([], []) if scaling is None else (scaling.scale_K.tolist(), scaling.good_K.tolist())
        for k, s in enumerate(trial.state for trial in self.trials):
            if scaling is not None:
                s.loss_scale, s.good_steps = scales[k], good[k]
            s.step_in_epoch, s.loss_sum, s.updates = self.step_in_epoch, loss_sums[k], int(updates[k])
            s.micro_batch = self.micro_batch if self.micro_batch < len(self.position_B) else 0
            s.values, s.exp_avg, s.exp_avg_sq = (self.export(k, matrix_KP) for matrix_KP in on_host)
        # a checkpoint would hide a bad step from a run that resumes
        return [t for t, bad_step in zip(self.trials, self.first_bad_step_K.tolist(), strict=True) if bad_step < 0]

    def step_of(self, trial: TrialRun) -> int:
        """The trial's steps so far, over all epochs."""
        return trial.state.epoch * self.steps_per_epoch + self.step_in_epoch

    def export(self, k: int, matrix_KP: Tensor) -> dict[str, Tensor]:
        """Trial k's row of a matrix as named, unpadded tensors on the CPU (copies)."""
        return {name: v.clone() for name, v in self._views(k, matrix_KP[k].cpu()).items()}

    def _views(self, k: int, row_P: Tensor) -> dict[str, Tensor]:
        """A row as unpadded views under the names of trial k's adapter file."""
        row = {name: row_P[where].view(shape) for name, (where, shape) in self.flat.slices.items()}
        views: dict[str, Tensor] = {}
        for prefix, adapters in self._adapters.items():
            own = {leaf: row.pop(f"{prefix}.{leaf}") for leaf, _ in adapters.named_parameters()}
            views |= adapters.trial_tensors(k, own)
        for leaf in ("weight", "bias"):
            views[f"{self.model.head.name}.{leaf}"] = row.pop(f"head.{leaf}")
        return views | {name.removeprefix("trunk."): view for name, view in row.items()}

    def parameter_counts(self, k: int) -> dict[str, int]:
        """Numbers of trial k's parameters: trainable, adapter, head and total."""
        sizes = {name: view.numel() for name, view in self._views(k, self.flat.values_KP[k]).items()}
        adapter = sum(size for name, size in sizes.items() if ".lora_" in name)
        head = sum(size for name, size in sizes.items() if name.startswith(f"{self.model.head.name}."))
        shared = sum(p.numel() for name, p in self.model.trunk.named_parameters() if ".lora_" not in name)
        return {"trainable": sum(sizes.values()), "adapter": adapter, "head": head, "total": shared + adapter + head}
