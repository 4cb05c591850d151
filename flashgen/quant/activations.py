"""Inputs of integer products: their scale and zero point from a histogram, and their rounding. Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from flashgen.quant.pack import InputScale
from flashgen.quant.rounding import full_range, range_scales, round_to

BITS = 8
BINS = 4096  # of a histogram of inputs: 16 for each of the 255 steps between codes
SHARES = [0.88**power for power in range(13)]  # of each end of the range (our choice); the least one is 0.22
LEAST_RANGE = 255 * 2.0**-24  # of inputs whose scale fp16 can hold


def best_input_scale(counts: Tensor, low: float, high: float) -> InputScale:
    """Scale and zero point of least squared error for inputs with the histogram `counts` [bins] over `low` <= 0 <= `high`.

    Each end of the range is cut to each of `SHARES`. The range is at least `LEAST_RANGE`.
    """
    shares, width = torch.tensor(SHARES, device=counts.device), (high - low) / len(counts)
    centers = low + width * (torch.arange(len(counts), device=counts.device) + 0.5)
    scales, zeros = range_scales(low * shares[:, None], high * shares, BITS, symmetric=False)
    codes = round_to(centers, scales, zeros, BITS)
    errors = ((codes - zeros[..., None]) * scales[..., None]).sub_(centers).square_().mul_(counts).sum(-1)
    best = int(errors.argmin())
    return InputScale(float(scales.flatten()[best]), int(zeros.flatten()[best]))


def rounded(x: Tensor, inputs: InputScale | None) -> Tensor:
    """`x` [B, ...] with the values that integer products multiply.

    The scale and zero point are those of `inputs`; with None they follow from the range of each sample, as on a device that draws one
    picture at a time.
    """
    samples = x.flatten(1)
    if inputs is None:
        scales, zeros = full_range(samples, BITS, symmetric=False)
    else:
        scales, zeros = (samples.new_full((len(samples),), float(value)) for value in inputs)
    codes = round_to(samples, scales, zeros, BITS)
    return ((codes - zeros[:, None]) * scales[:, None]).view_as(x)
