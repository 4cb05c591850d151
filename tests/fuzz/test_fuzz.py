"""The short form of `make fuzz`: the same inputs, a fixed choice of them."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as st

from flashgen.artifact.store import Artifact
from tests.fuzz import inputs

FIXED = how(max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def test_no_command_line_and_no_recipe_is_a_bug(tiny_student: Artifact, handmade_device: Artifact, tmp_path: Path) -> None:
    artifacts, manifest = [tiny_student.path, handmade_device.path], tiny_student.manifest.model_dump(mode="json")
    codes: dict[int, int] = {}

    @FIXED
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        code, message = inputs.outcome(data.draw(inputs.command_lines(tmp_path, artifacts, manifest)))
        codes[code] = codes.get(code, 0) + 1

    with inputs.stopped():
        fuzz()
    assert {0, 2, 3, 5} <= codes.keys(), codes
