"""Every pair of options of two groups composes to a trial that is accepted, and a preset holds what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from plain_trials import composed

from lora_vit.config import from_dict, validate

CONF = Path(__file__).parents[3] / "conf"
GROUPS = {group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))
          for group in ("model", "data", "lora", "optimizer", "trainer")}  # fmt: skip
SIZE = next(prime for prime in (7, 11, 13, 17) if prime >= max(map(len, GROUPS.values())))
"""A prime, so that the lines of slope k through a square of this size meet each pair of two groups' options."""
PRESETS = [path for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def options(row: int, column: int) -> dict[str, str]:
    """An option of each group, at a place of the square."""
    places = (row, *((column + slope * row) % SIZE for slope in range(len(GROUPS) - 1)))
    return {group: found[place % len(found)] for place, (group, found) in zip(places, GROUPS.items(), strict=True)}


def own_values(path: Path) -> dict[str, object]:
    """What an option sets itself, but for what refers to other settings and for what the test gives."""
    values = yaml.safe_load(path.read_text())
    return {key: value for key, value in values.items()
            if key not in ("defaults", "root") and "${" not in str(value)}  # fmt: skip


@pytest.mark.parametrize("row", range(SIZE))
def test_options_go_together(row):
    for column in range(SIZE):
        chosen = [f"{group}={option}" for group, option in options(row, column).items()]
        config = from_dict(composed(*chosen, "data.root=somewhere"))
        validate(config)
        for group, option in options(row, column).items():
            for key, value in own_values(CONF / group / f"{option}.yaml").items():
                assert getattr(getattr(config, group), key) == value, (chosen, key)


@pytest.mark.parametrize(
    ("model", "size"),
    [("vit_tiny", 256), ("vit_tiny model.image_size=600", 600), ("timm model.image_size=224", 256), ("timm", 518)],
)
def test_images_are_kept_as_large_as_the_model_wants_them(model, size):
    """DINOv2's own size is 518, which its name says to timm."""
    pytest.importorskip("timm")
    assert composed(*f"model={model} data=imagefolder data.root=x".split())["data"]["cache_size"] == size


@pytest.mark.parametrize("path", [*PRESETS, *sorted((CONF / "experiment").glob("*.yaml"))], ids=lambda path: path.stem)
def test_a_preset_says_what_it_is(path):
    line = next(line for line in path.read_text().splitlines() if line != "# @package _global_")
    assert line.startswith("# ")
    assert len(line.split()) > 3


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_that_inherits_holds_only_what_differs(path):
    own, group = yaml.safe_load(path.read_text()), path.parent.name
    base = own.pop("defaults", [])
    inherited = composed(f"{group}={base[0]}", "data.root=x")[group] if base else {}
    assert not [key for key, value in own.items() if key in inherited and value == inherited[key]]
