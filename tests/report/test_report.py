"""The report without a browser: what stands in it, what is escaped, how large it is, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image

from flashgen.errors import ArtifactError
from flashgen.report import write_report
from flashgen.report.page import FOLDER
from flashgen.report.pictures import MAX_PICTURES
from flashgen.report.tables import frontier, number
from tests.report import handmade

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&|`[x](javascript:alert(3))\n# <!--"


class Elements(HTMLParser):
    """Every start tag of a page with its attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(out: Path) -> tuple[str, str]:
    write_report(out)
    return (out / "report.html").read_text(), (out / "report.md").read_text()


def change(out: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((out / "bench.json").read_text())
    edit(data)
    (out / "bench.json").write_text(json.dumps(data))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    handmade.write(tmp_path / "bench", artifacts=2, prompts=2, side=32)
    return tmp_path / "bench"


def test_report_has_every_number_with_its_interval(full: Path) -> None:
    page, text = (full / "report.html").read_text(), (full / "report.md").read_text()
    for shown in ("0.540", "[0.513, 0.572]", "0.860", "[0.840, 0.880]", "27.5", "[26.0, 29.5]", "not judged", "19.0"):
        assert shown in page
        assert shown.replace("[", r"\[").replace("]", r"\]") in text
    elements = Elements(page)
    for words in (
        "composition ↑",
        "fid ↓",
        "Lineage of E device-int4",
        "7 to 30, one per prompt",
        "ab" * 32,
        "flashgen bench artifacts/demo",
    ):
        assert words in elements.text
    assert "fid against MiB" in elements.text
    assert {"summary", "quality-against-cost", "tasks", "pictures", "measurements", "lineage", "how-to-reproduce"} <= {
        section.get("id") for section in elements.all("section")
    }


def test_full_report_is_small_and_has_every_picture_with_words(full: Path) -> None:
    assert (full / "report.html").stat().st_size <= 15e6
    assert sum(path.stat().st_size for path in (full / "pictures").rglob("*.png")) > 100e6, "pictures without noise would prove nothing"
    pictures = [image for image in Elements((full / "report.html").read_text()).all("img") if "loading" in image]
    assert len(pictures) == 6 * 24
    assert all(len(image["alt"] or "") > 20 and (image["src"] or "").startswith("data:image/jpeg;base64,") for image in pictures)
    assert re.search("as JPEG of quality [89]0 and at most 512 px", (full / "report.html").read_text())


def test_links_lead_to_the_original_pictures(full: Path) -> None:
    links = [link["href"] or "" for link in Elements((full / "report.html").read_text()).all("a") if "data-prompt" in link]
    in_text = re.findall(r"!\[.*?\]\((pictures/.*?)\)", (full / "report.md").read_text())
    assert links == sorted(links, key=lambda link: (link[-8:], link)) and sorted(links) == sorted(in_text) and len(links) == 144
    assert all((full / unquote(link)).is_file() for link in links)


def test_small_pictures_are_embedded_byte_for_byte(small: Path) -> None:
    import base64

    page, _ = written(small)
    content = (small / "pictures" / "01-student" / "0001.png").read_bytes()
    assert base64.b64encode(content).decode() in page
    assert "All 2 prompts, pictures as they are" in page


def test_no_text_of_strangers_becomes_an_element(small: Path) -> None:
    clean = Elements(written(small)[0])

    def everywhere(data: dict[str, Any]) -> None:
        data["command"] = EVIL
        data["machine"] = {"cpu": EVIL, EVIL: EVIL}
        data["settings"] = {"seed": EVIL}
        for prompt in data["prompts"]:
            prompt.update(prompt=EVIL, task=EVIL)
        for result in data["results"]:
            result.update(name=EVIL, artifact=EVIL, engine=EVIL, device=EVIL, size_px=EVIL)
            result["bytes"] = {EVIL: 1e6}
            result["latency_s"][EVIL] = 1.0
            result["lineage"] = [dict.fromkeys(("stage", "path", "version", "digest"), EVIL)]
            result["quality"] = {EVIL: {"overall": 0.5, EVIL: 0.4}}
            result["quality_of"] = {EVIL: {"judge": {EVIL: EVIL}, "pictures": 2}}
            result["values"] = {EVIL: [1.0, 0.0]}
            result["fidelity"] = {"reference": EVIL, EVIL: {"mean": 1.0, "interval": [0.0, 2.0]}}

    change(small, everywhere)
    page, text = written(small)
    evil = Elements(page)
    for tag in ("script", "img", "a", "iframe"):
        assert len(evil.all(tag)) == len([e for e in clean.all(tag)]), f"{tag} elements came out of the text"
    assert not [name for _, attributes in evil.tags for name in attributes if name.startswith("on")]
    assert not [a for a in evil.all("a") if ":" in (a.get("href") or "")]
    assert evil.text.count("<script>alert(1)</script>") > 20, "shown letter by letter"
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["scatters"][0]["metric"] == EVIL
    outside = re.sub(r"(?m)^    .*$", "", text)  # an indented block shows its text as it is
    assert re.search(r"<script|<img|(?<!\\)\[x", outside) is None
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows[:4]} == {len(re.findall(r"(?<!\\)\|", rows[0]))}


