"""The report in a real headless browser: nothing from outside, its tables sort, filter and fit, also on paper."""

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

from lora_vit.analysis.core import summarize

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

    def values() -> list[str]:
        rows = table.find_elements("css selector", "tbody tr")
        return [row.find_elements("css selector", "td")[column].text for row in rows]

    before = sorted(values())
    for reverse in (False, True):
        table.find_elements("css selector", "th button")[column].click()
        numbers = [float(t) for t in values() if t not in ("", "–")]
        assert numbers == sorted(numbers, reverse=reverse)
        assert (len(set(numbers)), sorted(values())) == (3, before)


def shown(page, selector: str = "table.cells tbody tr") -> list[str]:
    """The texts of what is displayed."""
    return [found.text for found in page.find_elements("css selector", selector) if found.is_displayed()]


def open_at(page, width: int, media: str = "screen", dark: bool = False) -> None:
    """The page again, in a window of so many pixels."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.refresh()


def test_rows_are_filtered_here_and_in_the_picture(page):
    open_at(page, 1280)
    every, words = shown(page), page.find_element("css selector", "input[type=search]")
    dimmed = "return document.querySelectorAll('.first [data-cell$=row], .first .dim').length"
    for text, kept in (("rank 16", 4), ("16 0.003", 2), ("wor", len([r for r in every if "worse" in r])), ("x", 0)):
        words.clear()
        words.send_keys(text)
        assert len(shown(page)) == kept, text
        assert (page.execute_script(dimmed) > 0) == (kept < len(every))
    words.send_keys("\b")
    assert shown(page) == every


def test_columns_are_chosen(page):
    open_at(page, 1280)
    heads = {*shown(page, "table.cells th")}
    assert {"rank", "lr", "val accuracy %", "mark", "vs best"} <= heads - {"cell", "images/s"} == heads
    page.find_element("css selector", "details.columns summary").click()
    labels = {label.text: label for label in page.find_elements("css selector", ".columns label")}
    for name in ("images/s", "rank"):
        labels[name].click()
    assert {*shown(page, "table.cells th")} == {*heads, "images/s"} - {"rank"}


def test_a_point_and_its_row_light_up_together_with_the_values(page):
    open_at(page, 1280)
    point = page.find_element("css selector", ".first svg [data-cell] use")
    row = page.find_element("css selector", ".first svg [data-cell] path")
    webdriver.ActionChains(page).move_to_element_with_offset(row, 0, 1).perform()
    assert page.find_elements("css selector", "table.cells tr.lit"), "anywhere in a row"
    webdriver.ActionChains(page).move_to_element(point).perform()
    (lit,) = page.find_elements("css selector", "table.cells tr.lit")
    tip = page.find_element("id", "tip")
    assert lit.find_element("css selector", ".mark").text in tip.text, "and the tip is displayed"


def test_it_is_dark_where_that_is_preferred_or_chosen(page):
    back = "return getComputedStyle(document.body).backgroundColor + document.documentElement.dataset.theme"
    open_at(page, 1280, dark=True)
    dark = page.execute_script(back)
    open_at(page, 1280)
    light = page.execute_script(back)
    assert (light, dark.endswith("dark")) == ("rgb(255, 255, 255)light", True)
    page.find_element("id", "theme").click()
    assert page.execute_script(back) == dark


WIDER = """return Array.from(document.querySelectorAll("body *")).filter(e => !e.closest("svg, head, #tip")
    && !(e.parentElement.closest(arguments[0])) && e.getBoundingClientRect().right > innerWidth + 1
    && getComputedStyle(e).display !== "none").map(e => e.outerHTML.slice(0, 90))"""


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_the_window_and_tables_scroll_in_their_boxes(page, width):
    open_at(page, width)
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert page.execute_script(WIDER, ".scroll, figure, pre") == []
    heads = shown(page, "table.cells th")
    assert ("cell" in heads, "rank" in heads) == (width == 400, width == 1280), "a name column where it is narrow"
    if width == 1280:
        assert page.execute_script("let b = document.querySelector('.scroll'); return b.scrollWidth <= b.clientWidth")
    assert all(0 < p.size["width"] <= max(width, 640) for p in page.find_elements("css selector", "figure svg"))


@pytest.mark.parametrize("everything", [False, True])
def test_no_column_is_cut_on_paper(page, everything):
    open_at(page, 1280)
    if everything:
        page.execute_script("document.querySelectorAll('.columns input:not(:checked)').forEach(box => box.click())")
    size = {"width": 695, "height": 1000, "deviceScaleFactor": 1, "mobile": False}  # A4 without its margins
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert page.execute_script(WIDER, "none") == []
    assert not shown(page, ".controls, #theme")
    assert len(shown(page)) == len(page.find_elements("css selector", "table.cells tbody tr"))


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
