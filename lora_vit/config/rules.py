"""Rules that stand with a field as its metadata: what it may be (its type says whether None), what is said of others.

``lr: float = field(metadata=number("a learning rate", "(0, inf)"))`` refuses 0 with "optimizer.lr=0.0 is impossible:
give a learning rate above 0".
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from lora_vit.errors import ConfigError

NO_IDENTITY = {"identity": False}  # of a setting that does not decide a trial's numbers: no part of the trial id


def number(what: str, within: str = "(-inf, inf)", also: str = "", count: int | None = None) -> dict[str, Any]:
    """Of a number, or of each number of a list: of ``count`` numbers, or of at least one, each once.

    ``what`` to give, with its unit, ``within`` which interval (``[0, 1)``: from 0, below 1), what ``also`` would do.
    """
    low, high = (int(end) if end.strip("- ").isdigit() else float(end) for end in within[1:-1].split(","))
    excluded = {end for end, kept in ((low, within[0] == "["), (high, within[-1] == "]")) if not kept}
    where = f" in {within}"
    if high == math.inf:
        where = f" from {low} up" if within[0] == "[" else f" above {low}" if low > -math.inf else ""

    def check(key: str, value: Any) -> None:
        numbers = value if isinstance(value, list) else [value]
        if not all(low <= n <= high and n not in excluded for n in numbers) or count not in (None, len(numbers)):
            refuse(key, value, f"is impossible: give {what}{where}{also}")
        if count is None:
            _each_once(key, numbers, also)

    return {"check": check, "says": f"{what}{where}{also}"}


def choice(*names: str, also: str = "") -> dict[str, Any]:
    """Of a word, or of each word of a list that holds at least one, each once; ``also``: what to give instead."""

    def check(key: str, value: Any) -> None:
        words = value if isinstance(value, list) else [value]
        for word in words:
            one_of(key, word, names)
        _each_once(key, words, also)

    return {"check": check, "says": f"of {', '.join(names)}{also}"}


def _each_once(key: str, values: list[Any], also: str) -> None:
    if not values or len(set(values)) != len(values):
        refuse(key, values, f"is impossible: name at least one, each once{also}")


def text(pattern: str, says: str) -> dict[str, Any]:
    """Of a text that a regular expression describes, and what is said of another one."""
    return {"check": lambda key, value: re.fullmatch(pattern, value) or refuse(key, value, says)}


def one_of(key: str, value: Any, names: Sequence[str]) -> None:
    if value not in names:
        refuse(key, value, f"is unknown{nearest(str(value), names)} (one of: {', '.join(names)})")


def refuse(key: str, value: Any, why: str) -> NoReturn:
    """Raise ConfigError: the setting as one would give it, why it cannot work and what to do."""
    shown = {"None": "null", "True": "true", "False": "false"}.get(str(value), value)
    raise ConfigError(f"{key}={shown} {why}")


def check_fields(settings: Any, prefix: str = "") -> None:
    """Ask the rules of a dataclass's fields. Raises ConfigError."""
    for f in dataclasses.fields(settings):
        if (value := getattr(settings, f.name)) is not None and "check" in f.metadata:
            f.metadata["check"](prefix + f.name, value)


def nearest(word: str, choices: Sequence[str]) -> str:
    """``, did you mean 'x'?`` for the nearest of the choices, or nothing when none is near."""
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f", did you mean '{found[0]}'?" if found else ""
