"""Averages of weights, and the best of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashgen.randomness import generator
from flashgen.training.ema import BestWeights, Ema


def linear() -> nn.Linear:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(1)))
    return module


def test_ema_follows_its_closed_form() -> None:
    """shadow_n = w_0 prod d_k + sum_k (1 - d_k) w_k prod_{j > k} d_j with d_k = min(decay, (1+k)/(10+k))."""
    module = nn.Linear(1, 1, bias=False).double()
    values = [float(torch.randn((), generator=generator(k), dtype=torch.float64)) for k in range(31)]
    nn.init.constant_(module.weight, values[0])
    ema = Ema(module, 0.7)
    for step, value in enumerate(values[1:]):
        nn.init.constant_(module.weight, value)
        ema.update(module, step)
    decay = [min(0.7, (1 + k) / (10 + k)) for k in range(30)]
    assert decay[0] == 0.1 and decay[-1] == 0.7
    tail = [torch.tensor(decay[k + 1 :]).double().prod().item() for k in range(30)]
    expected = values[0] * decay[0] * tail[0] + sum((1 - decay[k]) * values[k + 1] * tail[k] for k in range(30))
    assert ema.shadow["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == values[-1]  # the live weights are left alone
    ema.copy_to(module)
    assert module.weight.item() == ema.shadow["weight"].item()


def test_the_average_is_applied_and_taken_back_also_after_an_error() -> None:
    module = linear()
    ema, weights = Ema(module, 0.9), [p.detach().clone() for p in module.parameters()]
    ema.shadow = {k: torch.zeros_like(v) for k, v in ema.shadow.items()}
    with pytest.raises(ZeroDivisionError), ema.applied_to(module):
        assert not any(p.any() for p in module.parameters())
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))


def test_best_weights_are_a_copy_of_the_highest_scoring_average_and_survive_saving() -> None:
    module = linear()
    ema = Ema(module, 0.9)
    best = BestWeights(ema)
    for step, score in enumerate([0.3, 0.5, 0.5, 0.1], start=1):
        for value in ema.shadow.values():
            value.fill_(step)
        best.offer(score, step)
    restored = BestWeights(ema)
    restored.load_state_dict(best.state_dict())
    for name, value in best.shadow.items():  # as a checkpoint is loaded
        restored.state_dict()[f"shadow.{name}"].copy_(value)
    for weights in (best, restored):
        assert (weights.score, weights.step, weights.last) == (0.5, 2, 0.1)
        weights.copy_to(module)
        assert all((p == 2).all() for p in module.parameters())
        nn.init.zeros_(module.weight)
