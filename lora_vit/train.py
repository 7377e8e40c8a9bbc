"""Train one trial or a sweep: ``python -m lora_vit.train lora.rank=8``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lora_vit.compose import HYDRA, in_one_line, register
from lora_vit.errors import run_command
from lora_vit.resolve import from_omegaconf


def task(cfg: DictConfig) -> float:
    """Train the composed trial."""
    hydra_cfg = HydraConfig.get()
    config = from_omegaconf(cfg)
    from lora_vit.run import run

    record = run(config, Path(hydra_cfg.runtime.output_dir), {})
    return float(record.metrics["val_accuracy"])


def command() -> None:
    register()
    if any(a.startswith("sweep=") for a in sys.argv[1:]) and not {"-m", "--multirun"} & set(sys.argv):
        sys.argv.insert(1, "-m")  # a preset is a sweep
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with in_one_line():
        hydra.main(config_path="pkg://lora_vit.conf", config_name="config", **HYDRA)(task)()


def main() -> None:
    """Command-line entry."""
    run_command(command)


if __name__ == "__main__":
    main()
