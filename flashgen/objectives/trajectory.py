"""Trajectory guidance: regress the student onto the teacher's guided ODE between the student's own nodes."""

from __future__ import annotations

from torch import Tensor

from flashgen.flow.convert import expand


def average_velocity(x_from: Tensor, x_to: Tensor, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
    """(x_to - x_from) / (sigma_to - sigma_from): what one Euler step must predict to land on the teacher's state.

    States [B, C, h, w], sigmas [B]. Source: SD3.5-Flash, trajectory guidance as its secondary sources describe it.
    """
    return (x_to - x_from) / expand(sigma_to - sigma_from, x_from)


def trajectory_loss(v_student: Tensor, x_from: Tensor, x_to: Tensor, sigma_from: Tensor, sigma_to: Tensor, huber: float = 0.0) -> Tensor:
    """Mean squared velocity error, every segment with weight 1 (our choice). Gradient: `v_student` only.

    With `huber` c > 0 a sample of mean squared error d counts sqrt(d + c^2) - c: iCT's pseudo-Huber loss (2310.14189, section 3.3), which
    takes the sum instead of the mean, so its c is sqrt(C h w) times ours. Where trajectories of one prompt part, its minimum is closer
    to the majority, while that of the squared error is their mean.
    """
    d = (v_student - average_velocity(x_from, x_to, sigma_from, sigma_to).detach()).square().flatten(1).mean(1)
    return ((d + huber**2).sqrt() - huber if huber else d).mean()
