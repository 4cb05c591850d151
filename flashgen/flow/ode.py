"""The probability-flow ODE dx/dsigma = v in the convention of `flow.convert`; numpy and torch alike, importing neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

Array = TypeVar("Array")  # numpy or torch; only +, - and * with floats are used


def euler(
    x: Array,
    velocity: Callable[[Array, float, int], Array],
    sigmas: Sequence[float],
    scales: Sequence[tuple[float, float]] | None = None,
    callback: Callable[[int, Array], None] | None = None,
) -> Array:
    """Integrate dx/dsigma = velocity(x, sigma, index) over consecutive `sigmas`; returns x at the last one.

    `scales`, one pair (a, b) per step, makes a step a x + b (sigma' - sigma) v (Q-Sched, 2509.01624); None: (1, 1) for all.
    `callback` is called at every step with (index, x - sigma v), the estimate of x0.
    """
    state: Any = x
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v: Any = velocity(state, sigma, index)
        if callback is not None:
            callback(index, state - sigma * v)
        if scales is None:
            state = state + (sigma_next - sigma) * v
        else:
            state = scales[index][0] * state + (scales[index][1] * (sigma_next - sigma)) * v
    return state  # type: ignore[no-any-return]


def second_order(v: Array, step: float, previous: tuple[Array, float] | None) -> Array:
    """Average velocity over a step of length `step` that starts with velocity `v`, to second order (Adams-Bashforth, variable steps).

    `previous` is (v, length) of the step before. Without one, the result is `v`. Costs no more evaluations than Euler's method.
    """
    if previous is None:
        return v
    current: Any = v
    average: Array = current + (step / (2 * previous[1])) * (current - previous[0])
    return average


def guide(unconditional: Array, conditional: Array, weight: float) -> Array:
    """Classifier-free guidance u + w (c - u), as diffusers' `guidance_scale`; w = 1 is no guidance."""
    u: Any = unconditional
    return u + weight * (conditional - u)  # type: ignore[no-any-return]
