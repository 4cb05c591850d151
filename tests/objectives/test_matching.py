"""Distribution matching: its gradient, its normaliser, where it is evaluated, and what the fake score must be fitted on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from flashgen.flow.convert import add_noise, expand, x0_from_v
from flashgen.flow.ode import guide
from flashgen.objectives.evaluation import Last, Point, evaluation_point, evaluation_sigma, sigma_below
from flashgen.objectives.matching import augmentation_term, distance, matching_loss, matching_term, normalise

G = torch.Generator().manual_seed(0)
LIMITS = MIN_SIGMA, MAX_SIGMA = 0.02, 0.98


def eps_from_v(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Estimate of the noise: x + (1 - sigma) v."""
    return x + (1 - expand(sigma, x)) * v


def draw(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 2, 3, 3)), generator=G, dtype=torch.float64)


def matching_direction(student: Tensor, teacher: Tensor, fake_score: Tensor, *, floor: float) -> Tensor:
    """The matching term alone, as the training normalises it."""
    return normalise(matching_term(teacher, fake_score), distance(student, teacher), floor=floor)


def test_gradient_with_respect_to_the_sample_is_the_direction_over_numel() -> None:
    x0, direction = draw().requires_grad_(), draw().requires_grad_()
    loss = matching_loss(x0, direction)
    loss.backward()  # type: ignore[no-untyped-call]
    assert x0.grad is not None and torch.allclose(x0.grad, direction.detach() / x0.numel(), rtol=1e-9, atol=1e-14)
    assert direction.grad is None
    assert loss.item() == pytest.approx(0.5 * direction.square().mean().item())


def test_direction_gives_no_gradient_and_points_from_teacher_to_fake_score() -> None:
    student, teacher, fake_score = draw().requires_grad_(), draw().requires_grad_(), draw().requires_grad_()
    direction = matching_direction(student, teacher, fake_score, floor=0.1)
    assert not direction.requires_grad and direction.dtype == torch.float32
    assert torch.all(torch.sign(direction) == torch.sign((fake_score - teacher).float()))


def test_direction_does_not_change_with_a_samples_scale() -> None:
    student, teacher, fake_score = draw(), draw(), draw()
    scale = torch.tensor([1.0, 3.0, 10.0, 100.0], dtype=torch.float64)[:, None, None, None]
    plain = matching_direction(student, teacher, fake_score, floor=1e-6)
    assert torch.allclose(matching_direction(scale * student, scale * teacher, scale * fake_score, floor=1e-6), plain, rtol=1e-5)
    distance = (student - teacher).abs().mean(dim=(1, 2, 3))
    assert torch.allclose(plain.abs().mean(dim=(1, 2, 3)).double(), (fake_score - teacher).abs().mean(dim=(1, 2, 3)) / distance, rtol=1e-5)


def test_direction_is_floored_when_the_student_agrees_with_the_teacher() -> None:
    teacher, fake_score = draw(), draw()
    direction = matching_direction(teacher + 1e-9, teacher, fake_score, floor=0.1)
    assert torch.allclose(direction, ((fake_score - teacher) / 0.1).float(), rtol=1e-6)


def test_direction_is_zero_when_the_fake_score_is_the_unguided_teacher() -> None:
    x, v_u, v_c, sigma = draw(), draw(), draw(), torch.tensor([0.9, 0.75, 0.5, 0.1], dtype=torch.float64)
    fake_score = x0_from_v(x, v_c, sigma)
    unguided, guided = (x0_from_v(x, guide(v_u, v_c, w), sigma) for w in (1.0, 4.5))
    assert torch.allclose(matching_direction(draw(), unguided, fake_score, floor=0.1), torch.zeros(4, 2, 3, 3), atol=1e-6)
    assert matching_direction(draw(), guided, fake_score, floor=0.1).abs().mean() > 0.1


