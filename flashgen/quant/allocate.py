"""Choosing the bits of each group of layers: the least sum of measured errors under a budget of bytes. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from flashgen.errors import NumericsError

Table = Mapping[str, Mapping[int, float]]  # by group, then by bits


def allocate(error: Table, cost: Table, budget: float) -> dict[str, int]:
    """Bits of each group, so that the sum of `error` is least and the sum of `cost` is at most `budget`.

    A multiple-choice knapsack, solved exactly (HiGHS). Each error is measured alone; that errors add up is an assumption (our choice).
    Raises ValueError, naming the smallest possible budget, when even the cheapest choice costs more, and NumericsError for an error
    that is not finite.
    """
    for group, options in error.items():
        for bits, value in options.items():
            if not isfinite(value):
                raise NumericsError(
                    f"{group} at {bits} bits gives latents that are not finite ({value}); check the student with: flashgen generate"
                )
    smallest = sum(min(options.values()) for options in cost.values())
    if budget < smallest:
        raise ValueError(f"the smallest is {smallest:.0f}")
    choices = [(group, bits) for group, options in cost.items() for bits in options]
    rows = {group: row for row, group in enumerate(cost)}
    one_each = np.zeros((len(rows), len(choices)))
    one_each[[rows[group] for group, _ in choices], range(len(choices))] = 1
    objective = np.array([error[group][bits] for group, bits in choices])
    spent = np.array([[cost[group][bits] for group, bits in choices]], float)
    solution = milp(
        objective / max(objective.max(), 1e-300),  # of a size that the solver's tolerances are made for
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(spent / budget, -np.inf, 1)],
        options={"mip_rel_gap": 0},
    )
    assert solution.x is not None, solution.message  # the cheapest choice is always possible
    return {group: bits for (group, bits), taken in zip(choices, solution.x, strict=True) if taken > 0.5}
