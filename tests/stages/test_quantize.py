"""flashgen quantize with calibration: GPTQ, budgets, and what reaches the exported graph."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from safetensors.torch import load_file, save_file

from flashgen.artifact.store import Artifact, versions
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import ArtifactError, UsageError
from flashgen.export.write import put_factors, read_codes
from flashgen.flow.grid import shifted_grid
from flashgen.models.sample import load_pipeline, sample
from flashgen.recipe.schema import Recipe
from flashgen.stages import export, quantize
from flashgen.stages.calibrate import budget_bytes
from flashgen.training import calibration


def having(recipe: Recipe, **changes: object) -> Recipe:
    settings = recipe.quantize.model_dump() | {"prompts": 8} | changes
    return recipe.model_copy(update={"quantize": type(recipe.quantize).model_validate(settings)})


def test_a_budget_is_kept_and_the_whole_table_is_in_the_artifact(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    made = quantize.run(str(tiny_student.path), tmp_path / "q", having(recipe, budget=4.9, method="gptq"), 0, False)
    layers = json.loads((made.path / "quantized" / "layers.json").read_text())
    table = json.loads((made.path / "quantized" / "allocation.json").read_text())
    assert sorted(name for row in table.values() for name in row["layers"]) == sorted(layers)
    assert all({layers[name]["bits"] for name in row["layers"]} == {row["bits"]} for row in table.values())
    assert len({spec["bits"] for spec in layers.values()}) > 1
    assert (made.path / "quantized" / "allocation.png").stat().st_size > 5000
    tensors = load_file(made.path / "quantized" / "transformer.safetensors")
    assert sum(row["bytes"][str(row["bits"])] for row in table.values()) == sum(t.nbytes for t in tensors.values())
    assert 4.4 < made.manifest.metrics["mean_bits"] <= 4.9 and 0 < made.manifest.metrics["latent_error"] < 1


def test_another_budget_measures_no_damage_again(
    tiny_student: Artifact, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(version: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / f"q/v{version:04d}/quantized/allocation.json").read_text())
        return {group: row["damage"] for group, row in found.items()}

    quantize.run(str(tiny_student.path), tmp_path / "q", having(recipe, budget=4.9), 0, False)
    whole, asked = calibration.Calibration.damage, list[str]()

    def counted(self: calibration.Calibration, rows: slice = slice(None)) -> float:
        asked.append("")
        return whole(self, rows)

    monkeypatch.setattr(calibration.Calibration, "damage", counted)
    quantize.run(str(tiny_student.path), tmp_path / "q", having(recipe, budget=4.5), 0, False)
    assert len(asked) == 1 and table(2) == table(1)  # of the finished student
    quantize.run(str(tiny_student.path), tmp_path / "q", having(recipe, budget=4.9, prompts=4), 0, False)
    assert len(asked) > len(table(1)) and table(3) != table(1)  # other prompts, another table
    (tmp_path / "own.txt").write_text("a red circle\na blue square\n")
    own = recipe.model_copy(update={"prompts_file": tmp_path / "own.txt"})
    asked.clear()
    quantize.run(str(tiny_student.path), tmp_path / "q", having(own, budget=4.5), 0, False)
    assert len(asked) > len(table(1)) and table(4) != table(1)


@pytest.mark.parametrize(
    "changes", [{"bits": 3}, {"bits": 2, "symmetric": True}, {"method": "hqq"}, {"method": "gptq", "bits": 3, "symmetric": True}]
)
def test_every_kind_of_codes_reaches_the_exported_graph(
    changes: dict[str, object], tiny_student: Artifact, recipe: Recipe, tmp_path: Path
) -> None:
    made = quantize.run(str(tiny_student.path), tmp_path / "q", having(recipe, **changes), 0, False)
    device = export.run(str(made.path), tmp_path / "device", recipe, 0, False)  # its own parity check is the assertion
    assert device.manifest.metrics["psnr_db"]["transformer"] >= 60


def test_one_scale_an_output_becomes_products_of_integers(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    whole = {"group": "channel", "bits": 8, "symmetric": True}
    made = quantize.run(str(tiny_student.path), tmp_path / "q", having(recipe, **whole), 0, False)
    device = export.run(str(made.path), tmp_path / "device", recipe, 0, False)
    kinds = Counter(node.op_type for node in onnx_ir.load(device.path / "transformer" / "model.onnx").graph)
    assert kinds["DynamicQuantizeMatMul"] == device.manifest.metrics["quantized_layers"] and not kinds["MatMulNBits"] + kinds["Gemm"]
    assert 40 < device.manifest.metrics["psnr_db"]["transformer"] < 100  # activations are rounded too
    for change in ({"bits": 4}, {"symmetric": False}, {"method": "gptq"}, {"budget": 8}, {"basis_tolerance": 0.1}):
        with pytest.raises(ValueError, match="group channel is for bits 8, symmetric true and method rtn"):
            having(recipe, **(whole | change))


def test_attention_is_one_operator_a_layer(tiny_student: Artifact, tiny_device: Artifact) -> None:
    kinds = Counter(node.op_type for node in onnx_ir.load(tiny_device.path / "transformer" / "model.onnx").graph)
    blocks = load_pipeline(tiny_student.path).transformer.transformer_blocks
    norms = sum(isinstance(module, RMSNorm) for module in blocks.modules())
    layers = sum(isinstance(module, Attention) for module in blocks.modules())
    assert (kinds["MultiHeadAttention"], kinds["SimplifiedLayerNormalization"], kinds["Softmax"]) == (layers, norms, 0)


def test_the_smallest_budget_there_is_is_named(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the smallest is \d+ bytes, 4\.\d+ mean bits"):
        quantize.run(str(tiny_student.path), tmp_path / "q", having(recipe, budget="2.0"), 0, False)
    assert versions(tmp_path / "q") == []


def test_gptq_and_sensitivity_go_on_where_they_were_interrupted(
    tiny_student: Artifact, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = having(recipe, budget="5", method="gptq")
    whole = quantize.run(str(tiny_student.path), tmp_path / "whole", settings, 0, False)
    measured, moments = calibration.Calibration.damage, calibration.Calibration.moments
    calls: list[str] = []

    def stop_after(limit: int, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: calibration.Calibration, *arguments: object) -> Any:
            calls.append("")
            if len(calls) > limit:
                raise KeyboardInterrupt
            return method(self, *arguments)

        return counted

    for limit, name, method in ((7, "damage", measured), (2, "moments", moments)):
        calls.clear()
        monkeypatch.setattr(calibration.Calibration, name, stop_after(limit, method))
        with pytest.raises(KeyboardInterrupt):
            quantize.run(str(tiny_student.path), tmp_path / "again", settings, 0, False)
        monkeypatch.setattr(calibration.Calibration, name, method)
    monkeypatch.setattr(calibration.Calibration, "moments", stop_after(10**9, moments))
    calls.clear()
    resumed = quantize.run(str(tiny_student.path), tmp_path / "again", settings, 0, False)
    units = len({calibration.unit_of(name) for name in json.loads((whole.path / "quantized" / "layers.json").read_text())})
    assert len(calls) == units - 2  # two were done before
    digest = {f.path: f.sha256 for f in whole.manifest.files if f.path.startswith("quantized/")}
    assert digest == {f.path: f.sha256 for f in resumed.manifest.files if f.path.startswith("quantized/")}


@pytest.mark.parametrize(("text", "size"), [("4", 500.0), ("4.25", 531.25), ("1MB", 1e6), ("1.5 KiB", 1536.0), ("2gb", 2e9)])
def test_a_budget_is_bits_or_bytes(text: str, size: float) -> None:
    assert budget_bytes(text, 1000) == size


def test_a_budget_of_neither_is_refused(recipe: Recipe) -> None:
    for wrong in ("", "four", "4 bits", "-1", "3TB"):
        with pytest.raises(ValueError, match="budget"):
            having(recipe, budget=wrong)


@pytest.mark.parametrize("changes", [{}, {"budget": "4.9", "method": "gptq"}])
def test_adaln_on_a_shared_basis_is_smaller_and_reaches_the_graph(
    changes: dict[str, object], tiny_student: Artifact, recipe: Recipe, tmp_path: Path
) -> None:
    """The random tiny student has as many directions as prompts, so its tolerance is wide; export checks its own parity."""
    settings = having(recipe, basis_tolerance=10, group=16, **changes)
    made = quantize.run(str(tiny_student.path), tmp_path / "q", settings, 0, False)
    tensors = load_file(made.path / "quantized" / "transformer.safetensors")
    layers = json.loads((made.path / "quantized" / "layers.json").read_text())
    rank = made.manifest.metrics["basis_rank"]
    assert len(tensors["basis"]) == rank == 16 and sum(name.endswith("linear.up") for name in layers) > 1
    assert not any(name.endswith("norm1.linear") for name in layers)
    assert made.manifest.metrics["packed_bytes"] == sum(t.nbytes for t in tensors.values())
    if changes:
        assert made.manifest.metrics["mean_bits"] <= 4.9
    device = export.run(str(made.path), tmp_path / "device", recipe, 0, False)
    assert device.manifest.metrics["psnr_db"]["transformer"] >= 60
    stored = onnx_ir.load(device.path / "transformer" / "model.onnx").graph.initializers
    bases = [value for name, value in stored.items() if name.endswith(".basis")]
    assert [value.dtype for value in bases] == [onnx_ir.DataType.FLOAT16]  # one for all layers
    whole = [value.shape for value in stored.values() if value.dtype == onnx_ir.DataType.FLOAT and value.shape is not None]
    assert [tensors["basis"].shape[1], rank] not in [list(shape) for shape in whole]  # nor is there another one in fp32


@pytest.mark.parametrize("broken", ["bits", "zeros", "basis", "list"])
def test_broken_codes_end_with_one_sentence(broken: str, tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    made = quantize.run(str(tiny_student.path), tmp_path / "q", having(recipe, basis_tolerance=10, group=16), 0, False)
    copy = shutil.copytree(made.path, tmp_path / "copy")
    layers = json.loads((copy / "quantized" / "layers.json").read_text())
    tensors = load_file(copy / "quantized" / "transformer.safetensors")
    up = next(name for name in layers if name.endswith(".up"))
    if broken == "bits":
        layers[up]["bits"] = 5
    elif broken == "list":
        layers = [layers]
    elif broken == "zeros":
        tensors[f"{up}.zeros"] = tensors[f"{up}.zeros"][:-1].clone()
    else:
        tensors["basis"] = tensors["basis"][:, :-1].clone()
    (copy / "quantized" / "layers.json").write_text(json.dumps(layers))
    save_file(tensors, copy / "quantized" / "transformer.safetensors")
    with pytest.raises(ArtifactError, match=r"quantized is broken .*flashgen quantize"):
        put_factors(load_pipeline(copy).transformer, read_codes(copy), copy)


def test_a_teacher_is_not_repaired(tiny_teacher: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without guidance"):
        quantize.run(str(tiny_teacher.path), tmp_path / "q", having(recipe, repair=True), 0, False)


def test_repair_is_kept_when_it_helps_and_reaches_the_device(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    made = quantize.run(str(tiny_student.path), tmp_path / "q", having(recipe, bits=2, repair=True), 0, False)
    sampler, found = made.manifest.sampler, made.manifest.metrics["repair"]
    assert sampler is not None and found["damage_after"] < found["damage_before"]
    assert sampler.scales is not None and len(sampler.scales) == len(sampler.sigmas) - 1
    device = export.run(str(made.path), tmp_path / "device", recipe, 0, False)
    assert device.manifest.sampler == sampler
    plain = sampler.model_copy(update={"scales": None})
    pipe, prompt = load_pipeline(made.path), ["a red circle"]
    with_scales, without = sample(pipe, sampler, prompt, [1]), sample(pipe, plain, prompt, [1])
    runtime = DevicePipeline(device)
    assert np.abs(runtime.sample(prompt, [1]).astype(int) - with_scales).max() <= 1 < np.abs(with_scales.astype(int) - without).max()
    finer = shifted_grid(8, 3.0)  # scales belong to their own grid
    assert np.array_equal(sample(pipe, sampler, prompt, [1], sigmas=finer), sample(pipe, plain, prompt, [1], sigmas=finer))


def test_adaln_stays_whole_where_no_basis_is_good_enough(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    made = quantize.run(str(tiny_student.path), tmp_path / "q", having(recipe, basis_tolerance=1e-12, group=16), 0, False)
    assert made.manifest.metrics["basis_rank"] == 0
    assert "basis" not in load_file(made.path / "quantized" / "transformer.safetensors")
