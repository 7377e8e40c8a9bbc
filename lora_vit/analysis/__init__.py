"""Compare trials from their records: tables, statistics, pictures and one report. Knows no torch.

>>> from lora_vit.analysis import summarize
>>> summarize(["outputs/sweeps/ranks"]).cells  # a DataFrame, one row per cell, best first
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_vit.analysis.core import Summary, summarize

__all__ = ["Summary", "summarize"]


def __getattr__(name: str) -> Any:
    """Import these when they are asked for: a worker that replays a race does not need pandas."""
    if name in __all__:
        return getattr(import_module("lora_vit.analysis.core"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
