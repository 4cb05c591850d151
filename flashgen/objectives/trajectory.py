"""Trajectory guidance: regress the student onto the teacher's guided ODE between the student's own nodes."""

from __future__ import annotations

from torch import Tensor

from flashgen.flow.convert import expand


def average_velocity(x_from: Tensor, x_to: Tensor, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
    """(x_to - x_from) / (sigma_to - sigma_from): what one Euler step must predict to land on the teacher's state.

    States [B, C, H, W], sigmas [B]. Source: SD3.5-Flash, trajectory guidance as its secondary sources describe it.
    """
    return (x_to - x_from) / expand(sigma_to - sigma_from, x_from)


def trajectory_loss(v_student: Tensor, x_from: Tensor, x_to: Tensor, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
    """Mean squared velocity error, weight 1 a segment (our choice). Gradient flows to `v_student` only."""
    return (v_student - average_velocity(x_from, x_to, sigma_from, sigma_to).detach()).square().mean()
