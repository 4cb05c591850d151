"""A tiny real transformer and a pool of random conditioning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import SD3Transformer2DModel

from flashgen.models.specs import SPECS
from flashgen.models.text import Conditioning
from flashgen.randomness import generator
from flashgen.training.prompts import PromptPool


@pytest.fixture
def transformer() -> Callable[[int], SD3Transformer2DModel]:
    """`transformer(seed)`, without gradient."""

    def build(seed: int) -> SD3Transformer2DModel:
        torch.manual_seed(seed)
        return SD3Transformer2DModel(**SPECS["tiny"].transformer).eval().requires_grad_(False)

    return build


@pytest.fixture
def pool() -> PromptPool:
    return random_pool(8)


def random_pool(count: int) -> PromptPool:
    g = generator(count, 77)
    conds = [Conditioning(torch.randn(n, 32, 32, generator=g), torch.randn(n, 32, generator=g)) for n in (count, 1)]
    return PromptPool(conds[0], conds[1], clip_tokens=16)
