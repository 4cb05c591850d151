"""quantize --scheme nf4: bitsandbytes' own codes, drawn from without bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from flashgen.artifact.store import Artifact
from flashgen.errors import ArtifactError, MachineError
from flashgen.models.nf4 import STATE, pack, unpack
from flashgen.models.sample import load_pipeline
from flashgen.models.stream import read
from flashgen.recipe.schema import BenchRecipe, QuantizeRecipe, Recipe
from flashgen.stages import checks, export, generate, quantize

LEVELS = torch.tensor([-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0])
RECIPE = Recipe(name="test", quantize=QuantizeRecipe(scheme="nf4"), bench=BenchRecipe(per_task=0))


def by_hand(codes: list[int], scales: list[float], shape: list[int], block: int) -> dict[str, torch.Tensor]:
    """The layout of the docstring."""
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
def test_what_is_no_nf4_layer_is_one_sentence(lacks: str) -> None:
    stored = by_hand([1, 2, 3, 4], [1.0], [1, 4], 4)
    del stored[lacks]
    with pytest.raises(ArtifactError, match="no plain NF4 codes of bitsandbytes"):
        unpack(stored)


def test_double_quantization_is_not_taken_for_plain_scales() -> None:
    stored = by_hand([1, 2, 3, 4], [1.0], [1, 4], 4)
    nested = stored | {"weight.absmax": torch.tensor([3], dtype=torch.uint8), "weight.nested_absmax": torch.ones(1)}
    with pytest.raises(ArtifactError, match="double quantization is not read"):
        unpack(nested)


def test_it_is_not_mixed_with_what_it_has_not() -> None:
    with pytest.raises(ValidationError, match="scheme nf4 has no method"):
        QuantizeRecipe(scheme="nf4", budget="4.25")


def test_without_bitsandbytes_it_says_how_to_get_it(tiny_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"pip install 'flashgen\[nf4\]'"):
        quantize.run(str(tiny_student.path), tmp_path / "nf4", RECIPE, 0, False)
    assert not (tmp_path / "nf4").exists()


def test_the_transformer_is_near_the_students(tiny_student: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    made = quantize.run(str(tiny_student.path), tmp_path / "nf4", RECIPE, 0, False)
    stored = {name: value for file in (made.path / "transformer").glob("*.safetensors") for name, value in read(file)}
    layers = [name.removesuffix(f".weight.{STATE}") for name in stored if name.endswith(STATE)]
    assert len(layers) > 20 and not any(name.startswith(("proj_out", "norm_out")) for name in layers)
    student, loaded = (dict(load_pipeline(path).transformer.named_parameters()) for path in (tiny_student.path, made.path))
    for name, whole in student.items():
        least, most = (0.03, 0.13) if name.removesuffix(".weight") in layers else (-1, 1e-6)
        assert least < float((loaded[name] - whole).norm() / whole.norm().clamp_min(1e-6)) < most, name
    picture = generate.run(str(made.path), ["a red circle"], tmp_path / "a.png")[0]
    assert picture.exists()
    config = json.loads((made.path / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4" and config["llm_int8_skip_modules"] == RECIPE.quantize.protect
    assert 4 < made.manifest.metrics["mean_bits"] < 6  # an fp32 scale for 64 weights, and states
    with pytest.raises(ArtifactError, match="has NF4 codes, for diffusers"):
        export.run(str(made.path), tmp_path / "device", RECIPE, 0, False)


def test_codes_mean_what_bitsandbytes_reads() -> None:
    """Rows of whole blocks: with shorter ones its CPU kernel (0.50) mixes up the scales."""
    functional = pytest.importorskip("bitsandbytes.functional")
    stored = pack(torch.randn(48, 128, generator=torch.Generator().manual_seed(0)))
    state = functional.QuantState.from_dict({k: v for k, v in stored.items() if k != "weight"}, device=torch.device("cpu"))
    torch.testing.assert_close(unpack(stored), functional.dequantize_4bit(stored["weight"], state))