def test_matching_and_augmentation_add_up_to_the_guided_difference() -> None:
    x, v_u, v_c, v_p, sigma = draw(), draw(), draw(), draw(), torch.tensor([0.9, 0.75, 0.5, 0.1], dtype=torch.float64)
    u, c, fake_score = (x0_from_v(x, v, sigma) for v in (v_u, v_c, v_p))
    guided = x0_from_v(x, guide(v_u, v_c, 4.5), sigma)
    assert torch.allclose(matching_term(c, fake_score) + augmentation_term(c, u, 4.5), (fake_score - guided).float(), atol=1e-5)
    assert torch.allclose(c - augmentation_term(c, u, 4.5), guided, atol=1e-5)
    assert not augmentation_term(c, u, 1.0).any()


def points(point: Point, last: Last = "interp") -> tuple[Tensor, ...]:
    """(evaluation point, its sigma, x, v, sigma, sigma_next, eps) at the nodes of four steps."""
    x, v, eps = draw(), draw(), draw()
    sigma, sigma_next = torch.tensor([[1.0, 0.9, 0.75, 0.5], [0.9, 0.75, 0.5, 0.0]], dtype=torch.float64)
    drawn = evaluation_sigma(point, sigma, sigma_next, torch.full((4,), 0.3, dtype=torch.float64), LIMITS)
    return evaluation_point(point, x, v, sigma, sigma_next, drawn, eps, last), drawn, x, v, sigma, sigma_next, eps


def test_shared_is_renoising_with_the_students_own_noise_at_the_next_node() -> None:
    """method.md 3.3, fact 1."""
    shared, drawn, x, v, sigma, sigma_next, _ = points("shared")
    assert torch.equal(drawn[:3], sigma_next[:3])
    renoised = evaluation_point("renoise", x, v, sigma, sigma_next, drawn, eps_from_v(x, v, sigma))
    assert torch.allclose(shared, renoised, atol=1e-14, rtol=0)


def test_shared_sigma_is_the_next_node_and_on_the_last_segment_a_point_of_it() -> None:
    sigma, sigma_next = torch.tensor([1.0, 0.9, 0.5, 0.5, 0.5]), torch.tensor([0.9, 0.75, 0.0, 0.0, 0.0])
    drawn = evaluation_sigma("shared", sigma, sigma_next, torch.tensor([0.3, 0.3, 0.0, 0.5, 1.0]), LIMITS)
    assert torch.allclose(drawn, torch.tensor([0.9, 0.75, MIN_SIGMA, (0.5 + MIN_SIGMA) / 2, 0.5]))


def test_shared_may_renoise_its_last_step_and_only_that() -> None:
    point, drawn, x, v, sigma, sigma_next, eps = points("shared", last="renoise")
    moved, fresh = (evaluation_point(p, x, v, sigma, sigma_next, drawn, eps) for p in ("shared", "renoise"))
    assert torch.equal(point[:3], moved[:3]) and torch.equal(point[3], fresh[3]) and not torch.allclose(moved[3], fresh[3])


def test_nothing_is_compared_at_pure_noise() -> None:
    """A single step from sigma 1 to 0 draws its level below the highest one, and so does decoupled augmentation on the first node."""
    top, end, most = torch.ones(1), torch.zeros(1), torch.ones(1)
    shared, lower = evaluation_sigma("shared", top, end, most, LIMITS), sigma_below(top, most, LIMITS)
    assert shared.item() == lower.item() == pytest.approx(MAX_SIGMA)


def test_an_interval_above_the_highest_level_is_a_point_at_its_end() -> None:
    sigma, sigma_next, drawn = torch.tensor([1.0, 0.995]), torch.tensor([0.99, 0.9]), torch.tensor([0.7, 0.5])
    assert torch.allclose(evaluation_sigma("interval", sigma, sigma_next, drawn, LIMITS), torch.tensor([0.99, 0.94]))


def test_renoise_is_dmd2s_draw() -> None:
    point, drawn, x, v, sigma, _, eps = points("renoise")
    assert torch.allclose(drawn, torch.full((4,), MIN_SIGMA + 0.3 * (MAX_SIGMA - MIN_SIGMA), dtype=torch.float64))
    assert torch.allclose(point, add_noise(x0_from_v(x, v, sigma), eps, drawn), atol=1e-14, rtol=0)


