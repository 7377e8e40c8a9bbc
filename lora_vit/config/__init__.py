"""The typed configuration of trials and sweeps. Knows no torch and no Hydra."""

from lora_vit.config.check import validate, validate_sweep
from lora_vit.config.datasets import DATASETS
from lora_vit.config.identity import canonical, cell_id, file_sha256, ids, is_weights_file, trial_id, weights_files
from lora_vit.config.schema import (
    IDENTITY,
    SCHEMA_VERSION,
    SECTIONS,
    TARGETS,
    WITHOUT_IDENTITY,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RootConfig,
    SweepConfig,
    TrainerConfig,
    TrialConfig,
    from_dict,
    known_keys,
    nearest,
    to_dict,
)
from lora_vit.errors import ConfigError

__all__ = [
    "DATASETS", "IDENTITY", "SCHEMA_VERSION", "SECTIONS", "TARGETS", "WITHOUT_IDENTITY", "ConfigError", "DataConfig",
    "LoraConfig", "ModelConfig", "OptimizerConfig", "RootConfig", "SweepConfig", "TrainerConfig", "TrialConfig",
    "canonical", "cell_id", "file_sha256", "from_dict", "ids", "is_weights_file", "known_keys", "nearest", "to_dict",
    "trial_id", "validate", "validate_sweep", "weights_files",
]  # fmt: skip
