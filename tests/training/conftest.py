"""A tiny real transformer and a pool of random conditioning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import SD3Transformer2DModel

from flashgen import families
from flashgen.families.conditioning import Conditioning
from flashgen.families.sd3.specs import SPECS
from flashgen.families.sd3.text import shares
from flashgen.randomness import generator, seeded
from flashgen.training.prompts import PromptPool


@pytest.fixture
def transformer() -> Callable[[int], SD3Transformer2DModel]:
    """`transformer(seed)`, without gradient."""

    def build(seed: int) -> SD3Transformer2DModel:
        with seeded(seed):
            return SD3Transformer2DModel(**SPECS["tiny"].transformer).eval().requires_grad_(False)

    return build


@pytest.fixture
def pool() -> PromptPool:
    """Eight prompts; the droppable encoder's output lies in the tokens from 16 on."""
    g = generator(8, 77)
    parts = shares(16, 16, 16, 16)
    rows = [{"embeds": torch.randn(n, 32, 32, generator=g), "pooled": torch.randn(n, 32, generator=g)} for n in (8, 1)]
    cond, empty = (Conditioning(families.get("sd3"), tensors, parts) for tensors in rows)
    return PromptPool(cond, empty)
