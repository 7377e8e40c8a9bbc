"""The typed configuration of trials and sweeps, for all other folders. Knows no torch and no Hydra."""
# ruff: noqa: F401, I001  (names that are imported from here, many to a line)

from lora_vit.config.check import validate, validate_sweep
from lora_vit.config.datasets import DATASETS
from lora_vit.config.identity import canonical, file_sha256, ids, is_weights_file, trial_id, weights_files
from lora_vit.config.rules import nearest
from lora_vit.config.schema import (
    ADAPTED, IDENTITY, SCHEMA_VERSION, SECTIONS, SIZES, TARGETS, WITHOUT_IDENTITY, DataConfig, LoraConfig, ModelConfig,
    OptimizerConfig, RootConfig, SweepConfig, TrainerConfig, TrialConfig, from_dict, idle, to_dict, unknown_key,
)  # fmt: skip
