"""Compare trials from their records: tables, statistics, pictures and one report. Knows no torch.

>>> from lora_vit.analysis import summarize
>>> summary = summarize(["outputs/sweeps/ranks"])
>>> summary.cells  # a DataFrame, one row per cell, best first
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "summarize": "lora_vit.analysis.core",
    "Summary": "lora_vit.analysis.core",
    "SummaryError": "lora_vit.analysis.load",
    "load_trials": "lora_vit.analysis.load",
}

__all__ = ["Summary", "SummaryError", "load_trials", "summarize"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lora_vit.analysis' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
