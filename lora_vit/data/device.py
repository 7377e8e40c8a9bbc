"""From the host to the device without waiting."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device; the host continues while a GPU copies.

    From pageable memory a copy makes the host wait whatever is asked for, hence the pinned copy.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
