from __future__ import annotations

import torch

from flashgen.flow.convert import move
from flashgen.objectives.trajectory import average_velocity, rollout_loss, trajectory_loss

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


def test_rollout_loss_is_the_velocity_error_of_each_step_from_the_students_own_state() -> None:
    noise, led = draw(), [draw(), draw()]
    sigmas = torch.tensor([1.0, 0.75, 0.0], dtype=torch.float64)
    v = [draw(), draw()]
    own = [noise + (0.75 - 1) * v[0]]
    own.append(own[0] + (0 - 0.75) * v[1])
    expected = [trajectory_loss(v[k], ([noise, *own])[k], led[k], sigmas[k].expand(3), sigmas[k + 1].expand(3), 0.03) for k in (0, 1)]
    assert torch.allclose(rollout_loss(own, led, sigmas, 0.03), torch.stack(expected).mean(), rtol=1e-12)
    assert rollout_loss(led, led, sigmas) == 0


def test_rollout_loss_teaches_a_step_what_the_later_ones_can_go_on_from() -> None:
    """Steps that can only add a and double: from 0 the two lead to 2 a. The leader is at 1, then at 6: each for itself, a were 1."""
    a = torch.zeros((), dtype=torch.float64, requires_grad=True)
    sigmas = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    optimizer = torch.optim.SGD([a], lr=0.01)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for _ in range(2000):
        optimizer.zero_grad()
        rollout_loss([a * one, 2 * a * one], [one, 6 * one], sigmas).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert abs(a.item() - 13 / 5) < 1e-6  # of (a - 1)^2 + (2 a - 6)^2
