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
