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
    watch: Callable[[int, Array], None] | None = None,
) -> Array:
    """Integrate dx/dsigma = velocity(x, sigma, index) over consecutive `sigmas`; returns x at the last one.

    `scales`, one pair (a, b) a step, makes the step a x + b (sigma' - sigma) v (Q-Sched, 2509.01624); none is (1, 1).
    `watch` is shown (index, x0) at every step: where its velocity leads, x - sigma v.
    """
    state: Any = x
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        moved: Any = velocity(state, sigma, index)
        if watch is not None:
            watch(index, state - sigma * moved)
        if scales is None:
            state = state + (sigma_next - sigma) * moved
        else:
            state = scales[index][0] * state + (scales[index][1] * (sigma_next - sigma)) * moved
    return state  # type: ignore[no-any-return]


def second_order(v: Array, step: float, before: tuple[Array, float] | None) -> Array:
    """Average velocity over a step of length `step` that begins with `v`, to second order: Adams-Bashforth with steps of any length.

    `before` is (v, length) of the step before; without one, at the start, it is `v`. Costs no evaluation more than Euler's method.
    """
    if before is None:
        return v
    now: Any = v
    ahead: Array = now + (step / (2 * before[1])) * (now - before[0])
    return ahead


def guide(unconditional: Array, conditional: Array, weight: float) -> Array:
    """Classifier-free guidance u + w (c - u); w = 1 is no guidance (SD3's `guidance_scale`)."""
    u: Any = unconditional
    return u + weight * (conditional - u)  # type: ignore[no-any-return]
