"""Trajectory guidance: regress the student onto the teacher's guided ODE between the student's own nodes."""

from __future__ import annotations

import torch
from torch import Tensor

from flashgen.flow.convert import expand


def average_velocity(x_from: Tensor, x_to: Tensor, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
    """(x_to - x_from) / (sigma_to - sigma_from): what one Euler step must predict to land on the teacher's state.

    States [B, C, H, W], sigmas [B]. Source: SD3.5-Flash, trajectory guidance as its secondary sources describe it.
    """
    return (x_to - x_from) / expand(sigma_to - sigma_from, x_from)


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """Mean over samples of sqrt(d + c^2) - c, d a sample's mean square of `error` [B, C, H, W]; the mean of d where c is 0.

    iCT's pseudo-Huber loss (2310.14189, section 3.3), which takes the sum instead of the mean, so that its c is sqrt(C H W) times ours.
    Its minimum is nearer to what most trajectories do than to a mean of those that decide one way and those that decide another.
    """
    d = error.square().flatten(1).mean(1)
    return ((d + c**2).sqrt() - c if c else d).mean()


def trajectory_loss(v_student: Tensor, x_from: Tensor, x_to: Tensor, sigma_from: Tensor, sigma_to: Tensor, huber: float = 0.0) -> Tensor:
    """Velocity error of one step from the leader's state, weight 1 a segment (our choice). Gradient flows to `v_student` only."""
    return pseudo_huber(v_student - average_velocity(x_from, x_to, sigma_from, sigma_to).detach(), huber)


def rollout_loss(own: list[Tensor], led: list[Tensor], sigmas: Tensor, huber: float = 0.0) -> Tensor:
    """The same of a student's whole rollout: each step from its own state, towards where the leader's trajectory of the same noise is then.

    `own` and `led` are the N states behind the start, [B, C, H, W] each; `sigmas` [N + 1]. A mean over steps. Gradient flows through all
    of `own`, so that a step also learns what the later ones can go on from (our choice; with the last step alone it would be Luhman and
    Luhman's regression of noise onto samples, 2101.02388).
    """
    steps = zip(own, led, sigmas.diff(), strict=True)
    return torch.stack([pseudo_huber((x - x_led) / stride, huber) for x, x_led, stride in steps]).mean()