def test_interval_stays_within_its_step_and_keeps_the_marginal() -> None:
    """If the next state is (1 - s) x0 + s e1, its diffusion has mean (1 - t) x0 and the variance t^2 of the flow at t."""
    point, drawn, x, v, sigma, sigma_next, eps = points("interval")
    assert torch.all(drawn > sigma_next) and torch.all(drawn < sigma)
    x0, e1 = x0_from_v(x, v, sigma), eps_from_v(x, v, sigma)
    a = ((1 - drawn) / (1 - sigma_next)).reshape(-1, 1, 1, 1)
    from_noise = point - (1 - drawn).reshape(-1, 1, 1, 1) * x0
    b = (drawn**2 - (a.flatten() * sigma_next) ** 2).sqrt().reshape(-1, 1, 1, 1)
    assert torch.allclose(from_noise, a * sigma_next.reshape(-1, 1, 1, 1) * e1 + b * eps, atol=1e-12)
    assert torch.allclose(a.flatten() ** 2 * sigma_next**2 + b.flatten() ** 2, drawn**2)


# A toy world in which everything is known: 1-D data 0.5 N(-2, 0.3^2) + 0.5 N(2, 0.3^2).
MEANS, SD, NODES = np.array([-2.0, 2.0]), 0.3, [1.0, 0.9, 0.75, 0.5, 0.0]


def denoise(x: np.ndarray, sigma: float, means: np.ndarray, sd: np.ndarray | float) -> np.ndarray:
    """E[x0 | x_s] of an equal mixture of Gaussians N(means, sd^2), in closed form."""
    a, variance = 1 - sigma, (1 - sigma) ** 2 * np.square(sd) + sigma**2
    log = -((x[:, None] - a * means) ** 2) / (2 * variance) - 0.5 * np.log(variance)
    weight = np.exp(log - log.max(1, keepdims=True))
    each = means + a * np.square(sd) / variance * (x[:, None] - a * means)
    return np.asarray((weight * each).sum(1) / weight.sum(1))


def perfect_rollout() -> list[np.ndarray]:
    """States at the nodes of a student that has the exact average velocities: those of the fine ODE."""
    quantiles = (np.arange(400) + 0.5) / 400
    x = np.sqrt(2) * torch.erfinv(torch.tensor(2 * quantiles - 1)).numpy()  # noise as quantiles, not as draws
    states = [x]
    for s, s_next in itertools.pairwise(NODES):
        fine = np.linspace(s, s_next, 401)
        for u, u_next in itertools.pairwise(fine):
            x = x + (u_next - u) * ((x - denoise(x, u, MEANS, SD)) / u)
        states.append(x)
    return states


@pytest.mark.parametrize("node", [0, 1, 2])
def test_perfect_student_is_left_alone_only_if_the_fake_score_is_fitted_on_finished_samples(node: int) -> None:
    """method.md 3.3, fact 4: the best fake score for a sample set is the exact denoiser of those samples."""
    states = perfect_rollout()
    s, s_next = NODES[node], NODES[node + 1]
    velocity = (states[node + 1] - states[node]) / (s_next - s)
    x0_step, x_eval = states[node] - s * velocity, states[node + 1]
    teacher = denoise(x_eval, s_next, MEANS, SD)

    def push(samples: np.ndarray) -> float:
        """Size of the direction in units of the normaliser; the whole set is one "picture" of 400 pixels."""
        fake_score = denoise(x_eval, s_next, samples, 0.0)
        one = [torch.tensor(values)[None, None, None] for values in (x0_step, teacher, fake_score)]
        return float(matching_direction(*one, floor=1e-6).abs().mean())

    assert push(states[-1]) < 0.01  # measured 0.001 to 0.002
    assert push(x0_step) > 1  # measured 1.1 to 2.6: away from where it should stay
