"""Compare trials from their records: tables, statistics, pictures and one report. Knows no torch.

>>> from lora_vit.analysis import summarize
>>> summary = summarize(["outputs/sweeps/ranks"])
>>> summary.cells  # a DataFrame, one row per cell, best first
"""

from lora_vit.analysis.core import summarize
from lora_vit.analysis.load import load_trials
from lora_vit.analysis.summary import Summary
from lora_vit.errors import RecordError

__all__ = ["Summary", "RecordError", "load_trials", "summarize"]
