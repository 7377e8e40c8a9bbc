"""Writes docs/settings.md: every setting with what it may be, its default and meaning, from the schema and from conf/.

python scripts/settings_reference.py
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import yaml

from lora_vit.config.schema import SECTIONS, SweepConfig
from lora_vit.sweep.engines import ENGINES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/settings.md"
DEFAULTS = {"model": "vit_b_16", "data": "tiny_imagenet", "optimizer": "adamw", "lora": "default", "trainer": "default"}
HEAD = """# Every setting

Written by `python scripts/settings_reference.py` from `lora_vit/config/schema.py` and `conf/`. The defaults are those
of `python -m lora_vit.train` without an override; presets change some (`--cfg job` prints the whole of a command).
A setting marked *beside* says how or where a trial runs and does not decide its numbers: it is no part of the trial id.
"""


def described(text: str) -> dict[str, str]:
    """The comment behind each key of a YAML file or a class."""
    return dict(re.findall(r"^ *(\w+): [^#\n]*# (.*)$", text, re.MULTILINE))


def table(title: str, kind: type, values: dict[str, object], said: dict[str, str]) -> str:
    """A section of the page; ``values``: the defaults."""
    lines = [f"\n## {title}\n", "| setting | what it may be | default | what it means |", "|---|---|---|---|"]
    for f in dataclasses.fields(kind):
        own = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        default = values.get(f.name, None if own is dataclasses.MISSING else own)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        beside = "*beside*; " if not f.metadata.get("identity", True) else ""
        meaning = f"{beside}{said.get(f.name, '')}".removesuffix("; ").replace("|", "or").replace("``", "`")
        kinds = str(f.type) if hasattr(f.type, "__args__") else f.type.__name__
        kinds = kinds.replace("typing.", "").replace("|", "or").replace("None", "null")
        kinds = f.metadata.get("kind", "one or a list") if f.type is Any else kinds
        may_be = f", {f.metadata['says']}" if "says" in f.metadata else ""
        lines.append(f"| `{f.name}` | {kinds}{may_be} | `{shown}` | {meaning} |")
    return "\n".join(lines) + "\n"


def tracker(path: Path) -> str:
    """The section of a tracker: what its file says."""
    text = path.read_text()
    ((name, values),), said = yaml.safe_load(text).items(), described(text)
    lines = [f"\n## tracker.{name}.* (tracker=[{name}])\n", f"{text[2:].splitlines()[0]}.\n"]
    lines += ["| setting | default | what it means |", "|---|---|---|"]
    for key, value in values.items():
        lines.append(f"| `{key}` | `{value or 'null'}` | {said.get(key, '').replace('|', 'or')} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section, kind in SECTIONS.items():
        text = (ROOT / "conf" / section / f"{DEFAULTS[section]}.yaml").read_text()
        said = described(inspect.getsource(kind)) | described(text)
        parts.append(table(f"{section}.* ({section}={DEFAULTS[section]})", kind, yaml.safe_load(text), said))
    config = (ROOT / "conf/config.yaml").read_text()
    seed = described(config)["seed"]
    parts.append(f"\n## seed\n\n`seed` (int, default `0`): {seed}.\n")
    parts.append(table("sweep.*", SweepConfig, yaml.safe_load(config)["sweep"], described(config)))
    parts += [tracker(path) for path in sorted((ROOT / "conf/tracker").glob("*.yaml"))]
    for name, kind in ENGINES.items():
        parts.append(table(f"engine.* (engine={name})", kind, {"name": name}, described(inspect.getsource(kind))))
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
