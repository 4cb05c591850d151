from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgen.arena.static import collect, export
from flashgen.arena.study import Study
from flashgen.arena.votes import counted, line_of, opened
from flashgen.errors import ArtifactError, UsageError
from tests.arena.conftest import PROMPT

Make = Callable[..., Study]


def island(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id="study">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def save(page: Path, file: Path, name: str = "Anna", token: str = "a" * 32, count: int = 99, **head: Any) -> Path:
    """What the page saves after the first `count` pairs."""
    data = island(page)
    rows = [{"kind": "rater", "study": data["study"], "slot": data["slot"], "rater": name, "token": token} | head]
    rows += [
        {"comparison": c["id"], "choice": "left", "seconds": 1.25, "time": "2026-01-01T00:00:00Z"} for c in data["comparisons"][:count]
    ]
    file.write_text("".join(map(line_of, rows)))
    return file


def test_the_page_is_one_file_and_a_prompt_cannot_leave_its_data(make_study: Make, tmp_path: Path) -> None:
    study = make_study(prompts=3, per_rater=9)
    page = export(study.folder, tmp_path / "page.html")
    text, data = page.read_text(), island(page)
    assert PROMPT in {c["prompt"] for c in data["comparisons"]} and PROMPT not in text and "<script>alert" not in text
    assert not re.search(r'(src|href)="(?!data:)', text) and "connect-src" not in text and "default-src 'none'" in text
    assert not re.search("alpha|beta|gamma", text)
    assert {c[side] for c in data["comparisons"] for side in ("left", "right")} == data["pictures"].keys()


def test_votes_come_back_once_and_pages_and_raters_take_different_places(make_study: Make, tmp_path: Path) -> None:
    study = make_study()
    pages = [export(study.folder, tmp_path / f"{i}.html") for i in range(2)]
    with opened(study) as votes:
        assert votes.join("Ben", "b" * 32).slot == 2
    assert [island(page)["slot"] for page in pages] == [0, 1]
    files = [save(page, tmp_path / f"{i}.jsonl", f"rater {i}") for i, page in enumerate(pages)]
    total = sum(len(study.plan(slot)) for slot in range(2))
    assert collect(study.folder, files) == total and collect(study.folder, files[:1]) == 0
    rows = counted(study)
    assert len(rows) == total and {row["rater"] for row in rows} == {"rater 0", "rater 1"}
    assert rows[0]["seconds"] == 1.25 and {row["kind"] for row in rows} == {"pair", "repeat", "gold"}


def test_a_cut_file_loses_its_last_vote_alone(make_study: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study()
    file = save(export(study.folder, tmp_path / "page.html"), tmp_path / "v.jsonl", count=10)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert collect(study.folder, [file]) == 9 and "line 11 is incomplete" in capsys.readouterr().err
    file.write_bytes(whole)
    assert collect(study.folder, [file]) == 1


def test_raters_of_one_name_are_told_apart(make_study: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study()
    page = export(study.folder, tmp_path / "page.html")
    files = [save(page, tmp_path / f"{token}.jsonl", token=token * 32, count=4) for token in "ab"]
    assert collect(study.folder, files) == 8 and collect(study.folder, files) == 0
    assert {row["rater"] for row in counted(study)} == {"Anna", "Anna (2)"} and "now called Anna (2)" in capsys.readouterr().err


def test_files_that_are_no_votes_of_the_study_add_nothing(make_study: Make, tmp_path: Path) -> None:
    study = make_study()
    page = export(study.folder, tmp_path / "page.html")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for file, message in (
        (empty, "no file of votes"),
        (tmp_path / "missing.jsonl", "cannot be read"),
        (save(page, tmp_path / "a.jsonl", study="other"), "another study"),
        (save(page, tmp_path / "b.jsonl", slot=7), "no file of votes"),
        (page, "no file of votes"),
    ):
        with pytest.raises(ArtifactError, match=message):
            collect(study.folder, [file])
    with pytest.raises(UsageError, match="for programs"):
        collect(study.folder, [save(page, tmp_path / "c.jsonl", "judge:clip")])
    with pytest.raises(ArtifactError, match="no votes yet"):
        counted(study)


def test_a_page_that_was_handed_out_is_not_overwritten(make_study: Make, tmp_path: Path) -> None:
    study = make_study()
    export(study.folder, tmp_path / "page.html")
    with pytest.raises(UsageError, match="exists"):
        export(study.folder, tmp_path / "page.html")
    with pytest.raises(UsageError, match="its folder does not exist"):
        export(study.folder, tmp_path / "no" / "page.html")
