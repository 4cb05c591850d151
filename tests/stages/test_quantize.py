"""flashgen quantize: calibration, budgets, plans, and what reaches the exported graph."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from safetensors.torch import load_file, save_file

from flashgen.artifact.draft import Origin, begin
from flashgen.artifact.store import Artifact, versions
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import ArtifactError, NumericsError, UsageError
from flashgen.export.codes import put_factors, read_codes
from flashgen.families.sd3 import SD3
from flashgen.flow.grid import shifted_grid
from flashgen.models.networks import linears_of
from flashgen.models.pipeline import load_pipeline
from flashgen.models.sample import sample
from flashgen.models.stream import weight_files
from flashgen.recipe.schema import Recipe
from flashgen.stages.base import prepare, run
from flashgen.stages.calibrate import budget_bytes
from flashgen.stages.export import Export
from flashgen.stages.quantize import Quantize
from flashgen.training import calibration
from flashgen.worlds.shapes.data import WORDS
from tests.conftest import make_pipeline_artifact, tiny_sampler
from tests.stages.test_damaged import reseal


def having(recipe: Recipe, **changes: object) -> Recipe:
    settings = recipe.quantize.model_dump() | {"prompts": 8} | changes
    return recipe.model_copy(update={"quantize": type(recipe.quantize).model_validate(settings)})


def quantize(source: Artifact, out: Path, recipe: Recipe) -> Artifact:
    return run(Quantize, {"student": source.path}, out, recipe)


def export(source: Artifact, out: Path, recipe: Recipe) -> Artifact:
    return run(Export, {"student": source.path}, out, recipe)


def layers_of(artifact: Artifact) -> dict[str, Any]:
    layers: dict[str, Any] = json.loads((artifact.path / "quantized" / "layers.json").read_text())
    return layers


def products(device: Artifact, part: str = "transformer") -> Counter[str]:
    return Counter(node.op_type for node in onnx_ir.load(device.path / part / "model.onnx").graph)


# ---- budgets


def test_budget_is_kept_and_the_whole_table_is_in_the_artifact(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    made = quantize(tiny_student, tmp_path / "q", having(recipe, budget=4.9, method="gptq"))
    layers, table = layers_of(made), json.loads((made.path / "quantized" / "allocation.json").read_text())
    assert sorted(name for row in table.values() for name in row["layers"]) == sorted(layers)
    assert all({layers[name]["bits"] for name in row["layers"]} == {row["bits"]} for row in table.values())
    assert len({spec["bits"] for spec in layers.values()}) > 1
    assert (made.path / "quantized" / "allocation.png").stat().st_size > 5000
    tensors = load_file(made.path / "quantized" / "transformer.safetensors")
    assert sum(row["bytes"][str(row["bits"])] for row in table.values()) == sum(t.nbytes for t in tensors.values())
    assert 4.4 < made.manifest.metrics["mean_bits"] <= 4.9 and 0 < made.manifest.metrics["latent_error"] < 1


def test_another_budget_measures_no_error_again(
    tiny_student: Artifact, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(version: int) -> dict[str, Any]:
        rows: dict[str, Any] = json.loads((tmp_path / f"q/v{version:04d}/quantized/allocation.json").read_text())
        return {group: row["damage"] for group, row in rows.items()}

    quantize(tiny_student, tmp_path / "q", having(recipe, budget=4.9))
    measure, calls = calibration.Calibration.latent_error, list[str]()

    def counted(self: calibration.Calibration, rows: slice = slice(None)) -> float:
        calls.append("")
        return measure(self, rows)

    monkeypatch.setattr(calibration.Calibration, "latent_error", counted)
    quantize(tiny_student, tmp_path / "q", having(recipe, budget=4.5))
    assert len(calls) == 1 and table(2) == table(1)  # of the finished student
    quantize(tiny_student, tmp_path / "q", having(recipe, budget=4.9, prompts=4))
    assert len(calls) > len(table(1)) and table(3) != table(1)  # other prompts, another table
    (tmp_path / "own.txt").write_text("a red circle\na blue square\n")
    calls.clear()
    with_file = recipe.model_copy(update={"prompts_file": tmp_path / "own.txt"})
    quantize(tiny_student, tmp_path / "q", having(with_file, budget=4.5))
    assert len(calls) > len(table(1)) and table(4) != table(1)


def test_broken_old_version_does_not_stop_a_budget(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    first = quantize(tiny_student, tmp_path / "q", having(recipe, budget=4.9))
    quantize(tiny_student, tmp_path / "q", having(recipe, bits=3))
    (first.path / "model_index.json").unlink()
    assert quantize(tiny_student, tmp_path / "q", having(recipe, budget=4.5)).path.name == "v0003"


def test_smallest_possible_budget_is_named(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the smallest is \d+ bytes, 4\.\d+ mean bits"):
        quantize(tiny_student, tmp_path / "q", having(recipe, budget="2.0"))
    assert versions(tmp_path / "q") == []


@pytest.mark.parametrize(("text", "size"), [("4", 500.0), ("4.25", 531.25), ("1MB", 1e6), ("1.5 KiB", 1536.0), ("2gb", 2e9)])
def test_budget_is_bits_or_bytes(text: str, size: float) -> None:
    assert budget_bytes(text, 1000) == size


def test_budget_in_neither_is_refused(recipe: Recipe) -> None:
    for wrong in ("", "four", "4 bits", "-1", "3TB"):
        with pytest.raises(ValueError, match="budget"):
            having(recipe, budget=wrong)


def test_gptq_and_sensitivity_go_on_where_they_were_interrupted(
    tiny_student: Artifact, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = having(recipe, budget="5", method="gptq")
    uninterrupted = quantize(tiny_student, tmp_path / "whole", settings)
    measured, moments = calibration.Calibration.latent_error, calibration.Calibration.moments
    calls: list[str] = []

    def stop_after(limit: int, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: calibration.Calibration, *arguments: object) -> Any:
            calls.append("")
            if len(calls) > limit:
                raise KeyboardInterrupt
            return method(self, *arguments)

        return counted

    for limit, name, method in ((7, "latent_error", measured), (2, "moments", moments)):
        calls.clear()
        monkeypatch.setattr(calibration.Calibration, name, stop_after(limit, method))
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_student, tmp_path / "again", settings)
        monkeypatch.setattr(calibration.Calibration, name, method)
    monkeypatch.setattr(calibration.Calibration, "moments", stop_after(10**9, moments))
    calls.clear()
    resumed = quantize(tiny_student, tmp_path / "again", settings)
    blocks = calibration.layer_blocks(layers_of(uninterrupted), SD3())
    assert len(calls) == len(blocks) - 2  # two were done before
    digest = {f.path: f.sha256 for f in uninterrupted.manifest.files if f.path.startswith("quantized/")}
    assert digest == {f.path: f.sha256 for f in resumed.manifest.files if f.path.startswith("quantized/")}


# ---- codes and the graph


@pytest.mark.parametrize(
    "changes", [{"bits": 3}, {"bits": 2, "symmetric": True}, {"method": "hqq"}, {"method": "gptq", "bits": 3, "symmetric": True}]
)
def test_every_kind_of_codes_reaches_the_exported_graph(
    changes: dict[str, object], tiny_student: Artifact, recipe: Recipe, tmp_path: Path
) -> None:
    made = quantize(tiny_student, tmp_path / "q", having(recipe, **changes))
    device = export(made, tmp_path / "device", recipe)  # its own parity check is the assertion
    assert device.manifest.metrics["psnr_db"]["transformer"] >= 60


def test_one_scale_per_output_becomes_products_of_integers(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    channel = {"group": "channel", "bits": 8, "symmetric": True}
    made = quantize(tiny_student, tmp_path / "q", having(recipe, **channel))
    assert {spec["group"] for spec in layers_of(made).values()} == {"channel"}
    device = export(made, tmp_path / "device", recipe)
    kinds = products(device)
    assert kinds["DynamicQuantizeMatMul"] == device.manifest.metrics["quantized_layers"] and not kinds["MatMulNBits"] + kinds["Gemm"]
    assert 40 < device.manifest.metrics["psnr_db"]["transformer"] < 100  # activations are rounded too
    assert (device.manifest.extra["accuracy_level"], device.manifest.extra["overflows"]) == (4, False)
    for change in ({"bits": 4}, {"symmetric": False}, {"method": "gptq"}, {"budget": 8}, {"low_rank_tolerance": 0.1}):
        with pytest.raises(ValueError, match="group channel is for bits 8, symmetric true and method rtn"):
            having(recipe, **(channel | change))


STATIC = {"group": "channel", "bits": 8, "symmetric": True, "activations": "static"}


def test_static_activations_are_measured_stored_and_exported(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    made = quantize(tiny_student, tmp_path / "q", having(recipe, **STATIC, activation_tolerance=1))
    table = json.loads((made.path / "quantized" / "activations.json").read_text())
    static = {name for name, spec in layers_of(made).items() if "inputs" in spec}
    assert static == {name for row in table.values() for name in row["layers"]} and len(static) == 25
    assert all(row["static"] and 0 < row["damage"] < 1 for row in table.values())
    dynamic = quantize(tiny_student, tmp_path / "d", having(recipe, **STATIC | {"activations": "dynamic"}))
    assert 0 < made.manifest.metrics["latent_error"] < 0.1 and "latent_error" not in dynamic.manifest.metrics
    device = export(made, tmp_path / "device", recipe)
    kinds = products(device)
    assert kinds["DynamicQuantizeMatMul"] == len(layers_of(made)) - len(static) and kinds["MatMul"] == len(static)
    read = len({tuple(spec["inputs"]) for spec in layers_of(made).values() if "inputs" in spec})
    assert kinds["QuantizeLinear"] == read < kinds["MatMul"]  # q, k and v read one value
    assert kinds["DequantizeLinear"] == kinds["QuantizeLinear"] + kinds["MatMul"]
    assert device.manifest.extra["accuracy_level"] == 4 and device.manifest.metrics["psnr_db"]["transformer"] > 30


def test_layers_that_static_activations_damage_stay_dynamic(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    tolerance = 1e-30
    for _ in range(2):
        made = quantize(tiny_student, tmp_path / "q", having(recipe, **STATIC, activation_tolerance=tolerance))
        table = json.loads((made.path / "quantized" / "activations.json").read_text())
        static = {name for name, spec in layers_of(made).items() if "inputs" in spec}
        assert static == {name for row in table.values() if row["static"] for name in row["layers"]}
        assert bool(static) == (tolerance > 1e-30)
        tolerance = sum(row["damage"] for row in table.values()) / 2  # errors nearly add up
    taken, left = ([row["damage"] for row in table.values() if row["static"] == static] for static in (True, False))
    assert taken and left and max(taken) < min(left)


def test_static_activations_are_for_products_of_integers_and_students(tiny_teacher: Artifact, recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="activations static is for products of integers: set bits 8, group channel"):
        having(recipe, activations="static")
    with pytest.raises(UsageError, match="activations=static learn from rollouts without guidance"):
        prepare(Quantize, {"student": tiny_teacher.path}, having(recipe, **STATIC))


def test_group_longer_than_a_row_is_cut_with_one_warning_and_stays_fp32(
    tiny_student: Artifact, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protected layers, 8 bits and one group: the shape that was once taken for products of integers."""
    made = quantize(tiny_student, tmp_path / "q", having(recipe, group=128, symmetric=True, encoder_bits=8))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "quantize.group=128" in line]
    assert len(warnings) == 1 and "(16 inputs and more)" in warnings[0]
    linears = linears_of(load_pipeline(made.path).transformer)
    assert {name: spec["group"] for name, spec in layers_of(made).items()} == {n: min(128, m.in_features) for n, m in linears.items()}
    device = export(made, tmp_path / "device", recipe)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer"):
        kinds = products(device, part)
        assert kinds["MatMulNBits"] and not kinds["DynamicQuantizeMatMul"]
        assert device.manifest.metrics["psnr_db"][part] >= 60
    assert device.manifest.extra["accuracy_level"] == 0


