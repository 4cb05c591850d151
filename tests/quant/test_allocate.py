from __future__ import annotations

import itertools

import numpy as np
import pytest

from flashgen.errors import NumericsError
from flashgen.quant.allocate import allocate


def tables(groups: int, seed: int) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """(errors, bytes) of each group at 3, 4 and 8 bits."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(10, 1000, groups)
    cost = {f"g{i}": {b: float(sizes[i] * b) for b in (3, 4, 8)} for i in range(groups)}
    error = {f"g{i}": {b: float(rng.uniform(0.5, 2) * rng.lognormal() * 4.0**-b) for b in (3, 4, 8)} for i in range(groups)}
    return error, cost


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.4, 0.5, 0.8])
def test_allocation_is_the_best_of_all(seed: int, share: float) -> None:
    error, cost = tables(6, seed)
    budget = share * sum(options[8] for options in cost.values())
    every = [dict(zip(cost, bits, strict=True)) for bits in itertools.product((3, 4, 8), repeat=6)]
    allowed = [choice for choice in every if sum(cost[g][b] for g, b in choice.items()) <= budget]
    best = min(allowed, key=lambda choice: sum(error[g][b] for g, b in choice.items()))
    assert allocate(error, cost, budget) == best


def test_budget_for_everything_gives_the_least_error_everywhere() -> None:
    error, cost = tables(50, 0)
    error["g3"][4] = 0.0  # more bits are not always better
    found = allocate(error, cost, sum(options[8] for options in cost.values()))
    assert found == {group: min(options, key=lambda b: options[b]) for group, options in error.items()} and found["g3"] == 4


def test_budget_that_cannot_be_met_names_the_smallest() -> None:
    error, cost = tables(3, 0)
    smallest = sum(options[3] for options in cost.values())
    assert set(allocate(error, cost, smallest).values()) == {3}
    with pytest.raises(ValueError, match=f"the smallest is {smallest:.0f}"):
        allocate(error, cost, smallest - 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_allocation_names_the_group_when_an_error_is_not_finite(value: float) -> None:
    error, cost = tables(4, 0)
    error["g2"][4] = value
    with pytest.raises(NumericsError, match=r"g2 at 4 bits .*not finite.*flashgen generate"):
        allocate(error, cost, 1e9)
