"""One layer as the recipe of `quantize` says: which bits, which rounding, how many bytes. Tensors in, tensors out."""

from __future__ import annotations

from torch import Tensor

from flashgen.quant.gptq import gptq
from flashgen.quant.pack import QuantizedLinear
from flashgen.quant.rounding import quantize_groups
from flashgen.recipe.schema import QuantizeRecipe


def quantize_layer(weight: Tensor, bits: int, config: QuantizeRecipe, moments: Tensor | None) -> QuantizedLinear:
    """Codes of `weight` [N, K]; GPTQ where there are second `moments` [K, K] of the inputs to round for."""
    if config.method == "gptq" and moments is not None:
        return gptq(weight, moments, bits, config.group_of(weight.shape[1]), config.symmetric)
    return quantize_groups(weight, bits, config.group_of(weight.shape[1]), config.symmetric, "hqq" if _unpacked(bits, config) else "mse")


def stored(q: QuantizedLinear) -> dict[str, Tensor]:
    """Tensors as the artifact keeps them: scales, and zero points between codes, as the fp16 that they are."""
    found = {"codes": q.codes, "scales": q.scales.half()}
    if q.zeros is not None:
        found["zeros"] = q.zeros.half() if q.zeros.is_floating_point() else q.zeros
    return found


def stored_bytes(weight: Tensor, bits: int, config: QuantizeRecipe) -> int:
    """Of the stored codes, scales and zero points of `weight` [N, K]."""
    n, k = weight.shape
    group = config.group_of(weight.shape[1])
    blocks = -(-k // group)
    zeros = 0 if config.symmetric else 2 * blocks if _unpacked(bits, config) else -(-blocks * bits // 8)
    return int(n * (blocks * group * bits // 8 + 2 * blocks + zeros))


def _unpacked(bits: int, config: QuantizeRecipe) -> bool:
    """Whether zero points lie between codes: HQQ's do, but onnxruntime's CPU kernel takes whole ones only at 8 bits."""
    return config.method == "hqq" and bits < 8
