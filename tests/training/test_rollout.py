"""Guided velocities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from flashgen.families.base import velocity
from flashgen.flow.guidance import Guidance
from flashgen.flow.ode import guide
from flashgen.training.prompts import PromptPool
from flashgen.training.rollout import guided_velocity

SHAPE = (16, 4, 4)
Build = Callable[[int], nn.Module]


def test_guided_velocity_is_two_forwards_in_one(transformer: Build, pool: PromptPool) -> None:
    net = transformer(0)
    x, sigma = torch.randn(8, *SHAPE), torch.full((8,), 0.7)
    empty = pool.empty_for(pool.cond)
    with torch.no_grad():
        both = guided_velocity(net, x, 0.7, pool.cond, empty, Guidance(4.5))
        apart = guide(velocity(net, x, sigma, empty), velocity(net, x, sigma, pool.cond), 4.5)
    assert torch.allclose(both, apart, atol=1e-5)
    assert not torch.allclose(both, guide(velocity(net, x, sigma, pool.cond), velocity(net, x, sigma, empty), 4.5), atol=1e-2)
