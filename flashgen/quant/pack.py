"""Group-wise weights of 2, 3, 4 and 8 bits in the layout of onnxruntime's MatMulNBits: packing and its inverse.

A weight [N, K] is cut into groups of `group` inputs (the last one padded with zeros). Its value is scale * (code - zero)
with code in 0..2^bits-1; zero is 2^(bits-1) for symmetric groups. Codes are packed low bits first, 3 bits across bytes, a layout that
MatMulNBits lacks: `as_bits` widens them for the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Bits of weights in products of integers: x86 without VNNI adds two products in 16 bits, which those of 8 bits overflow. There onnxruntime
# would need a kernel for unsigned weights, which takes 1.4 times as long (docs/lab-log.md, 2026-11-30).
PRODUCT_BITS = 7


class InputScale(NamedTuple):
    """Scale and zero point of a layer's inputs: x becomes the uint8 code round(x / scale) + zero, clamped to 0..255."""

    scale: float
    zero: int


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes of a weight [N, K] in G = ceil(K / group) groups per row.

    `codes` are uint8 [N, G, group * bits / 8]; `scales` are fp32 [N, G], numbers that fp16 holds exactly; `zeros` are packed uint8
    [N, ceil(G * bits / 8)], or fp32 [N, G] that fp16 holds (HQQ's are fractions), or None for symmetric groups. `channel` says that one
    scale per row was asked for, so that products may round their activations and multiply integers; a row that happens to be one group
    does not allow that. `inputs` are the scale and zero point of these activations; None: they follow from each call's range.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    k: int
    channel: bool = False
    inputs: InputScale | None = None

    @property
    def overflows(self) -> bool:
        """Return True if products of integers read these codes and any has more than `PRODUCT_BITS`, as in flashgen 0.2."""
        half = 1 << PRODUCT_BITS - 1
        return self.channel and not bool(self.codes.min() >= 128 - half and self.codes.max() < 128 + half)

    def cpu(self) -> QuantizedLinear:
        """The same codes in the CPU's memory."""
        return replace(self, codes=self.codes.cpu(), scales=self.scales.cpu(), zeros=None if self.zeros is None else self.zeros.cpu())


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n] into bytes [..., ceil(n * bits / 8)], the first code in the lowest bits; unused bits are 0."""
    if bits == 3:  # eight codes in three bytes
        padded = pad(codes, (0, -codes.shape[-1] % 8))
        eight = padded.reshape(*padded.shape[:-1], -1, 8).int()
        word = (eight << (3 * torch.arange(8, dtype=torch.int32, device=eight.device))).sum(-1, dtype=torch.int32)
        packed = torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], -1).to(torch.uint8).flatten(-2)
        return packed[..., : -(-codes.shape[-1] * 3 // 8)].contiguous()
    each = 8 // bits
    padded = pad(codes, (0, -codes.shape[-1] % each))
    packed = padded[..., 0::each].clone()
    for i in range(1, each):
        packed |= padded[..., i::each] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes of each row; inverse of `pack`."""
    if bits == 3:
        padded = pad(packed, (0, -packed.shape[-1] % 3))
        three = padded.reshape(*padded.shape[:-1], -1, 3).int()
        word = (three << (8 * torch.arange(3, dtype=torch.int32, device=three.device))).sum(-1, dtype=torch.int32)
        codes: Tensor = ((word[..., None] >> (3 * torch.arange(8, dtype=torch.int32, device=word.device))) & 7).to(torch.uint8)
    else:
        codes = torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
    return codes.flatten(-2)[..., :n]


def dequantize(q: QuantizedLinear) -> Tensor:
    """The fp32 weight [N, K] that MatMulNBits computes with."""
    codes = unpack(q.codes, q.bits, q.group).float()
    return ((codes - zeros_of(q)[..., None]) * q.scales[..., None]).flatten(1)[:, : q.k].contiguous()


def zeros_of(q: QuantizedLinear) -> Tensor:
    """Zero points as floats [N, G]."""
    if q.zeros is None:
        return torch.full_like(q.scales, 2.0 ** (q.bits - 1))
    return q.zeros if q.zeros.is_floating_point() else unpack(q.zeros, q.bits, q.scales.shape[1]).float()


def as_bits(q: QuantizedLinear, bits: int) -> QuantizedLinear:
    """The same weight with its codes stored in `bits` bits each, for engines without the narrower kind (3-bit codes as 4-bit ones)."""
    codes = pack(unpack(q.codes, q.bits, q.group), bits)
    if q.zeros is not None and q.zeros.is_floating_point():
        return replace(q, codes=codes, bits=bits)
    zeros = zeros_of(q).to(torch.uint8)  # a symmetric zero is the middle of the narrow range, not of the wider one
    return replace(q, codes=codes, zeros=pack(zeros, bits), bits=bits)


def as_half(values: Tensor) -> Tensor:
    """`values` in fp32, rounded to fp16: the exported graph stores scales in fp16, so that groups may be half as long."""
    return values.clamp(-65504, 65504).half().float()
