from __future__ import annotations

import torch

from flashgen.flow.convert import move
from flashgen.objectives.trajectory import average_velocity, trajectory_loss

G = torch.Generator().manual_seed(0)
FROM = torch.tensor([1.0, 0.9, 0.5], dtype=torch.float64)
TO = torch.tensor([0.9, 0.75, 0.0], dtype=torch.float64)


def draw() -> torch.Tensor:
    return torch.randn(3, 2, 4, 4, generator=G, dtype=torch.float64)


def test_one_euler_step_along_the_average_velocity_lands_on_the_target() -> None:
    x_from, x_to = draw(), draw()
    v = average_velocity(x_from, x_to, FROM, TO)
    assert torch.allclose(move(x_from, v, FROM, TO), x_to, atol=1e-14, rtol=0)
    assert trajectory_loss(v, x_from, x_to, FROM, TO) == 0


def test_trajectory_loss_gives_gradient_to_the_student_only() -> None:
    v, x_from, x_to, s, s_next = (t.clone().requires_grad_() for t in (draw(), draw(), draw(), FROM, TO))
    trajectory_loss(v, x_from, x_to, s, s_next).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        expected = 2 * (v - average_velocity(x_from, x_to, s, s_next)) / v.numel()
    assert v.grad is not None and torch.allclose(v.grad, expected, rtol=1e-12)
    assert all(t.grad is None for t in (x_from, x_to, s, s_next))


def test_huber_is_the_squared_error_of_small_misses_and_the_root_of_large_ones() -> None:
    x_from, x_to, v = draw(), draw(), draw()
    d = (v - average_velocity(x_from, x_to, FROM, TO)).square().mean((1, 2, 3))
    assert torch.allclose(trajectory_loss(v, x_from, x_to, FROM, TO, 1e4), (d / 2e4).mean(), rtol=1e-5)
    assert torch.allclose(trajectory_loss(v, x_from, x_to, FROM, TO, 1e-6), d.sqrt().mean(), rtol=1e-5)


def test_huber_settles_where_most_samples_are() -> None:
    """Of seven trajectories that go one way and three that go another the squared error wants the mean, a small c the majority."""
    zero, one = torch.zeros(10, 1, 2, 2, dtype=torch.float64), torch.ones(10, dtype=torch.float64)
    ends = zero.clone()
    ends[:3] = 1.0  # their velocity is -1
    for huber, wanted in ((0.0, -0.3), (0.01, 0.0)):
        v = torch.full((), -0.5, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([v], lr=0.01)
        for _ in range(1500):
            optimizer.zero_grad()
            trajectory_loss(v.expand(10, 1, 2, 2), zero, ends, one, 0 * one, huber).backward()  # type: ignore[no-untyped-call]  # torch's has no types
            optimizer.step()
        assert abs(v.item() - wanted) < 0.02
