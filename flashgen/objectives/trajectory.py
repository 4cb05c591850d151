"""Trajectory guidance: regress the student onto the teacher's guided ODE between the student's own nodes."""

from __future__ import annotations

from torch import Tensor

from flashgen.flow.convert import expand


def average_velocity(x_from: Tensor, x_to: Tensor, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
    """(x_to - x_from) / (sigma_to - sigma_from): what one Euler step must predict to land on the teacher's state.

    States [B, C, H, W], sigmas [B]. Source: SD3.5-Flash, trajectory guidance as its secondary sources describe it.
    """
    return (x_to - x_from) / expand(sigma_to - sigma_from, x_from)


def trajectory_loss(v_student: Tensor, x_from: Tensor, x_to: Tensor, sigma_from: Tensor, sigma_to: Tensor, huber: float = 0.0) -> Tensor:
    """Mean squared velocity error, weight 1 a segment (our choice). Gradient flows to `v_student` only.

    With `huber` c > 0 a sample of mean squared error d counts sqrt(d + c^2) - c: iCT's pseudo-Huber loss (2310.14189, section 3.3), which
    takes the sum instead of the mean, so that its c is sqrt(C H W) times ours. Its minimum is nearer to what most trajectories do than to
    a mean of those that decide one way and those that decide another.
    """
    d = (v_student - average_velocity(x_from, x_to, sigma_from, sigma_to).detach()).square().flatten(1).mean(1)
    return ((d + huber**2).sqrt() - huber if huber else d).mean()
