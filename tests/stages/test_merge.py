"""The merge of two branches."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from flashgen.families.sd3.specs import SPECS
from flashgen.randomness import seeded
from flashgen.stages.finetune import merge


def transformer(seed: int) -> SD3Transformer2DModel:
    with seeded(seed):
        return SD3Transformer2DModel(**SPECS["tiny"].transformer).requires_grad_(False)


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_merge_is_the_exact_interpolation_of_two_branches(weight: float) -> None:
    target, high, low = transformer(0), transformer(1), transformer(2)
    branches = weights(high), weights(low)
    merge(target, high, low, weight)
    merged = weights(target)
    if weight in (0.0, 1.0):
        assert same(merged, branches[0] if weight else branches[1])
    for value, a, b in zip(merged, *branches, strict=True):
        assert torch.allclose(value, (weight * a.double() + (1 - weight) * b.double()).float(), atol=1e-7, rtol=1e-6)
    assert same(weights(high), branches[0]) and same(weights(low), branches[1])
