"""Hydra calls this before a single run begins."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lora_vit.config import refuse_impossible


class RefuseImpossible(Callback):
    """Validate the trial before Hydra makes its folder; SystemExit passes through Hydra's own handling."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra with the composed config."""
        refuse_impossible(config)