def test_group_that_fits_says_nothing(tiny_student: Artifact, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(tiny_student, tmp_path / "q", having(recipe, group=32))
    assert "quantize.group" not in capsys.readouterr().err


def test_attention_is_one_operator_per_layer(tiny_student: Artifact, tiny_device: Artifact) -> None:
    kinds = products(tiny_device)
    blocks = load_pipeline(tiny_student.path).transformer.transformer_blocks
    norms = sum(isinstance(module, RMSNorm) for module in blocks.modules())
    layers = sum(isinstance(module, Attention) for module in blocks.modules())
    assert (kinds["MultiHeadAttention"], kinds["SimplifiedLayerNormalization"], kinds["Softmax"]) == (layers, norms, 0)


def test_protected_layers_are_the_recipes_or_the_familys(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    family = quantize(tiny_student, tmp_path / "family", having(recipe))
    assert family.manifest.recipe["protect"] == list(SD3.protect)
    assert {n for n, s in layers_of(family).items() if s["bits"] == 8} == {n for n in layers_of(family) if n.startswith(SD3.protect)}
    own = quantize(tiny_student, tmp_path / "own", having(recipe, protect=["proj_out"]))
    assert [n for n, s in layers_of(own).items() if s["bits"] == 8] == ["proj_out"]


def test_weight_that_fp16_cannot_hold_is_named_and_nothing_is_published(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    """A student in bf16 with one loud bias, which is not quantized."""
    out = tmp_path / "loud"
    draft = begin(out, Origin("student", "test", "sd3", "shapes", {}, 0, []))
    for item in tiny_student.path.iterdir():
        if item.is_dir() and item.name != "transformer":
            draft.link_tree(item, item.name)
    shutil.copyfile(tiny_student.path / "model_index.json", draft.path / "model_index.json")
    (draft.path / "transformer").mkdir()
    shutil.copyfile(tiny_student.path / "transformer" / "config.json", draft.path / "transformer" / "config.json")
    (file,) = weight_files(tiny_student.path / "transformer")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    tensors["proj_out.bias"][3] = 1e5
    save_file(tensors, draft.path / "transformer" / file.name)
    loud = draft.publish(sampler=tiny_student.manifest.sampler)
    with pytest.raises(NumericsError, match=r"transformer: proj_out\.bias holds 9\.984e\+04, and fp16 ends at 65504"):
        quantize(loud, tmp_path / "q", having(recipe))
    assert versions(tmp_path / "q") == []


# ---- a shared adaLN basis


@pytest.mark.parametrize("changes", [{}, {"budget": "4.9", "method": "gptq"}])
def test_adaln_on_a_shared_basis_is_smaller_and_reaches_the_graph(
    changes: dict[str, object], tiny_student: Artifact, recipe: Recipe, tmp_path: Path
) -> None:
    """The random tiny student has as many directions as prompts, so its tolerance is wide; export checks its own parity."""
    made = quantize(tiny_student, tmp_path / "q", having(recipe, low_rank_tolerance=10, group=16, **changes))
    tensors, layers = load_file(made.path / "quantized" / "transformer.safetensors"), layers_of(made)
    rank = made.manifest.metrics["basis_rank"]
    assert len(tensors["basis"]) == rank == 16 and sum(name.endswith("linear.up") for name in layers) > 1
    assert not any(name.endswith("norm1.linear") for name in layers)
    assert made.manifest.metrics["packed_bytes"] == sum(t.nbytes for t in tensors.values())
    if changes:
        assert made.manifest.metrics["mean_bits"] <= 4.9
    device = export(made, tmp_path / "device", recipe)
    assert device.manifest.metrics["psnr_db"]["transformer"] >= 60
    constants = onnx_ir.load(device.path / "transformer" / "model.onnx").graph.initializers
    bases = [value for name, value in constants.items() if name.endswith(".basis")]
    assert [value.dtype for value in bases] == [onnx_ir.DataType.FLOAT16]  # one for all layers
    fp32 = [value.shape for value in constants.values() if value.dtype == onnx_ir.DataType.FLOAT and value.shape is not None]
    assert [tensors["basis"].shape[1], rank] not in [list(shape) for shape in fp32]  # and no second one in fp32


def test_adaln_stays_whole_where_no_basis_is_good_enough(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    made = quantize(tiny_student, tmp_path / "q", having(recipe, low_rank_tolerance=1e-12, group=16))
    assert made.manifest.metrics["basis_rank"] == 0
    assert "basis" not in load_file(made.path / "quantized" / "transformer.safetensors")


def test_family_without_adaln_has_no_shared_basis(tiny_student: Artifact, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SD3, "modulation", None)
    with pytest.raises(UsageError, match=r"quantize\.low_rank_tolerance: .* no adaLN layers .*set it to 0"):
        prepare(Quantize, {"student": tiny_student.path}, having(recipe, low_rank_tolerance=0.1))


@pytest.mark.parametrize("broken", ["bits", "zeros", "basis", "list"])
def test_broken_codes_end_in_one_sentence(broken: str, tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    made = quantize(tiny_student, tmp_path / "q", having(recipe, low_rank_tolerance=10, group=16))
    copy = replace(made, path=Path(shutil.copytree(made.path, tmp_path / "copy")))
    layers: Any = layers_of(copy)
    tensors = load_file(copy.path / "quantized" / "transformer.safetensors")
    up = next(name for name in layers if name.endswith(".up"))
    if broken == "bits":
        layers[up]["bits"] = 5
    elif broken == "list":
        layers = [layers]
    elif broken == "zeros":
        tensors[f"{up}.zeros"] = tensors[f"{up}.zeros"][:-1].clone()
    else:
        tensors["basis"] = tensors["basis"][:, :-1].clone()
    (copy.path / "quantized" / "layers.json").write_text(json.dumps(layers))
    save_file(tensors, copy.path / "quantized" / "transformer.safetensors")
    reseal(copy.path)
    with pytest.raises(ArtifactError, match=r"quantized is broken .*flashgen quantize|layers\.json cannot be read \(it is no mapping\)"):
        put_factors(load_pipeline(copy.path).transformer, read_codes(copy), copy.path)


# ---- step scales


def test_teacher_gets_no_step_scales(tiny_teacher: Artifact, recipe: Recipe) -> None:
    with pytest.raises(UsageError, match="without guidance"):
        prepare(Quantize, {"student": tiny_teacher.path}, having(recipe, step_scales=True))


def test_step_scales_are_kept_when_they_help_and_reach_the_device(recipe: Recipe, tmp_path: Path) -> None:
    student = make_pipeline_artifact(tmp_path / "student", kind="student", sampler=tiny_sampler(), words=WORDS)  # they help this one
    made = quantize(student, tmp_path / "q", having(recipe, bits=2, step_scales=True))
    sampler, errors = made.manifest.sampler, made.manifest.metrics["step_scales"]
    assert sampler is not None and errors["damage_after"] < errors["damage_before"]
    assert sampler.scales is not None and len(sampler.scales) == len(sampler.sigmas) - 1
    device = export(made, tmp_path / "device", recipe)
    assert device.manifest.sampler == sampler
    plain = sampler.model_copy(update={"scales": None})
    pipe, prompt = load_pipeline(made.path), ["a red circle"]
    with_scales, without = sample(pipe, sampler, prompt, [1]), sample(pipe, plain, prompt, [1])
    runtime = DevicePipeline(device)
    assert np.abs(runtime.sample(prompt, [1]).astype(int) - with_scales).max() <= 1 < np.abs(with_scales.astype(int) - without).max()
    finer = shifted_grid(8, 3.0)  # scales belong to their own grid
    assert np.array_equal(sample(pipe, sampler, prompt, [1], sigmas=finer), sample(pipe, plain, prompt, [1], sigmas=finer))
