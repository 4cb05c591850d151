"""Quantized layers as single nodes, and constants in fp16."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from flashgen.device.engine import Opening, OpenVinoNetwork, open_session
from flashgen.errors import ArtifactError, NumericsError
from flashgen.export import write
from flashgen.export.graph import trace
from flashgen.export.parity import check, psnr_db, reference
from flashgen.export.rewrite import linears, quantize_linears
from flashgen.export.write import write_graph
from flashgen.families.graphs import Call, Component
from flashgen.models.networks import linears_of
from flashgen.quant.layer import Rounding, quantize_layer
from flashgen.quant.pack import QuantizedLinear, dequantize
from flashgen.quant.rounding import quantize_groups
from flashgen.training.calibration import input_scales, with_rounded_inputs


class Block(nn.Module):
    """Both shapes in which a Linear leaves the exporter: Gemm (2-D input) and MatMul (3-D), with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.up, self.down = nn.Linear(40, 24), nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        out: torch.Tensor = self.down(h * torch.relu(self.modulation(h[:, 0]))[:, None, :1])
        return out


def block_component(group: int = 16) -> tuple[Component, dict[str, QuantizedLinear]]:
    torch.manual_seed(0)
    block, layers = Block(), {}
    for name, module in block.named_children():
        assert isinstance(module, nn.Linear)
        q = quantize_groups(module.weight, 8 if name == "up" else 4, group, name != "down")
        module.weight.data = dequantize(q)
        layers[name] = q
    return Component("block", Call(block, lambda net, x: net(x)), {"x": torch.randn(3, 5, 24)}, ("y",)), layers


@pytest.mark.parametrize("group", [16, 64])  # 64 pads each row of 24 and 40 to one group
@pytest.mark.parametrize("accuracy_level", [0, 1])
def test_rewritten_linears_compute_what_the_dequantized_ones_do(tmp_path: Path, accuracy_level: int, group: int) -> None:
    component, layers = block_component(group)
    expected = reference(component)
    assert check(component, expected, write_graph(component, layers, tmp_path, accuracy_level), 100) > 100
    nodes = [n.op_type for n in ir.load(tmp_path / "block" / "model.onnx").graph]
    assert nodes.count("MatMulNBits") == 3
    assert "Gemm" not in nodes and "MatMul" not in nodes


class Shared(nn.Module):
    """Three layers that read one value, one of them without bias, and one that reads their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 128), nn.Linear(64, 128, bias=False), nn.Linear(64, 128)
        self.last = nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x)
        out: torch.Tensor = self.last(self.q(h) * torch.tanh(self.k(h)) + torch.sigmoid(self.v(h)))
        return out


def static_component() -> tuple[Component, dict[str, QuantizedLinear]]:
    """A network with static activations, which its torch module rounds, too."""
    torch.manual_seed(0)
    net, x = Shared(), torch.randn(3, 40, 64)
    layers = linears_of(net)
    inputs = input_scales(layers, lambda: net(x), 1)
    codes = {name: quantize_layer(layer.weight, 8, Rounding("channel", True), inputs=inputs[name]) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.weight.data = dequantize(codes[name])
    return Component("block", Call(net, lambda net, x: net(x)), {"x": x}, ("y",)), codes


def write_static(folder: Path) -> tuple[Path, torch.Tensor, NDArray[np.float32]]:
    """A graph with static activations, an input, and torch's output with rounded inputs."""
    component, codes = static_component()
    with with_rounded_inputs(linears_of(component.module.net), {name: q.inputs for name, q in codes.items()}):
        (expected,) = component.reference()
    return write_graph(component, codes, folder), component.inputs["x"], expected.numpy()


def test_static_activations_are_products_of_integers_in_onnxruntime(tmp_path: Path) -> None:
    path, x, expected = write_static(tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph)
    assert kinds["MatMulIntegerToFloat"] == 4 and kinds["QuantizeLinear"] == 2 and not kinds["MatMul"] + kinds["DequantizeLinear"]
    assert psnr_db(expected, session.run(None, {"x": x.numpy()})[0]) > 80
    assert psnr_db(expected, open_session(path).run(None, {"x": x.numpy()})[0]) > 80


def test_static_activations_are_products_of_integers_in_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    path, x, expected = write_static(tmp_path)
    network = OpenVinoNetwork(path, Opening(1, rounded=True))
    operations = [op.get_rt_info() for op in network.model.get_runtime_model().get_ops()]
    kinds = Counter((info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in operations)
    assert kinds["FullyConnected", "u8"] == 4 and not {kind for kind in kinds if kind[0] in ("FullyConnected", "MatMul")} - {
        ("FullyConnected", "u8")
    }
    assert psnr_db(expected, network.run(["y"], {"x": x.numpy()})[0]) > 80


def test_codes_of_a_layer_that_no_output_needs_are_left_out(tmp_path: Path) -> None:
    component, layers = block_component()
    component.module.net.pooler = nn.Linear(24, 24)
    layers["pooler"] = quantize_groups(component.module.net.pooler.weight, 4, 16, True)
    expected = reference(component)
    assert check(component, expected, write_graph(component, layers, tmp_path), 100) > 100
    with pytest.raises(ArtifactError, match=r"does not have: \['elsewhere'\]"):
        write_graph(block_component()[0], {"elsewhere": layers["down"]}, tmp_path)


def test_export_fails_when_a_quantized_layer_is_not_in_the_graph() -> None:
    component, layers = block_component()
    model = trace(component)
    assert "net.modulation" in linears(model.graph)
    with pytest.raises(ArtifactError, match=r"does not have: \['elsewhere'\]"):
        quantize_linears(model, {**layers, "elsewhere": layers["down"]}, 0)


def test_export_fails_when_codes_have_another_shape() -> None:
    component, layers = block_component()
    for wrong in (layers["up"], replace(layers["modulation"], k=41)):
        with pytest.raises(ArtifactError, match="modulation"):
            quantize_linears(trace(component), {"modulation": wrong}, 0)


def test_export_fails_when_a_modulation_layer_would_stay_in_fp32() -> None:
    component, layers = block_component()
    pattern = re.compile("^modulation$")
    with pytest.raises(ArtifactError, match=r"adaLN layers left in fp32: \['modulation'\]"):
        quantize_linears(trace(component), {"up": layers["up"]}, 0, pattern)
    quantize_linears(trace(component), layers, 0, pattern)
    quantize_linears(trace(component), {"up": layers["up"]}, 0)  # a family without adaLN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_constant_that_fp16_cannot_hold_is_an_error_when_the_source_is_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(write, "HALF_BYTES", 0)
    source, network = tmp_path / "net", nn.Linear(3, 2)
    network.weight.data.fill_(7e4 if dtype == torch.bfloat16 else 6e4)
    source.mkdir()
    save_file({name: value.to(dtype) for name, value in network.state_dict().items()}, source / "model.safetensors")
    part = Component("net", Call(network, lambda net, x: net(x)), {"x": torch.rand(3, 3)}, ("y",))
    if dtype == torch.float16:
        assert check(part, reference(part), write_graph(part, {}, tmp_path / "out", source=source), 60) > 60
        return
    with pytest.raises(NumericsError, match=r"weight holds 7e\+04, and fp16 ends at 65504"):
        write_graph(part, {}, tmp_path / "out", source=source)
