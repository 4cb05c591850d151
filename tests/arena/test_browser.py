"""The page in headless Chromium, served and as one file."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashgen.arena.analysis import analyse
from flashgen.arena.static import collect, export
from flashgen.arena.study import Study
from flashgen.arena.votes import counted
from tests.arena.conftest import PROMPT
from tests.arena.test_server import Server, free_port

pytestmark = pytest.mark.browser
READY = "#pair:not(.waiting)"
WAITING = "Object.keys(localStorage).filter((k) => k.endsWith('-waiting')).flatMap((k) => JSON.parse(localStorage[k])).length"
Make = Callable[..., Study]


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A page whose console errors, script errors and requests are kept in `errors` and `asked`."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(60_000)
    page.errors, page.asked = [], []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("dialog", lambda dialog: dialog.accept())
    yield page
    page.close()


@pytest.fixture
def served(make_study: Make) -> Iterator[tuple[Study, Server]]:
    study = make_study(prompts=6, per_rater=8, gold=0.1, repeats=0.1)
    server = Server(study.folder, free_port())
    yield study, server
    server.end(signal.SIGINT)


def start(tab: Any, url: str, name: str = "Anna") -> None:
    tab.goto(url)
    tab.fill("#name", name)
    tab.keyboard.press("Enter")
    tab.locator(READY).wait_for()


def press(tab: Any, key: str, then: str) -> None:
    """Press `key` and wait until the counter says `then`."""
    tab.locator(READY).wait_for()
    tab.keyboard.press(key)
    tab.locator("#count", has_text=then).wait_for()
    tab.locator(READY).wait_for()


def test_keys_vote_undo_and_a_reload_goes_on(served: tuple[Study, Server], tab: Any) -> None:
    study, server = served
    start(tab, server.url)
    press(tab, "ArrowLeft", "2 of 10")
    press(tab, "ArrowDown", "3 of 10")
    press(tab, "z", "2 of 10")
    press(tab, "ArrowRight", "3 of 10")
    tab.reload()
    tab.locator("#count", has_text="3 of 10").wait_for()
    plan = [c.id for c in study.plan(0)]
    assert {row["comparison"]: row["choice"] for row in counted(study)} == {plan[0]: "left", plan[1]: "right"}
    for number in range(4, 11):
        press(tab, "ArrowLeft", f"{number} of 10")
    tab.keyboard.press("ArrowLeft")
    tab.locator("#outcome", has_text="All 10 votes are recorded").wait_for()
    assert len(counted(study)) == 10
    assert tab.errors == [] and all(url.startswith((server.url, "data:")) for url in tab.asked)


def test_200_votes_of_5_raters_survive_kill_9_of_the_server(make_study: Make, browser: Any) -> None:
    study, port = make_study("low high", prompts=40, per_rater=40, gold=0, repeats=0), free_port()
    server = Server(study.folder, port)
    tabs = [browser.new_context().new_page() for _ in range(5)]
    for number, tab in enumerate(tabs):
        tab.set_default_timeout(60_000)
        start(tab, server.url, f"rater {number}")
    random, plans = np.random.default_rng(0), [study.plan(number) for number in range(5)]
    for number in range(40):
        if number == 20:
            server.end(signal.SIGKILL)
            acknowledged = 100 - sum(tab.evaluate(WAITING) for tab in tabs)
            assert 0 < acknowledged <= len(counted(study)) <= 100
            server = Server(study.folder, port)
        for tab, plan in zip(tabs, plans, strict=True):
            is_right = (plan[number].right == 1) == (random.random() < 0.8)  # artifact 1, "high", wins four of five
            tab.locator(READY).wait_for()
            tab.keyboard.press("ArrowRight" if is_right else "ArrowLeft")
        for tab in tabs if number < 39 else ():
            tab.locator("#count", has_text=f"{number + 2} of 40").wait_for()
    for tab in tabs:
        tab.locator("#outcome", has_text="All 40 votes are recorded").wait_for()
        tab.context.close()
    server.end(signal.SIGINT)
    assert len(counted(study)) == 200
    people = analyse(study.folder, replicates=100)["people"]
    assert [row["artifact"] for row in people["elo"]] == ["high", "low"] and people["differences"][0]["interval"][1] < 0


def test_a_lost_connection_keeps_votes_and_sends_them_again(served: tuple[Study, Server], tab: Any) -> None:
    study, server = served
    start(tab, server.url)
    tab.route("**/api/vote", lambda route: route.abort())
    press(tab, "ArrowLeft", "2 of 10")
    press(tab, "ArrowRight", "3 of 10")
    tab.locator("#state", has_text="2 votes wait").wait_for()
    tab.reload()  # even so
    tab.locator("#count", has_text="3 of 10").wait_for()
    assert not (study.folder / "votes.jsonl").read_text().count("comparison")
    tab.unroute("**/api/vote")
    tab.locator("#state:not(.late)").wait_for(state="attached")
    assert [row["choice"] for row in counted(study)] == ["left", "right"]


def test_a_taken_name_is_refused_and_another_is_taken(served: tuple[Study, Server], browser: Any, tab: Any) -> None:
    start(tab, served[1].url)
    other = browser.new_page()
    other.goto(served[1].url)
    other.fill("#name", "anna")
    other.keyboard.press("Enter")
    other.locator("#refused", has_text="choose another name").wait_for()
    other.fill("#name", "Ben")
    other.keyboard.press("Enter")
    other.locator(READY).wait_for()
    other.close()


@pytest.mark.parametrize(("width", "height"), [(360, 640), (1280, 800), (740, 360)])
def test_a_phone_sees_both_pictures_whole_and_taps(
    served: tuple[Study, Server], browser: Any, tmp_path: Path, width: int, height: int
) -> None:
    phone = browser.new_page(viewport={"width": width, "height": height}, has_touch=True)
    phone.set_default_timeout(60_000)
    start(phone, served[1].url)
    inside = """() => ["left", "right", "tie", "undo", "prompt"].every((id) => {
        const box = document.getElementById(id).getBoundingClientRect();
        return box.width > 40 && box.left >= 0 && box.right <= innerWidth && box.top >= 0 && box.bottom <= innerHeight; })"""
    assert phone.evaluate(inside)
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight")
    assert phone.evaluate("document.querySelector('#left img').getBoundingClientRect().height") > 100
    phone.tap("#right")
    phone.locator("#count", has_text="2 of 10").wait_for()
    phone.close()


def test_a_prompt_of_strangers_is_text(make_study: Make, tmp_path: Path, tab: Any) -> None:
    study = make_study("alpha beta", prompts=1, gold=0)
    start(tab, export(study.folder, tmp_path / "page.html").as_uri())
    assert tab.text_content("#prompt") == PROMPT and tab.locator("#prompt script").count() == 0
    assert tab.errors == []


def test_one_file_works_without_network_and_its_votes_come_back(make_study: Make, tmp_path: Path, tab: Any) -> None:
    study = make_study(prompts=6, per_rater=8, gold=0.1, repeats=0.1)
    page = export(study.folder, tmp_path / "page.html")
    start(tab, page.as_uri(), "Zoë & co")
    press(tab, "ArrowDown", "2 of 10")
    tab.reload()
    tab.click("#join button")
    for number in range(3, 11):
        press(tab, "ArrowRight", f"{number} of 10")
    tab.keyboard.press("ArrowLeft")
    with tab.expect_download() as download:
        tab.click("#save")
    download.value.save_as(tmp_path / "votes.jsonl")
    assert collect(study.folder, [tmp_path / "votes.jsonl"]) == 10
    by_comparison = {row["comparison"]: row for row in counted(study)}
    assert [by_comparison[c.id]["choice"] for c in study.plan(0)] == ["tie", *["right"] * 8, "left"]
    assert {row["rater"] for row in by_comparison.values()} == {"Zoë & co"}
    assert tab.errors == [] and all(url.startswith(("file:", "data:", "blob:")) for url in tab.asked)
