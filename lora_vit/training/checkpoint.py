"""A trial's checkpoint on disk, whole or absent."""

import io
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_vit.errors import ConfigError, one_line
from lora_vit.files import replacing
from lora_vit.records import CHECKPOINT


@dataclass
class TrialState:
    """Where a trial stands; every draw is keyed by it. Tensors are on the CPU, unpadded, without a trial axis."""

    epoch: int = 0  # finished epochs
    step_in_epoch: int = 0
    updates: int = 0  # optimizer updates
    loss_sum: float = 0.0  # of this epoch's steps so far
    metrics_bytes: int = 0  # length of metrics.jsonl
    seconds: float = 0.0  # trained so far
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)  # metrics of the last finished epoch
    values: dict[str, Tensor] = field(default_factory=dict)  # empty: not started
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    loss_scale: float = 2.0**16  # of fp16, as is the next (training/optim.py)
    good_steps: int = 0  # since the scale changed
    micro_batch: int = 0  # images that memory had room for at once, where it had not for all; 0: it had


def save_checkpoint(folder: Path, trial_id: str, state: TrialState) -> None:
    """Replace the folder's checkpoint. Raises OSError (disk full, unwritable) and leaves the last good one."""
    buffer = io.BytesIO()
    torch.save({"trial_id": trial_id, **vars(state)}, buffer)
    with replacing(folder / CHECKPOINT) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(folder: Path, trial_id: str) -> TrialState:
    """The folder's checkpoint, or a fresh state. Raises ConfigError for a damaged file or another trial's."""
    if not (path := folder / CHECKPOINT).exists():
        return TrialState()
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        owner = values.pop("trial_id")
        state = TrialState(**values)
    except Exception as error:
        raise ConfigError(f"{path} is damaged ({one_line(error)}): remove it, or give trainer.resume=restart") from None
    if owner != trial_id:
        raise ConfigError(f"{path} belongs to trial {owner}, not to {trial_id}")
    return state
