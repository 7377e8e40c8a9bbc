"""How people read a configuration, in every table: ``rank 8, alpha 32, lr 0.002`` for a cell, short names, values."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_vit.config.schema import ADAPTED, IDENTITY, OF_ADAPTERS, SECTIONS, TARGETS

LR, METHOD = "optimizer.lr", "lora.method"
BASELINES = {"none": "linear probe", "full": "full fine-tuning"}  # trials without adapters, by ``lora.method``
METHODS = {"lora": "LoRA", "dora": "DoRA", **BASELINES}
CUT = " cut from "  # in the method of what was trained at a higher rank
_TARGETS = {"q k v o fc1 fc2": "all", "q k v o": "attention", "fc1 fc2": "mlp"}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the numbers, by dotted name; lists as readable text; a cut belongs to the method."""
    values: dict[str, Any] = {}
    for name in IDENTITY:
        section, key = name.split(".")
        value = config[section][key]
        if isinstance(value, list):
            words = " ".join([t for t in TARGETS if t in value] if key == "targets" else map(str, value))
            value = _TARGETS.get(words, words)
        values[name] = value
    if values[METHOD] not in ADAPTED:
        values |= dict.fromkeys(OF_ADAPTERS)
    elif values["lora.blocks"] is None:
        values["lora.blocks"] = "all"
    if cut := values.pop("lora.cut"):
        values[METHOD] = f"{METHODS[values[METHOD]]}{CUT}{cut}"
    return values


def names(rows: Mapping[str, Mapping[str, Any]], settings: Sequence[str]) -> dict[str, str]:
    """A name for each cell, by its id, of its flat settings; equal names get the id behind them."""
    both = "dora" in {row[METHOD] for row in rows.values()}
    found = {c: cell_text(row, settings, both) or f"rank {value_text(row['lora.rank'])}" for c, row in rows.items()}
    counts = Counter(found.values())
    return {cell: name if counts[name] == 1 else f"{name} [{cell}]" for cell, name in found.items()}


def cell_text(row: Mapping[str, Any], settings: Sequence[str], both: bool = False) -> str:
    """The settings of one cell in words, without those that a baseline leaves empty; ``both``: beside DoRA say LoRA."""
    short, method = short_names(settings), row.get(METHOD) or "lora"
    base = (METHODS if both else {**METHODS, "lora": ""}).get(method, method)
    shown = [c for c in settings if c != METHOD and not (base and c in OF_ADAPTERS and _is_missing(row[c]))]
    return ", ".join([*([base] if base else []), *(f"{short[c]} {value_text(row[c])}" for c in shown)])


def varying(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The settings in which the rows differ (but by what a baseline leaves empty), the most interesting first."""
    values: dict[str, set[Any]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, set()).add(None if _is_missing(value) else value)
    found = [c for c, v in values.items() if len(v - {None} if c in OF_ADAPTERS else v) > 1]
    found.sort(key=lambda c: (-list(SECTIONS).index(c.split(".")[0]), c))
    return preferred(found, [METHOD, "lora.rank", "lora.alpha", "lora.scaling", "lora.dropout"])


def preferred(columns: Iterable[str], first: Sequence[str]) -> list[str]:
    """The columns, those that ``first`` names before the others, in its order."""
    return sorted(columns, key=lambda c: first.index(c) if c in first else len(first))


def short_names(columns: Iterable[str]) -> dict[str, str]:
    """Dotted setting -> short name for display: the last part if it is unique, ``model`` for ``model.name``."""
    last = {c: c.split(".")[0] if c.endswith(".name") else c.rsplit(".", 1)[-1] for c in columns}
    counts = Counter(last.values())
    return {c: short if counts[short] == 1 else c for c, short in last.items()}


def value_text(value: object) -> str:
    """A setting's value as a person writes it."""
    if _is_missing(value):
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _is_missing(value: object) -> bool:
    return value is None or value != value  # NaN
