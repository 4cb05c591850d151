"""Group-wise 4- and 8-bit weights in the layout of onnxruntime's MatMulNBits. Tensors in, tensors out.

A weight [N, K] is cut into groups of `group` inputs (the last one padded with zeros). Its value is scale * (code - zero)
with code in 0..2^bits-1; zero is 2^(bits-1) for symmetric groups. Codes of 4 bits are packed low nibble first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashgen.errors import NumericsError

# Shares of a group's range tried by the MSE search (our choice). Above 1: a symmetric group whose other end would be cut.
SHRINK = torch.linspace(1.15, 0.55, 25).tolist()


@dataclass(frozen=True)
class QuantizedLinear:
    """`codes` uint8 [N, K/g, g*bits/8], `scales` fp32 [N, K/g] that fp16 holds exactly, `zeros` packed uint8
    [N, ceil(K/g * bits / 8)] or None if symmetric."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    k: int


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] to bytes [..., ceil(n * bits / 8)]; an odd last nibble is followed by 0."""
    if bits == 8:
        return codes.contiguous()
    even = pad(codes, (0, codes.shape[-1] % 2))
    return even[..., 0::2] | (even[..., 1::2] << 4)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: the first `n` codes of each row."""
    if bits == 8:
        return packed[..., :n]
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :n]


def quantize_groups(weight: Tensor, bits: int, group: int, symmetric: bool, clip: Literal["mse", "none"] = "mse") -> QuantizedLinear:
    """Round-to-nearest codes of `weight` [N, K]; `clip="mse"` picks, group by group, the range with the least squared error.

    Raises NumericsError when a weight is not finite.
    """
    if bits not in (4, 8) or group < 16 or group & (group - 1):
        raise ValueError(f"bits must be 4 or 8 and group a power of two >= 16, not {bits} and {group}")
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise NumericsError("a weight to be quantized is not finite; check the student with `flashgen generate` and train it again")
    n, k = weight.shape
    groups = pad(weight, (0, -k % group)).reshape(n, -1, group)
    best = _candidate(groups, bits, symmetric, 1.0)
    if clip == "mse":
        best_error = _error(groups, *best)
        for share in SHRINK:
            trial = _candidate(groups, bits, symmetric, share)
            error = _error(groups, *trial)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = (
                torch.where(better[..., None], trial[0], best[0]),
                torch.where(better, trial[1], best[1]),
                torch.where(better, trial[2], best[2]),
            )
    codes, scales, zeros = best
    packed_zeros = None if symmetric else pack(zeros.to(torch.uint8), bits)
    return QuantizedLinear(pack(codes.to(torch.uint8), bits), scales, packed_zeros, bits, group, k)


def dequantize(q: QuantizedLinear) -> Tensor:
    """The fp32 weight [N, K] that MatMulNBits computes with."""
    codes = unpack(q.codes, q.bits, q.group).float()
    zeros: Tensor | float = 2.0 ** (q.bits - 1)
    if q.zeros is not None:
        zeros = unpack(q.zeros, q.bits, q.scales.shape[1]).float()[..., None]
    return ((codes - zeros) * q.scales[..., None]).flatten(1)[:, : q.k].contiguous()


def _candidate(groups: Tensor, bits: int, symmetric: bool, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Float codes [N, G, g], scales and zeros [N, G] for `share` of each group's range."""
    levels = 2**bits - 1
    if symmetric:  # the signed extreme maps to code 0, so that all 2^bits levels are used; scales may be negative
        low, high = groups.amin(-1), groups.amax(-1)
        scales = _as_half(share * torch.where(high > -low, high, low) / -(2 ** (bits - 1)))
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = share * groups.amin(-1).clamp(max=0), share * groups.amax(-1).clamp(min=0)
        scales = _as_half((high - low) / levels)
        zeros = torch.round(-low / torch.where(scales == 0, 1, scales)).clamp(0, levels)
    scales = torch.where(scales == 0, 1, scales)
    codes = (torch.round(groups / scales[..., None]) + zeros[..., None]).clamp(0, levels)
    return codes, scales, zeros


def _as_half(scales: Tensor) -> Tensor:
    """Rounded to what the exported graph stores: half the bytes, so that groups may be half as long."""
    return scales.clamp(-65504, 65504).half().float()


def _error(groups: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return ((codes - zeros[..., None]) * scales[..., None] - groups).square().sum(-1)
