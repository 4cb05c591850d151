"""Distribution matching (DMD2) with the evaluation point on the student's own trajectory (SD3.5-Flash, "timestep sharing")."""

from __future__ import annotations

import torch
from torch import Tensor

from flashgen.flow.convert import move

MIN_SIGMA = 0.02  # scores are not evaluated nearer to the data than this (DMD2)


def shared_sigma(sigma: Tensor, sigma_next: Tensor, uniform: Tensor) -> Tensor:
    """Noise level at which scores are compared, [B]: the student's next node.

    The last node has no score at 0; there a point on the last segment is drawn, `uniform` [B] in 0..1 (our choice).
    """
    return torch.where(sigma_next > 0, sigma_next, MIN_SIGMA + uniform * (sigma - MIN_SIGMA))


def shared_point(x: Tensor, v_student: Tensor, sigma: Tensor, sigma_eval: Tensor) -> Tensor:
    """The student's own state at `sigma_eval`: x moved along its own velocity, not a re-noised x0. No gradient."""
    return move(x, v_student, sigma, sigma_eval).detach()


def matching_direction(x0_student: Tensor, x0_teacher: Tensor, x0_proxy: Tensor, *, floor: float) -> Tensor:
    """(x0_proxy - x0_teacher) / max(mean |x0_student - x0_teacher|, floor), per sample, float32 (DMD eq. 8, DMD2).

    `x0_teacher` is guided, `x0_proxy` conditional and unguided. `floor` > 0 keeps the division from exploding.
    """
    scale = (x0_student - x0_teacher).float().abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(floor)
    return ((x0_proxy - x0_teacher).float() / scale).detach()


def matching_loss(x0_student: Tensor, direction: Tensor) -> Tensor:
    """Surrogate whose gradient with respect to `x0_student` is `direction` / numel. Gradient: `x0_student` only."""
    return 0.5 * (x0_student - (x0_student - direction).detach()).square().mean()
