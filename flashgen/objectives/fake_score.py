"""The fake score: a flow model of the student's samples. Its losses take velocities [B, C, h, w] and sigmas [B]."""

from __future__ import annotations

from torch import Tensor

from flashgen.flow.convert import diffusion_factors, expand

MAX_WEIGHT = 10.0  # largest 1/b^2 in the interval loss, where the two noise levels meet (Phased DMD)
MIN_FACTOR = 1e-4  # b below which the interval loss has practically no weight


def fake_score_loss(v_fake_score: Tensor, x0_student: Tensor, eps: Tensor) -> Tensor:
    """Flow matching on samples of the student: mean |v - (eps - x0)|^2. Gradient: `v_fake_score` only.

    Fitted on finished rollouts by default, not on per-step estimates of x0: those are not samples, and a perfect student would
    be pushed away from the teacher (our choice; tests/objectives has a toy proof).
    """
    return (v_fake_score - (eps - x0_student).detach()).square().mean()


def interval_loss(v_fake_score: Tensor, x: Tensor, eps: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
    """Flow matching on unfinished states x at `sigma`, diffused to `sigma_to` by `eps`. Gradient: `v_fake_score` only.

    mean min(1/b^2, 10) (b (1 - sigma) (v - target))^2, b of `diffusion_factors`; needs no x0 and is unbiased (Phased DMD).
    DEVIATION: the factor 1 - sigma. The target holds x / (1 - sigma); without the factor the noisiest node dominates the others
    (a loss of 88 instead of 1.6 on the grid of four steps). A weight that depends on the noise level alone keeps the target unbiased.
    """
    _, b = diffusion_factors(sigma, sigma_to)
    error = v_fake_score - interval_velocity(x, eps, sigma, sigma_to).detach()
    weight = (b.square() * MAX_WEIGHT).clamp_max(1) * (1 - sigma).square()
    return (expand(weight, x) * error.square()).mean()


def interval_velocity(x: Tensor, eps: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
    """Target with mean E[v | x at sigma_to] that needs no x0: [((1-s)^2 t + (1-t) s^2) / ((1-s)^2 b)] eps - x / (1-s) (Phased DMD)."""
    _, b = diffusion_factors(sigma, sigma_to)
    squared = (1 - sigma).square()
    factor = (squared * sigma_to + (1 - sigma_to) * sigma.square()) / (squared * b.clamp_min(MIN_FACTOR))
    return expand(factor, x) * eps - x / expand(1 - sigma, x)
