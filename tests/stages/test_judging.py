"""A judge that is no world's serves every stage: validations, choices, floors, and the manifest. The model has no world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashgen.artifact.files import sha256
from flashgen.artifact.store import Artifact
from flashgen.errors import NumericsError, UsageError
from tests import runs
from tests.cli.command import made_by
from tests.stages.chain import MICRO, micro

SCORE = """#!{python}
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
folder = Path(sys.argv[-1])
rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
values = [float(np.asarray(Image.open(folder / row["picture"])).mean()) for row in rows]
with open({log!r}, "a") as log:
    log.write(json.dumps([row["prompt"] for row in rows]) + "\\n")
print(json.dumps({{"overall": sum(values) / len(values), "values": values, "higher_is_better": {higher}}}))
"""
PROMPTS = "\n".join(f"a boat number {n}" for n in range(12)) + "\n"


def program(path: Path, higher: bool = True) -> str:
    """A program that calls the brighter or the darker pictures better; the spec of its judge. It logs the prompts it is given."""
    import sys

    path.write_text(SCORE.format(python=sys.executable, log=str(path.with_suffix(".log")), higher=higher))
    path.chmod(0o755)
    return f"command:{path}"


def asked(path: Path) -> list[list[str]]:
    return [json.loads(line) for line in path.with_suffix(".log").read_text().splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text(PROMPTS)
    return f"prompts_file={file}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return runs.random("tiny", tmp_path_factory.mktemp("teacher"), world=None)


@pytest.fixture(scope="module")
def judged(teacher: Artifact, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    """(student whose best round was chosen by a program, the program)"""
    out = tmp_path_factory.mktemp("judged")
    spec = program(out / "brightness.py")
    words = [word for setting in (*MICRO, prompts, "distill.matching.validate_every=1", "bench.pictures=4") for word in ("--set", setting)]
    made = made_by("distill", teacher.path, "--recipe", "shapes-demo", "--judge", spec, "-o", out / "student", *words)
    return made, out / "brightness.py"


def test_a_program_chooses_the_best_round_and_stands_in_the_manifest(judged: tuple[Artifact, Path]) -> None:
    student, score = judged
    metrics: dict[str, Any] = student.manifest.metrics
    rows = [json.loads(line) for line in (student.path / "stats.jsonl").read_text().splitlines()]
    scores = [row["score"] for row in rows if row["phase"] == "matching" and "score" in row]
    assert scores and metrics["validated"]["best"] >= max(scores) - 1e-6
    assert 0 < metrics["brightness"]["overall"] < 255 and "composition" not in metrics
    known = metrics["judges"]["brightness"]
    assert known["pictures"] == 4 and sha256(score) in known["files"].values()
    *choices, validation = asked(score)
    assert len(validation) == 4 and all(len(choice) == 4 for choice in choices)
    assert not {prompt for choice in choices for prompt in choice} & set(validation)  # the score in the manifest is of other prompts


@pytest.mark.parametrize("higher", [True, False], ids=["brighter", "darker"])
def test_a_program_chooses_the_merge_ratio(judged: tuple[Artifact, Path], prompts: str, tmp_path: Path, higher: bool) -> None:
    spec = program(tmp_path / "score.py", higher)
    recipe = micro(prompts, f"judge={spec}", "finetune.merge_high=[0.1, 0.9]", "finetune.allow_worse=1", "bench.pictures=4")
    metrics = runs.finetune(str(judged[0].path), tmp_path / "out", recipe).manifest.metrics
    merged = {float(name.split()[1]): value for name, value in metrics["choice"].items() if name.startswith("merge")}
    assert len(set(merged.values())) == 2
    assert metrics["merge_high"] == (max if higher else min)(merged, key=lambda ratio: merged[ratio])


@pytest.mark.parametrize("higher", [True, False], ids=["brighter", "darker"])
def test_the_floor_holds_for_both_directions(teacher: Artifact, prompts: str, tmp_path: Path, higher: bool) -> None:
    spec = program(tmp_path / "score.py", higher)
    settings = (prompts, f"judge={spec}", "bench.pictures=4", "distill.matching.iterations=0")
    student = runs.distill(str(teacher.path), tmp_path / "student", micro(*settings))
    made = runs.restructure(str(student.path), tmp_path / "zeros", micro(*settings, "restructure.floor=0.2"), mode="zeros")
    assert made.manifest.metrics["score"]["overall"] > 0
    before, after = (artifact.manifest.metrics["score"]["overall"] for artifact in (student, made))
    worse = (before - after if higher else after - before) / before
    floor = f"restructure.floor={1 - worse + 0.01}" if worse < 1 else "restructure.floor=0.01"
    with pytest.raises(NumericsError, match=f"is {'below' if higher else 'above'} the floor"):
        runs.restructure(str(student.path), tmp_path / "refused", micro(*settings, floor), mode="zeros")


def test_a_floor_by_another_program_is_not_applied(
    judged: tuple[Artifact, Path], prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (prompts, f"judge={program(tmp_path / 'brightness.py', higher=False)}", "bench.pictures=4", "restructure.floor=1.5")
    made = runs.restructure(str(judged[0].path), tmp_path / "zeros", micro(*settings), mode="zeros")
    assert "not by the same judge" in capsys.readouterr().err and made.manifest.metrics["brightness"]["overall"] > 0


def test_quantize_reports_the_score(judged: tuple[Artifact, Path], prompts: str, tmp_path: Path) -> None:
    recipe = micro(prompts, f"judge=command:{judged[1]}", "bench.pictures=4")
    metrics = runs.quantize(str(judged[0].path), tmp_path / "int4", recipe).manifest.metrics
    assert metrics["brightness"]["overall"] > 0 and metrics["judges"]["brightness"]["pictures"] == 4


def test_another_program_is_another_run(judged: tuple[Artifact, Path], teacher: Artifact, prompts: str) -> None:
    student, score = judged
    before = score.read_text()
    settings = (prompts, "distill.matching.validate_every=1", "bench.pictures=4", f"judge=command:{score}")
    keys = []
    for text in (before, before + "# changed\n"):
        score.write_text(text)
        keys.append(runs.prepared("distill", {"teacher": teacher.path}, micro(*settings)).settings())
    score.write_text(before)
    assert keys[0] == student.manifest.recipe and keys[1] != keys[0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("blip:x", "is not known; give one of: world, clip:"),
        ("world", "belongs to no world"),
        ("command:./nothing-there.py", "nothing-there"),
    ],
)
def test_a_judge_that_cannot_be_used_is_an_error_before_any_work(
    teacher: Artifact, prompts: str, tmp_path: Path, spec: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        runs.distill(str(teacher.path), tmp_path / "out", micro(prompts, f"judge={spec}"))
    assert not (tmp_path / "out").exists()