def test_policy_allows_only_the_scripts_of_the_page(small: Path) -> None:
    import base64

    page, _ = written(small)
    policy = next(m["content"] or "" for m in Elements(page).all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "http" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 3
    assert all(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" in policy for s in scripts)
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]


def test_libraries_are_the_ones_of_the_table() -> None:
    table = (FOLDER / "vendor" / "README.md").read_text()
    for path in (FOLDER / "vendor").glob("*.js"):
        assert f"`{path.name}`" in table and hashlib.sha256(path.read_bytes()).hexdigest() in table


def test_report_leaves_out_what_is_missing(tmp_path: Path) -> None:
    data = {"version": 1, "results": [{"artifact": "a/b", "name": "b", "quality": {"composition": "not judged"}}]}
    (tmp_path / "bench.json").write_text(json.dumps(data))
    page, text = written(tmp_path)
    sections = [section.get("id") for section in Elements(page).all("section")]
    assert sections == ["summary"]
    assert "not judged" in text and "Lineage" not in text and "None" not in text + Elements(page).text


def test_numbers_that_are_not_finite_are_shown_and_not_plotted(small: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["results"][0]["quality"]["fid"]["overall"] = math.nan
        data["results"][1]["fidelity"]["psnr_db"] = {"mean": math.inf, "interval": [math.inf, math.inf]}
        data["results"][1]["quality_interval"]["fid"]["overall"] = [math.nan, 3.0]

    change(small, edit)
    page, _ = written(small)
    island = json.loads(page.split('id="data">')[1].split("</script>")[0])
    fid = next(plot for plot in island["scatters"] if plot["metric"] == "fid")
    assert [(p["letter"], p["ys"]) for p in fid["points"]] == [("B", None)]
    assert "inf" in Elements(page).text


def test_missing_picture_is_said(small: Path) -> None:
    (small / "pictures" / "01-student" / "0001.png").unlink()
    page, text = written(small)
    assert page.count("no picture") == 1 and text.count("](pictures/") == 3


def test_many_prompts_are_thinned_out_evenly(tmp_path: Path) -> None:
    data = handmade.bench(artifacts=1, prompts=600)
    data["results"][0]["pictures"] = "pictures/a"
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    for index in range(600):
        Image.new("RGB", (2, 2)).save(tmp_path / "pictures" / "a" / f"{index:04d}.png")
    (tmp_path / "bench.json").write_text(json.dumps(data))
    page, _ = written(tmp_path)
    assert f"{MAX_PICTURES} of 600 prompts" in page
    seen = [int(link["data-prompt"] or "") for link in Elements(page).all("a") if "data-prompt" in link]
    assert len(seen) == MAX_PICTURES and max(seen) > 595 and max(b - a for a, b in pairwise(seen)) == 3


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda out: (out / "bench.json").unlink(), "bench.json cannot be read (No such file or directory)"),
    "cut": (
        lambda out: (out / "bench.json").write_text((out / "bench.json").read_text()[:500]),
        "not a whole bench.json of version 1 (Inv",
    ),
    "binary": (lambda out: (out / "bench.json").write_bytes(b"\xff\x00PNG"), "not a whole bench.json of version 1 (Invalid JSON"),
    "foreign": (lambda out: (out / "bench.json").write_text('{"a": 1}'), "(version: Field required)"),
    "other version": (lambda out: change(out, lambda d: d.update(version=2)), "(version: Input should be 1)"),
    "no artifact": (lambda out: change(out, lambda d: d.update(results=[])), "(results: List should have at least 1 item"),
    "wrong type": (
        lambda out: change(out, lambda d: d["results"][1].update(steps="many")),
        "(results.1.steps: Input should be a valid int",
    ),
    "cut picture": (
        lambda out: (out / "pictures/00-teacher/0000.png").write_bytes((out / "pictures/01-student/0000.png").read_bytes()[:900]),
        "0000.png is not a whole PNG",
    ),
    "no picture": (lambda out: (out / "pictures/00-teacher/0000.png").write_text("<svg>"), "0000.png is not a whole PNG"),
    "picture outside": (
        lambda out: change(out, lambda d: d["results"][0].update(pictures="../../etc")),
        "names pictures outside of",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_bench_is_one_sentence(fault: str, small: Path) -> None:
    damage, sentence = BROKEN[fault]
    damage(small)
    with pytest.raises(ArtifactError) as caught:
        write_report(small)
    message = str(caught.value)
    assert sentence in message and "run flashgen bench again" in message and "\n" not in message
    assert not (small / "report.html").exists()


def test_frontier_is_what_no_other_reaches_for_less() -> None:
    assert frontier([(3, 0.9), (1, 0.5), (2, 0.5), (2, 0.7), (4, 0.9), (0.5, 0.1)]) == [5, 1, 3, 0]
    assert frontier([(1, 0.5), (1, 0.6)]) == [1]
    assert frontier([]) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.8125, "0.812"), (12.345, "12.3"), (1234.5, "1234"), (0.00123, "0.00123"), (0.0, "0.00"), (-1.5, "-1.50"), (None, "")],
)
def test_number_has_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_interval_has_the_decimals_of_its_number() -> None:
    assert number(0.86, interval=(0.8444, 1.0)) == "0.860\n[0.844, 1.000]"


def test_a_noisy_machine_is_said_beside_the_latencies(tmp_path: Path) -> None:
    handmade.write(tmp_path, 2, 2, 16)
    assert not any("too noisy" in text for text in written(tmp_path))
    change(tmp_path, lambda data: data["machine"]["noise"].update(noisy=True))
    assert all("too noisy for exact latencies" in text for text in written(tmp_path))
