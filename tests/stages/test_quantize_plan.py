"""What flashgen quantize needs: prompts, forward passes, memory and disk, counted from this transformer's own layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashgen.artifact.store import Artifact
from flashgen.errors import UsageError
from flashgen.families.sd3 import SD3
from flashgen.models.footprint import Footprint
from flashgen.models.networks import linears_of
from flashgen.models.pipeline import load_pipeline
from flashgen.quant.layer import Rounding, quantize_layer, stored_tensors
from flashgen.recipe.schema import Recipe
from flashgen.stages.base import prepare, run
from flashgen.stages.describe import describe
from flashgen.stages.quantize import Quantize, streamed
from flashgen.training.calibration import layer_blocks


def having(recipe: Recipe, **changes: object) -> Recipe:
    settings = recipe.quantize.model_dump() | {"prompts": 8} | changes
    return recipe.model_copy(update={"quantize": type(recipe.quantize).model_validate(settings)})


def test_calibration_without_prompts_is_refused(outside_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"quantize needs prompts, and .* belongs to no world"):
        prepare(Quantize, {"student": outside_student.path}, having(recipe, method="gptq"))
    prepare(Quantize, {"student": outside_student.path}, having(recipe))
    (tmp_path / "own.txt").write_text("a red circle\n")
    with_file = recipe.model_copy(update={"prompts_file": tmp_path / "own.txt"})
    assert "prompts_file" in prepare(Quantize, {"student": outside_student.path}, having(with_file, method="gptq")).settings()
    assert "prompts_file" not in prepare(Quantize, {"student": outside_student.path}, having(with_file)).settings()


@pytest.mark.parametrize("changes", [{"method": "gptq"}, {"budget": 5}, {"step_scales": True}, {"budget": 5, "method": "gptq"}])
def test_planned_forwards_are_those_of_the_run(
    changes: dict[str, object], tiny_student: Artifact, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, rows = having(recipe.model_copy(update={"bench": recipe.bench.model_copy(update={"per_task": 0})}), **changes), list[int]()

    def counted(self: SD3, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return output

    monkeypatch.setattr(SD3, "velocity", counted)
    plan = describe(prepare(Quantize, {"student": tiny_student.path}, wanted), tmp_path / "q")
    assert "calibrate" in plan["memory"] and "validate" not in plan["memory"]
    run(Quantize, {"student": tiny_student.path}, tmp_path / "q", wanted)
    assert plan["forwards"] == sum(rows)


def test_planned_codes_and_disk_are_those_that_are_written(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    wanted = having(recipe, encoder_bits=4)
    plan = describe(prepare(Quantize, {"student": tiny_student.path}, wanted), tmp_path / "q")
    assert {"round transformer", "round text_encoder", "round text_encoder_3", "validate"} <= plan["memory"].keys()
    made = run(Quantize, {"student": tiny_student.path}, tmp_path / "q", wanted)
    rewritten = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "quantized")
    files = sum(f.size for f in made.manifest.files if f.path.startswith(rewritten) and f.path.endswith(".safetensors"))
    assert plan["disk_bytes"] == pytest.approx(files, rel=0.1)
    for rounding in (Rounding(16, False), Rounding(256, True)):
        codes = streamed(Footprint(tiny_student).transformer, rounding, lambda _: 4)[1]
        linears = Footprint(tiny_student).transformer.linears.values()
        expected = [stored_tensors(quantize_layer(torch.randn(shape), 4, rounding)).values() for shape in linears]
        assert codes == sum(tensor.nbytes for tensors in expected for tensor in tensors)


def test_plan_counts_moments_of_the_largest_block(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    plan = describe(prepare(Quantize, {"student": tiny_student.path}, having(recipe, method="gptq")), tmp_path / "q")
    layers = linears_of(load_pipeline(tiny_student.path).transformer)
    blocks = layer_blocks(layers, SD3())
    assert plan["memory"]["calibrate"]["moments"] == max(sum(4 * layers[name].in_features ** 2 for name in names) for names in blocks)
