"""Export from files: halved constants, external data and quantized text encoders, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from flashgen.artifact.store import Artifact
from flashgen.export import write
from flashgen.recipe.load import load
from flashgen.stages.base import run
from flashgen.stages.export import Export
from flashgen.stages.quantize import Quantize
from tests import runs


def test_weights_of_students_without_codes_are_halved_too(tiny_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("shapes-demo", ["bench.per_task=0"])
    plain = run(Export, {"student": tiny_student.path}, tmp_path / "plain", recipe)
    monkeypatch.setattr(write, "HALF_BYTES", 0)
    half = run(Export, {"student": tiny_student.path}, tmp_path / "half", recipe)
    assert min(half.manifest.metrics["psnr_db"].values()) >= 60
    for part, size in half.manifest.metrics["bytes"].items():
        assert size < 0.85 * plain.manifest.metrics["bytes"][part], part


@pytest.mark.parametrize("symmetric", [False, True])  # without zero points and bias a product has no inputs after its scales
def test_quantized_encoders_and_halved_constants_compute_what_torch_does(
    symmetric: bool, tiny_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "HALF_BYTES", 0)
    monkeypatch.setattr(write, "EXTERNAL_BYTES", 0)
    settings = ["quantize.group=16", "quantize.encoder_bits=4", "bench.per_task=0", f"quantize.symmetric={str(symmetric).lower()}"]
    recipe = load("shapes-demo", settings)
    int4 = run(Quantize, {"student": tiny_student.path}, tmp_path / "int4", recipe)
    assert set(int4.manifest.metrics["encoders"]) == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    made = run(Export, {"student": int4.path}, tmp_path / "device", recipe)
    assert min(made.manifest.metrics["psnr_db"].values()) >= 60
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae_decoder"):
        model = ir.load(made.path / part / "model.onnx")
        linears = [node for node in model.graph if node.op_type == "MatMulNBits"]
        assert bool(linears) == (part != "vae_decoder") and (made.path / part / "model.onnx_data").is_file()
        kinds = {v.const_value.dtype for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.size > 64}
        assert ir.DataType.FLOAT16 in kinds
    runs.generate(made.path, ["a red circle"], tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


def test_encoders_beside_integer_products_have_groups(tiny_student: Artifact, tmp_path: Path) -> None:
    settings = ["bits=8", "group=channel", "symmetric=true", "encoder_bits=4"]
    recipe = load("shapes-demo", [f"quantize.{setting}" for setting in settings] + ["bench.per_task=0", "export.psnr_floor_int8_db=1"])
    int8 = run(Quantize, {"student": tiny_student.path}, tmp_path / "int8", recipe)
    made = run(Export, {"student": int8.path}, tmp_path / "device", recipe)
    kinds = {part: {node.op_type for node in ir.load(made.path / part / "model.onnx").graph} for part in ("text_encoder", "transformer")}
    assert "MatMulNBits" in kinds["text_encoder"] and "DynamicQuantizeMatMul" in kinds["transformer"]
    assert made.manifest.metrics["psnr_db"]["text_encoder"] >= 60
