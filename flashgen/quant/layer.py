"""One layer of a network under the settings of a quantization: its codes, their bytes, their error. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from flashgen.quant.gptq import gptq
from flashgen.quant.pack import PRODUCT_BITS, InputScale, QuantizedLinear
from flashgen.quant.rounding import MIN_GROUP, quantize_groups

PROTECTED_BITS = 8


@dataclass(frozen=True)
class Rounding:
    """How the weights of a network become codes.

    `group` is the number of inputs that share a scale; "channel" is one scale per output, for integer products (8 bits, symmetric).
    """

    group: int | Literal["channel"]
    symmetric: bool
    method: Literal["rtn", "hqq", "gptq"] = "rtn"

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale in a layer with this number of inputs.

        A group longer than the row is cut to the smallest power of two that holds the row: one scale per row as before, without codes
        of zeros that pad the group.
        """
        if self.group == "channel":
            return inputs
        return min(self.group, max(MIN_GROUP, 1 << (inputs - 1).bit_length()))

    def fractional_zeros(self, bits: int) -> bool:
        """Return True if zero points lie between codes: HQQ's do, but onnxruntime's CPU kernel takes only whole ones at 8 bits."""
        return self.method == "hqq" and bits < 8


def layer_bits(name: str, bits: int, protect: Sequence[str]) -> int:
    """Bits of the layer `name` without a budget: `PROTECTED_BITS` if its name starts with an entry of `protect`, else `bits`."""
    return PROTECTED_BITS if name.startswith(tuple(protect)) else bits


def quantize_layer(
    weight: Tensor, bits: int, rounding: Rounding, moments: Tensor | None = None, inputs: InputScale | None = None
) -> QuantizedLinear:
    """Codes of `weight` [N, K]. Method gptq uses the second `moments` [K, K] of the layer's inputs, and is rtn without them.

    With one scale per output the codes are those of `PRODUCT_BITS`, in the middle of the 8-bit ones: 128 - 64 to 128 + 63. All processors
    multiply them exactly. `inputs` is the scale of the layer's inputs, for such layers.
    Raises NumericsError when a weight or a moment is not finite.
    """
    group = rounding.group_of(weight.shape[1])
    if rounding.method == "gptq" and moments is not None:
        q = gptq(weight, moments, bits, group, rounding.symmetric)
    else:
        steps = PRODUCT_BITS if rounding.group == "channel" else bits
        q = quantize_groups(weight, steps, group, rounding.symmetric, "hqq" if rounding.fractional_zeros(bits) else "mse")
    if rounding.group == "channel":
        q = replace(q, codes=q.codes + 2 ** (bits - 1) - 2 ** (PRODUCT_BITS - 1), bits=bits, inputs=inputs, channel=True)
    return q


def stored_tensors(q: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors that an artifact keeps of a layer: codes, and scales and fractional zero points in fp16, which holds them exactly."""
    tensors = {"codes": q.codes, "scales": q.scales.half()}
    if q.zeros is not None:
        tensors["zeros"] = q.zeros.half() if q.zeros.is_floating_point() else q.zeros
    return tensors


def stored_bytes(shape: Sequence[int], bits: int, rounding: Rounding) -> int:
    """Bytes of `stored_tensors` for a weight of `shape` [N, K]."""
    n, k = shape
    group = rounding.group_of(k)
    groups = -(-k // group)
    zeros = 0 if rounding.symmetric else 2 * groups if rounding.fractional_zeros(bits) else -(-groups * bits // 8)
    return n * (groups * (group * bits // 8) + 2 * groups + zeros)


def relative_error(approximation: Tensor, weight: Tensor) -> float:
    """|approximation - weight| / |weight|."""
    return float((approximation - weight).norm() / weight.norm().clamp_min(1e-12))
