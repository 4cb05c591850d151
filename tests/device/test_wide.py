"""Codes of 2 and 4 bits that OpenVINO holds in 8 give the numbers that onnxruntime computes from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from flashgen.artifact.store import Artifact
from flashgen.device import wide
from flashgen.device.engine import OnnxRuntimeNetwork, Opening, OpenVinoNetwork
from flashgen.device.memory import Needs
from flashgen.device.wide import widened


def product(path: Path, bits: int, k: int, zeros: str, bias: bool) -> np.ndarray[Any, Any]:
    """Write y = x W^T (+ bias), W [6, k] in groups of 16 with codes of `bits` bits, to `path`; returns an x [3, k]."""
    rng, n, groups = np.random.default_rng(bits), 6, -(-k // 16)
    constants: list[np.ndarray[Any, Any] | None] = [
        rng.integers(0, 256, (n, groups, 2 * bits), np.uint8),
        rng.uniform(0.1, 1, (n, groups)).astype(np.float32),
        {
            "none": None,
            "packed": rng.integers(0, 256, (n, -(-groups * bits // 8)), np.uint8),
            "real": rng.uniform(0, 2**bits, (n, groups)).astype(np.float32),
        }[zeros],
        None,
        rng.standard_normal(n).astype(np.float32) if bias else None,
    ]
    x = ir.Value(name="x", shape=ir.Shape(["batch", k]), type=ir.TensorType(ir.DataType.FLOAT))
    values = [None if c is None else ir.Value(name=f"c{i}", const_value=ir.tensor(c, name=f"c{i}")) for i, c in enumerate(constants)]
    attributes = {"K": k, "N": n, "bits": bits, "block_size": 16}
    while values and values[-1] is None:
        values.pop()
    node = ir.node("MatMulNBits", [x, *values], attributes, domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    initializers = [value for value in values if value is not None]
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 20, "com.microsoft": 1}, name="g")
    ir.save(ir.Model(graph, ir_version=10), path)
    return rng.standard_normal((3, k)).astype(np.float32)


CASES = [(4, 64, "none"), (4, 64, "packed"), (4, 64, "real"), (4, 40, "packed"), (2, 64, "packed"), (2, 40, "none"), (8, 64, "packed")]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("bits", "k", "zeros"), CASES)
def test_wide_codes_give_the_same_product(
    bits: int, k: int, zeros: str, bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    convert, calls = wide._convert, list[Any]()
    monkeypatch.setattr(wide, "_convert", lambda node: convert(calls.append(node) or node))  # type: ignore[func-returns-value]
    x, file = product(tmp_path / "model.onnx", bits, k, zeros, bias), tmp_path / "model.onnx"
    expected = OnnxRuntimeNetwork(file, Opening(1)).run(["y"], {"x": x})[0]
    for is_wide in (False, True):
        found = OpenVinoNetwork(file, Opening(1, wide=is_wide)).run(["y"], {"x": x})[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
        assert bool(calls) == is_wide


def test_8_bit_activations_can_be_asked_for_where_the_processor_has_bf16(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    product(tmp_path / "model.onnx", 8, 64, "packed", False)
    model = OpenVinoNetwork(tmp_path / "model.onnx", Opening(1, where="int8", rounded=True)).model
    assert model.get_property("EXECUTION_DEVICES") == ["CPU"] and model.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 128
    assert model.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def test_lowest_bits_come_first() -> None:
    assert widened(np.array([[0x21, 0x43]], np.uint8), 4).tolist() == [[1, 2, 3, 4]]
    assert widened(np.array([0b11100100], np.uint8), 2).tolist() == [0, 1, 2, 3]


def test_wide_codes_need_memory_and_no_budget(handmade_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def bytes_of(compact: bool) -> float:
        return Needs(quantized, "openvino", 1, compact=compact).drawing(1)["transformer"] - Needs(quantized, "openvino", 1).decoding(0, 0)

    manifest = handmade_device.manifest.model_copy(update={"metrics": {"quantized_layers": 3}})
    quantized = Artifact(handmade_device.path, manifest)
    size = sum(file.size for file in manifest.files if file.path.startswith("transformer/model.onnx"))
    assert bytes_of(False) > bytes_of(True) + 2 * size
    assert wide.is_roomy(handmade_device)
    monkeypatch.setattr(wide, "total_bytes", lambda: 8 * size - 1)
    assert not wide.is_roomy(handmade_device) and bytes_of(False) < bytes_of(True) + size
