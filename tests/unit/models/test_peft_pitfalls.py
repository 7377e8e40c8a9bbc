"""docs/peft_pitfalls.md says what scripts/peft_pitfalls.py measures."""

from __future__ import annotations

import re
import runpy

import pytest

pytest.importorskip("peft")
pytest.importorskip("timm")


def table(text: str) -> list[list[str]]:
    """Rows with every number but counts taken out: last digits differ between machines."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| (\d |warnings)", line)]
    return [[re.sub(r"\de[-+]\d\d", "x", cell) for cell in row] for row in rows]


@pytest.mark.slow
def test_the_page_shows_what_the_script_finds(project_root, capsys):
    runpy.run_path(str(project_root / "scripts" / "peft_pitfalls.py"), run_name="__main__")
    page, out = (project_root / "docs" / "peft_pitfalls.md").read_text(encoding="utf-8"), capsys.readouterr().out
    found = table(out)
    assert len(found) == 16
    assert [row[-1] for row in found].count("seen") == 9
    if out.splitlines()[0].rpartition(",")[0] in page:  # PEFT's and timm's versions
        assert found == table(page)
