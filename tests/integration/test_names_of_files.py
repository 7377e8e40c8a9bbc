"""Names of files and folders that mean something else to Hydra: refused with the quoted form, which works."""

from __future__ import annotations

import re

import pytest
from helpers import run_command

from lora_vit.records import read_record

pytestmark = pytest.mark.slow
ODD = "ru n=(1),ü$x"


def quoted_form(text: str) -> str:
    """What the message says to give instead."""
    return re.findall(r'give it in quotes, "(.*)"$', text, re.M)[0]


def test_the_form_that_a_message_shows_works(tmp_path):
    given = [f"hydra.run.dir={ODD}", "data.root=2024_11", "data.cache_dir=it's (1)"]
    for i, argument in enumerate(given):
        given[i] = quoted_form(run_command(argument, cwd=tmp_path, code=1).stderr)
    done = run_command(*given, cwd=tmp_path)
    assert f"tensorboard --logdir '{ODD}'/tensorboard\n" in done.stdout
    data = read_record(tmp_path / ODD).config["data"]
    assert (data["root"], data["cache_dir"]) == (str(tmp_path / "2024_11"), str(tmp_path / "it's (1)"))
