from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.errors import ArtifactError, NumericsError, UsageError
from flashgen.families.sd3 import SD3
from flashgen.models.stream import stored
from flashgen.pixels import Size
from flashgen.quant.pack import dequantize
from flashgen.quant.rounding import quantize_groups
from flashgen.recipe.compression import QuantizeRecipe
from flashgen.recipe.schema import Recipe
from flashgen.stages.base import prepare, run
from flashgen.stages.describe import describe
from flashgen.stages.export import Export
from flashgen.stages.quantize import Quantize
from tests import runs

gguf = pytest.importorskip("gguf")

from flashgen.export.gguf import _type, blocks, check  # noqa: E402

Type = gguf.GGMLQuantizationType


@pytest.mark.parametrize(
    ("bits", "symmetric", "method", "kind"),
    [
        *((bits, symmetric, "mse", Type.Q4_0) for bits in (2, 3) for symmetric in (False, True)),
        (4, True, "mse", Type.Q4_0),
        (4, False, "mse", Type.Q4_1),
        (4, False, "hqq", Type.Q4_1),
        (3, False, "hqq", Type.Q4_1),
        (8, True, "mse", Type.Q8_0),
    ],
)
@pytest.mark.parametrize("group", [32, 64])
def test_codes_keep_their_weights_in_gguf(bits: int, symmetric: bool, method: Any, kind: Any, group: int) -> None:
    q = quantize_groups(torch.randn(6, 96, generator=torch.Generator().manual_seed(0)), bits, group, symmetric, method)
    assert _type(q) == kind
    read, weight = torch.from_numpy(gguf.dequantize(blocks(q, kind), kind)), dequantize(q)
    if kind != Type.Q4_1:
        assert torch.equal(read, weight)
    step = q.scales.abs().repeat_interleave(group, 1)[:, :96]
    assert bool(((read - weight).abs() <= 0.004 * step).all())  # m has 11 bits, a zero point of 4 bits times a scale of 11 has 15


@pytest.mark.parametrize(("bits", "group", "symmetric", "k"), [(4, 16, True, 64), (8, 32, False, 64), (4, 32, True, 80)])
def test_codes_that_no_gguf_type_holds_stay_fp16(bits: int, group: int, symmetric: bool, k: int) -> None:
    assert _type(quantize_groups(torch.randn(4, k), bits, group, symmetric)) == Type.F16


def of(source: Artifact, out: Path, recipe: Recipe) -> Artifact:
    return run(Export, {"student": source.path}, out, recipe, target="gguf")


def quantized(student: Artifact, out: Path, recipe: Recipe, **settings: Any) -> Artifact:
    changed = recipe.model_copy(update={"quantize": QuantizeRecipe(**settings)})
    return run(Quantize, {"student": student.path}, out, changed)


def test_student_is_exact_in_original_names(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    made = of(tiny_student, tmp_path / "gguf", recipe)
    assert (made.manifest.kind, made.manifest.metrics["psnr_db"]) == ("gguf", {"transformer": 200.0})
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(made.path / "transformer" / "model.gguf").tensors}
    assert {t.dtype for t in tensors.values() if t.ndim == 1} == {torch.float32}
    assert {t.dtype for t in tensors.values() if t.ndim > 1} == {torch.float16}
    back = convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    weights = stored(tiny_student.path / "transformer")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name].float(), weights[name]().float()) for name in weights)
    assert of(tiny_student, tmp_path / "gguf", recipe).path == made.path  # up to date
    fields = gguf.GGUFReader(made.path / "transformer" / "model.gguf").fields
    assert fields["general.architecture"].contents() == "sd3" and made.manifest.sampler is not None
    assert fields["flashgen.sigmas"].contents() == pytest.approx(made.manifest.sampler.sigmas)


