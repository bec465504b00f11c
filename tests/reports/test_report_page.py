"""The page in a real browser: it sorts, filters, hovers and leads from a point to its run, with no network."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not BROWSER or not DRIVER, reason="needs Chromium and chromedriver (apt-get install chromium chromium-driver)"
)


def test_the_page_asks_nobody_for_anything(report: Path) -> None:
    """No script, style, picture or font comes from elsewhere; links lead to files of the report or into the page."""
    page = (report / "index.html").read_text(encoding="utf-8")
    body = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
    assert "default-src 'none'" in body
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", body)
    links = set(re.findall(r'<a [^>]*href="([^"]+)"', body))
    ids = set(re.findall(r'\bid="([^"]+)"', body))
    for link in links:
        assert (link[1:] in ids) if link.startswith("#") else (report / link).is_file(), link


def test_ids_are_unique(report: Path) -> None:
    body = re.sub(r"<script>.*?</script>", "", (report / "index.html").read_text(encoding="utf-8"), flags=re.DOTALL)
    ids = re.findall(r'\sid="([^"]+)"', body)
    assert len(ids) == len(set(ids)), sorted({one for one in ids if ids.count(one) > 1})[:5]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # no network
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    def there(driver: Any) -> bool:
        """The driver was seen to go on while the document was still the empty one before."""
        found = driver.find_elements("css selector", "#table-curves")
        return bool(found) and driver.execute_script("return document.readyState") == "complete"

    browser.set_window_size(1400, 900)
    browser.get((report / "index.html").as_uri())
    WebDriverWait(browser, 20).until(there)
    return browser


def cells(page: Any, table: str, column: int) -> list[str]:
    rows = page.find_elements("css selector", f"#{table} tbody tr")
    return [row.find_elements("css selector", "td")[column].text for row in rows]


def head(page: Any, table: str) -> list[str]:
    return [one.text.strip() for one in page.find_elements("css selector", f"#{table} thead tr:first-child th")]


@needs_browser
def test_a_click_on_a_heading_sorts_by_number(page: Any) -> None:
    column = head(page, "table-curves").index("score")
    heading = page.find_elements("css selector", "#table-curves thead tr:first-child th")[column]
    heading.click()
    first = [float(one.replace(",", "")) for one in cells(page, "table-curves", column)]
    assert first == sorted(first)
    heading.click()
    second = [float(one.replace(",", "")) for one in cells(page, "table-curves", column)]
    assert second == sorted(second, reverse=True) and second[0] > first[0]


@needs_browser
def test_a_table_can_be_filtered_and_searched(page: Any) -> None:
    from selenium.webdriver.support.ui import Select

    box = page.find_element("css selector", ".table:has(#table-curves)")
    method = head(page, "table-curves").index("method")
    choice = Select(box.find_element("css selector", "select[data-column=method]"))
    choice.select_by_visible_text("wanda")
    assert set(cells(page, "table-curves", method)) == {"wanda"}
    choice.select_by_index(0)
    box.find_element("css selector", "input[type=search]").send_keys("random")
    assert set(cells(page, "table-curves", method)) == {"random"}


@needs_browser
def test_a_point_says_its_numbers_and_leads_to_its_run(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    point = page.find_element("css selector", "#figure-tradeoff-tiny_100k-perplexity a[href='#run-wanda-0.5']")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", point)
    ActionChains(page).move_to_element(point).perform()
    tip = WebDriverWait(page, 5).until(lambda driver: driver.find_elements("css selector", ".tippy-content"))
    assert re.match(r"wanda: perplexity [\d.]+ \[[\d.]+, [\d.]+\], sparsity 0\.5", tip[0].text)
    faded = page.find_elements("css selector", "#figure-tradeoff-tiny_100k-perplexity .faded")
    assert {one.get_attribute("data-series") for one in faded} == {"dense", "magnitude", "random"}
    ActionChains(page).click().perform()
    row = page.find_element("css selector", "tr.found")
    assert "wanda-0.5" in row.text
    assert row.is_displayed()


@needs_browser
@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_wider_than_the_screen(browser: Any, report: Path, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get((report / "index.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    severe = [one for one in browser.get_log("browser") if one["level"] == "SEVERE"]
    assert severe == []


@needs_browser
def test_it_reads_without_scripts(browser: Any, report: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get((report / "index.html").as_uri())
        assert len(browser.find_elements("css selector", "#table-runs tbody tr")) == 28
        titles = browser.find_elements("css selector", "#figure-tradeoff-tiny_100k-perplexity a.point title")
        assert len(titles) > 20
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
