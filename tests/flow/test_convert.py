"""Identities of rectified flow in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashgen.flow.convert import add_noise, expand, move, x0_from_v

G = torch.Generator().manual_seed(0)
SIGMA = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.02], dtype=torch.float64)
NEXT = torch.tensor([0.9, 0.75, 0.5, 0.02, 0.0], dtype=torch.float64)


def draw() -> Tensor:
    return torch.randn(5, 3, 4, 2, generator=G, dtype=torch.float64)


def eps_from_v(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Estimate of the noise: x + (1 - sigma) v."""
    return x + (1 - expand(sigma, x)) * v


def test_x0_and_eps_come_back_from_the_true_velocity() -> None:
    x0, eps = draw(), draw()
    x, v = add_noise(x0, eps, SIGMA), eps - x0
    assert torch.allclose(x0_from_v(x, v, SIGMA), x0, atol=1e-14, rtol=0)
    assert torch.allclose(eps_from_v(x, v, SIGMA), eps, atol=1e-14, rtol=0)


def test_predictions_recompose_state_and_velocity_for_any_network_output() -> None:
    x, v = draw(), draw()
    x0, eps = x0_from_v(x, v, SIGMA), eps_from_v(x, v, SIGMA)
    assert torch.allclose(add_noise(x0, eps, SIGMA), x, atol=1e-14, rtol=0)
    assert torch.allclose(eps - x0, v, atol=1e-14, rtol=0)


def test_add_noise_ends_in_data_and_in_noise() -> None:
    x0, eps = draw(), draw()
    assert torch.equal(add_noise(x0, eps, torch.zeros(5, dtype=torch.float64)), x0)
    assert torch.equal(add_noise(x0, eps, torch.ones(5, dtype=torch.float64)), eps)


def test_add_noise_uses_each_samples_own_sigma() -> None:
    x0, eps = draw(), draw()
    rows = [add_noise(x0[i : i + 1], eps[i : i + 1], SIGMA[i : i + 1]) for i in range(5)]
    assert torch.equal(add_noise(x0, eps, SIGMA), torch.cat(rows))


def test_move_is_renoising_with_the_predicted_noise() -> None:
    """Euler: x + (s' - s) v = (1 - s') x0_hat + s' eps_hat, the identity behind timestep sharing."""
    x, v = draw(), draw()
    renoised = add_noise(x0_from_v(x, v, SIGMA), eps_from_v(x, v, SIGMA), NEXT)
    assert torch.allclose(move(x, v, SIGMA, NEXT), renoised, atol=1e-14, rtol=0)
    assert torch.allclose(move(x, v, SIGMA, torch.zeros_like(SIGMA)), x0_from_v(x, v, SIGMA), atol=1e-14, rtol=0)


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (1.7, 0.3), (-0.4, 4.0)])
def test_score_is_the_gaussian_one_for_the_exact_velocity(mean: float, variance: float) -> None:
    """x0 ~ N(m, c): x_s ~ N((1-s) m, (1-s)^2 c + s^2), whose score is known, and so is E[eps - x0 | x_s]."""
    x, s = draw(), expand(SIGMA, draw())
    marginal = (1 - s) ** 2 * variance + s**2
    centred = x - (1 - s) * mean
    v = s / marginal * centred - (mean + (1 - s) * variance / marginal * centred)
    expected = -centred / marginal
    assert torch.allclose(-eps_from_v(x, v, SIGMA) / s, expected, rtol=1e-9)
    x0 = x0_from_v(x, v, SIGMA)
    assert torch.allclose(((1 - s) * x0 - x) / s**2, expected, rtol=1e-6, atol=1e-9)


def test_expand_takes_the_shape_and_dtype_of_its_partner() -> None:
    assert expand(SIGMA, torch.zeros(5, 1, 1)).shape == (5, 1, 1)
    assert expand(SIGMA, torch.zeros(5, 1, 1, 1, dtype=torch.float32)).dtype == torch.float32
