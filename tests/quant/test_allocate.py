from __future__ import annotations

import itertools

import numpy as np
import pytest

from flashgen.quant.allocate import allocate


def tables(groups: int, seed: int) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(10, 1000, groups)
    cost = {f"g{i}": {b: float(sizes[i] * b) for b in (3, 4, 8)} for i in range(groups)}
    damage = {f"g{i}": {b: float(rng.uniform(0.5, 2) * rng.lognormal() * 4.0**-b) for b in (3, 4, 8)} for i in range(groups)}
    return damage, cost


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.4, 0.5, 0.8])
def test_allocation_is_the_best_of_all(seed: int, share: float) -> None:
    damage, cost = tables(6, seed)
    budget = share * sum(options[8] for options in cost.values())
    every = [dict(zip(cost, bits, strict=True)) for bits in itertools.product((3, 4, 8), repeat=6)]
    allowed = [choice for choice in every if sum(cost[g][b] for g, b in choice.items()) <= budget]
    best = min(allowed, key=lambda choice: sum(damage[g][b] for g, b in choice.items()))
    assert allocate(damage, cost, budget) == best


def test_a_budget_for_everything_gives_the_least_damage_everywhere() -> None:
    damage, cost = tables(50, 0)
    damage["g3"][4] = 0.0  # more bits are not always better
    found = allocate(damage, cost, sum(options[8] for options in cost.values()))
    assert found == {group: min(options, key=lambda b: options[b]) for group, options in damage.items()} and found["g3"] == 4


def test_a_budget_that_cannot_be_met_names_the_smallest() -> None:
    damage, cost = tables(3, 0)
    smallest = sum(options[3] for options in cost.values())
    assert set(allocate(damage, cost, smallest).values()) == {3}
    with pytest.raises(ValueError, match=f"the smallest is {smallest:.0f}"):
        allocate(damage, cost, smallest - 1)
