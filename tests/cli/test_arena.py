"""`flashgen arena` and `bench --judge --arena` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashgen.arena.study import Study
from flashgen.arena.votes import judge_votes
from flashgen.artifact.store import Artifact
from tests.arena.conftest import write_bench
from tests.cli.command import flashgen, refused
from tests.cli.test_commands import measured_at_once
from tests.stages.test_judging import program


def test_a_study_is_built_handed_out_and_analysed(tmp_path: Path) -> None:
    bench, study = write_bench(tmp_path / "bench", ["alpha", "beta"], 6), tmp_path / "study"
    built = flashgen("arena", "build", bench, "--out", study, "--set", "per_rater=4", "--set", "question=Which one?")
    assert built.stdout == f"{study}\n", built.stderr
    assert (Study(study).settings.per_rater, Study(study).settings.question) == (4, "Which one?")
    page = tmp_path / "anna.html"
    assert flashgen("arena", "page", study, "--out", page).stdout == f"{page}\n" and "Which one?" in page.read_text()
    assert "no votes yet" in refused(3, "arena", "analyse", study)
    judge_votes(Study(study), "size", {"alpha": [2.0, 1.0] * 3, "beta": [1.0, 2.0] * 3})
    result = json.loads(flashgen("arena", "analyse", study, "--json").stdout)
    assert result["people"] is None and [row["elo"] for row in result["judges"]["judge:size"]["elo"]] == pytest.approx([1000, 1000])
    assert json.loads((study / "analysis.json").read_text()) == result


def test_what_a_study_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    bench = write_bench(tmp_path / "bench", ["alpha", "beta"], 6)
    assert "per_raters" in refused(2, "arena", "build", bench, "-o", tmp_path / "study", "--set", "per_raters=4")
    assert "NAME=VALUE" in refused(2, "arena", "build", bench, "-o", tmp_path / "study", "--set", "per_rater")
    assert "one of: sd35-flash" in refused(2, "arena", "build", bench, "-o", tmp_path / "study", "--preset", "x")
    assert "the study wants 507" in refused(2, "arena", "build", bench, "-o", tmp_path / "study", "--preset", "sd35-flash")
    assert "holds no study" in refused(3, "arena", "serve", tmp_path)
    assert "cannot be read" in refused(
        3, "arena", "collect", flashgen("arena", "build", bench, "-o", tmp_path / "s").stdout.strip(), "none"
    )


def test_bench_asks_programs_and_builds_a_study(
    tiny_student: Artifact, tiny_teacher: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashgen.stages import bench

    monkeypatch.setattr(bench, "measure", measured_at_once)
    asked = ["bench", str(tiny_student.path), str(tiny_teacher.path), "--per-task", "1", "--arena", str(tmp_path / "study")]
    judges = ["--judge", program(tmp_path / "bright.py"), "--judge", "world"]
    result = flashgen(*asked, *judges, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    first, second = json.loads(result.stdout)["results"]
    assert (
        set(first["quality"]) == {"bright", "composition"}
        and first["quality"]["bright"]["overall"] == second["quality"]["bright"]["overall"]
    )
    assert first["quality_of"]["bright"]["judge"]["files"] and len(first["values"]["bright"]) == 6
    assert len(Study(tmp_path / "study").artifacts) == 2 and "bright" in (tmp_path / "out" / "report.html").read_text()
    judged = ["arena", "build", str(tmp_path / "out"), "--out", str(tmp_path / "judged"), "--judges", "--json"]
    assert json.loads(flashgen(*judged).stdout)["votes_of_judges"] == 12 and json.loads(flashgen(*judged).stdout)["votes_of_judges"] == 0
    analysis = json.loads(flashgen("arena", "analyse", tmp_path / "judged", "--json").stdout)
    assert set(analysis["judges"]) == {"judge:bright", "judge:composition"} and analysis["judges"]["judge:bright"]["ties"] == 6
    assert "add --out DIR" in refused(2, *asked)
    assert "is not known" in refused(2, *asked[:-2], "--judge", "nobody")
