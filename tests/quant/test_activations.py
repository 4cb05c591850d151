"""Scales of inputs, and the rounding that integer products do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from flashgen.quant.activations import BINS, best_input_scale, rounded
from flashgen.quant.layer import Rounding, quantize_layer, relative_error
from flashgen.quant.pack import InputScale, dequantize


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def scale_of(x: Tensor) -> InputScale:
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    return best_input_scale(torch.histc(x, BINS, low, high), low, high)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 3.0), (-2.0, 0.5)])
def test_uniform_inputs_keep_their_range(low: float, high: float) -> None:
    scale, zero = scale_of(low + (high - low) * torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    assert scale == pytest.approx((high - low) / 255, rel=2e-3)
    assert zero == pytest.approx(-low / scale, abs=1)


def test_range_is_that_of_least_error_and_an_outlier_is_cut() -> None:
    x = torch.cat([gaussian(1_000_000), torch.tensor([60.0])])
    best = scale_of(x)
    assert 4 < best.scale * (255 - best.zero) < 30 and 3 < best.scale * best.zero < 6
    error = (rounded(x[None], best) - x).norm()
    for factor in (0.8, 1.25):
        other = InputScale(best.scale * factor, best.zero)
        assert (rounded(x[None], other) - x).norm() > error
    assert error < 0.9 * (rounded(x[None], None) - x).norm()


def test_fixed_scale_rounds_as_the_standard_operators_do() -> None:
    x, scale = 3 * gaussian(4, 7, 9), InputScale(0.0173492431640625, 97)
    arrays: dict[str, Any] = {"s": np.array(scale.scale, np.float32), "z": np.array(scale.zero, np.uint8)}
    parameters = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
    given = ir.Value(name="x", shape=ir.Shape([4, 7, 9]), type=ir.TensorType(ir.DataType.FLOAT))
    codes = ir.node("QuantizeLinear", [given, *parameters])
    values = ir.node("DequantizeLinear", [*codes.outputs, *parameters])
    values.outputs[0].name, values.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([given], values.outputs, nodes=[codes, values], initializers=parameters, opset_imports={"": 20}, name="round")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    expected = onnxruntime.InferenceSession(model).run(None, {"x": x.numpy()})[0]
    assert np.abs(expected).max() < 3  # some are clamped
    np.testing.assert_allclose(rounded(x, scale).numpy(), expected, rtol=1e-6)


def test_without_a_scale_each_sample_has_its_own() -> None:
    x = gaussian(3, 5, 8)
    alone = rounded(x[:1], None)
    assert 0 < (alone - x[:1]).abs().max() < 0.02
    x[1] *= 100
    assert torch.equal(rounded(x, None)[:1], alone)


def test_weights_in_products_of_integers_have_codes_of_7_bits() -> None:
    """255 x 64 x 2 stays below 2^15, which x86 without VNNI needs."""
    weight, inputs = gaussian(40, 64), InputScale(0.1, 3)
    static, dynamic = (quantize_layer(weight, 8, Rounding("channel", True), inputs=scale) for scale in (inputs, None))
    grouped = quantize_layer(weight, 8, Rounding(64, True))
    assert 64 <= static.codes.min() < 70 and 186 < static.codes.max() <= 191 and static.codes.shape == grouped.codes.shape
    assert torch.equal(static.codes, dynamic.codes) and torch.equal(static.scales, dynamic.scales)
    assert (static.bits, static.inputs, dynamic.inputs) == (8, inputs, None) and grouped.codes.min() < 10
    ratio = relative_error(dequantize(static), weight) / relative_error(dequantize(grouped), weight)
    assert 1.7 < ratio < 2.3
