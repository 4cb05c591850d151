"""The short form of `make fuzz`: the same inputs, a fixed choice of them."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import HealthCheck, example, given
from hypothesis import settings as how
from hypothesis import strategies as st

from flashgen.artifact.store import Artifact
from flashgen.errors import NumericsError
from flashgen.quant.pack import dequantize
from flashgen.quant.rounding import Method, quantize_groups
from tests.fuzz import inputs

FIXED = how(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def test_no_command_line_recipe_or_manifest_is_a_bug(tiny_student: Artifact, tiny_teacher: Artifact, tmp_path: Path) -> None:
    artifacts, manifest = [tiny_student.path, tiny_teacher.path], tiny_student.manifest.model_dump(mode="json")
    codes: dict[int, int] = {}

    @FIXED
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        code, _ = inputs.outcome(data.draw(inputs.command_lines(tmp_path, artifacts, manifest)))
        codes[code] = codes.get(code, 0) + 1

    with inputs.stopped():
        fuzz()
    assert {0, 2, 3, 5} <= codes.keys(), codes


@FIXED
@given(
    st.integers(1, 5), st.integers(0, 70), st.integers(0, 9), st.integers(-1, 70), st.booleans(), st.sampled_from(["none", "mse", "hqq"]),
    st.sampled_from([0.0, 1e-30, 1.0, 60000.0, 1e38, torch.inf, torch.nan]),
)  # fmt: skip
@example(2, 40, 4, 16, False, "mse", 1.0)
def test_weights_of_any_shape_become_codes_of_that_shape_or_are_refused(
    n: int, k: int, bits: int, group: int, symmetric: bool, method: Method, scale: float
) -> None:
    weight = torch.linspace(-1, 1, n * k).reshape(n, k) * scale
    try:
        rounded = dequantize(quantize_groups(weight, bits, group, symmetric, method))
    except (ValueError, NumericsError):
        assert bits not in (2, 3, 4, 8) or group < 16 or group & (group - 1) or not k or method == "hqq" or not 0 <= scale < torch.inf
    else:
        assert rounded.shape == weight.shape and bool(torch.isfinite(rounded).all())
