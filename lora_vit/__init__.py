"""LoRA on Vision Transformers: train, sweep and compare.

Importing this changes nothing in the process, and public names load lazily: ``--help`` and the summary cost no torch.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "ConfigError": "lora_vit.errors",
    "adapter_state_dict": "lora_vit.lora.inject",
    "disable_adapter": "lora_vit.lora.inject",
    "load_adapter": "lora_vit.lora.adapter",
    "load_peft": "lora_vit.interop",
    "mark_lora_and_head_as_trainable": "lora_vit.lora.inject",
    "merge_adapter": "lora_vit.lora.adapter",
    "preprocessing": "lora_vit.data.preprocessing",
    "remove_adapter": "lora_vit.lora.inject",
    "replace_linear_with_lora": "lora_vit.lora.inject",
    "save_adapter": "lora_vit.lora.adapter",
    "trainable_parameters": "lora_vit.lora.inject",
}

__all__ = ["api", *_PUBLIC]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name == "api":  # compose, train, sweep, summarize: these are modules' names here
        return import_module("lora_vit.api")
    raise AttributeError(f"module 'lora_vit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
