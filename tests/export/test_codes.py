"""quantized/ as it is written and read, and what earlier versions of it become in the graph."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from flashgen import families
from flashgen.artifact import draft as drafts
from flashgen.artifact.draft import Origin
from flashgen.artifact.store import Artifact
from flashgen.errors import ArtifactError
from flashgen.export.codes import put_factors, read_codes, write_codes
from flashgen.models.rewrite import linear_shapes, rewrite_network
from flashgen.quant.layer import Rounding, quantize_layer
from flashgen.quant.pack import InputScale, QuantizedLinear, dequantize
from flashgen.quant.rounding import quantize_groups
from flashgen.recipe.schema import Recipe
from flashgen.stages.base import run
from flashgen.stages.export import Export

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0.2"


def of_flashgen_02(student: Artifact, out: Path, settings: dict[str, Any], group: int | None) -> Artifact:
    """A quantized artifact as flashgen 0.2 wrote it: 8 bits, symmetric, a number for every group (None: the row), padded codes."""
    family, codes = families.get("sd3"), dict[str, QuantizedLinear]()
    out.mkdir()
    draft = drafts.begin(out, Origin("quantized", "quantize", "sd3", "shapes", settings, 0, [student.as_parent("student")]))
    names = linear_shapes(student.path, "transformer", family)

    def change(name: str, weight: Tensor) -> Tensor:
        layer, _, parameter = name.rpartition(".")
        if layer not in names or parameter != "weight":
            return weight
        codes[layer] = quantize_groups(weight.float(), 8, group or weight.shape[1], True)
        return dequantize(codes[layer])

    rewrite_network(student.path / "transformer", draft.path / "transformer", change, "quantize")
    for component in family.components:
        if component != "transformer" and (student.path / component).is_dir():
            draft.link_tree(student.path / component, component)
    (draft.path / "model_index.json").write_bytes((student.path / "model_index.json").read_bytes())
    (draft.path / "quantized").mkdir()
    write_codes(draft.path, "transformer", {name: codes[name] for name in names})
    specs = {name: {"bits": 8, "group": codes[name].group, "symmetric": True} for name in names}
    (draft.path / "quantized" / "layers.json").write_text(json.dumps(specs))
    return draft.publish(sampler=student.manifest.sampler)


def products(device: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(device.path / "transformer" / "model.onnx").graph)


@pytest.mark.parametrize("group", [32, 128])  # layers of tiny have 32 inputs: one group that fills the row, and one that pads it
def test_layers_of_one_group_stay_products_of_fp32_activations(tiny_student: Artifact, recipe: Recipe, tmp_path: Path, group: int) -> None:
    source = of_flashgen_02(tiny_student, tmp_path / "codes", {"group": group, "symmetric": True}, group)
    layer = next(q for name, q in read_codes(source).items() if name == "proj_out")
    assert (layer.k, layer.group, layer.channel, tuple(layer.codes.shape[1:])) == (32, group, False, (1, group))
    device = run(Export, {"student": source.path}, tmp_path / "device", recipe)
    kinds = products(device)
    assert kinds["MatMulNBits"] == device.manifest.metrics["quantized_layers"] and not kinds["DynamicQuantizeMatMul"]
    assert device.manifest.extra["accuracy_level"] == 0 and device.manifest.metrics["psnr_db"]["transformer"] >= 60


def test_codes_of_02_with_group_channel_stay_products_of_integers(tiny_student: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    source = of_flashgen_02(tiny_student, tmp_path / "codes", {"group": "channel", "bits": 8, "symmetric": True}, None)
    device = run(Export, {"student": source.path}, tmp_path / "device", recipe)
    kinds = products(device)
    assert kinds["DynamicQuantizeMatMul"] == device.manifest.metrics["quantized_layers"] and not kinds["MatMulNBits"]
    assert device.manifest.extra["accuracy_level"] == 4


def test_artifact_of_02_exports_to_the_codes_that_02_exported(recipe: Recipe, tmp_path: Path) -> None:
    device = run(Export, {"student": FIXTURES / "quantized" / "v0001"}, tmp_path / "device", recipe)
    new, old = (ir.load(path / "transformer" / "model.onnx").graph for path in (device.path, FIXTURES / "device-quantized" / "v0001"))
    nodes = {str(node.name): node for node in old if node.op_type == "MatMulNBits"}
    assert len(nodes) > 20
    for node in new:
        if node.op_type == "MatMulNBits":
            other = nodes.pop(str(node.name))
            assert {k: v.value for k, v in node.attributes.items()} == {k: v.value for k, v in other.attributes.items()}
            for name in (f"{node.name}.{part}" for part in ("codes", "scales", "zeros")):
                assert (name in new.initializers) == (name in old.initializers)
                if name in new.initializers:
                    a, b = (graph.initializers[name].const_value for graph in (new, old))
                    assert a is not None and b is not None and np.array_equal(a.numpy(), b.numpy()), name
    assert not nodes


@pytest.mark.parametrize(
    ("bits", "rounding"),
    [(8, Rounding("channel", True)), (4, Rounding(256, False)), (3, Rounding(16, True)), (4, Rounding(32, False, "hqq"))],
)
def test_what_is_written_is_what_is_read(bits: int, rounding: Rounding, tiny_quantized: Artifact, tmp_path: Path) -> None:
    source = replace(tiny_quantized, path=tmp_path)
    (tmp_path / "transformer").symlink_to(tiny_quantized.path / "transformer")
    (tmp_path / "quantized").mkdir()
    inputs = InputScale(0.0125732421875, 7) if rounding.group == "channel" else None
    q = quantize_layer(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), bits, rounding, inputs=inputs)
    write_codes(tmp_path, "transformer", {"proj_out": q})
    again = read_codes(source)["proj_out"]
    for name, value in vars(q).items():
        assert torch.equal(getattr(again, name), value) if isinstance(value, Tensor) else getattr(again, name) == value, name


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"group": 32},
        {"group": "channel"},
        {"symmetric": True, "group": "channel", "bits": 8},
        {"group": "row"},
        {"bits": None},
        {"inputs": [0.5, 3]},
    ],
)
def test_codes_that_do_not_fit_end_in_one_sentence(change: dict[str, Any], tiny_quantized: Artifact, tmp_path: Path) -> None:
    (tmp_path / "transformer").symlink_to(tiny_quantized.path / "transformer")
    (tmp_path / "quantized").mkdir()
    write_codes(tmp_path, "transformer", {"proj_out": quantize_groups(torch.randn(6, 32), 4, 16, False)})
    specs = json.loads((tmp_path / "quantized" / "layers.json").read_text())
    specs["proj_out"] |= change
    (tmp_path / "quantized" / "layers.json").write_text(json.dumps(specs))
    with pytest.raises(ArtifactError, match=r"quantized is broken .*flashgen quantize"):
        read_codes(replace(tiny_quantized, path=tmp_path))


@pytest.mark.parametrize("inputs", [[0.0, 3], [-0.5, 3], [0.5, 256], [0.5, 3.0], [0.5], 0.5, None])
def test_scale_of_inputs_that_is_none_ends_in_one_sentence(inputs: object, tiny_quantized: Artifact, tmp_path: Path) -> None:
    (tmp_path / "transformer").symlink_to(tiny_quantized.path / "transformer")
    (tmp_path / "quantized").mkdir()
    write_codes(tmp_path, "transformer", {"proj_out": quantize_layer(torch.randn(6, 32), 8, Rounding("channel", True))})
    specs = json.loads((tmp_path / "quantized" / "layers.json").read_text())
    specs["proj_out"]["inputs"] = inputs
    (tmp_path / "quantized" / "layers.json").write_text(json.dumps(specs))
    with pytest.raises(ArtifactError, match=r"quantized is broken .*flashgen quantize"):
        read_codes(replace(tiny_quantized, path=tmp_path))


def test_only_layers_that_the_network_lacks_are_factors(tmp_path: Path) -> None:
    network = nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(32, 8)})})
    q = quantize_groups(torch.randn(8, 32), 4, 16, False)
    put_factors(network, {"mlp.up": q}, tmp_path)
    assert isinstance(network.get_submodule("mlp.up"), nn.Linear)
    (tmp_path / "quantized").mkdir()
    write_codes(tmp_path, "transformer", {"mlp.gate.up": q}, torch.randn(32, 16))
    with pytest.raises(ArtifactError, match=r"quantized is broken .*mlp\.gate"):
        put_factors(network, {"mlp.gate.up": q}, tmp_path)


def test_missing_codes_end_in_one_sentence(tiny_quantized: Artifact, tmp_path: Path) -> None:
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "layers.json").write_text('{"a": {"bits": 4}}')
    with pytest.raises(ArtifactError, match="flashgen quantize"):
        read_codes(replace(tiny_quantized, path=tmp_path))
    assert read_codes(replace(tiny_quantized, path=tmp_path), "text_encoder") == {}