@pytest.mark.parametrize(
    ("settings", "types"),
    [
        ({"group": 32, "symmetric": True}, {"Q4_0", "Q8_0"}),
        ({"group": 32}, {"Q4_1"}),
        ({"group": 16}, set()),
        ({"group": 16, "low_rank_tolerance": 1e3}, set()),
    ],
)
def test_diffusers_computes_the_same_velocity_from_the_gguf(
    tiny_student: Artifact, recipe: Recipe, tmp_path: Path, settings: dict[str, Any], types: set[str]
) -> None:
    source = quantized(tiny_student, tmp_path / "codes", recipe, **settings)
    made = of(source, tmp_path / "gguf", recipe)
    assert set(made.manifest.metrics["types"]) == types | {"F16", "F32"}
    pytest.importorskip("diffusers.quantizers.gguf")
    theirs = SD3Transformer2DModel.from_single_file(
        str(made.path / "transformer" / "model.gguf"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(made.path), subfolder="transformer", torch_dtype=torch.float32,
    )  # fmt: skip
    ours = SD3Transformer2DModel.from_pretrained(source.path / "transformer", torch_dtype=torch.float32)
    inputs = (torch.randn(2, 16, 8, 8), torch.randn(2, 32, 32), torch.randn(2, 32), torch.tensor([1000.0, 300.0]))
    with torch.no_grad():
        one, other = (net(*inputs, return_dict=False)[0] for net in (ours, theirs))
    assert float((one - other).norm() / one.norm()) < 1e-3


def test_a_changed_tensor_fails_the_check(tiny_student: Artifact, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = of(tiny_student, tmp_path / "gguf", recipe)
    file = made.path / "transformer" / "model.gguf"
    tensor = next(t for t in gguf.GGUFReader(file, "r+").tensors if t.name.endswith("joint_blocks.1.x_block.attn.qkv.weight"))
    tensor.data[40, 3] += np.float16(1)  # a row of keys: 32 rows are queries
    with pytest.raises(NumericsError, match=r"1.x_block.attn.qkv.weight: transformer_blocks.1.attn.to_k.weight is at"):
        check(file, SD3(), stored(tiny_student.path / "transformer"), 60)
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, path: setattr(self, "tensors", []))
    with pytest.raises(NumericsError, match="has no tensor"):
        check(file, SD3(), stored(tiny_student.path / "transformer"), 60)


def test_scaled_steps_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    from tests.conftest import make_pipeline_artifact, tiny_sampler

    scaled: Sampler = tiny_sampler(scales=[(1.0, 1.01)] * 4)
    source = make_pipeline_artifact(tmp_path / "scaled", kind="student", sampler=scaled)
    with pytest.raises(UsageError, match=r"scales its steps.*--set quantize.step_scales=false"):
        of(source, tmp_path / "gguf", recipe)


def test_flashgen_says_which_programs_draw_from_it(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    made = of(tiny_student, tmp_path / "gguf", recipe)
    with pytest.raises(ArtifactError, match=r"for stable-diffusion.cpp, ComfyUI-GGUF or diffusers.* draw from the artifact that"):
        runs.generate(made.path, ["a red circle"], tmp_path / "a.png")
    with pytest.raises(ArtifactError, match=r"stable-diffusion\.cpp"):
        runs.bench([made.path], None, recipe)
    with pytest.raises(ArtifactError, match="is a gguf, this needs a"):
        prepare(Export, {"student": made.path}, recipe)
    assert open_artifact(made.path, verify=True).manifest.sampler == tiny_student.manifest.sampler


def test_family_without_a_gguf_architecture_is_refused(tiny_student: Artifact, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SD3, "gguf_arch", None)
    with pytest.raises(UsageError, match=r"--target gguf: no program reads .* from a GGUF; export with --target onnx"):
        prepare(Export, {"student": tiny_student.path}, recipe, target="gguf")


def test_plan_draws_nothing_at_any_size(tiny_quantized: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    odd = recipe.model_copy(update={"export": recipe.export.model_copy(update={"size_px": Size(72, 72)})})
    plan = describe(prepare(Export, {"student": tiny_quantized.path}, odd, target="gguf"), tmp_path / "gguf")
    assert plan["memory"].keys() == {"write"} and plan["forwards"] == 0
    assert plan["memory"]["write"]["codes"] == (tiny_quantized.path / "quantized" / "transformer.safetensors").stat().st_size
