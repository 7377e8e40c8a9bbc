"""The report in a real headless browser: no error, nothing from outside, tables sort, it fits narrow and wide."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from made_up_records import grid, make_sweep

from lora_vit.analysis import summarize

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="no chromium with chromedriver on this machine"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    sweep = tmp_path_factory.mktemp("report") / "sweep"
    cells, accuracies = grid(np.random.default_rng(3), (1, 4, 16), (0.0, 0.1), (1e-3, 3e-3), 3)
    make_sweep(sweep, cells, accuracies)
    subprocess.run([sys.executable, "-m", "lora_vit.summarize", sweep], check=True, stdout=subprocess.DEVNULL)
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get((sweep / "summary" / "report.html").as_uri())
        yield driver
    finally:
        driver.quit()


def test_no_console_error_and_nothing_from_outside(page):
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = [p["request"]["url"] for p in sent if p["documentURL"].startswith("file://")]  # not the browser's own
    assert [url for url in asked if not url.startswith("data:")] == [page.current_url]


def test_tables_sort(page):
    table = page.find_elements("css selector", "table.sortable")[0]
    heads = [h.text.strip() for h in table.find_elements("css selector", "th")]
    column = next(i for i, text in enumerate(heads) if "rank" in text)

    def shown() -> list[str]:
        rows = table.find_elements("css selector", "tbody tr")
        return [row.find_elements("css selector", "td")[column].text for row in rows]

    before = sorted(shown())
    for reverse in (False, True):
        table.find_elements("css selector", "th button")[column].click()
        numbers = [float(t) for t in shown() if t not in ("", "–")]
        assert numbers == sorted(numbers, reverse=reverse)
        assert (len(set(numbers)), sorted(shown())) == (3, before)


@pytest.mark.parametrize("width", [380, 1400])
def test_the_page_fits_the_window(page, width):
    page.set_window_size(width, 900)
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    pictures = page.find_elements("css selector", "figure svg")
    assert pictures
    assert all(0 < p.size["width"] <= width for p in pictures)


def test_in_a_notebook_it_has_the_colours_of_the_theme_and_changes_nothing_else(page, tmp_path):
    """The last test of this page: the browser leaves it."""
    shown = summarize(Path(unquote(urlparse(page.current_url).path)).parents[1])._repr_html_()
    outside = "<table><tr><td class='n mark best'>theirs</td></tr></table>"
    colours = "return [...document.querySelectorAll(arguments[0])].map(e => getComputedStyle(e)[arguments[1]])"
    page.set_window_size(900, 900)
    for ink, paper in (("rgb(20, 20, 20)", "white"), ("rgb(220, 220, 220)", "#111")):
        style = f"color: {ink}; background: {paper}"
        (tmp_path / "cell.html").write_text(f"<!doctype html><body style='{style}'>{outside}{shown}</body>")
        page.get((tmp_path / "cell.html").as_uri())
        assert {*page.execute_script(colours, "div, td, th, .lora-vit-summary .mark", "color")} == {ink}
        assert page.execute_script(colours, "body > table td", "backgroundColor") == ["rgba(0, 0, 0, 0)"]
        assert page.execute_script(colours, "body > table td", "textAlign") == ["start"]
        assert page.execute_script("return document.querySelector('img').naturalWidth") > 500
        assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
