from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgen.errors import NumericsError
from flashgen.quant import rounding
from flashgen.quant.gptq import gptq
from flashgen.quant.pack import dequantize, unpack
from flashgen.quant.rounding import Method, quantize_groups


def weights(n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=generator) ** 3 * 0.1 + 0.05 * torch.rand(n, 1, generator=generator)


def moments(k: int, samples: int = 512) -> Tensor:
    """Correlated inputs, some channels far louder than others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, k // 4, generator=generator) @ torch.randn(k // 4, k, generator=generator)
    x = (x + 0.3 * torch.randn(samples, k, generator=generator)) * torch.logspace(-1, 1, k)
    return x.T @ x


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_lowers_the_norm_that_it_is_made_for(bits: int) -> None:
    weight = weights(64, 128)
    norm = {m: float((dequantize(quantize_groups(weight, bits, 64, False, m)) - weight).abs().pow(0.7).sum()) for m in ("none", "hqq")}
    assert norm["hqq"] < 0.99 * norm["none"]


def test_hqq_refuses_groups_without_a_zero_point() -> None:
    with pytest.raises(ValueError, match="set symmetric to false"):
        quantize_groups(weights(4, 32), 4, 16, True, "hqq")


def hessian_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T): the share of a layer's output energy that is error, for inputs with H = sum x x^T."""
    difference = (weight - quantized).double()
    energy = ((weight.double() @ hessian.double()) * weight.double()).sum()
    return float(((difference @ hessian.double()) * difference).sum() / energy.clamp_min(1e-30))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_beats_rounding_to_nearest_on_the_inputs_it_was_shown(bits: int, symmetric: bool) -> None:
    weight, hessian = weights(48, 128), moments(128)
    error = {
        "rtn": hessian_error(weight, dequantize(quantize_groups(weight, bits, 32, symmetric)), hessian),
        "gptq": hessian_error(weight, dequantize(gptq(weight, hessian, bits, 32, symmetric)), hessian),
    }
    assert error["gptq"] < 0.2 * error["rtn"], error


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_rounding_to_nearest_when_inputs_are_white(symmetric: bool) -> None:
    weight = weights(16, 64)
    ours, nearest = gptq(weight, 3.0 * torch.eye(64), 4, 16, symmetric), quantize_groups(weight, 4, 16, symmetric)
    assert torch.equal(unpack(ours.codes, 4, 16), unpack(nearest.codes, 4, 16)) and torch.equal(ours.scales, nearest.scales)


def test_gptq_does_not_depend_on_the_scale_of_its_moments() -> None:
    weight, hessian = weights(16, 64), moments(64)
    assert torch.equal(gptq(weight, hessian, 4, 32, False).codes, gptq(weight, 1024 * hessian, 4, 32, False).codes)


def test_gptq_rounds_inputs_that_never_fired_and_pads_odd_widths() -> None:
    weight, hessian = weights(8, 50), moments(52)[:50, :50].clone()
    hessian[7], hessian[:, 7] = 0, 0
    q = gptq(weight, hessian, 4, 16, False)
    assert q.codes.shape == (8, 4, 8) and dequantize(q).shape == (8, 50)
    assert torch.isfinite(dequantize(q)).all()
    step = q.scales.repeat_interleave(16, 1)[:, 7]
    nearest = (dequantize(q)[:, 7] - weight[:, 7]).abs()
    inside = nearest <= 0.51 * step
    assert inside.float().mean() > 0.5  # others lie outside of their group's clipped range


def test_gptq_makes_up_for_an_error_with_the_columns_to_come() -> None:
    """Inputs that are always equal: only the sum of their weights counts, and the last ones can correct the first."""
    weight = torch.full((1, 16), 0.26)
    weight[0, 0] = 1.0
    hessian = torch.ones(16, 16) + 1e-6 * torch.eye(16)
    ours = dequantize(gptq(weight, hessian, 2, 16, True)).sum()
    nearest = dequantize(quantize_groups(weight, 2, 16, True)).sum()
    assert abs(float(ours - weight.sum())) < 0.3 * abs(float(nearest - weight.sum()))


def test_gptq_refuses_moments_and_weights_that_are_not_finite() -> None:
    with pytest.raises(NumericsError, match="calibration inputs"):
        gptq(weights(4, 32), torch.full((32, 32), float("nan")), 4, 16, True)
    with pytest.raises(NumericsError, match="not finite"):
        gptq(torch.full((4, 32), float("inf")), torch.eye(32), 4, 16, True)


@pytest.mark.parametrize("method", ["mse", "hqq"])
def test_chunks_are_rounded_in_workers_of_one_thread_with_the_same_codes(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads inside an operation wait for each other, so that one busy processor would slow all of them down."""
    weight, before, rounded, inside = weights(64, 128), torch.get_num_threads(), rounding._rounded, list[tuple[int, int]]()

    def spy(*given: Any) -> Any:
        inside.append((threading.get_ident(), torch.get_num_threads()))
        return rounded(*given)

    monkeypatch.setattr(rounding, "_rounded", spy)
    whole = quantize_groups(weight, 4, 32, False, method)
    monkeypatch.setattr(rounding, "CHUNK", 16 * 128)
    try:
        torch.set_num_threads(3)
        inside.clear()
        parts = quantize_groups(weight, 4, 32, False, method)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert len(inside) == 4 and {threads for _, threads in inside} == {1}
    assert threading.get_ident() not in {worker for worker, _ in inside}
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.scales, whole.scales)
