"""Codes of weights without data: rounded to nearest on the full range, on the range of least error, or HQQ. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashgen.errors import NumericsError
from flashgen.quant.pack import QuantizedLinear, as_half, pack

T = TypeVar("T")
Method = Literal["none", "mse", "hqq"]
# Shares of a group's range tried by the MSE search (our choice). Above 1: a symmetric group whose other end would be cut.
SHARES = [1.0, *torch.linspace(1.15, 0.55, 25).tolist()]
CHUNK = 1 << 18  # weights searched together: whole rows that stay in a processor's cache through all shares
MIN_GROUP = 16  # the shortest group that MatMulNBits takes
HQQ_ROUNDS, HQQ_NORM, HQQ_BETA, HQQ_GROWTH = 20, 0.7, 10.0, 1.01  # as in the published solver


def quantize_groups(weight: Tensor, bits: int, group: int, symmetric: bool, method: Method = "mse") -> QuantizedLinear:
    """Codes of `weight` [N, K], group by group; the range of a group by `method`.

    none   from its least to its greatest weight
    mse    the share of that range with the least squared error
    hqq    the full range with the zero point, a fraction, of least |error|^0.7 (half-quadratic quantization, Badri and Shaji 2023)

    Raises NumericsError when a weight is not finite, ValueError for sizes that the layout lacks.
    """
    if method == "hqq" and symmetric:
        raise ValueError("hqq moves zero points, and symmetric groups have none; set symmetric to false")
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    parts = _in_workers(lambda part: _rounded(grouped(part, bits, group), bits, symmetric, method), torch.split(weight, rows))
    codes, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    return assemble(codes, scales, zeros, bits, symmetric, weight.shape[1])


def _in_workers(function: Callable[[Tensor], T], parts: Sequence[Tensor]) -> list[T]:
    """`function` of each part, in order; parts in the CPU's memory are shared out over as many workers as torch has threads.

    A worker computes on one thread. Threads inside an operation would wait for each other at its end, thousands of times per second, and
    a processor that another program keeps busy would slow all of them down.
    """
    threads = torch.get_num_threads()
    if min(threads, len(parts)) < 2 or parts[0].device.type != "cpu":
        return [function(part) for part in parts]
    torch.set_num_threads(1)  # a thread that starts later begins with this number
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, parts))
    finally:
        torch.set_num_threads(threads)


def _rounded(groups: Tensor, bits: int, symmetric: bool, method: Method) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes [N, G, g], scales and zeros [N, G] of groups [N, G, g]."""
    scales, zeros = best_range(groups, bits, symmetric) if method == "mse" else full_range(groups, bits, symmetric)
    if method == "hqq":
        zeros = _half_quadratic(groups, scales, zeros, bits)
    return round_to(groups, scales, zeros, bits).to(torch.uint8), scales, zeros


def grouped(weight: Tensor, bits: int, group: int) -> Tensor:
    """`weight` [N, K] as fp32 groups [N, ceil(K / group), group], padded with zeros.

    Raises NumericsError when a weight is not finite, ValueError for sizes that the layout lacks.
    """
    if bits not in (2, 3, 4, 7, 8) or group < MIN_GROUP or (group & (group - 1) and group != weight.shape[1]):
        raise ValueError(f"bits must be 2, 3, 4, 7 or 8 and group a power of two >= 16 or a whole row, not {bits} and {group}")
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise NumericsError("a weight to be quantized is not finite; check the student with `flashgen generate` and train it again")
    return pad(weight, (0, -weight.shape[1] % group)).reshape(len(weight), -1, group)


def assemble(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, symmetric: bool, k: int) -> QuantizedLinear:
    """Codes of a weight with `k` inputs from float codes [N, G, g], scales and zeros [N, G]."""
    integers = not bool((zeros != zeros.round()).any())
    packed_zeros = None if symmetric else pack(zeros.to(torch.uint8), bits) if integers else zeros
    return QuantizedLinear(pack(codes.to(torch.uint8), bits), scales, packed_zeros, bits, codes.shape[-1], k)


def round_to(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Nearest codes [..., g] of groups [..., g], as floats."""
    return torch.round(groups / scales[..., None] + zeros[..., None]).clamp(0, 2**bits - 1)


def full_range(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros [...] for the whole range of each group [..., g]."""
    return range_scales(groups.amin(-1), groups.amax(-1), bits, symmetric)


def range_scales(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros of groups whose least and greatest values are `low` and `high`."""
    if symmetric:  # the signed extreme maps to code 0, so that all 2^bits levels are used; scales may be negative
        scales = as_half(torch.where(high > -low, high, low) / -(2 ** (bits - 1)))
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = as_half((high - low) / (2**bits - 1))
        zeros = torch.round(-low / torch.where(scales == 0, 1, scales)).clamp(0, 2**bits - 1)
    return torch.where(scales == 0, 1, scales), zeros


def best_range(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros of the first share in `SHARES` with the least squared error, group by group."""
    low, high = groups.amin(-1), groups.amax(-1)
    shares = torch.tensor(SHARES, device=groups.device).view(-1, *[1] * low.dim())
    scales, zeros = range_scales(shares * low, shares * high, bits, symmetric)
    errors, work = torch.empty_like(scales), torch.empty_like(groups)
    for scale, zero, error in zip(scales[..., None], zeros[..., None], errors, strict=True):  # every pass in place: nothing is allocated
        torch.div(groups, scale, out=work).add_(zero).round_().clamp_(0, 2**bits - 1)
        torch.sum(work.sub_(zero).mul_(scale).sub_(groups).square_(), -1, out=error)
    order = torch.arange(len(SHARES), device=groups.device).view_as(shares)
    best = torch.where(errors == errors.amin(0), order, len(SHARES) - 1).amin(0, keepdim=True)
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def _half_quadratic(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Zeros [N, G] that fp16 holds: alternate a soft threshold, which takes outliers out of the error, with the best zero for the rest."""
    best, best_error, beta = zeros, torch.full_like(zeros, torch.inf), HQQ_BETA
    for _ in range(HQQ_ROUNDS):
        codes = round_to(groups, scales, zeros, bits)
        error = groups - (codes - zeros[..., None]) * scales[..., None]
        norm = error.abs().pow(HQQ_NORM).sum(-1)
        best = torch.where(norm < best_error, zeros, best)
        best_error = torch.minimum(norm, best_error)
        size = error.abs()
        outlier = error.sign() * (size - size.clamp_min(1e-8).pow(HQQ_NORM - 1) / beta).clamp_min(0)
        zeros = as_half((codes - (groups - outlier) / scales[..., None]).mean(-1))
        beta *= HQQ_GROWTH
    return best
