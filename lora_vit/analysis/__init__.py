"""Compare trials from their records: tables, statistics, pictures and one report. Knows no torch.

>>> from lora_vit.analysis import summarize
>>> summary = summarize(["outputs/sweeps/ranks"])
>>> summary.cells  # a DataFrame, one row per cell, best first
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_vit.errors import RecordError

if TYPE_CHECKING:
    from lora_vit.analysis.core import summarize
    from lora_vit.analysis.load import load_trials
    from lora_vit.analysis.summary import Summary

__all__ = ["RecordError", "Summary", "load_trials", "summarize"]

_HOMES = {"Summary": "summary", "load_trials": "load", "summarize": "core"}


def __getattr__(name: str) -> Any:
    """Import these when they are asked for: a worker that replays a race does not need pandas."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
