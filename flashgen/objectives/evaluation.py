"""Where scores are compared: the student's own next node (`shared`), a re-noised sample (`renoise`), or between (`interval`).

All three move the same estimate, at noise level sigma of a student step sigma -> sigma_next. Sigmas [B], states [B, C, H, W].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flashgen.flow.convert import add_noise, diffuse, expand, move, x0_from_v

MIN_SIGMA, MAX_SIGMA = 0.02, 0.98  # scores are not compared nearer to the data or to the noise than this (DMD2)
Point = Literal["shared", "renoise", "interval"]
Last = Literal["interp", "renoise"]


def evaluation_sigma(point: Point, sigma: Tensor, sigma_next: Tensor, uniform: Tensor) -> Tensor:
    """Noise level of the comparison, [B], from `uniform` [B] in 0..1.

    shared    the next node (SD3.5-Flash); the last one has no score at 0, so there a point on the last segment (our choice)
    renoise   anywhere in MIN_SIGMA..MAX_SIGMA (DMD2)
    interval  between the next node and this one, disjoint from the other steps' (TDM), so that one proxy can tell steps apart
    """
    if point == "renoise":
        return MIN_SIGMA + uniform * (MAX_SIGMA - MIN_SIGMA)
    low = sigma_next.clamp_min(MIN_SIGMA)
    if point == "interval":
        return low + uniform * (sigma.clamp_max(MAX_SIGMA) - low).clamp_min(0)  # a next node may be above MAX_SIGMA
    return torch.where(sigma_next > 0, sigma_next, below(sigma, uniform))


def below(sigma: Tensor, uniform: Tensor) -> Tensor:
    """A level between MIN_SIGMA and a node's own, [B]; under pure noise at most MAX_SIGMA."""
    return MIN_SIGMA + uniform * (sigma.clamp_max(MAX_SIGMA) - MIN_SIGMA)


def evaluation_point(
    point: Point, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_eval: Tensor, eps: Tensor, last: Last = "interp"
) -> Tensor:
    """The state at `sigma_eval` on which teacher and proxy are asked; `eps` is fresh noise.

    shared    x moved along the student's own velocity: re-noising with the student's own noise estimate; on the last step, which
              leads to sigma 0, as far along the step as `sigma_eval` (`last` "interp"), or re-noised with `eps` ("renoise")
    renoise   (1 - s) x0 + s eps of the student's estimate of x0
    interval  the student's next state, diffused back up to `sigma_eval` (TDM, Phased DMD)
    """
    if point == "shared":
        moved = move(x, v, sigma, sigma_eval)
        if last == "interp":
            return moved
        return torch.where(expand(sigma_next, x) > 0, moved, add_noise(x0_from_v(x, v, sigma), eps, sigma_eval))
    if point == "renoise":
        return add_noise(x0_from_v(x, v, sigma), eps, sigma_eval)
    return diffuse(move(x, v, sigma, sigma_next), eps, sigma_next, sigma_eval)
