"""GPTQ (Frantar et al. 2022): round column by column, and correct each error in the columns behind it. Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashgen.errors import NumericsError
from flashgen.quant.pack import QuantizedLinear
from flashgen.quant.rounding import assemble, best_range, grouped, round_to

BLOCK = 128  # columns whose errors are passed on to the columns behind the block in one product
DAMP = 0.01  # share of the mean diagonal that is added to the diagonal (as in the paper)


def gptq(weight: Tensor, hessian: Tensor, bits: int, group: int, symmetric: bool) -> QuantizedLinear:
    """Codes of `weight` [N, K] for inputs with second moments `hessian` [K, K] (any positive scale).

    Inputs are rounded in the order of their moments, the largest first, so that errors move to inputs that matter less. The range of a
    group is that of least squared error of the unchanged weights, so groups keep the layout of MatMulNBits (GPTQ's act-order with static
    groups). Inputs that are always 0 are rounded to nearest. Raises NumericsError when a weight or a moment is not finite.
    """
    groups = grouped(weight, bits, group)
    if not bool(torch.isfinite(hessian).all()):
        raise NumericsError("the calibration inputs of a layer are not finite; check the student with `flashgen generate`")
    scales, zeros = best_range(groups, bits, symmetric)
    columns = groups.flatten(1)
    moments = pad(hessian.double(), (0, columns.shape[1] - len(hessian)) * 2)
    order = moments.diagonal().argsort(descending=True, stable=True)
    scale, zero = (part.repeat_interleave(group, 1)[:, order] for part in (scales, zeros))
    columns, upper = columns[:, order], _inverse_factor(moments[order][:, order]).float()
    codes = torch.empty_like(columns)
    for start in range(0, columns.shape[1], BLOCK):
        end, errors = min(start + BLOCK, columns.shape[1]), []
        for i in range(start, end):
            codes[:, i] = round_to(columns[:, i, None], scale[:, i], zero[:, i], bits)[:, 0]
            error = (columns[:, i] - (codes[:, i] - zero[:, i]) * scale[:, i]) / upper[i, i]
            columns[:, i:end] -= error[:, None] * upper[i, i:end]
            errors.append(error)
        columns[:, end:] -= torch.stack(errors, 1) @ upper[start:end, end:]
    codes = codes[:, order.argsort()].reshape(len(columns), -1, group)
    return assemble(codes, scales, zeros, bits, symmetric, weight.shape[1])


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse; row i says how the error of column i spreads to the columns behind it."""
    diagonal = hessian.diagonal()
    damped = hessian + torch.diag(torch.where(diagonal > 0, DAMP * diagonal.mean(), diagonal.mean().clamp_min(1e-12)))
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor
