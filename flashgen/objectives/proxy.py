"""The proxy (fake score): a flow model of what the student paints."""

from __future__ import annotations

from torch import Tensor

from flashgen.flow.convert import diffusion_factors, expand

MAX_WEIGHT = 10.0  # of the interval loss, where the two noise levels meet (Phased DMD)


def proxy_loss(v_proxy: Tensor, x0_student: Tensor, eps: Tensor) -> Tensor:
    """Flow matching on samples of the student: mean |v - (eps - x0)|^2. Gradient: `v_proxy` only.

    Fitted on finished rollouts by default, not on per-step x0 estimates: those are no samples, and a perfect student would
    be pushed away from the teacher (our choice; tests/objectives has the toy proof).
    """
    return (v_proxy - (eps - x0_student).detach()).square().mean()


def interval_loss(v_proxy: Tensor, x: Tensor, eps: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
    """Flow matching on a student's unfinished states x at `sigma`, diffused to `sigma_to` by `eps`. Gradient: `v_proxy` only.

    mean min(1/b^2, 10) (b (1 - sigma) (v - target))^2, b of `diffusion_factors`; needs no x0 and is unbiased (Phased DMD).
    The factor 1 - sigma is our choice: the target holds x / (1 - sigma), and without it the noisiest node drowns the others
    (a loss of 88 instead of 1.6 on the grid of four steps). A weight by noise level alone leaves the target unbiased.
    """
    _, b = diffusion_factors(sigma, sigma_to)
    error = v_proxy - interval_velocity(x, eps, sigma, sigma_to).detach()
    weight = (b.square() * MAX_WEIGHT).clamp_max(1) * (1 - sigma).square()
    return (expand(weight, x) * error.square()).mean()


def interval_velocity(x: Tensor, eps: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
    """What has the mean E[v | x at sigma_to] without knowing x0: [((1-s)^2 t + (1-t) s^2) / ((1-s)^2 b)] eps - x / (1-s)."""
    _, b = diffusion_factors(sigma, sigma_to)
    keep = (1 - sigma).square()
    factor = (keep * sigma_to + (1 - sigma_to) * sigma.square()) / (keep * b.clamp_min(1e-4))  # weighs nothing where b is that small
    return expand(factor, x) * eps - x / expand(1 - sigma, x)
