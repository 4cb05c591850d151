"""Rectified-flow algebra. One convention for all of flashgen, stated here and nowhere else.

    x_s = (1 - s) x0 + s eps        s = sigma in [0, 1]; 1 is noise
    v   = dx_s/ds = eps - x0        what the network predicts
    guided v = v_u + guidance (v_c - v_u)          (`ode.guide`)

Functions take tensors [B, C, h, w] and sigmas [B] (or anything that broadcasts after `expand`).
"""

from __future__ import annotations

from torch import Tensor


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """`sigma` [B] as [B, 1, 1, 1], with as many axes as `like` and in its dtype."""
    return sigma.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """State at `sigma` between data `x0` and noise `eps`: (1 - sigma) x0 + sigma eps."""
    s = expand(sigma, x0)
    return (1 - s) * x0 + s * eps


def diffuse(x: Tensor, eps: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
    """`x` at `sigma` carried up to a noisier `sigma_to` by fresh noise: a x + b eps, with the marginal of the flow at `sigma_to`."""
    a, b = diffusion_factors(sigma, sigma_to)
    return expand(a, x) * x + expand(b, x) * eps


def diffusion_factors(sigma: Tensor, sigma_to: Tensor) -> tuple[Tensor, Tensor]:
    """a = (1 - t) / (1 - s) and b = sqrt(t^2 - a^2 s^2) of the transition s -> t >= s, [B] each; s < 1."""
    a = (1 - sigma_to) / (1 - sigma)
    return a, (sigma_to.square() - a.square() * sigma.square()).clamp_min(0).sqrt()


def x0_from_v(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Estimate of x0 from state `x` and velocity `v`: x - sigma v."""
    return x - expand(sigma, x) * v


def move(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """State after one Euler step from `sigma` to `sigma_next` along `v`."""
    return x + expand(sigma_next - sigma, x) * v
