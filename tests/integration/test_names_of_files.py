"""Names of files and folders that mean something else to Hydra: refused with the quoted form, which works."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from helpers import command, run_command

from lora_vit.records import read_record

pytestmark = pytest.mark.slow
ODD = "ru n=(1),ü$x"


def quoted_form(text: str) -> str:
    """What the message says to give instead."""
    return re.findall(r'give the name in quotes, "(.*)"$', text, re.M)[0]


def test_the_form_that_a_message_shows_works(tmp_path):
    given = [f"hydra.run.dir={ODD}", "data.root=2024_11", "data.cache_dir=it's (1)"]
    for i, argument in enumerate(given):
        given[i] = quoted_form(run_command(argument, cwd=tmp_path, code=1).stderr)
    done = run_command(*given, cwd=tmp_path)
    assert f"tensorboard --logdir '{ODD}'/tensorboard\n" in done.stdout
    data = read_record(tmp_path / ODD).config["data"]
    assert (data["root"], data["cache_dir"]) == (str(tmp_path / "2024_11"), str(tmp_path / "it's (1)"))


def test_what_the_terminals_encoding_lacks_is_escaped(tmp_path):
    """As of cp1252 or of Latin-1, which has no dash of the summary's tables either."""
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = run_command("-m", "sweep.name='猫'", "seed=0,1", "trainer.epochs=1", cwd=tmp_path, env=ascii_only)
    assert "python -m lora_vit.summarize 'outputs/sweeps/\\u732b'\n" in done.stdout
    for module, told in (
        ("summarize", "Report: outputs/sweeps/\\u732b/"),
        ("sweep", "outputs/sweeps/\\u732b: 2 trials"),
    ):
        line = [*command(module=f"lora_vit.{module}")[:3], "outputs/sweeps/猫"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **ascii_only})
        assert (done.returncode, told in done.stdout) == (0, True), done.stderr
