"""Where scores are compared: at the student's own next node (`shared`), at a re-noised sample (`renoise`), or between (`interval`).

All three give a state for the same estimate of x0, at node `sigma` of a student step sigma -> sigma_next. Sigmas [B], states [B, C, h, w].
`limits` is (min_sigma, max_sigma): scores are compared between these noise levels only (DMD2).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flashgen.flow.convert import add_noise, diffuse, expand, move, x0_from_v

Point = Literal["shared", "renoise", "interval"]
Last = Literal["interp", "renoise"]
Limits = tuple[float, float]


def evaluation_sigma(point: Point, sigma: Tensor, sigma_next: Tensor, uniform: Tensor, limits: Limits) -> Tensor:
    """Noise level of the comparison, [B], from `uniform` [B] in 0..1.

    shared    the next node (SD3.5-Flash); the last step leads to 0, where there is no score, so a point below its node (our choice)
    renoise   anywhere within the limits (DMD2)
    interval  between the next node and this one, disjoint from other steps' levels (TDM), so one fake score can tell steps apart
    """
    lowest, highest = limits
    if point == "renoise":
        return lowest + uniform * (highest - lowest)
    if point == "interval":
        low = sigma_next.clamp_min(lowest)
        return low + uniform * (sigma.clamp_max(highest) - low).clamp_min(0)  # a next node may lie above the highest level
    return torch.where(sigma_next > 0, sigma_next, sigma_below(sigma, uniform, limits))


def sigma_below(sigma: Tensor, uniform: Tensor, limits: Limits) -> Tensor:
    """Noise level between the lowest one and a node's own, at most the highest one, [B], from `uniform` [B] in 0..1."""
    lowest, highest = limits
    return lowest + uniform * (sigma.clamp_max(highest) - lowest)


def evaluation_point(
    point: Point, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_eval: Tensor, eps: Tensor, last: Last = "interp"
) -> Tensor:
    """State at `sigma_eval` at which teacher and fake score are evaluated; `eps` is fresh noise.

    shared    x moved along the student's own velocity, which re-noises with the student's own estimate of the noise; on the last step,
              to sigma 0, moved as far as `sigma_eval` (`last` "interp"), or re-noised with `eps` ("renoise")
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
