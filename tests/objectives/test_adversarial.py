"""The adversarial term: closed forms of its losses, and its size against the matching term."""

from __future__ import annotations

import math

import pytest
import torch

from flashgen.objectives.adversarial import clamp_ratio, discriminator_loss, generator_loss

G = torch.Generator().manual_seed(0)


def test_losses_at_no_opinion_and_at_certainty() -> None:
    none, sure = torch.zeros(3, 2, dtype=torch.float64), torch.full((3, 2), 40.0, dtype=torch.float64)
    assert generator_loss(none).item() == pytest.approx(math.log(2))
    assert discriminator_loss(none, none).item() == pytest.approx(2 * math.log(2))
    assert discriminator_loss(sure, -sure).item() == pytest.approx(0, abs=1e-12)
    assert generator_loss(-sure).item() == pytest.approx(40)


def test_the_two_players_pull_a_fake_in_opposite_directions() -> None:
    logit = torch.randn(4, 2, generator=G, dtype=torch.float64).requires_grad_()
    (up,) = torch.autograd.grad(generator_loss(logit), logit)
    (down,) = torch.autograd.grad(discriminator_loss(torch.zeros_like(logit), logit), logit)
    assert torch.all(up < 0) and torch.all(down > 0)


def test_the_best_discriminator_of_two_gaussians_has_the_log_ratio_as_its_logit() -> None:
    """Of logits a x, that with a = 2 is log p/q of N(1, 1) and N(-1, 1): the loss falls towards it from both sides."""
    z = torch.special.ndtri((torch.arange(4001, dtype=torch.float64) + 0.5) / 4001)  # quantiles in place of samples
    slopes: list[torch.Tensor] = []
    for a in (1.5, 2.0, 2.5):
        factor = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        slopes += torch.autograd.grad(discriminator_loss(factor * (z + 1), factor * (z - 1)), factor)
    below, at, above = (slope.item() for slope in slopes)
    assert below < -1e-2 and abs(at) < 1e-4 and above > 1e-2


def test_the_adversarial_direction_stays_in_its_band() -> None:
    matching = torch.randn(4, 2, 3, 3, generator=G)
    raw = torch.randn(4, 2, 3, 3, generator=G) * torch.tensor([1e-6, 0.1, 1.0, 1e3])[:, None, None, None]
    scaled, ratio, before = clamp_ratio(raw, matching, (0.05, 0.2))
    sizes = scaled.flatten(1).norm(dim=1) / matching.flatten(1).norm(dim=1)
    assert torch.allclose(sizes, ratio, rtol=1e-4) and ratio[0] == 0.05 and ratio[3] == 0.2
    assert torch.allclose(before, raw.flatten(1).norm(dim=1) / matching.flatten(1).norm(dim=1)) and before[0] < 1e-5 and before[3] > 100
    cosine = torch.nn.functional.cosine_similarity(scaled.flatten(1), raw.flatten(1))
    assert torch.allclose(cosine, torch.ones(4), atol=1e-5)
    inside, *_ = clamp_ratio(0.1 * matching, matching, (0.05, 0.2))
    assert torch.allclose(inside, 0.1 * matching, rtol=1e-5)


def test_alone_on_a_node_it_has_the_scale_of_a_normalised_matching_term() -> None:
    scaled, ratio, _ = clamp_ratio(10 * torch.randn(2, 1, 8, 8, generator=G), torch.zeros(2, 1, 8, 8), (0.05, 0.2))
    assert torch.allclose(scaled.square().mean((1, 2, 3)).sqrt(), ratio, rtol=1e-5) and ratio[0] == 0.2
