"""Batches: which samples, in which order, and this process's part of each."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_vit import randomness
from lora_vit.data.augment import Transform, mixed, to_device
from lora_vit.data.dataset import ImageData
from lora_vit.data.decode import Streamed
from lora_vit.distributed import Process

_DEVICE_SHARE = 0.25  # largest part of a GPU's free memory that the uint8 images may take
_PIECE = 1 << 26  # bytes that are copied there at once: no more of them are in the host's own memory
_AHEAD = 3  # batches that are read or decoded before they are asked for, side by side: a disk gives more to several


class Samples:
    """The images of a data set, uint8, or features, to gather batches of: on the GPU if there is room, else as is."""

    def __init__(self, data: ImageData, device: torch.device, features: np.ndarray | None = None):
        self.device, self.data = device, data
        self._images = images = data.images if features is None else features
        self.labels = torch.from_numpy(data.labels).to(device)
        self._resident: Tensor | None = None
        self._readers = ThreadPoolExecutor(_AHEAD)
        room = _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        if isinstance(images, np.ndarray) and images.nbytes < room:
            self._resident = torch.empty(images.shape, dtype=getattr(torch, images.dtype.name), device=device)
            count = 1 + images.nbytes // _PIECE
            for piece, here in zip(np.array_split(images, count), self._resident.tensor_split(count), strict=True):
                here.copy_(to_device(np.array(piece), device))

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, Callable[[], tuple[Tensor, Tensor]]]:
        """The ids, and what then gives their :meth:`gather`: other threads decode, and read from a disk for a GPU."""
        is_ahead = isinstance(self._images, Streamed) or (self.device.type == "cuda" and self._resident is None)
        return ids, self._readers.submit(self.gather, ids).result if is_ahead else functools.partial(self.gather, ids)

    def gather(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, 3, h, w], or features, and labels int64 [B], on the device."""
        index = to_device(ids, self.device)
        images = to_device(self._images[ids], self.device) if self._resident is None else self._resident[index]
        return images, self.labels[index]


class TrainStream:
    """The ordered, augmented batches of one data set and seed.

    The order is a function of (seed, epoch) and covers the global batch; each process takes a contiguous part,
    so that any number of processes trains on the same samples. The incomplete last batch is dropped.
    """

    def __init__(self, samples: Samples, transform: Transform, batch_size: int, seed: int, process: Process):
        self.samples, self.transform, self.seed = samples, transform, seed
        self.ids = ids = samples.data.splits["train"]
        self.batch_size, self.local = batch_size, batch_size // process.world_size
        self.first = process.rank * self.local
        self.steps_per_epoch = len(self.ids) // batch_size
        self._order = functools.lru_cache(1)(lambda epoch: ids[randomness.permutation(len(ids), "order", seed, epoch)])
        self._read: dict[tuple[int, int], Any] = {}  # what Samples.read gives, by epoch and step

    def batch_ids(self, epoch: int, step: int, whole: bool = False) -> np.ndarray:
        """Sample ids of this process's part, int64 [B] (mixed: one before it first, [1 + B]), or of the ``whole``."""
        first, last = (0, self.batch_size) if whole else (self.first, self.first + self.local)
        places = np.arange(first - bool(self.transform.mixes and not whole), last) % self.batch_size
        return self._order(epoch)[step * self.batch_size + places]

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor, float]:
        """This process's part: images [B, 3, S, S], labels int64 [B], 1; if mixed, labels [B, 2], the first's share."""
        soon = [(epoch, later) for later in range(step, min(step + 1 + _AHEAD, self.steps_per_epoch))]
        self._read = {at: self._read.get(at) or self.samples.read(self.batch_ids(*at)) for at in soon}
        ids, gathered = self._read.pop((epoch, step))
        images, labels = gathered()
        images = self.transform.train(images, self.seed, epoch, ids)
        if not self.transform.mixes:
            return images, labels, 1.0
        images, share = mixed(images, self.transform.mixes, self.seed, epoch, step)
        return images, torch.stack([labels[1:], labels[:-1]], 1), share
