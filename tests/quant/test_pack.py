from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from flashgen.errors import NumericsError
from flashgen.quant.layer import Rounding, quantize_layer
from flashgen.quant.pack import QuantizedLinear, as_bits, dequantize, pack, unpack, zeros_of
from flashgen.quant.rounding import quantize_groups

CASES = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def weights(n: int, k: int) -> torch.Tensor:
    """Off-centre and heavy-tailed, so that zero points and clipping matter."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=generator) ** 3 * 0.1 + 0.05 * torch.rand(n, 1, generator=generator)


def test_pack_keeps_every_pair_of_nibbles() -> None:
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    packed = pack(pairs, 4)
    assert packed.shape == (256, 1)
    assert torch.equal(packed[:, 0], pairs[:, 0] + 16 * pairs[:, 1])  # low nibble first
    assert torch.equal(unpack(packed, 4, 2), pairs)


def test_codes_of_integer_products_overflow_with_8_bits() -> None:
    layer = quantize_layer(weights(8, 32), 8, Rounding("channel", symmetric=True))
    eight = replace(quantize_groups(weights(8, 32), 8, 32, symmetric=True), channel=True)  # as flashgen 0.2 wrote them
    assert not layer.overflows and eight.overflows and not replace(eight, channel=False).overflows
    for code, overflows in ((64, False), (191, False), (63, True), (192, True)):
        codes = layer.codes.clone()
        codes[0, 0, 0] = code
        assert replace(layer, codes=codes).overflows == overflows


@pytest.mark.parametrize("bits", [2, 3])
def test_pack_keeps_every_pattern_of_bits_and_puts_the_first_code_lowest(bits: int) -> None:
    each = 8 // bits if bits == 2 else 8
    every = torch.cartesian_prod(*[torch.arange(2**bits)] * 4).to(torch.uint8).repeat(1, each // 4)
    packed = pack(every, bits)
    assert packed.shape == (2 ** (4 * bits), each * bits // 8)
    words = (packed.long() << (8 * torch.arange(packed.shape[1]))).sum(1)
    assert torch.equal(words, (every.long() << (bits * torch.arange(each))).sum(1))
    assert torch.equal(unpack(packed, bits, each), every)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 5, 7, 8, 11, 17])
def test_pack_keeps_rows_that_fill_no_whole_byte(bits: int, n: int) -> None:
    codes = torch.randint(2**bits, (3, n), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-n * bits // 8))
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_three_bits_in_a_home_of_four_are_the_same_weight(symmetric: bool) -> None:
    q = quantize_groups(weights(6, 40), 3, 16, symmetric)
    wider = as_bits(q, 4)
    assert wider.codes.shape == (6, 3, 8) and wider.bits == 4
    assert torch.equal(dequantize(wider), dequantize(q))


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_quantize_keeps_values_that_are_on_the_grid(bits: int, symmetric: bool) -> None:
    levels = 2**bits
    codes = torch.randint(levels, (4, 64), generator=torch.Generator().manual_seed(1))
    codes[:, 0::16], codes[:, 1::16] = 0, levels - 1  # every group spans its range
    weight = (codes - levels // 2) / 32  # a scale that fp16 holds
    assert torch.allclose(dequantize(quantize_groups(weight, bits, 16, symmetric, "none")), weight, atol=1e-6)


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_error_stays_below_half_a_level_without_clipping(bits: int, symmetric: bool) -> None:
    weight = weights(8, 100)
    q = quantize_groups(weight, bits, 32, symmetric, "none")
    step = q.scales.abs().repeat_interleave(32, 1)[:, :100]
    # A symmetric group has one level less on one side, an asymmetric zero is rounded to a level.
    assert bool(((dequantize(q) - weight).abs() <= step * 1.001).all())


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_mse_clip_never_hurts_a_group_and_helps_overall(bits: int, symmetric: bool) -> None:
    weight = weights(32, 128)
    plain, clipped = (
        (dequantize(quantize_groups(weight, bits, 32, symmetric, clip)) - weight).square().reshape(32, 4, 32).sum(-1)
        for clip in ("none", "mse")
    )
    assert bool((clipped <= plain + 1e-9).all())
    assert clipped.sum() < 0.97 * plain.sum()


def test_asymmetric_groups_beat_symmetric_ones_when_weights_are_off_centre() -> None:
    weight = weights(16, 128).abs()
    error = {s: float((dequantize(quantize_groups(weight, 4, 64, s)) - weight).norm()) for s in (True, False)}
    assert error[False] < 0.75 * error[True]


def test_quantize_gives_zeros_for_zeros() -> None:
    for bits, symmetric in CASES:
        assert not dequantize(quantize_groups(torch.zeros(2, 40), bits, 16, symmetric)).any()


def test_quantize_refuses_weights_that_are_not_finite() -> None:
    with pytest.raises(NumericsError, match="not finite"):
        quantize_groups(torch.tensor([[float("nan")] * 16]), 4, 16, True)


def matmul_nbits(q: QuantizedLinear, x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """What onnxruntime's own operator computes from the codes."""
    n = len(bias)
    arrays = {"codes": q.codes, "scales": q.scales, "zeros": q.zeros, "bias": torch.from_numpy(bias)}
    values = {k: ir.Value(name=k, const_value=ir.tensor(v.numpy(), name=k)) for k, v in arrays.items() if v is not None}
    source = ir.Value(name="x", shape=ir.Shape(["rows", q.k]), type=ir.TensorType(ir.DataType.FLOAT))
    inputs = [source, values["codes"], values["scales"], values.get("zeros"), None, values["bias"]]
    node = ir.node("MatMulNBits", inputs, {"K": q.k, "N": n, "bits": q.bits, "block_size": q.group}, domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [source], node.outputs, nodes=[node], initializers=list(values.values()), opset_imports={"": 20, "com.microsoft": 1}, name="g"
    )
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return np.asarray(ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0])


@pytest.mark.parametrize(("bits", "symmetric"), [case for case in CASES if case[0] != 3])
@pytest.mark.parametrize(("k", "group"), [(100, 32), (64, 64), (80, 16)])
def test_codes_mean_the_same_to_onnxruntime(bits: int, symmetric: bool, k: int, group: int) -> None:
    rng = np.random.default_rng(0)
    x, bias = rng.standard_normal((5, k), np.float32), rng.standard_normal(24, np.float32)
    q = quantize_groups(weights(24, k), bits, group, symmetric)
    want = x @ dequantize(q).numpy().T + bias
    np.testing.assert_allclose(matmul_nbits(q, x, bias), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_zero_points_between_codes_mean_the_same_to_onnxruntime() -> None:
    rng = np.random.default_rng(0)
    x, bias = rng.standard_normal((5, 64), np.float32), np.zeros(24, np.float32)
    q = quantize_groups(weights(24, 64), 4, 32, False, "hqq")
    assert q.zeros is not None and q.zeros.is_floating_point() and torch.equal(zeros_of(q), q.zeros)
    want = x @ dequantize(q).numpy().T
    np.testing.assert_allclose(matmul_nbits(q, x, bias), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_ort_test_notices_swapped_nibbles() -> None:
    rng = np.random.default_rng(0)
    x, bias = rng.standard_normal((5, 64), np.float32), np.zeros(8, np.float32)
    q = quantize_groups(weights(8, 64), 4, 16, False)
    restored = QuantizedLinear((q.codes >> 4) | (q.codes << 4), q.scales, q.zeros, 4, 16, 64)
    assert not np.allclose(matmul_nbits(restored, x, bias), x @ dequantize(q).numpy().T, atol=1e-2)
