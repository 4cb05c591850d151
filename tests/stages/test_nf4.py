"""quantize --scheme nf4: bitsandbytes' own codes, drawn from without bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from flashgen.artifact.store import Artifact
from flashgen.errors import ArtifactError, MachineError, NumericsError, UsageError
from flashgen.families.sd3 import SD3
from flashgen.models.nf4 import STATE, pack, unpack
from flashgen.models.pipeline import load_pipeline
from flashgen.models.stream import read
from flashgen.recipe.compression import QuantizeRecipe
from flashgen.recipe.schema import BenchRecipe, Recipe
from flashgen.stages import quantize
from flashgen.stages.base import prepare, run
from flashgen.stages.describe import describe
from flashgen.stages.export import Export
from flashgen.stages.quantize import Quantize
from tests import runs

LEVELS = torch.tensor([-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0])
RECIPE = Recipe(name="test", quantize=QuantizeRecipe(scheme="nf4"), bench=BenchRecipe(per_task=0))


def by_hand(codes: list[int], scales: list[float], shape: list[int], block: int) -> dict[str, torch.Tensor]:
    """The tensors of a layer, in the layout that `flashgen.models.nf4` describes."""
    high, low = torch.tensor(codes, dtype=torch.uint8).reshape(-1, 2).T
    state = json.dumps({"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": shape}).encode()
    return {
        "weight": (high << 4 | low)[:, None],
        "weight.absmax": torch.tensor(scales),
        "weight.quant_map": LEVELS,
        f"weight.{STATE}": torch.tensor(list(state), dtype=torch.uint8),
    }


def test_codes_are_read_as_they_are_laid_out() -> None:
    stored = by_hand([15, 0, 7, 8, 3, 15, 0, 1], [2.0, 10.0], [2, 4], 4)
    want = torch.tensor([[1.0, -1, 0, 0.08], [-0.4, 1, -1, -0.7]]) * torch.tensor([[2.0], [10.0]])
    torch.testing.assert_close(unpack(stored), want)


@pytest.mark.parametrize("lacks", ["weight.absmax", "weight.quant_map", f"weight.{STATE}"])
def test_layer_that_lacks_a_tensor_ends_in_one_sentence(lacks: str) -> None:
    stored = by_hand([1, 2, 3, 4], [1.0], [1, 4], 4)
    del stored[lacks]
    with pytest.raises(ArtifactError, match="no plain NF4 codes of bitsandbytes"):
        unpack(stored)


def test_double_quantization_is_not_taken_for_plain_scales() -> None:
    stored = by_hand([1, 2, 3, 4], [1.0], [1, 4], 4)
    nested = stored | {"weight.absmax": torch.tensor([3], dtype=torch.uint8), "weight.nested_absmax": torch.ones(1)}
    with pytest.raises(ArtifactError, match="double quantization is not read"):
        unpack(nested)


def test_settings_that_nf4_has_not_are_refused() -> None:
    with pytest.raises(ValidationError, match="scheme nf4 has no method"):
        QuantizeRecipe(scheme="nf4", budget="4.25")


def test_missing_bitsandbytes_ends_in_how_to_get_it(tiny_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"pip install 'flashgen\[nf4\]'"):
        run(Quantize, {"student": tiny_student.path}, tmp_path / "nf4", RECIPE)
    assert not (tmp_path / "nf4").exists()


def test_the_transformer_is_near_the_students(tiny_student: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    made = run(Quantize, {"student": tiny_student.path}, tmp_path / "nf4", RECIPE)
    stored = {name: value for file in (made.path / "transformer").glob("*.safetensors") for name, value in read(file)}
    layers = [name.removesuffix(f".weight.{STATE}") for name in stored if name.endswith(STATE)]
    assert len(layers) > 20 and not any(name.startswith(("proj_out", "norm_out")) for name in layers)
    student, loaded = (dict(load_pipeline(path).transformer.named_parameters()) for path in (tiny_student.path, made.path))
    for name, weight in student.items():
        least, most = (0.03, 0.13) if name.removesuffix(".weight") in layers else (-1, 1e-6)
        assert least < float((loaded[name] - weight).norm() / weight.norm().clamp_min(1e-6)) < most, name
    picture = runs.generate(made.path, ["a red circle"], tmp_path / "a.png")[0]
    assert picture.exists()
    config = json.loads((made.path / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4" and config["llm_int8_skip_modules"] == list(SD3.protect)
    assert 4 < made.manifest.metrics["mean_bits"] < 6  # an fp32 scale per 64 weights, and states
    with pytest.raises(ArtifactError, match="has NF4 codes, for diffusers"):
        prepare(Export, {"student": made.path}, RECIPE)


def test_codes_mean_what_bitsandbytes_reads() -> None:
    """Rows of whole blocks: with shorter ones its CPU kernel (0.50) mixes up the scales."""
    functional = pytest.importorskip("bitsandbytes.functional")
    stored = pack(torch.randn(48, 128, generator=torch.Generator().manual_seed(0)))
    state = functional.QuantState.from_dict({k: v for k, v in stored.items() if k != "weight"}, device=torch.device("cpu"))
    torch.testing.assert_close(unpack(stored), functional.dequantize_4bit(stored["weight"], state))


def test_protecting_every_layer_is_refused(tiny_student: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    every = QuantizeRecipe(scheme="nf4", protect=["transformer_blocks", *SD3.protect])
    with pytest.raises(UsageError, match=r"quantize\.protect leaves no layer"):
        run(Quantize, {"student": tiny_student.path}, tmp_path / "nf4", RECIPE.model_copy(update={"quantize": every}))


def test_protected_weight_that_fp16_cannot_hold_is_named(tiny_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    from flashgen.models import stream

    def loud(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, tensor.float() * 1e9 if name == "proj_out.weight" else tensor) for name, tensor in read(path))

    monkeypatch.setattr(stream, "read", loud)
    with pytest.raises(NumericsError, match=r"transformer: proj_out\.weight holds .*, and fp16 ends at 65504"):
        run(Quantize, {"student": tiny_student.path}, tmp_path / "nf4", RECIPE)


def test_plan_is_one_phase_without_forwards(tiny_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: True)
    plan = describe(prepare(Quantize, {"student": tiny_student.path}, RECIPE), tmp_path / "nf4")
    assert plan["memory"].keys() == {"round transformer"} and plan["forwards"] == 0
