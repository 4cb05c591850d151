from __future__ import annotations

import pytest
import torch

from flashgen.flow.convert import add_noise, diffuse
from flashgen.objectives.fake_score import fake_score_loss, interval_loss, interval_velocity


def test_fake_score_loss_gives_gradient_to_the_fake_score_only() -> None:
    g = torch.Generator().manual_seed(0)
    v, x0, eps = (torch.randn(2, 1, 3, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    fake_score_loss(v, x0, eps).backward()  # type: ignore[no-untyped-call]
    assert v.grad is not None and torch.allclose(v.grad, 2 * (v - (eps - x0)).detach() / v.numel(), rtol=1e-12)
    assert x0.grad is None and eps.grad is None


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_fake_score_fitted_on_gaussian_samples_is_the_exact_velocity(sigma: float) -> None:
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
    loss = fake_score_loss(slope * x + offset, x0, eps)
    for gradient in torch.autograd.grad(loss, (slope, offset)):  # a quadratic: no gradient means the minimum
        assert gradient.item() == pytest.approx(0, abs=1e-12)
    assert loss.item() == pytest.approx(1 + variance - exact**2 * marginal, rel=1e-12)


@pytest.mark.parametrize(("sigma", "sigma_to"), [(0.0, 0.4), (0.5, 0.6), (0.75, 0.9), (0.9, 0.95)])
def test_interval_target_has_the_mean_of_the_exact_velocity(sigma: float, sigma_to: float) -> None:
    """Regressing the interval target on x_t gives E[eps - x0 | x_t] of N(m, c) exactly: same slope, same offset.

    Three-factor two-point draws (x0, first noise, second noise) have the Gaussians' first two moments without Monte Carlo.
    """
    mean, variance = 0.7, 0.3
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double()
    x0, first, eps = ((mean + variance**0.5 * signs[:, 0]), signs[:, 1], signs[:, 2])
    x0, first, eps = (value.reshape(8, 1, 1, 1) for value in (x0, first, eps))
    s, t = (torch.full((8,), value, dtype=torch.float64) for value in (sigma, sigma_to))
    x = add_noise(x0, first, s)
    x_t, target = diffuse(x, eps, s, t).flatten(), interval_velocity(x, eps, s, t).flatten()
    slope = ((x_t - x_t.mean()) * (target - target.mean())).mean() / x_t.var(unbiased=False)
    exact = (sigma_to - (1 - sigma_to) * variance) / ((1 - sigma_to) ** 2 * variance + sigma_to**2)
    assert slope.item() == pytest.approx(exact, rel=1e-9)
    assert target.mean().item() == pytest.approx(-mean, rel=1e-9)
    assert abs((first - x0 - target.reshape(-1, 1, 1, 1)).mean().item()) < 1e-9


def test_interval_loss_weighs_little_where_the_two_levels_meet_and_moves_the_fake_score_only() -> None:
    g = torch.Generator().manual_seed(1)
    v, x, eps = (torch.randn(2, 1, 3, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    s, t = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.5, 0.95], dtype=torch.float64)
    loss = interval_loss(v, x, eps, s, t)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss) and v.grad is not None and x.grad is None and eps.grad is None
    assert torch.isfinite(v.grad).all()
    error = v[1] - interval_velocity(x[1:], eps[1:], s[1:], t[1:])[0]
    assert torch.allclose(v.grad[1], (0.5**2 * 2 * error / v.numel()).detach(), rtol=1e-9)  # b^2 > 0.1: weight (1 - s)^2
