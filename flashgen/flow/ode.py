"""The probability-flow ODE dx/dsigma = v in the convention of `flow.convert`; numpy and torch alike, importing neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

Array = TypeVar("Array")  # numpy or torch; only +, - and * with floats are used


def euler(x: Array, velocity: Callable[[Array, float, int], Array], sigmas: Sequence[float]) -> Array:
    """Integrate dx/dsigma = velocity(x, sigma, index) over consecutive `sigmas`; returns x at the last one."""
    state: Any = x
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        state = state + (sigma_next - sigma) * velocity(state, sigma, index)  # type: ignore[operator]
    return state  # type: ignore[no-any-return]


def guide(unconditional: Array, conditional: Array, weight: float) -> Array:
    """Classifier-free guidance u + w (c - u); w = 1 is no guidance (SD3's `guidance_scale`)."""
    u: Any = unconditional
    return u + weight * (conditional - u)  # type: ignore[no-any-return]
