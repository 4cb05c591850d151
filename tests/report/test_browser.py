"""The report in headless Chromium, opened as a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from flashgen.report import write_report
from tests.report import handmade

pytestmark = pytest.mark.browser
PAINT = """() => new Promise((resolve) => new PerformanceObserver((list) =>
    resolve(list.getEntriesByName("first-contentful-paint")[0]?.startTime)).observe({ type: "paint", buffered: true }))"""
DECODED = "(i) => Promise.race([i.decode().then(() => i.naturalWidth), new Promise((resolve) => setTimeout(resolve, 60000, 0))])"
HIDDEN_BY_WIDTH = """() => [...document.querySelectorAll("main *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1 &&
    !e.closest(".scroll") && !e.closest("svg")).map((e) => e.outerHTML.slice(0, 80))"""
# Contrast of WCAG between the colour of text and the first background below it, for elements with text of their own.
CONTRAST = """() => {
    const light = (color) => {
        const [r, g, b] = color.match(/[\\d.]+/g).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const background = (e) => {
        for (; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if (!/^rgba.*, 0\\)$/.test(color)) return color;
        }
        return getComputedStyle(document.documentElement).backgroundColor;
    };
    return [...document.querySelectorAll("body *:not(script):not(svg *):not(option)")]
        .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
        .map((e) => {
            const [a, b] = [light(getComputedStyle(e).color), light(background(e))].sort((x, y) => y - x);
            return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 90)];
        })
        .sort((a, b) => a[0] - b[0])[0];
}"""


class Tab:
    """A page with what it reported and asked for."""

    def __init__(self, browser: Any, out: Path, **options: Any) -> None:
        self.page = browser.new_context(**options).new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = (out / "report.html").as_uri()
        self.page.goto(self.url)

    def screenshot(self, name: str, full_page: bool = True) -> None:
        """Keep a picture of the page in the folder of the environment variable SCREENSHOTS, for people who change the page."""
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=full_page)


def test_page_opens_without_errors_and_without_network(browser: Any, full: Path) -> None:
    tab = Tab(browser, full, viewport={"width": 1280, "height": 900})
    paint_ms = tab.page.evaluate(PAINT)
    print(f"first paint {paint_ms:.0f} ms")  # pytest -s shows it; the clock of a busy machine decides no test
    tab.page.locator("figure.plot svg").first.wait_for()
    assert tab.page.locator("figure.plot svg").count() == 5, "two metrics with numbers against two costs, and tasks of one"
    assert tab.messages == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [tab.url]
    tab.page.locator("#gallery img").last.scroll_into_view_if_needed()
    assert tab.page.locator("#gallery img").last.evaluate(DECODED) == 512, "pictures load when they are seen"


def test_text_comes_before_the_pictures_are_read(browser: Any, full: Path) -> None:
    """What makes the first paint fast: tables are at the start of the file, pictures and scripts behind them."""
    page = (full / "report.html").read_text()
    assert page.index("<table") < page.index("data:image/jpeg") and page.index("<table") < 40_000
    assert page.rindex("data:image/jpeg") < page.index("<script>")


def test_plots_show_intervals_and_the_frontier(browser: Any, full: Path) -> None:
    tab = Tab(browser, full, viewport={"width": 1280, "height": 900})
    plot = tab.page.locator("figure.plot svg").first
    plot.wait_for()
    for kind, count in {"x-rule": 6, "y-rule": 6}.items():
        lines = plot.locator(f"[aria-label={'rule'}]")
        assert lines.count() == 2, kind
        lengths = [line.evaluate("l => l.getBBox().height + l.getBBox().width") for line in lines.locator("line").all()]
        assert len(lengths) == 2 * count and min(lengths) > 1, "an interval without length is not seen"
    assert plot.locator("[aria-label=line] path").count() == 1
    assert plot.locator("[aria-label=dot] circle").count() == 6
    assert plot.evaluate("s => getComputedStyle(s.querySelector('[aria-label=dot] circle')).fill") == "rgb(47, 102, 176)", (
        "the colour of the page"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_is_readable(browser: Any, full: Path, scheme: str, width: int) -> None:
    tab = Tab(browser, full, viewport={"width": width, "height": 780}, color_scheme=scheme)
    tab.page.locator("figure.plot svg").first.wait_for()
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width
    assert tab.page.evaluate(HIDDEN_BY_WIDTH) == []
    contrast, element = tab.page.evaluate(CONTRAST)
    assert contrast >= 4.5, element
    tab.screenshot(f"{scheme}-{width}", full_page=False)
    for section in ("quality-against-cost", "tasks", "pictures", "lineage", "how-to-reproduce"):
        tab.page.evaluate(f"document.getElementById('{section}').scrollIntoView()")
        tab.screenshot(f"{scheme}-{width}-{section}", full_page=False)
    assert tab.messages == []


def test_lightbox_works_by_keyboard(browser: Any, full: Path) -> None:
    tab = Tab(browser, full, viewport={"width": 1280, "height": 900})
    links = tab.page.locator("#gallery a")
    links.nth(1).focus()
    tab.page.keyboard.press("Enter")
    box = tab.page.locator("#lightbox")
    box.wait_for()

    def alt() -> Any:
        return box.locator("img").get_attribute("alt")

    assert alt() == links.nth(1).locator("img").get_attribute("alt")
    assert box.locator("img").evaluate(DECODED) == 512
    assert box.bounding_box() == {"x": 0, "y": 0, "width": 1280, "height": 900}
    assert box.locator(".close").bounding_box()["y"] < 870, "the buttons are inside of the window"
    tab.screenshot("lightbox", full_page=False)
    for key, index in (("ArrowRight", 2), ("ArrowDown", 8), ("ArrowLeft", 7), ("ArrowUp", 1), ("ArrowUp", 23 * 6 + 1), ("ArrowDown", 1)):
        tab.page.keyboard.press(key)
        assert alt() == links.nth(index).locator("img").get_attribute("alt"), key
    assert box.locator("a").get_attribute("href") == links.nth(1).evaluate("a => a.href")
    narrow = box.locator("img").bounding_box()["width"]
    tab.page.keyboard.press("z")
    assert box.locator("img").bounding_box()["width"] > 1.8 * narrow
    tab.page.keyboard.press("Escape")
    assert not box.is_visible()
    assert links.nth(1).evaluate("a => a === document.activeElement"), "the focus returns to the picture"
    assert tab.messages == [] and tab.page.url == tab.url


def test_swipe_works_by_keyboard_and_by_pointer(browser: Any, full: Path) -> None:
    tab = Tab(browser, full, viewport={"width": 1280, "height": 900})

    def source(artifact: int, prompt: int) -> Any:
        return tab.page.locator(f"a[data-artifact='{artifact}'][data-prompt='{prompt}'] img").get_attribute("src")

    left, right = tab.page.locator(".stage img.left"), tab.page.locator(".stage img.right")
    assert left.get_attribute("src") == source(0, 0) and right.get_attribute("src") == source(1, 0)
    tab.page.locator("select[name=right]").focus()
    tab.page.keyboard.press("ArrowDown")
    tab.page.locator("select[name=prompt]").select_option("5")
    assert left.get_attribute("src") == source(0, 5) and right.get_attribute("src") == source(2, 5)

    def cut() -> Any:
        return left.evaluate("i => getComputedStyle(i).clipPath")

    tab.page.locator("#swipe [type=range]").focus()
    before = cut()
    for _ in range(10):
        tab.page.keyboard.press("ArrowRight")
    assert before != cut() and tab.page.locator("#swipe [type=range]").input_value() == "60"
    stage = tab.page.locator(".stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    tab.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 50)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    tab.page.mouse.up()
    assert tab.page.locator("#swipe [type=range]").input_value() == "25"
    tab.screenshot("swipe", full_page=False)
    assert tab.messages == []


def test_page_without_scripts_has_tables_and_pictures(browser: Any, full: Path) -> None:
    tab = Tab(browser, full, viewport={"width": 1280, "height": 900}, java_script_enabled=False)
    assert tab.page.locator("table").count() > 10 and tab.page.locator("#gallery img").count() == 144
    assert not tab.page.locator("#swipe").is_visible()
    assert "Plots need JavaScript" in tab.page.locator("figure.plot").first.inner_text()
    assert (tab.page.locator("#gallery a").first.get_attribute("href") or "") == "pictures/00-teacher/0000.png"


def test_strange_names_stay_text(browser: Any, tmp_path: Path) -> None:
    import json

    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    data = handmade.write(tmp_path, artifacts=2, prompts=2, side=32)
    for result in data["results"]:
        result["name"] = evil
        result["quality"] = {evil: {"overall": 0.5, evil: 0.5, "b": 0.4}}
    for prompt in data["prompts"]:
        prompt["prompt"] = evil
    (tmp_path / "bench.json").write_text(json.dumps(data))
    write_report(tmp_path)
    dialogs: list[str] = []
    tab = Tab(browser, tmp_path)
    tab.page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    tab.page.locator("figure.plot svg").first.wait_for()
    tab.page.locator("#gallery a").first.click()
    tab.page.locator("#lightbox").wait_for()
    assert tab.page.locator("img[onerror]").count() == 0 and dialogs == [] and tab.messages == []
    assert evil in (tab.page.locator("#lightbox .caption").text_content() or "")
    assert evil in (tab.page.locator("figure.plot svg").first.text_content() or "")
