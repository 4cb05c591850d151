"""Which group of layers gets how many bits: the least measured damage under a budget of bytes. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Table = Mapping[str, Mapping[int, float]]  # by group, then by bits


def allocate(damage: Table, cost: Table, budget: float) -> dict[str, int]:
    """Bits of each group, so that the sum of `damage` is least and that of `cost` at most `budget`.

    A multiple-choice knapsack, solved exactly (HiGHS); damages add up by assumption (our choice: each is measured alone).
    Raises ValueError, naming the smallest budget there is, when even the cheapest choice is too dear.
    """
    smallest = sum(min(options.values()) for options in cost.values())
    if budget < smallest:
        raise ValueError(f"the smallest is {smallest:.0f}")
    choices = [(group, bits) for group, options in cost.items() for bits in options]
    groups = {group: row for row, group in enumerate(cost)}
    one_each = np.zeros((len(groups), len(choices)))
    one_each[[groups[group] for group, _ in choices], range(len(choices))] = 1
    objective = np.array([damage[group][bits] for group, bits in choices])
    spent = np.array([[cost[group][bits] for group, bits in choices]], float)
    found = milp(
        objective / max(objective.max(), 1e-300),  # of a size that the solver's tolerances are made for
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(spent / budget, -np.inf, 1)],
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None, found.message  # there is a choice: the cheapest
    return {group: bits for (group, bits), taken in zip(choices, found.x, strict=True) if taken > 0.5}
