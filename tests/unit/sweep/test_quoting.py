"""Names of files and folders reach the configuration as they stand on the command line."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lora_vit.compose import PATHS, quote_paths, register_schema

NAMES = [
    "plain/name.pth", "../a-b_c", "a=b", "=", "a,b", ",a,", "a(b", "(1)", "copy (1)", "f(1)", "a[b", "[a]", "a{b",
    "{a:b}", "a~b", "~x", "#a", "a#b", "$a", "a$", "a${b", "${", "%a%", "a:b", "c:/d", "a b", " a ", "it's", "'",
    "a'b'c", '"', 'a"b', "\\", "a\\", "a\\'b", "a\\,b", "a\\ b", "\\\\", "ü", "猫", "2024_11", "1e5", "007", "1", "1.0",
    "nan", "-inf", "true", "False", "NULL", "None", "null-", "a@b", "a?b*|", "+a", "-a", "a;b&c<d>", "`a`", "a\tb",
    "a\nb",
]  # fmt: skip


def setup_module() -> None:
    register_schema()


@pytest.mark.parametrize("key", PATHS)
def test_hydras_grammar_gives_each_name_back(key):
    parser = OverridesParser.create()
    for name in NAMES:
        (line,) = quote_paths([f"{key}={name}"])
        assert OmegaConf.create({"it": parser.parse_override(line).value()}).it == name, line
        assert quote_paths([line]) == [line], "what is quoted stays"


def test_hydra_composes_the_names():
    """Each name at one key; the keys take turns."""
    with initialize_config_module("lora_vit.conf", version_base="1.3"):
        for first in range(0, len(NAMES), len(PATHS)):
            named = dict(zip(PATHS[first % 5 :] + PATHS[: first % 5], NAMES[first:], strict=False))
            lines = quote_paths([f"{key}={name}" for key, name in named.items()])
            config = compose("config", lines, return_hydra_config=True)
            assert {key: OmegaConf.select(config, key) for key in named} == named


def test_what_means_something_to_hydra_stays():
    for line in (
        "data.root=null",
        "data.root=",
        "hydra.run.dir=outputs/${now:%Y}",
        "model.weights='a'",
        "lora.rank=2,4",
    ):
        assert quote_paths([line]) == [line]
    assert quote_paths(["hydra.run.dir=a b/${seed}"]) == ["hydra.run.dir=a b/${seed}"]
    assert quote_paths(["hydra.run.dir=a(b/${seed}"]) == ["hydra.run.dir='a(b/${seed}'"]


@pytest.mark.parametrize("sweep", ["-m", "--multirun", "sweep=quickstart", "hydra.mode=MULTIRUN"])
def test_a_comma_separates_in_a_sweep(sweep):
    _, root, name = quote_paths([sweep, "data.root=a=b,'c,d',2024_11,null,it's", "sweep.name=a,b"])
    assert root == "data.root='a=b','c,d','2024_11',null,'it\\'s'"
    assert name == "sweep.name='a,b'", "which cannot be swept"
    override = OverridesParser.create().parse_override(root)
    assert [OverridesParser.create().parse_override(f"k={v}").value() for v in override.sweep_string_iterator()] == [
        "a=b", "c,d", "2024_11", None, "it's"
    ]  # fmt: skip
