from __future__ import annotations

import pytest
import torch

from flashgen.flow.convert import add_noise
from flashgen.objectives.proxy import proxy_loss


def test_proxy_loss_gives_gradient_to_the_proxy_only() -> None:
    g = torch.Generator().manual_seed(0)
    v, x0, eps = (torch.randn(2, 1, 3, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    proxy_loss(v, x0, eps).backward()  # type: ignore[no-untyped-call]
    assert v.grad is not None and torch.allclose(v.grad, 2 * (v - (eps - x0)).detach() / v.numel(), rtol=1e-12)
    assert x0.grad is None and eps.grad is None


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_proxy_fitted_on_gaussian_samples_is_the_exact_velocity(sigma: float) -> None:
    """The best affine v(x) on exact moments equals E[eps - x0 | x_s] of N(m, c); its loss is the conditional variance.

    Two-point draws at mean +- sd (a product of two of them) have the Gaussian's first two moments exactly, so no Monte Carlo.
    """
    mean, variance = 0.7, 0.3
    signs = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0])).double()
    x0, eps = (mean + variance**0.5 * signs[:, 0]).reshape(4, 1, 1, 1), signs[:, 1].reshape(4, 1, 1, 1)
    s = torch.full((4,), sigma, dtype=torch.float64)
    x = add_noise(x0, eps, s)
    marginal = (1 - sigma) ** 2 * variance + sigma**2
    exact = (sigma - (1 - sigma) * variance) / marginal
    slope, offset = (torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in (exact, -mean - exact * (1 - sigma) * mean))
    loss = proxy_loss(slope * x + offset, x0, eps)
    for gradient in torch.autograd.grad(loss, (slope, offset)):  # a quadratic: no gradient means the minimum
        assert gradient.item() == pytest.approx(0, abs=1e-12)
    assert loss.item() == pytest.approx(1 + variance - exact**2 * marginal, rel=1e-12)
