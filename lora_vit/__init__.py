"""LoRA on Vision Transformers: train, sweep and compare.

Public names load lazily, so that importing ``lora_vit`` (for ``--help``, the summarizer) costs no torch.
"""

import sys
from importlib import import_module
from typing import Any

_PUBLIC = {
    "ConfigError": "lora_vit.config",
    "replace_linear_with_lora": "lora_vit.lora.inject",
    "mark_lora_and_head_as_trainable": "lora_vit.lora.inject",
    "load_adapter": "lora_vit.lora.adapter",
    "merge_adapter": "lora_vit.lora.adapter",
}

__all__ = [
    "ConfigError",
    "api",
    "load_adapter",
    "mark_lora_and_head_as_trainable",
    "merge_adapter",
    "replace_linear_with_lora",
]
__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m lora_vit.train` is looked for
    from lora_vit.start import begin_command

    begin_command()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name == "api":  # compose, train, sweep, summarize: these are modules' names here
        return import_module("lora_vit.api")
    raise AttributeError(f"module 'lora_vit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, "api"])
